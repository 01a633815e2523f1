"""A block table that outlives whoever reads or writes its blocks."""

from collections.abc import Callable, Sequence

from pdserve.domain.ids import BlockId
from pdserve.domain.invariants import check_invariant
from pdserve.engine.block_pool import BlockTable


class StepTable:
    """One request's blocks, while engine steps read and write them and digests are made of them.

    A request can end in the middle of a step. Its blocks then go back only when nobody uses them:
    given away earlier, they could take another request's KV, which the step would write over.
    """

    __slots__ = ("_is_released", "_num_held", "_num_users", "_on_released", "_table")

    def __init__(self, table: BlockTable, on_released: Callable[[], None]) -> None:
        self._table = table
        self._on_released = on_released
        self._num_users = 0
        self._is_released = False
        self._num_held = table.num_cached_blocks

    @property
    def block_ids(self) -> tuple[BlockId, ...]:
        return self._table.block_ids

    @property
    def num_cached_blocks(self) -> int:
        return self._table.num_cached_blocks

    def hold(self, first: int, count: int) -> None:
        """As `BlockTable.hold`; blocks are held from the first one on."""
        is_next = first == self._num_held
        check_invariant(is_next, "blocks are held from the first on", first, self._num_held)
        self._table.hold(first, count)
        self._num_held += count

    def hold_until(self, end: int) -> None:
        """All below `end` are held, or get their content; harmless for those that are held."""
        if end > self._num_held:
            self.hold(self._num_held, end - self._num_held)

    def hold_rest(self) -> None:
        """Whatever is not held yet will be computed here."""
        self.hold(self._num_held, len(self._table.block_ids) - self._num_held)

    def pin(self, first: int, count: int) -> None:
        self._table.pin(first, count)

    def unpin(self, first: int, count: int) -> None:
        self._table.unpin(first, count)

    async def publish(self, names: Sequence[bytes]) -> None:
        """As `BlockTable.publish`, which uses the blocks; harmless once they are given back."""
        if self._is_released:
            return
        self.enter_step()
        try:
            await self._table.publish(names)
        finally:
            self.leave_step()

    def enter_step(self) -> None:
        """Begin to use the blocks; each call is followed by one of `leave_step`."""
        check_invariant(not self._is_released, "no step uses blocks that are given back")
        self._num_users += 1

    def leave_step(self) -> None:
        self._num_users -= 1
        self._give_back_if_unused()

    def release(self) -> None:
        """Give all blocks back, at once or when their last user leaves; safe to call twice."""
        if not self._is_released:
            self._is_released = True
            self._give_back_if_unused()

    def _give_back_if_unused(self) -> None:
        if self._is_released and self._num_users == 0:
            self._table.release()
            self._on_released()
