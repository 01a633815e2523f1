"""The check on a GPU says what failed, what was left out and why, and goes on."""

import sys

import pytest

from bench.gpu_check.findings import Finding, must
from bench.gpu_check.parts import PARTS, Part
from bench.gpu_check.report import as_data, as_markdown
from bench.gpu_check.running import Budget, Outcome, run_parts

GOOD = f"print('noise'); print('{must('it is so', True, value='1/1').to_line()}')"
WRONG = f"print('{must('it is so', False, note='seen: 2').to_line()}')"
HANGS = f"{GOOD}; import sys, time; sys.stdout.flush(); time.sleep(60)"
PROGRAMS = {
    "good": GOOD,
    "wrong": WRONG,
    "ends": f"{GOOD}; raise ValueError('out of luck')",
    "hangs": HANGS,
    "last": GOOD,
}


def part(name: str, **changes: object) -> Part:
    return Part(name=name, module="", answers=f"what {name} shows", most_s=60, **changes)  # type: ignore[arg-type]


def run(*parts: Part, device: str = "cuda", budget_s: float = 100.0) -> list[Outcome]:
    return run_parts(
        parts,
        device,
        Budget(total_s=budget_s),
        lambda line: None,
        lambda part, _: [sys.executable, "-c", PROGRAMS[part.name]],
    )


def test_a_part_that_fails_in_any_way_does_not_stop_the_others() -> None:
    hanging = Part(name="hangs", module="", answers="", most_s=2, needs=())
    parts = [part(name, needs=()) for name in ("good", "wrong", "ends")]
    good, wrong, ends, hangs, last = run(*parts, hanging, part("last", needs=()))
    assert good.is_good
    assert last.is_good
    assert not wrong.is_good
    assert not wrong.failure
    assert "out of luck" in ends.failure
    assert "ended after 2 s" in hangs.failure
    # What it had found before counts.
    assert [finding.what for finding in ends.findings] == ["it is so"]


def test_a_part_whose_packages_are_missing_is_left_out_and_they_are_named() -> None:
    (outcome,) = run(part("good", needs=("json", "no_such_package", "no_such.inner")))
    assert outcome.left_out == "not installed: no_such_package, no_such.inner"
    assert outcome.is_good


def test_parts_for_which_no_time_is_left_are_left_out() -> None:
    (outcome,) = run(part("good", needs=()), budget_s=1.0)
    assert outcome.left_out == "no time left"


def test_parts_for_a_gpu_are_left_out_on_a_cpu() -> None:
    (outcome,) = run(part("good", needs=(), needs_gpu=True), device="cpu")
    assert outcome.left_out == "needs a GPU"


def test_the_report_has_what_was_found_what_failed_and_what_was_left_out() -> None:
    outcomes = run(
        part("good", needs=()), part("ends", needs=()), part("wrong", needs=("no_such_package",))
    )
    table = as_markdown(outcomes, "cuda", "2026-01-01")
    assert "| good | it is so | yes 1/1 |" in table
    assert "| ends | what ends shows | **failed** |" in table
    assert "| wrong | what wrong shows | left out | not installed: no_such_package |" in table
    data = as_data(outcomes, "cuda", 3.0, "2026-01-01")
    assert data["is_good"] is False
    assert [each["name"] for each in data["parts"]] == ["good", "ends", "wrong"]


def test_findings_survive_the_way_between_processes_and_noise_does_not() -> None:
    finding = Finding(what="a | b", value=1234.5, unit="GB/s", note="é")
    assert Finding.of_line(finding.to_line()) == finding
    for noise in ("Loading weights: 100%", "{}", "[1]", '{"what": 1, "other": 2}', ""):
        assert Finding.of_line(noise) is None


@pytest.mark.parametrize("each", PARTS, ids=lambda each: each.name)
def test_every_part_has_a_module_of_its_own(each: Part) -> None:
    import importlib.util

    assert importlib.util.find_spec(f"bench.gpu_check.{each.module}") is not None
    assert each.most_s <= 200


def test_parts_that_only_need_torch_and_triton_come_with_little() -> None:
    """They run on a machine that has none of our other packages."""
    light = {part.name for part in PARTS if set(part.needs) <= {"torch", "triton", "numpy"}}
    assert {"machine", "kernels", "decode", "prefill", "nccl"} <= light
