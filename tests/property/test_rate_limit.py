"""A limit on the rate: what it takes in the long run, at once, and of a plan's own arrivals."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from placement.search.bursts import allowed_burst, burst_above
from router.rate_limit import RateLimit

GAPS = st.lists(
    st.sampled_from((0.0, 1e-3, 0.1, 0.5, 1.0)) | st.floats(0, 3), min_size=1, max_size=200
)
RATES = st.sampled_from((0.3, 1.0, 2.0, 7.5, 1000.0))


def num_taken(arrivals: "np.ndarray[tuple[int], np.dtype[np.float64]]", limit: RateLimit) -> int:
    taken = 0
    for now_s in arrivals.tolist():
        if limit.wait_s(now_s) == 0:
            limit.take(now_s)
            taken += 1
    return taken


@given(gaps=GAPS, rate=RATES)
def test_bucket_of_the_planner_refuses_none_of_its_arrivals_and_a_smaller_one_some(
    gaps: list[float], rate: float
) -> None:
    arrivals = np.cumsum(gaps)
    burst = burst_above(arrivals, rate)
    assert num_taken(arrivals, RateLimit(rate, burst)) == len(arrivals)
    if burst > 1:
        assert num_taken(arrivals, RateLimit(rate, burst - 1)) < len(arrivals)


@given(gaps=GAPS, rate=RATES, burst=st.integers(1, 20))
def test_never_more_is_taken_than_the_burst_and_what_the_rate_adds(
    gaps: list[float], rate: float, burst: int
) -> None:
    """In any stretch of time; and whoever comes back when told to is taken."""
    limit = RateLimit(rate, burst)
    now_s, taken_s = 0.0, []
    for gap_s in gaps:
        now_s += gap_s
        if wait_s := limit.wait_s(now_s):
            assert wait_s <= 1 / rate * (1 + 1e-6)
            now_s += wait_s * (1 + 1e-6)
            assert limit.wait_s(now_s) == 0
        limit.take(now_s)
        taken_s.append(now_s)
    for first in range(len(taken_s)):
        for last in range(first, len(taken_s)):
            most = burst + rate * (taken_s[last] - taken_s[first])
            assert last - first + 1 <= most + 1e-3


@given(seed=st.integers(0, 10_000), cv=st.sampled_from((0.5, 1.0, 3.0)))
def test_an_hour_of_traffic_at_the_very_rate_goes_through(seed: int, cv: float) -> None:
    """Of another draw than any that was simulated."""
    rng, rate = np.random.default_rng(seed), 2.0
    gaps = rng.gamma(1 / cv**2, cv**2 / rate, 7200)
    arrivals = np.cumsum(gaps)
    burst = allowed_burst(0, rate=rate, gap_cv=cv)
    assert num_taken(arrivals, RateLimit(rate, burst)) >= 0.995 * len(arrivals), f"seed {seed}"
