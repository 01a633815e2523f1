"""Draws on a device are those of the host."""

from random import Random

import numpy as np
import pytest
import torch
from torch import Tensor

from pdserve.domain.sampling import SamplingParams
from pdserve.domain.tokens import SampledToken
from pdserve.engine.contract import SampleStep
from pdserve.engine.device.device_draws import UNUSABLE, DrawPlan, draw, greedy_tokens
from pdserve.engine.sampling import draw_tokens
from tests.support.sim_device import DEVICE, SIM, SimRuntime

NUM_ROWS = 500
SIZES = (1, 7, 300, 900)
SHAPES = ("normal", "steep", "bfloat16", "few values", "flat", "ruled out")


def logits_of(shape: str, size: int, rng: np.random.Generator) -> Tensor:
    rows = rng.normal(0, 60 if shape == "steep" else 3, (NUM_ROWS, size))
    if shape == "few values":
        rows = np.round(rows / 3)
    if shape == "flat":
        rows[:] = 1.5
    if shape == "ruled out":
        rows[rng.random(rows.shape) < 0.9] = -np.inf
        rows[:, 0] = np.maximum(rows[:, 0], 0)
    logits = torch.from_numpy(rows.astype(np.float32))
    return logits.bfloat16() if shape == "bfloat16" else logits


def step_of(chooser: Random) -> SampleStep:
    params = SamplingParams(
        temperature=chooser.choice((0.0, 0.01, 0.3, 0.7, 1.0, 2.0)),
        top_k=chooser.choice((0, 0, 1, 5, 40, 900, 7000)),
        top_p=chooser.choice((1.0, 1.0, 0.999, 0.9, 0.5, 0.01)),
        seed=chooser.getrandbits(64),
    )
    return SampleStep(params=params, token_index=chooser.randrange(1000))


def drawn_on_device(logits: Tensor, steps: list[SampleStep]) -> tuple[list[int], DrawPlan]:
    plan = DrawPlan.of(steps, logits.shape[1])
    rows = logits.to(DEVICE)
    plain, cut = (
        torch.from_numpy(np.ascontiguousarray(columns)).to(DEVICE)
        for columns in (plan.plain, plan.cut)
    )
    before = SIM.num_waits
    tokens = draw(rows, greedy_tokens(rows), plain, cut)
    assert SIM.num_waits == before, "the host waits for the device"
    result: list[int] = tokens.cpu().tolist()
    return result, plan


@torch.inference_mode()
def test_twelve_thousand_draws_are_those_of_the_host() -> None:
    num_draws = 0
    with SimRuntime():
        for shape in SHAPES:
            for size in SIZES:
                seed = sum(shape.encode()) + size
                logits = logits_of(shape, size, np.random.default_rng(seed))
                chooser = Random(seed)
                steps = [step_of(chooser) for _ in range(NUM_ROWS)]
                tokens, plan = drawn_on_device(logits, steps)
                assert not plan.host_rows
                host = draw_tokens(logits.float().numpy(), steps, ())
                expected = [each.token_id for each in host if isinstance(each, SampledToken)]
                assert tokens == expected, f"{shape} {size}"
                num_draws += len(tokens)
    assert num_draws == 12_000


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@torch.inference_mode()
def test_rows_without_a_usable_logit_give_none(bad: float) -> None:
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(1))
    for row in (1, 3, 5):
        logits[row, ... if bad == -torch.inf else 7] = bad
    params = [
        *[SamplingParams()] * 2,
        *[SamplingParams(temperature=1.0)] * 2,
        *[SamplingParams(temperature=1.0, top_p=0.9)] * 2,
    ]
    with SimRuntime():
        steps = [SampleStep(params=each, token_index=0) for each in params]
        tokens, _ = drawn_on_device(logits, steps)
    assert [token == UNUSABLE for token in tokens] == [False, True] * 3


def test_what_is_rare_is_left_to_the_host() -> None:
    params = [
        SamplingParams(),
        SamplingParams(logprobs=0),
        SamplingParams(min_tokens=3, temperature=1.0),
        SamplingParams(min_tokens=2, temperature=1.0),
    ]
    plan = DrawPlan.of([SampleStep(params=each, token_index=2) for each in params], 100)
    assert plan.host_rows == (1, 2)
    assert plan.plain[0].tolist() == [3]
    assert plan.cut.shape == (5, 0)
