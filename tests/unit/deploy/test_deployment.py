from hypothesis import given
from hypothesis import strategies as st

from deploy.deployment import Deployment, deployment_of_cluster
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
