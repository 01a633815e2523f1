"""Where the ranks of a worker run: in one process's hands, or shared out between several."""

from pydantic import Field

from pdserve.config.base import Settings
from pdserve.config.binding import Address
from pdserve.domain.addresses import is_loopback, split_address


class RankSettings(Settings):
    """Which of a worker's tp * pp ranks one process hosts; by default it hosts them all.

    Otherwise several processes, on hosts or in actors of their own, share the worker. Node 0 is the
    worker to everybody else and listens at `leader` for the others, which only host ranks.
    """

    node: int = Field(0, ge=0, description="which of the processes that share this worker")
    per_node: int | None = Field(
        None, ge=1, description="ranks of each of them; null: all tp * pp ranks in one"
    )
    leader: Address | None = Field(
        None, description="host:port of node 0, which listens there for the others; null: no others"
    )

    def num_nodes(self, num_ranks: int) -> int:
        """Processes that share a worker of `num_ranks`."""
        return num_ranks // self.per_node if self.per_node else 1


def check_ranks(ranks: RankSettings, tp: int, pp: int, *, insecure: bool) -> None:
    """Raise `ValueError` for settings that do not describe one part of a worker of `tp * pp`."""
    num_ranks = tp * pp
    of = f"the {num_ranks} ranks of tp {tp}, pp {pp}"
    if ranks.per_node and num_ranks % ranks.per_node:
        raise ValueError(f"ranks.per_node must divide {of}; got {ranks.per_node}")
    num_nodes = ranks.num_nodes(num_ranks)
    if ranks.node >= num_nodes:
        raise ValueError(
            f"ranks.node must be below {num_nodes}, since {of} are {num_nodes} times "
            f"{ranks.per_node or num_ranks}; got {ranks.node}"
        )
    if num_nodes > 1 and ranks.leader is None:
        raise ValueError(
            f"ranks.leader is needed: {of} are shared by {num_nodes} processes, which meet there"
        )
    if num_nodes == 1 and ranks.leader is not None:
        raise ValueError(
            f"ranks.leader is only for workers of several processes; got {ranks.leader}, and all "
            f"of {of} are in one"
        )
    if ranks.leader and not insecure and not is_loopback(split_address(ranks.leader)[0]):
        raise ValueError(
            f"ranks.leader must be a loopback address, got {ranks.leader!r}: ranks have no TLS "
            "and login; where the network around them is closed, say so with insecure: true"
        )
