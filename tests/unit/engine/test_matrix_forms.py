import time
from collections.abc import Iterator
from random import Random

import pytest
import torch
from torch import Tensor

from pdserve.engine import matrix_forms
from pdserve.engine.matrix_forms import (
    ROW_LIMITS,
    TRIED_ROWS,
    Choice,
    Form,
    Product,
    Times,
    WeightShape,
    choose_forms,
    fastest,
    forms_of,
)

torch.set_num_threads(1)

TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def product_of(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.nn.functional.linear(rows, weight, bias)


def first(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return product_of(rows, weight, bias)


def second(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return product_of(rows, weight, bias) + 1


USUAL = Form("usual", torch.clone, (first,))
OTHER = Form("other", torch.clone, (first, second))


def every_product() -> Iterator[tuple[torch.dtype, Choice]]:
    for dtype in TOLERANCES:
        for form in forms_of(dtype):
            for product in form.products:
                yield dtype, Choice(form, (product,) * len(TRIED_ROWS))


@torch.inference_mode()
def test_every_form_gives_the_product_rounded_once() -> None:
    generator = torch.Generator().manual_seed(3)
    for dtype, choice in every_product():
        for out_features, in_features in ((40, 24), (1, 8), (700, 4096)):
            weight = torch.randn(out_features, in_features, generator=generator).to(dtype)
            bias = torch.randn(out_features, generator=generator).to(dtype)
            for given in (bias, None):
                forward = choice.bind(weight, given)
                for shape in ((1, 1), (1, 5), (70,), (2, 3)):
                    rows = torch.randn(*shape, in_features, generator=generator).to(dtype)
                    double = None if given is None else given.double()
                    expected = torch.nn.functional.linear(rows.double(), weight.double(), double)
                    result = forward(rows)
                    assert result.dtype is dtype
                    assert result.shape == expected.shape
                    error = (result.double() - expected).abs()
                    limit = TOLERANCES[dtype] * (expected.abs() + in_features**0.5)
                    assert bool((error <= limit).all()), (dtype, choice)


def test_another_form_is_taken_only_if_it_is_clearly_faster() -> None:
    usual: Times = {("usual", first): (1.0, 1.0, 1.0)}
    for time_s, name in ((0.5, "other"), (0.75, "other"), (0.85, "usual"), (2.0, "usual")):
        times: Times = {**usual, ("other", first): (time_s,) * 3, ("other", second): (9.0,) * 3}
        assert fastest((USUAL, OTHER), times).form.name == name
    assert fastest((USUAL, OTHER), {}) == Choice(USUAL, (first,) * 3)


def test_many_rows_count_more_than_few() -> None:
    times: dict[tuple[str, Product], tuple[float, ...]] = {
        ("usual", first): (4.0, 1.0, 1.0),
        ("other", first): (1.0, 1.0, 2.0),
        ("other", second): (9.0, 9.0, 9.0),
    }
    assert fastest((USUAL, OTHER), times).form is USUAL
    times["other", first] = (1.0, 1.0, 0.8)
    assert fastest((USUAL, OTHER), times).form is OTHER


@torch.inference_mode()
def test_product_is_chosen_by_the_number_of_rows() -> None:
    times: Times = {("other", first): (1.0, 3.0, 1.0), ("other", second): (2.0, 1.0, 0.99)}
    choice = fastest((OTHER,), times)
    assert choice.products == (first, second, first)
    forward = choice.bind(torch.zeros(2, 3), None)
    few, many = ROW_LIMITS
    assert TRIED_ROWS[0] <= few < TRIED_ROWS[1] <= many < TRIED_ROWS[2]
    for num_rows in (0, 1, few, few + 1, many, many + 1, 1000):
        is_second = few < num_rows <= many
        expected = torch.full((1, num_rows, 2), float(is_second))
        assert torch.equal(forward(torch.ones(1, num_rows, 3)), expected)


def test_trials_end_with_their_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is large is tried first; the rest keeps the usual form."""
    tried: list[WeightShape] = []

    def try_shape(shape: WeightShape) -> Times:
        tried.append(shape)
        clock[0] += 0.3
        return {
            (form.name, product): (1.0 / (place + 1),) * len(TRIED_ROWS)
            for place, form in enumerate(forms_of(shape.dtype))
            for product in form.products
        }

    clock = [5.0]
    monkeypatch.setattr(matrix_forms, "_tried", try_shape)
    monkeypatch.setattr(time, "thread_time", lambda: clock[0])
    sizes = [8, 32, 16]
    Random(0).shuffle(sizes)
    shapes = {WeightShape(size, size, torch.float32): 1 for size in sizes}
    choices = choose_forms(shapes)
    forms = forms_of(torch.float32)
    assert [shape.out_features for shape in tried] == [32, 16]
    chosen = {shape.out_features: choice.form for shape, choice in choices.items()}
    assert chosen == {32: forms[-1], 16: forms[-1], 8: forms[0]}


def test_trial_of_a_huge_weight_is_short_and_makes_no_such_weight() -> None:
    times = matrix_forms._tried(WeightShape(1 << 30, 64, torch.float32))
    assert {name for name, _ in times} == {form.name for form in forms_of(torch.float32)}
    assert all(len(taken) == len(TRIED_ROWS) and min(taken) > 0 for taken in times.values())


def test_other_form_that_is_ahead_once_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    forms = forms_of(torch.float32)
    asked: list[WeightShape] = []

    def trial(shape: WeightShape) -> Times:
        """A busy moment in the first trial of the usual form."""
        asked.append(shape)
        usual_s = 2.0 if len(asked) == 1 else 0.9
        return {
            (form.name, product): (usual_s if form is forms[0] else 1.0,) * len(TRIED_ROWS)
            for form in forms
            for product in form.products
        }

    monkeypatch.setattr(matrix_forms, "_trial", trial)
    shape = WeightShape(11, 13, torch.float32)
    assert choose_forms({shape: 1})[shape].form is forms[0]
    assert asked == [shape, shape]
