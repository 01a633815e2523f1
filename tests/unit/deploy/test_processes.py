from pathlib import Path

from deploy.processes import NUM_LOG_LINES, LocalProcess, describe_exit
from pdserve.config.processes import RouterSettings, WorkerSettings


def test_exit_codes_are_told_in_words() -> None:
    assert describe_exit(2) == "exited with code 2"
    assert describe_exit(-9) == "was killed by SIGKILL"
    assert describe_exit(-77) == "was killed by signal 77"


def test_last_words_are_the_end_of_the_log(tmp_path: Path) -> None:
    path = tmp_path / "router.log"
    process = LocalProcess("router", "router", RouterSettings(), path)
    assert process.last_words() == "    (empty)"
    path.write_text("".join(f"line {index}\n" for index in range(5000)) + "long" * 1000)
    lines = process.last_words().splitlines()
    assert len(lines) == NUM_LOG_LINES
    assert lines[0] == f"    line {5000 - NUM_LOG_LINES + 1}"
    assert len(lines[-1]) < 400


def test_only_workers_have_blocks(tmp_path: Path) -> None:
    worker = WorkerSettings(role="decode", worker_id="decode-0")
    assert LocalProcess("decode-0", worker.role, worker, tmp_path).num_blocks == 1024
    assert LocalProcess("router", "router", RouterSettings(), tmp_path).num_blocks == 0
