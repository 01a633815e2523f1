"""Asserts that `python -O` may remove: each only tells the type checker what is known.

Allowed are `assert x is not None` and `assert isinstance(x, T)`, without a call in `x`. All else
belongs in `pdserve.domain.invariants.check_invariant`, or in an error that a user or a peer gets.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ROOMS = (
    *("pdserve", "router", "prefill_worker", "decode_worker", "kvtransfer", "placement", "deploy"),
    *("bench", "scripts"),
)
_PLAIN = (ast.Name, ast.Attribute, ast.Subscript, ast.Constant, ast.BinOp, ast.Tuple)
_SAFE = (*_PLAIN, ast.expr_context, ast.operator)


def bad_asserts(source: str) -> Iterator[int]:
    """Lines of the asserts in `source` that do more than narrow a type."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Assert) and not _narrows(node.test):
            yield node.lineno


def _narrows(test: ast.expr) -> bool:
    match test:
        case ast.Compare(left=left, ops=[ast.IsNot()], comparators=[ast.Constant(value=None)]):
            return _is_plain(left)
        case ast.Call(func=ast.Name(id="isinstance"), args=[value, kind], keywords=[]):
            return _is_plain(value) and _is_plain(kind)
        case _:
            return False


def _is_plain(value: ast.expr) -> bool:
    """Reads names, attributes and items; calls, awaits and assigns nothing."""
    return all(isinstance(part, _SAFE) for part in ast.walk(value))


def main() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}: this assert does more than narrow a type"
        for room in ROOMS
        for path in sorted((ROOT / room).rglob("*.py"))
        for line in bad_asserts(path.read_text(encoding="utf-8"))
    ]
    if found:
        sys.exit("\n".join([*found, "use check_invariant (pdserve/domain/invariants.py)"]))


if __name__ == "__main__":
    main()
