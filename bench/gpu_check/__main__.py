"""`python -m bench.gpu_check`: what only a GPU can show, in one run of less than ten minutes.

Parts run in order of importance, each in a process of its own, until the budget is used; a part
that fails does not stop the others. With `--device cpu` the same parts run in small sizes, kernels
in Triton's interpreter: that shows that the script works, and nothing about speed. Writes
gpu_check.json and gpu_check.md. Ends with 1 if a part failed.

The first parts need torch and triton alone. Whoever brings this to a machine without our other
packages carries them as wheels (docs/benchmarks.md says how); the report names what was missing.
"""

import argparse
import datetime
import json
import sys
import time
from pathlib import Path

from bench.gpu_check.parts import PARTS, part_named
from bench.gpu_check.report import as_data, as_markdown
from bench.gpu_check.running import Budget, run_parts


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [part.name for part in PARTS]
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N or cpu [cuda]")
    parser.add_argument("--only", nargs="*", choices=names, default=names, metavar="PART",
                        help=f"of {', '.join(names)}")  # fmt: skip
    parser.add_argument(
        "--budget", type=float, help="seconds for all parts [540 on a GPU, an hour on a CPU]"
    )
    parser.add_argument("--output", type=Path, default=Path("out"), help="folder of results [out]")
    parser.add_argument("--part", choices=names, help=argparse.SUPPRESS)  # in its own process
    options = parser.parse_args()
    if options.part:
        run_here(options.part, options.device)
        return
    began_s = time.monotonic()
    parts = [part_named(name) for name in names if name in options.only]
    default_s = 3600.0 if options.device == "cpu" else 540.0
    budget = Budget(total_s=options.budget or default_s)
    outcomes = run_parts(parts, options.device, budget, lambda line: print(line, flush=True))
    elapsed_s = time.monotonic() - began_s
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    options.output.mkdir(parents=True, exist_ok=True)
    data = as_data(outcomes, options.device, elapsed_s, date)
    (options.output / "gpu_check.json").write_text(json.dumps(data, indent=1) + "\n")
    (options.output / "gpu_check.md").write_text(as_markdown(outcomes, options.device, date))
    failed = [outcome.part.name for outcome in outcomes if not outcome.is_good]
    left_out = [outcome.part.name for outcome in outcomes if outcome.left_out]
    print(f"\n{len(outcomes)} parts in {elapsed_s:.0f} s, results in {options.output}/gpu_check.md")
    print(f"failed: {', '.join(failed) or 'none'}; left out: {', '.join(left_out) or 'none'}")
    if failed:
        sys.exit(1)


def run_here(name: str, device: str) -> None:
    """Measure one part and print what it finds, a line of JSON each, as it is found."""
    from bench.gpu_check.machine import open_machine

    for finding in part_named(name).measure(open_machine(device)):
        print(finding.to_line(), flush=True)


if __name__ == "__main__":
    main()
