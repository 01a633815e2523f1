"""Run the benchmarks, each beside its peer: `python -m bench [NAME ...]`; all of them by default.

Each prints its table; options of one are told by `python -m bench.NAME --help`.
"""

import argparse
import subprocess
import sys

MODULES = {
    "engine": "our engine beside transformers and vLLM (see docs/benchmarks.md for that peer)",
    "ranks": "workers of two ranks on two cores beside a worker of one rank",
    "attention": "decode attention by dtype, compiled beside gathered",
    "sampling": "top-k, top-p and log-probabilities beside transformers' warpers",
    "overlap": "visible time of KV transfers beside that without overlap",
    "kvtransfer": "KV transports beside memcpy and plain sockets",
    "decision": "choosing workers for a request, by each policy, beside choosing by chance",
    "tokenizing": "other requests while huge prompts are tokenised",
    "simulator": "the planner's simulator beside a plain Python event loop",
    "planner": "the planner's questions: time, memory, answers",
    "latency_fidelity.run": "the latency model beside published measurements",
    "plan_vs_real": "predicted beside measured, on a cluster of this machine",
}


def main() -> None:
    listed = "\n".join(f"  {name:<22}{about}" for name, about in MODULES.items())
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=listed, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", choices=[*MODULES, []])
    names = parser.parse_args().names or list(MODULES)
    failed = []
    for name in names:
        print(f"\n== {name}: {MODULES[name]}", flush=True)
        if subprocess.run([sys.executable, "-m", f"bench.{name}"], check=False).returncode != 0:
            failed.append(name)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
