import re
from typing import Any

import pytest

from pdserve.config.base import parse_settings
from pdserve.config.processes import WorkerSettings
from pdserve.domain.errors import LocalFault


def worker(*, tp: int = 4, pp: int = 2, insecure: bool = False, **given: Any) -> WorkerSettings:
    data = {
        "role": "decode",
        "worker_id": "w",
        "insecure": insecure,
        "engine": {"tp": tp, "pp": pp},
        **given,
    }
    return parse_settings(WorkerSettings, data, source="w.yaml")


@pytest.mark.parametrize(
    ("ranks", "said"),
    [
        ({"per_node": 3}, "ranks.per_node must divide the 8 ranks of tp 4, pp 2; got 3"),
        ({"per_node": 16}, "ranks.per_node must divide the 8 ranks of tp 4, pp 2; got 16"),
        ({"node": 1}, "ranks.node must be below 1, since the 8 ranks of tp 4, pp 2 are 1 times 8"),
        ({"node": 4, "per_node": 2, "leader": "127.0.0.1:9"}, "below 4, .* are 4 times 2; got 4"),
        ({"node": -1}, "ranks.node: Input should be greater than or equal to 0; got -1"),
        ({"per_node": 4}, "ranks.leader is needed: the 8 ranks of tp 4, pp 2 are shared by 2 proc"),
        ({"leader": "127.0.0.1:9"}, "ranks.leader is only for workers of several processes; got 1"),
        ({"per_node": 4, "leader": "10.0.0.1:9"}, "ranks.leader must be a loopback address, got '"),
        ({"per_node": 4, "leader": "there:9"}, "say so with insecure: true"),
        ({"per_node": 4, "leader": "there"}, "ranks.leader: 'there' has no port"),
        ({"leeder": 1}, "ranks.leeder: unknown field; did you mean leader?"),
    ],
)
def test_ranks_that_are_no_part_of_the_worker_are_refused(
    ranks: dict[str, object], said: str
) -> None:
    with pytest.raises(LocalFault, match=said):
        worker(ranks=ranks)


def test_all_ranks_are_in_one_process_unless_said_otherwise() -> None:
    assert worker().num_local_ranks == 8
    assert worker().ranks.num_nodes(8) == 1
    one_a_process = {"per_node": 1, "node": 7, "leader": "node-0.pods:29500"}
    found = worker(ranks=one_a_process, insecure=True)
    assert found.num_local_ranks == 1
    assert found.ranks.num_nodes(8) == 8
    assert worker(ranks={"per_node": 8}).num_local_ranks == 8


def test_ranks_of_a_process_share_its_cores() -> None:
    for num_cpus in range(1, 9):
        cpus = tuple(range(10, 10 + num_cpus))
        shares = [worker(tp=3, pp=1, cpus=cpus).cpus_of_rank(index) for index in range(3)]
        if num_cpus < 3:
            assert shares == [cpus] * 3
        else:
            assert tuple(cpu for share in shares for cpu in share) == cpus
            assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert worker(tp=3, pp=1).cpus_of_rank(2) == ()
    here = worker(tp=2, pp=2, cpus=(4, 5), ranks={"per_node": 1, "leader": "127.0.0.1:9"})
    assert here.cpus_of_rank(0) == (4, 5)


def test_each_rank_has_a_kv_port_of_its_own() -> None:
    many = worker(kv_port=65528)
    assert [many.kv_port_of_rank(index) for index in (0, 7)] == [65528, 65535]
    assert worker().kv_port_of_rank(7) == 0
    worker(kv_port=65535, ranks={"per_node": 1, "leader": "127.0.0.1:9"})
    with pytest.raises(LocalFault, match=r"kv_port: the 8 ranks here .* from 65529 to 65536"):
        worker(kv_port=65529)


def test_bad_ranks_are_named_by_their_field() -> None:
    with pytest.raises(LocalFault) as caught:
        worker(ranks={"per_node": 0})
    assert re.match(r"w\.yaml: ranks\.per_node: ", caught.value.message)
