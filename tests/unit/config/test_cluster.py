from pathlib import Path
from typing import Any

import pytest
import yaml

from pdserve.config.base import Settings, lay_over, parse_assignment, parse_settings, read_yaml
from pdserve.config.cluster import (
    ClusterSettings,
    DecodePool,
    PrefillPool,
    RouterPool,
    example_yaml,
    parse_cluster_settings,
)
from pdserve.config.processes import EngineSettings, RouterSettings, WorkerSettings
from pdserve.domain.errors import LocalFault
from pdserve.domain.messages import Role

NO_TIME = {"fixed_s": 0, "prefill_token_s": 0, "decode_token_s": 0}
CHAT = {"name": "chat", "ttft_s": 1.0, "tpot_s": 0.1}


def read(path: Path, flags: dict[str, object]) -> ClusterSettings:
    return parse_cluster_settings(read_yaml(path), flags, source=str(path))


def problem(data: object) -> str:
    with pytest.raises(LocalFault) as caught:
        parse_settings(ClusterSettings, data, source="c.yaml")
    assert caught.value.message.startswith("c.yaml: ")
    return caught.value.message


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"prefil": {}}, "prefil: unknown field; did you mean prefill?"),
        ({"router": {"prot": 1}}, "router.prot: unknown field; did you mean port?"),
        ({"decode": {"num_block": 1}}, "decode.num_block: unknown field; did you mean num_blocks?"),
        ({"decode": {"replicas": "two"}}, "decode.replicas: Input should be a valid integer"),
        ({"decode": {"replicas": "two"}}, "got 'two'"),
        ({"decode": {"replicas": 0}}, "decode.replicas: Input should be greater than or equal"),
        ({"decode": 3}, "decode: "),
        ({"router": {"port": 70000}}, "router.port: "),
        ({"router": {"port": 7, "internal_port": 7}}, "router: port and internal_port must differ"),
        ({"router": {"policy": "best"}}, "router.policy: Input should be 'least_total_time' or '"),
        ({"decode": {"queue_order": "lifo"}}, "decode.queue_order: Input should be 'fcfs' or 'dea"),
        ({"transports": []}, "transports: "),
        ({"memory_fraction": 1.1}, "memory_fraction: Input should be less than or equal to 1"),
        (
            {"block_order": "heads"},
            "block_order heads needs engine torch on a GPU; got torch on cpu",
        ),
        (
            {"compile": True},
            "compile needs engine torch on a GPU; got torch on cpu: the engine of the CPU has comp",
        ),
        ({"compile": 3}, "compile: Input should be a valid boolean"),
        ({"block_order": "layers"}, "block_order: Input should be 'tokens' or 'heads'"),
        ({"decode": {"tp": 0}}, "decode.tp: Input should be greater than or equal to 1"),
        (
            {"prefill": {"block_size": 1025}},
            "prefill.block_size: Input should be less than or equal to 1024",
        ),
        ({"transports": ["rdma"]}, "transports.0: "),
        ({"timers": {"drain_s": float("nan")}}, "timers.drain_s: "),
        ({"engine": "timed"}, "engine: timed needs coefficients"),
        ({"decode": {"max_num_waiting": 8}}, "decode.max_num_waiting: is called max_num_queued"),
        ({"decode": {"max_num_queued": 0}}, "decode.max_num_queued: Input should be greater than"),
        ({"router": {"slo": [CHAT, CHAT]}}, "router.slo: each class needs a name of its own"),
        ({"router": {"slo": [{**CHAT, "nam": 1}]}}, "router.slo.0.nam: unknown field"),
        ([], "expected a mapping of settings, got list"),
    ],
)
def test_bad_settings_are_named_with_their_field(data: object, said: str) -> None:
    assert said in problem(data)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.4", "example.org"])
def test_other_hosts_than_loopback_need_the_insecure_flag(host: str) -> None:
    assert "host must be a loopback address" in problem({"router": {"host": host}})
    assert "insecure: true" in problem({"router": {"host": host}})
    open_router = {"router": {"host": host, "insecure": True}}
    settings = parse_settings(ClusterSettings, open_router, source="c")
    assert settings.router_settings().insecure


@pytest.mark.parametrize("kind", [RouterSettings, WorkerSettings])
def test_no_process_listens_to_others_unasked(kind: type[RouterSettings | WorkerSettings]) -> None:
    about = {"role": "decode", "worker_id": "w"} if kind is WorkerSettings else {}
    with pytest.raises(LocalFault, match="insecure: true"):
        parse_settings(kind, {**about, "host": "10.0.0.1"}, source="s")
    parse_settings(kind, {**about, "host": "10.0.0.1", "insecure": True}, source="s")


def test_a_worker_tells_peers_an_address_that_they_can_dial() -> None:
    data = {"role": "decode", "worker_id": "w", "host": "0.0.0.0", "insecure": True}
    with pytest.raises(LocalFault, match="give one address of this machine"):
        parse_settings(WorkerSettings, data, source="s")


def test_assignments_are_laid_over_and_leave_the_data_as_it_was() -> None:
    data = {"timers": {"drain_s": 1.0}, "role": "decode"}
    assignments = [parse_assignment("timers.drain_s=5"), parse_assignment("engine.model=demo")]
    assert lay_over(data, assignments) == {
        "timers": {"drain_s": 5},
        "role": "decode",
        "engine": {"model": "demo"},
    }
    assert data == {"timers": {"drain_s": 1.0}, "role": "decode"}


@pytest.mark.parametrize("text", ["drain_s", "=5", "a=[1"])
def test_what_is_no_assignment_is_refused(text: str) -> None:
    with pytest.raises(LocalFault, match="--set"):
        parse_assignment(text)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_loopback_hosts_are_accepted(host: str) -> None:
    settings = parse_settings(ClusterSettings, {"router": {"host": host}}, source="c")
    assert settings.router_settings().host == host


def test_example_holds_every_field_at_its_default_and_explains_it() -> None:
    text = example_yaml()
    assert parse_settings(ClusterSettings, yaml.safe_load(text), source="example") == (
        ClusterSettings()
    )
    for name in ClusterSettings.model_fields:
        assert f"\n{name}:" in text or f"\n# {name}:" in text
    unexplained = [line for line in text.splitlines() if line[:2] != "  " and "#" not in line]
    assert [line for line in unexplained if line and line[-1] != ":"] == []


def test_every_worker_gets_its_pool_and_what_the_pools_share() -> None:
    settings = ClusterSettings.model_validate(
        {
            "block_size": 8,
            "prefill": {"replicas": 2, "num_blocks": 10, "max_step_tokens": 99},
            "decode": {"replicas": 1, "num_blocks": 20},
            "timers": {"drain_s": 5},
        }
    )
    workers = settings.worker_settings("127.0.0.1:9")
    assert [worker.worker_id for worker in workers] == ["prefill-0", "prefill-1", "decode-0"]
    assert [worker.engine.num_blocks for worker in workers] == [10, 10, 20]
    assert [worker.max_step_tokens for worker in workers] == [99, 99, 512]
    assert {worker.engine.block_size for worker in workers} == {8}
    assert {worker.routers for worker in workers} == {("127.0.0.1:9",)}
    assert {worker.timers.drain_s for worker in workers} == {5.0}


def test_blocks_of_a_pool_are_those_of_the_cluster_unless_it_has_its_own() -> None:
    settings = ClusterSettings.model_validate({"num_blocks": 30, "decode": {"num_blocks": 20}})
    workers = settings.worker_settings("")
    assert [(each.role, each.engine.num_blocks) for each in workers] == [
        ("prefill", 30),
        ("decode", 20),
    ]


def test_a_pool_has_blocks_of_its_own_size_or_that_of_the_cluster() -> None:
    settings = ClusterSettings.model_validate({"block_size": 24, "decode": {"block_size": 32}})
    assert [each.engine.block_size for each in settings.worker_settings("")] == [24, 32]


def test_a_pool_has_ranks_of_its_own_or_those_of_the_cluster() -> None:
    settings = ClusterSettings.model_validate({"tp": 2, "decode": {"tp": 1, "pp": 2}})
    workers = settings.worker_settings("")
    assert [(each.engine.tp, each.engine.pp) for each in workers] == [(2, 1), (1, 2)]


@pytest.mark.parametrize(
    ("given", "known"),
    [
        ({}, 1024),
        ({"num_blocks": 7}, 7),
        ({"device": "cuda"}, None),
        ({"device": "cuda", "num_blocks": 7}, 7),
        ({"device": "cuda:3", "engine": "timed", "coefficients": NO_TIME}, 1024),
    ],
)
def test_number_of_blocks_is_known_before_the_start_unless_a_gpu_decides(
    given: dict[str, object], known: int | None
) -> None:
    assert EngineSettings.model_validate(given).planned_num_blocks == known


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:-1", "cpu:0", "", "CUDA", "cuda:0 "])
def test_a_device_that_is_none_is_refused(device: str) -> None:
    assert "device: device is cpu, cuda, or cuda:N" in problem({"device": device})


def test_one_gpu_is_not_for_many_ranks() -> None:
    assert "each of 4 ranks (tp 2, pp 2) needs its own: give device: cuda" in problem(
        {"device": "cuda:1", "tp": 2, "pp": 2}
    )
    EngineSettings.model_validate({"device": "cuda:1"})


def test_ranks_are_not_compiled() -> None:
    said = "compile needs one rank, and tp 2, pp 2 are 4, which exchange numbers within layers"
    assert said in problem({"compile": True, "device": "cuda", "tp": 2, "pp": 2})
    EngineSettings.model_validate({"device": "cuda", "compile": "on"})


def test_a_pool_may_have_a_hundred_workers_and_each_its_name_and_metrics_port() -> None:
    settings = ClusterSettings.model_validate({"decode": {"replicas": 100, "metrics_port": 8000}})
    workers = settings.worker_settings("")[1:]
    assert [each.worker_id for each in workers] == [f"decode-{index}" for index in range(100)]
    assert [each.metrics_port for each in workers] == list(range(8000, 8100))


def test_what_is_said_of_a_process_is_all_of_it_or_only_what_was_given() -> None:
    settings = ClusterSettings.model_validate(
        {"timers": {"drain_s": 5}, "router": {"port": 0}, "decode": {"max_step_tokens": 9}}
    )
    assert settings.router_data(only_given=True) == {"timers": {"drain_s": 5.0}, "port": 0}
    given = settings.worker_data(Role.DECODE, only_given=True)
    assert (given["timers"], given["engine"], given["max_step_tokens"]) == ({"drain_s": 5.0}, {}, 9)
    for name in ("max_num_requests", "transports", "metrics_port"):
        assert name not in given
        assert name in settings.worker_data(Role.DECODE)
    assert RouterSettings.model_validate(settings.router_data()) == settings.router_settings()


@pytest.mark.parametrize(
    ("kind", "part"),
    [
        (RouterSettings, ClusterSettings),
        (RouterSettings, RouterPool),
        (EngineSettings, ClusterSettings),
        (WorkerSettings, ClusterSettings),
        (WorkerSettings, PrefillPool),
        (WorkerSettings, DecodePool),
    ],
)
def test_a_field_of_a_process_is_in_a_cluster_file_what_it_is_to_the_process(
    kind: type[Settings], part: type[Settings]
) -> None:
    shared = set(part.model_fields) & set(kind.model_fields)
    if kind is WorkerSettings:
        shared -= {"engine", "metrics_port"}  # a name of an engine; ports counted up from one
    assert len(shared) > 2
    for name in shared:
        assert repr(part.model_fields[name]) == repr(kind.model_fields[name]), name


def test_no_prefill_workers_is_colocated_serving() -> None:
    settings = ClusterSettings.model_validate({"prefill": {"replicas": 0}})
    assert [worker.role for worker in settings.worker_settings("a:1")] == ["decode"]


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("model: demo-draft\nrouter: {port: 1, internal_port: 2}\n")
    settings = read(path, {"router.port": 3, "decode.replicas": 4})
    assert settings.model == "demo-draft"
    assert (settings.router.port, settings.router.internal_port) == (3, 2)
    assert settings.decode.replicas == 4


@pytest.mark.parametrize("text", ["", "# only a comment\n"])
def test_empty_file_means_all_defaults(tmp_path: Path, text: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    assert read(path, {}) == ClusterSettings()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"model: [", "c.yaml:1:"),
        (b"- model\n", "expected a mapping of settings"),
        (b"\xff\xfe", "not UTF-8 at byte 0"),
        (b"router: 3\n", "router: "),
        (b"model: !!python/object:os.system x\n", "c.yaml:1:"),
    ],
)
def test_unreadable_files_are_named(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_bytes(content)
    with pytest.raises(LocalFault) as caught:
        read(path, {"router.port": 1})
    assert said in caught.value.message
    assert str(path) in caught.value.message


def test_missing_file_and_directory_are_named(tmp_path: Path) -> None:
    for path, said in ((tmp_path / "none.yaml", "no such file"), (tmp_path, "Is a directory")):
        with pytest.raises(LocalFault, match=said):
            read(path, {})


def test_settings_do_not_change() -> None:
    settings: Any = ClusterSettings()
    with pytest.raises(ValueError, match="frozen"):
        settings.model = "other"
