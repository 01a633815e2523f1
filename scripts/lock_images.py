"""Write the images' lock files: every package with its version and hash, for linux/amd64.

`python scripts/lock_images.py` asks pip what the images would install under constraints.txt and
writes deploy/docker/*.lock. Run it with the images' Python (3.11) on Linux, amd64, after a change
of pyproject.toml or constraints.txt. torch is left out: it comes from another index, by its exact
version.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
DOCKER = ROOT / "deploy" / "docker"
LOCKS: dict[str, Sequence[str]] = {
    "build.lock": ("setuptools>=77",),
    "router.lock": (str(ROOT),),
    "worker.lock": (f"{ROOT}[worker]",),
}
LEFT_OUT = {"pdserve", "torch"}
HEAD = "# Written by scripts/lock_images.py from constraints.txt, for Python 3.11 on linux/amd64.\n"


def main() -> None:
    """Write all lock files."""
    for name, requirements in LOCKS.items():
        packages = sorted(locked(resolve(requirements)))
        (DOCKER / name).write_text(HEAD + "".join(packages))
        print(f"{name}: {len(packages)} packages")


def resolve(requirements: Sequence[str]) -> Any:
    """What pip would install into an empty environment."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        subprocess.run(
            [
                *(sys.executable, "-m", "pip", "install", "--quiet", "--dry-run"),
                *("--ignore-installed", "--report", str(report)),
                *("--only-binary", ":all:", "-c", str(ROOT / "constraints.txt")),
                *requirements,
            ],
            check=True,
        )
        return json.loads(report.read_text())


def locked(report: Any) -> Iterable[str]:
    """A requirement with its hash for each package; only wheels have the hash of what runs."""
    for item in report["install"]:
        about = item["metadata"]
        if about["name"] in LEFT_OUT:
            continue
        digest = item["download_info"]["archive_info"]["hashes"]["sha256"]
        yield f"{about['name'].lower()}=={about['version']} \\\n    --hash=sha256:{digest}\n"


if __name__ == "__main__":
    main()
