"""Generate `pdserve/v1` from `proto/`; with `--check`, fail if what is committed differs."""

import argparse
import filecmp
import sys
import tempfile
from pathlib import Path

import grpc_tools
from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent


def generate(into: Path) -> list[Path]:
    """Write the stubs of every proto file under `into` and return their paths."""
    protos = sorted((ROOT / "proto").rglob("*.proto"))
    well_known = Path(grpc_tools.__file__).parent / "_proto"
    status = protoc.main(
        [
            "protoc",
            f"--proto_path={ROOT / 'proto'}",
            f"--proto_path={well_known}",
            f"--python_out={into}",
            f"--pyi_out={into}",
            f"--grpc_python_out={into}",
            *[str(path) for path in protos],
        ]
    )
    if status != 0:
        sys.exit(status)
    return sorted((into / "pdserve" / "v1").glob("*_pb2*"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    if not parser.parse_args().check:
        generate(ROOT)
        return
    with tempfile.TemporaryDirectory() as folder:
        fresh = generate(Path(folder))
        stale = [
            path.name
            for path in fresh
            if not (ROOT / "pdserve" / "v1" / path.name).exists()
            or not filecmp.cmp(path, ROOT / "pdserve" / "v1" / path.name, shallow=False)
        ]
    if stale:
        sys.exit(f"stubs differ from proto/: {', '.join(stale)}; run `make proto`")


if __name__ == "__main__":
    main()
