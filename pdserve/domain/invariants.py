"""Checks of our own code that hold in every interpreter mode; `python -O` removes asserts."""


class BrokenInvariant(AssertionError):
    """A bug of ours: a caller broke a contract. Nothing was changed when this is raised."""


def check_invariant(holds: bool, rule: str, *seen: object) -> None:
    """Raise `BrokenInvariant` with the rule, and the values seen, unless it holds.

    An assert only tells the type checker what is known (`is not None`, `isinstance`), since the
    next line fails anyway if that is untrue. A broken rule that the next lines would not notice,
    such as a block that is used after its release, is checked with this function.
    """
    if not holds:
        raise BrokenInvariant(f"{rule}; saw {', '.join(map(repr, seen))}" if seen else rule)
