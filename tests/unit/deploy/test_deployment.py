from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from deploy.deployment import Deployment, PlacedWorker, deployment_of_cluster
from pdserve.config.cluster import ClusterSettings
from pdserve.domain.messages import Role


def deployment(num_prefill: int, num_decode: int) -> Deployment:
    return deployment_of_cluster(
        ClusterSettings.model_validate(
            {"prefill": {"replicas": num_prefill}, "decode": {"replicas": num_decode}}
        )
    )


def cores(pinned: Deployment, role: Role) -> list[set[int]]:
    return [set(worker.settings.cpus) for worker in pinned.of_role(role)]


@given(st.integers(0, 9), st.integers(1, 9), st.integers(2, 40))
def test_roles_never_share_a_core_and_no_worker_goes_without(
    num_prefill: int, num_decode: int, num_cpus: int
) -> None:
    cpus = range(7, 7 + num_cpus)
    pinned = deployment(num_prefill, num_decode).pinned_to(cpus)
    readers, writers = cores(pinned, Role.PREFILL), cores(pinned, Role.DECODE)
    assert all([*readers, *writers])
    used_by = [set().union(*pool) for pool in (readers, writers)]
    assert not used_by[0] & used_by[1]
    assert used_by[0] | used_by[1] == set(cpus)
    if num_cpus >= num_prefill + num_decode:
        everyone = [*readers, *writers]
        assert sum(map(len, everyone)) == len(set().union(*everyone)), "each has its own"


def test_pinning_changes_nothing_else() -> None:
    before = deployment(1, 2)
    after = before.pinned_to((0, 1))
    unpinned = [worker.settings.model_copy(update={"cpus": ()}) for worker in after.workers]
    assert unpinned == [worker.settings for worker in before.workers]
    assert after.router == before.router


@given(
    st.lists(st.tuples(st.integers(1, 4), st.integers(1, 3)), min_size=1, max_size=6),
    st.integers(2, 60),
)
def test_workers_of_many_ranks_get_a_core_for_each_where_there_are_enough(
    cuts: list[tuple[int, int]], num_cpus: int
) -> None:
    one = deployment(1, 1)
    workers = tuple(
        with_ranks(one.workers[index % 2], f"w{index}", tp=tp, pp=pp)
        for index, (tp, pp) in enumerate(cuts)
    )
    pinned = replace(one, workers=workers).pinned_to(range(num_cpus))
    num_ranks = sum(worker.settings.engine.num_ranks for worker in workers)
    for worker in pinned.workers:
        own = [worker.settings.cpus_of_rank(i) for i in range(worker.settings.num_local_ranks)]
        assert all(own)
        if num_cpus >= num_ranks:
            assert len(set().union(*own)) == len(worker.settings.cpus)
    if num_cpus >= num_ranks:
        taken = [cpu for worker in pinned.workers for cpu in worker.settings.cpus]
        assert len(taken) == len(set(taken)) == num_cpus
        assert all(
            len(each.settings.cpus) >= each.settings.num_local_ranks for each in pinned.workers
        )


def with_ranks(worker: PlacedWorker, name: str, *, tp: int, pp: int) -> PlacedWorker:
    engine = worker.settings.engine.model_copy(update={"tp": tp, "pp": pp})
    settings = worker.settings.model_copy(update={"worker_id": name, "engine": engine})
    return replace(worker, settings=settings)
