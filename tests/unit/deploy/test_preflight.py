import socket
from pathlib import Path

import pytest
import yaml

from deploy import preflight
from deploy.deployment import deployment_of_cluster
from deploy.opening import read_deployment
from deploy.preflight import Footprint, available_bytes, check_deployment
from pdserve.config.cluster import ClusterSettings
from pdserve.domain.errors import LocalFault
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
    assert footprint.block_bytes == 4 * 2 * 16 * 2 * 32 * 4
    assert footprint.kv_bytes == 7 * footprint.block_bytes


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
    meminfo.write_text("MemTotal: 9999999 kB\nMemAvailable:      64 kB\n")
    monkeypatch.setattr(preflight, "MEMINFO", meminfo)
    assert available_bytes() == 65_536
    check_cluster(settings(prefill={"num_blocks": 1}, decode={"num_blocks": 1}))  # 65,536 bytes
    with pytest.raises(LocalFault, match="lower num_blocks or the replicas"):
        check_cluster(settings(prefill={"num_blocks": 2}, decode={"num_blocks": 1}))


def test_system_that_does_not_tell_its_memory_is_trusted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(preflight, "MEMINFO", tmp_path / "none")
    assert available_bytes() is None
    check_cluster(settings())
