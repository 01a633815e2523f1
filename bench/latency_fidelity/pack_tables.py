"""Packs the measured CSV tables into the compact form that `placement.tables` reads.

    python -m bench.latency_fidelity.pack_tables <directory of the CSVs>

Times are float32 milliseconds on dense grids; NaN marks points nobody measured.
"""

import csv
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Row = dict[str, str]
TARGET = Path(__file__).parents[2] / "placement" / "data" / "hardware"


def dense(rows: Iterable[Row], names: tuple[str, ...]) -> dict[str, NDArray[np.float32]]:
    """Axes and times of `rows` on the grid spanned by `names`."""
    rows = list(rows)
    axes = [sorted({int(row[name]) for row in rows}) for name in names]
    times = np.full([len(axis) for axis in axes], np.nan, np.float32)
    for row in rows:
        place = tuple(axis.index(int(row[name])) for axis, name in zip(axes, names, strict=True))
        times[place] = float(row["latency_ms"])
    packed: dict[str, NDArray[np.float32]] = {
        name: np.array(axis, np.float32) for name, axis in zip(names, axes, strict=True)
    }
    return packed | {"latency_ms": times}


def group(path: Path, names: tuple[str, ...]) -> dict[tuple[str, ...], list[Row]]:
    groups: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    with path.open(newline="") as lines:
        for row in csv.DictReader(lines):
            groups[tuple(row[name] for name in names)].append(row)
    return groups


def pack(source: Path, system: str) -> dict[str, NDArray[np.float32]]:
    """Every table of one GPU type, keys `kind/variant/axis`."""
    out: dict[str, NDArray[np.float32]] = {}
    tables = (
        ("gemm", "gemm.csv", ("dtype",), ("n", "k", "m")),
        ("context", "attention_context.csv", ("q_heads", "kv_heads"), ("batch_size", "isl")),
        ("decode", "attention_generation.csv", ("q_heads", "kv_heads"), ("batch_size", "kv_len")),
        ("collective", "collectives.csv", ("impl", "op", "num_gpus"), ("bytes",)),
    )
    for kind, name, variant, axes in tables:
        for key, rows in sorted(group(source / name, ("system", *variant)).items()):
            if key[0] == system:
                label = f"{kind}/{'-'.join(key[1:])}"
                out |= {f"{label}/{axis}": array for axis, array in dense(rows, axes).items()}
    return out


def main() -> None:
    source = Path(sys.argv[1])
    for system in ("a100_sxm", "h100_sxm", "h200_sxm"):
        np.savez_compressed(TARGET / f"{system}.npz", **pack(source, system))  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
