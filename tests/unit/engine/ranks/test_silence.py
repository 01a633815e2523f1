from pdserve.engine.ranks.silence import TICK_S, Silence


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
