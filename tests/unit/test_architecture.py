"""ARCHITECTURE.md says what is true: its names resolve, its drawings match the code."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
ROOMS = (
    "pdserve",
    "router",
    "prefill_worker",
    "decode_worker",
    "kvtransfer",
    "placement",
    "deploy",
)
CODE = re.findall(r"`([^`\n]+)`", (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8"))
NAMES = sorted(
    {
        name
        for name in CODE
        if re.fullmatch(rf"({'|'.join(ROOMS)})(\.\w+)+", name) and not name.endswith(".py")
    }
)
PATHS = sorted(
    {name for name in CODE if re.fullmatch(r"[\w./]+/[\w./]*", name) and not name.startswith("/")}
    - {"pdserve.v1.Inference/Generate"}
)


def resolve(name: str) -> object:
    """Import the longest module prefix of a dotted name and walk the rest."""
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for attribute in parts[cut:]:
            found = getattr(found, attribute)
        return found
    raise AttributeError(name)


def test_page_names_enough_of_the_code() -> None:
    assert len(NAMES) > 30
    assert len(PATHS) > 15


@pytest.mark.parametrize("name", NAMES)
def test_every_name_resolves(name: str) -> None:
    resolve(name)


@pytest.mark.parametrize("path", PATHS)
def test_every_path_exists(path: str) -> None:
    assert (ROOT / path).exists()


def test_every_room_is_on_the_map() -> None:
    rooms = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests"}
    assert {f"`{room}`" for room in rooms} <= set(
        re.findall(r"^\| (`\w+`) \|", (ROOT / "ARCHITECTURE.md").read_text("utf-8"), re.MULTILINE)
    ) | {"`pdserve`"}


@pytest.mark.parametrize(
    "script", ["generate_stubs.py", "generate_diagrams.py", "generate_metrics_table.py"]
)
def test_generated_files_match_their_sources(script: str) -> None:
    subprocess.run(
        [sys.executable, str(ROOT / "scripts" / script), "--check"],
        check=True,
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT)},
    )


def test_only_the_tests_of_the_benchmarks_import_them() -> None:
    """The product's tests run where `bench` is not, and do not break when a benchmark changes."""
    texts = {
        path.relative_to(ROOT): path.read_text(encoding="utf-8")
        for path in sorted((ROOT / "tests").rglob("*.py"))
    }
    imports = re.compile(r"^\s*(from|import) bench\b", re.MULTILINE)
    found = [path for path, text in texts.items() if imports.search(text)]
    assert [str(path) for path in found if path.parts[:2] != ("tests", "bench")] == []
    assert found, "the tests of the benchmarks are there"
