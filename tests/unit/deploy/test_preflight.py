import socket
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from deploy import preflight
from deploy.deployment import deployment_of_cluster
from deploy.opening import read_deployment
from deploy.preflight import Footprint, available_bytes, check_deployment
from kvtransfer import transports
from pdserve.config.cluster import ClusterSettings
from pdserve.domain.errors import LocalFault
from pdserve.models import DEMO_MODEL_DIR
from tests.support.plans import plan, pool

FREE_PORTS = {"router": {"port": 0, "internal_port": 0}}


def settings(**changes: object) -> ClusterSettings:
    return ClusterSettings.model_validate({**FREE_PORTS, **changes})


def check_cluster(settings: ClusterSettings) -> Footprint:
    return check_deployment(deployment_of_cluster(settings))


def test_demo_model_passes_and_its_kv_memory_is_counted() -> None:
    footprint = check_cluster(settings(prefill={"num_blocks": 3}, decode={"num_blocks": 4}))
    assert footprint.model_name == "demo"
    assert footprint.num_blocks == 7
    # 4 layers, K and V, 16 tokens, 2 heads of 32, float32
    assert footprint.kv_bytes == 7 * 4 * 2 * 16 * 2 * 32 * 4
    weights = load_file(DEMO_MODEL_DIR / "model.safetensors")
    assert footprint.weight_bytes == 2 * 4 * sum(each.numel() for each in weights.values())


def test_memory_of_ranks_counts_heads_that_several_of_them_hold() -> None:
    one = check_cluster(settings())
    assert check_cluster(settings(tp=2)).kv_bytes == one.kv_bytes
    assert check_cluster(settings(pp=4)).kv_bytes == one.kv_bytes
    assert check_cluster(settings(tp=4)).kv_bytes == 2 * one.kv_bytes  # of 2 heads
    assert check_cluster(settings(prefill={"tp": 4})).kv_bytes == 1.5 * one.kv_bytes


def test_memory_of_workers_that_compute_nothing_is_their_kv() -> None:
    nothing = {"fixed_s": 0, "prefill_token_s": 0, "decode_token_s": 0}
    one = check_cluster(settings())
    timed = check_cluster(settings(engine="timed", coefficients=nothing, tp=8, pp=4))
    assert (timed.kv_bytes, timed.weight_bytes) == (one.kv_bytes, 0)


def test_transport_whose_extra_is_missing_is_refused_unless_there_is_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(transports, "is_installed", lambda: False)
    with pytest.raises(LocalFault, match=r"nixl needs its extra: pip install 'pdserve\[nixl\]'"):
        check_cluster(settings(transports=["nixl"]))
    check_cluster(settings(transports=["nixl", "tcp"]))


def test_model_that_cannot_be_divided_among_the_ranks_is_refused() -> None:
    with pytest.raises(LocalFault, match="tp 3: its 2 KV heads divide neither by it nor into"):
        check_cluster(settings(decode={"tp": 3}))
    with pytest.raises(
        LocalFault, match="pp must be at most 4, the number of layers of demo; got 5"
    ):
        check_cluster(settings(prefill={"pp": 5}))


@pytest.mark.parametrize("flag", ["--port", "--internal-port"])
def test_port_in_use_is_named_with_what_to_do(flag: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        name = "port" if flag == "--port" else "internal_port"
        with pytest.raises(LocalFault) as caught:
            check_cluster(settings(router={"port": 0, "internal_port": 0, name: port}))
    assert f"port {port} on 127.0.0.1 is in use" in caught.value.message
    assert caught.value.message.endswith(flag)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"prefill": {"metrics_port": 65535, "replicas": 2}},
            "prefill-1 would get 65536, ",
        ),
        (
            {"prefill": {"metrics_port": 7500}, "decode": {"metrics_port": 7499, "replicas": 2}},
            "decode-1 would get 7500, which prefill-0.metrics_port has",
        ),
        (
            {"router": {"port": 7460, "internal_port": 0, "metrics_port": 7460}},
            "router would get 7460, which router.port has",
        ),
    ],
)
def test_metrics_ports_that_cannot_be_are_named(changes: dict[str, object], said: str) -> None:
    with pytest.raises(LocalFault, match=f"metrics_port: {said}"):
        check_cluster(settings(**changes))


def test_metrics_ports_of_a_plans_pools_are_counted_up_over_all_pools_of_a_role(
    tmp_path: Path,
) -> None:
    path = tmp_path / "plan.yaml"
    pools = [pool("prefill", 1), pool("decode", 2), pool("decode", 2)]
    path.write_text(yaml.safe_dump(plan(pools=pools)))
    ports = {"router.port": 0, "router.internal_port": 0, "decode.metrics_port": 65533}
    with pytest.raises(LocalFault, match="metrics_port: decode-3 would get 65536"):
        check_deployment(read_deployment(path, ports, ()))
    check_deployment(read_deployment(path, {**ports, "decode.metrics_port": 65532}, ()))


def test_unknown_model_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(LocalFault, match=r"no model directory at .*none"):
        check_cluster(settings(model=str(tmp_path / "none")))


def test_model_directory_without_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(LocalFault, match=r"cannot read .*config\.json"):
        check_cluster(settings(model=str(tmp_path)))


def test_kv_memory_beyond_what_is_available_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    meminfo = tmp_path / "meminfo"
    fits = settings(prefill={"num_blocks": 1}, decode={"num_blocks": 1})
    num_kb = check_cluster(fits).num_bytes // 1024 + 1
    meminfo.write_text(f"MemTotal: 9999999 kB\nMemAvailable:      {num_kb} kB\n")
    monkeypatch.setattr(preflight, "MEMINFO", meminfo)
    assert available_bytes() == num_kb * 1024
    check_cluster(fits)
    with pytest.raises(LocalFault, match="lower num_blocks or the replicas"):
        check_cluster(settings(prefill={"num_blocks": 2}, decode={"num_blocks": 1}))


def test_system_that_does_not_tell_its_memory_is_trusted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(preflight, "MEMINFO", tmp_path / "none")
    assert available_bytes() is None
    check_cluster(settings())
