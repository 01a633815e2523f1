"""Where one rank stands in a worker of many."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class RankPlace:
    """One of the `tp * pp` ranks of a worker; those of a stage follow one another.

    Rank 0 leads: it takes requests and says what each step computes. The first rank of the last
    stage draws tokens.
    """

    rank: int = 0
    tp: int = 1
    pp: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.num_ranks:
            raise ValueError(f"rank must be 0 to {self.num_ranks - 1}; got {self.rank}")

    @property
    def num_ranks(self) -> int:
        return self.tp * self.pp

    @property
    def stage(self) -> int:
        return self.rank // self.tp

    @property
    def shard(self) -> int:
        """Which part of its stage's layers, of `tp`."""
        return self.rank % self.tp

    @property
    def is_first_stage(self) -> bool:
        return self.stage == 0

    @property
    def is_last_stage(self) -> bool:
        return self.stage == self.pp - 1

    @property
    def draws(self) -> bool:
        return self.is_last_stage and self.shard == 0
