"""What is found out of a model by running it beside a far position, and what is refused."""

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

from pdserve.domain.errors import LocalFault
from pdserve.domain.lengths import ONE_REGIME, LengthRule
from pdserve.engine import paged_model
from pdserve.engine.paged_model import PagedModel
from tests.support.tiny_models import SWITCH, tiny_model


def rule_of(model: Any) -> LengthRule:
    paged = PagedModel(model, block_size=8, num_blocks=4, dtype="float32")
    paged.close()
    return paged.length_rule


def scale_rotation(model: Any, factor: Callable[[int], float]) -> None:
    """Let the rotary embedding depend on the largest position of a step, as LongRoPE's does."""
    rotary = model.model.rotary_emb
    plain = rotary.forward

    def forward(states: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        turned = plain(states, position_ids * factor(int(position_ids.max())))
        return turned[0], turned[1]

    rotary.forward = forward


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "llama/yarn", "llama/dynamic"])
def test_model_without_switches_has_one_regime(name: str) -> None:
    assert rule_of(tiny_model(name)) == ONE_REGIME


@pytest.mark.parametrize(
    ("name", "switches", "recomputes"),
    [
        ("phi3/longrope", (SWITCH,), True),
        ("phimoe/longrope", (SWITCH,), True),
        ("llama/longrope", (SWITCH,), False),
        ("gemma3_text/two-switches", (SWITCH, SWITCH + 6), False),
    ],
)
def test_switches_are_found_and_whether_kv_is_computed_again(
    name: str, switches: tuple[int, ...], recomputes: bool
) -> None:
    rule = rule_of(tiny_model(name))
    assert rule == LengthRule(switches=switches, recomputes=recomputes)


def test_switch_of_a_kind_unknown_here_is_found_by_its_number() -> None:
    model = tiny_model("llama", stretched={"after_position": 50})
    scale_rotation(model, lambda last: 0.5 if last >= 50 else 1.0)
    assert rule_of(model) == LengthRule(switches=(50,))


@pytest.mark.parametrize(
    "factor",
    [
        pytest.param(lambda last: 1 / (1 + last), id="with every token"),
        pytest.param(
            lambda last: 0.5 if last >= 70 else 1.0, id="after a length not in the config"
        ),
        pytest.param(lambda last: 1.0 if last < 255 else 0.9, id="at the last position only"),
    ],
)
def test_dependence_on_the_length_that_is_no_named_switch_is_refused(
    factor: Callable[[int], float],
) -> None:
    model = tiny_model("llama")
    scale_rotation(model, factor)
    with pytest.raises(LocalFault, match=r"llama cannot be served: .*depends on how long"):
        rule_of(model)


def growing() -> Callable[[int], float]:
    longest = 0

    def factor(last: int) -> float:
        nonlocal longest
        longest = max(longest, last)
        return 1.0 if longest < 100 else 0.5

    return factor


def counting() -> Callable[[int], float]:
    steps = iter(range(1, 1000))
    return lambda _: 1 / next(steps)


@pytest.mark.parametrize("make", [growing, counting])
def test_dependence_on_earlier_steps_is_refused(make: Callable[[], Callable[[int], float]]) -> None:
    model = tiny_model("llama")
    scale_rotation(model, make())
    with pytest.raises(LocalFault, match="llama cannot be served"):
        rule_of(model)


def test_position_that_the_model_cannot_compute_is_named() -> None:
    model = tiny_model("gpt2")
    model.config.n_positions = 300  # the table has 256
    with pytest.raises(LocalFault, match=r"gpt2 cannot be served: .* a token at position 299"):
        rule_of(model)


def test_switch_that_is_not_followed_is_noticed_by_the_logits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(paged_model, "find_length_rule", lambda *_: ONE_REGIME)
    with pytest.raises(LocalFault, match=r"phi3 cannot be served: .*other logits"):
        rule_of(tiny_model("phi3/longrope"))


def test_length_beside_the_threshold_is_of_the_lower_regime() -> None:
    rule = LengthRule(switches=(8, 20), recomputes=True)
    assert [rule.regime(length) for length in (1, 8, 9, 20, 21)] == [0, 0, 1, 1, 2]
    assert len({rule.salt(length) for length in (8, 9, 21)}) == 3
    assert rule.salt(1) == ONE_REGIME.salt(100) == b""
    assert rule.is_recomputed(8, 9)
    assert not rule.is_recomputed(9, 20)
    assert not LengthRule(switches=(8,)).is_recomputed(8, 9)
