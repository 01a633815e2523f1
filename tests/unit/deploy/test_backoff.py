from deploy.backoff import MAX_BACKOFF_S, SETTLED_S, Backoff


def test_first_replacement_comes_at_once_and_a_crash_loop_slows_down() -> None:
    backoff = Backoff()
    pauses = [backoff.after_life(0.1) for _ in range(12)]
    assert pauses[:4] == [0.0, 0.2, 0.4, 0.8]
    assert pauses == sorted(pauses)
    assert pauses[-1] == MAX_BACKOFF_S


def test_life_that_lasted_starts_the_pauses_anew() -> None:
    backoff = Backoff()
    for _ in range(5):
        backoff.after_failure()
    assert backoff.after_life(SETTLED_S) == 0.0
    assert backoff.after_life(SETTLED_S - 1) > 0
