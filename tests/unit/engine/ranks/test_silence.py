import os
import signal
import subprocess
import time

from pdserve.engine.ranks.silence import MIN_LOOKS, TICK_S, Silence, Standstill, is_stopped


def test_silence_counts_from_the_last_word() -> None:
    silence = Silence(now_s=100.0)
    now_s = 100.0
    for _ in range(12):
        now_s += TICK_S
        silent_s = silence.tick(now_s)
    assert abs(silent_s - 12 * TICK_S) < 1e-9
    silence.heard()
    assert silence.tick(now_s) == 0.0


def test_own_pause_silences_nobody() -> None:
    silence = Silence(now_s=0.0)
    assert silence.tick(3600.0) <= 2 * TICK_S


def test_standstill_is_seen_while_a_process_is_stopped() -> None:
    with subprocess.Popen(["sleep", "60"]) as child:
        try:
            standstill = Standstill(child.pid)
            assert standstill.look(0.0) == 0.0
            os.kill(child.pid, signal.SIGSTOP)
            _wait_for(child.pid, stopped=True)
            seen = [standstill.look(10.0 + look) for look in range(MIN_LOOKS + 1)]
            assert seen == [0.0] * (MIN_LOOKS - 1) + [MIN_LOOKS - 1, MIN_LOOKS]
            os.kill(child.pid, signal.SIGCONT)
            _wait_for(child.pid, stopped=False)
            assert standstill.look(90.0) == 0.0
            os.kill(child.pid, signal.SIGSTOP)
            _wait_for(child.pid, stopped=True)
            assert standstill.look(91.0) == 0.0  # it begins anew
        finally:
            child.kill()
    assert not is_stopped(child.pid)


def _wait_for(pid: int, *, stopped: bool) -> None:
    until_s = time.monotonic() + 20
    while is_stopped(pid) is not stopped:
        assert time.monotonic() < until_s
