"""Ways to keep a weight and to multiply rows with it, and which is the fastest on this machine.

Which library is ahead depends on the processor, the dtype, the shape and the number of rows. On an
EPYC with AVX-512 oneDNN's packed weights need half to nine tenths of the time of MKL, which is what
`torch.nn.functional.linear` takes for float32; on processors without AVX-512 MKL can be ahead; and
float16 that the processor does not multiply is better widened to float32 first. So each shape is
tried at load. The values are the same but for rounding, whatever is chosen: sampling does not
depend on it (see `pdserve.engine.sampling`).

Packing by MKL (`torch.ops.mkl._mkl_linear`) is not among the forms: it serves one number of rows
for each packed copy, and needs the plain weight beside it for all others.
"""

import functools
import math
import time
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]  # of rows, a weight in its form, bias
Forward = Callable[[Tensor], Tensor]
Times = Mapping[tuple[str, Product], tuple[float, ...]]  # seconds by `TRIED_ROWS`

TRIED_ROWS = (1, 16, 64)
ROW_LIMITS = (4, 32)  # the first product is for at most 4 rows, the second for at most 32
BUDGET_S = 0.5  # of the processor, for all trials of a model
MAX_TRIED_VALUES = 1 << 20  # of a weight; more columns of the result take their share more
ROW_WEIGHTS = (0.25, 0.25, 0.5)  # a worker that is short of time has many rows in a step
GAIN = 1.25
"""What another form must be faster by. Trials find weights in the processor's caches, where those
of a model are not, and this favours forms that are not packed; the rest is noise."""

_NUM_SAMPLES = 3
_NUM_LOOKS = 4
_SAMPLE_S = 1e-4
_TYPICAL_ROWS = 64
_WIDENED_VALUES = 1 << 18  # in float32 they stay in a core's own cache


@dataclass(frozen=True, slots=True)
class WeightShape:
    out_features: int
    in_features: int
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Form:
    """How a weight lies in memory, and the products that take it so. `is_copy`: not as given."""

    name: str
    lay_out: Callable[[Tensor], Tensor]
    products: tuple[Product, ...]
    is_copy: bool = True


@dataclass(frozen=True, slots=True)
class Choice:
    """A form, and a product for few, some and many rows (see `ROW_LIMITS`)."""

    form: Form
    products: tuple[Product, ...]

    def bind(self, weight: Tensor, bias: Tensor | None) -> Forward:
        """The layer of these parameters; `weight` is held only where its form is the plain one."""
        laid_out = self.form.lay_out(weight.detach())
        bias = None if bias is None else bias.detach()
        products, in_features = self.products, weight.shape[1]
        if len(set(products)) == 1:
            only = products[0]
            return lambda rows: only(rows, laid_out, bias)

        def forward(rows: Tensor) -> Tensor:
            place = bisect_left(ROW_LIMITS, rows.numel() // in_features)
            return products[place](rows, laid_out, bias)

        return forward


def choose_forms(shapes: Mapping[WeightShape, int]) -> dict[WeightShape, Choice]:
    """A choice for each shape; `shapes` says how many weights there are of it.

    The largest are tried first; those that the budget does not reach keep the usual form.
    """
    ends_s = time.thread_time() + BUDGET_S
    choices = {}
    sizes = {shape: num * shape.out_features * shape.in_features for shape, num in shapes.items()}
    for shape in sorted(shapes, key=lambda shape: -sizes[shape]):
        forms = forms_of(shape.dtype)
        times = _tried(shape) if time.thread_time() < ends_s else {}
        choices[shape] = fastest(forms, times)
    return choices


def fastest(forms: Sequence[Form], times: Times) -> Choice:
    """The form that needs the least time over all numbers of rows, by `ROW_WEIGHTS`.

    The first form is the usual one, and the first product of each: another is taken if it is
    faster by more than noise. Without `times` nothing is.
    """
    if not times:
        return Choice(forms[0], (forms[0].products[0],) * len(TRIED_ROWS))
    choices = [Choice(form, _best_products(form, times)) for form in forms]
    usual, best = choices[0], min(choices, key=lambda choice: _cost(choice, times))
    return best if _cost(usual, times) - _cost(best, times) > math.log(GAIN) else usual


def _best_products(form: Form, times: Times) -> tuple[Product, ...]:
    def best(place: int) -> Product:
        usual = form.products[0]
        other = min(form.products, key=lambda product: times[form.name, product][place])
        is_faster = times[form.name, usual][place] > GAIN * times[form.name, other][place]
        return other if is_faster else usual

    return tuple(best(place) for place in range(len(TRIED_ROWS)))


def _cost(choice: Choice, times: Times) -> float:
    """The mean logarithm of its times."""
    return sum(
        weight * math.log(times[choice.form.name, product][place])
        for place, (product, weight) in enumerate(zip(choice.products, ROW_WEIGHTS, strict=True))
    )


@functools.cache
def _tried(shape: WeightShape) -> Times:
    """The least times of several trials; of one alone if the usual form is ahead in it.

    On a busy machine noise can put another form there. Each further look costs nothing where none
    is ahead.
    """
    forms, times = forms_of(shape.dtype), _trial(shape)
    for _ in range(_NUM_LOOKS - 1):
        if fastest(forms, times).form is forms[0]:
            break
        again = _trial(shape)
        times = {key: tuple(map(min, taken, again[key])) for key, taken in times.items()}
    return times


@torch.inference_mode()
def _trial(shape: WeightShape) -> Times:
    """Time all products with a weight of this shape, or with its first columns of the result.

    All take turns, and the least of a few samples counts: what else the machine does only adds.
    """
    out_features = min(shape.out_features, max(64, MAX_TRIED_VALUES // shape.in_features))
    weight = torch.ones(out_features, shape.in_features, dtype=shape.dtype)
    laid_out = {form.name: form.lay_out(weight) for form in forms_of(shape.dtype)}
    products = [(form.name, product) for form in forms_of(shape.dtype) for product in form.products]
    times: dict[tuple[str, Product], tuple[float, ...]] = dict.fromkeys(products, ())
    for num_rows in TRIED_ROWS:
        rows = torch.ones(1, num_rows, shape.in_features, dtype=shape.dtype)
        samples: dict[tuple[str, Product], list[float]] = {key: [] for key in products}
        for turn in range(_NUM_SAMPLES + 1):
            for (name, product), taken in samples.items():
                spent_s = _sample(functools.partial(product, rows, laid_out[name], None), turn)
                taken += [spent_s] if turn else []  # the first turn compiles and fills caches
        times |= {key: (*times[key], min(taken)) for key, taken in samples.items()}
    return times


def _sample(run: Callable[[], Tensor], turn: int) -> float:
    """Seconds of the processor for one run, of as many as make a time that can be measured."""
    began_s, num_runs = time.thread_time(), 0
    while True:
        run()
        num_runs += 1
        spent_s = time.thread_time() - began_s
        if turn == 0 or spent_s >= _SAMPLE_S:
            return spent_s / num_runs


@functools.cache
def forms_of(dtype: torch.dtype) -> tuple[Form, ...]:
    """Those that this machine has for `dtype`, the usual one first."""
    linear: Any = torch.nn.functional.linear
    if not _packs(dtype):
        products = (linear,) if dtype is torch.float32 else (linear, _widened_linear)
        return (Form("plain", _as_given, products, is_copy=False),)
    forms = (
        Form("packed", _pack, (_packed_linear,)),
        Form("plain", _as_given, (linear,), is_copy=False),
    )
    if dtype is torch.float32:
        return (*forms, Form("transposed", _transpose, (linear,)))
    return forms


def _packs(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies `dtype` by the processor's own instructions."""
    onednn: Any = torch.backends.mkldnn
    if not onednn.is_available():
        return False
    operators: Any = torch.ops.mkldnn
    if dtype is torch.bfloat16:
        return bool(operators._is_mkldnn_bf16_supported())
    return dtype is torch.float32 or bool(operators._is_mkldnn_fp16_supported())


def _as_given(weight: Tensor) -> Tensor:
    return weight


def _transpose(weight: Tensor) -> Tensor:
    """[out, in], but with the values of one input beside each other."""
    return weight.t().contiguous().t()


def _pack(weight: Tensor) -> Tensor:
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, _TYPICAL_ROWS)
    return packed


def _packed_linear(rows: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    run: Any = torch.ops.mkldnn._linear_pointwise.default
    result: Tensor = run(rows, packed, bias, "none", [], "")
    return result


def _widened_linear(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """By float32, a few columns of the result at a time, so that no whole wide weight is made."""
    wide = rows.reshape(-1, rows.shape[-1]).float()
    out = rows.new_empty(len(wide), len(weight))
    step = max(64, _WIDENED_VALUES // weight.shape[1])
    for first in range(0, len(weight), step):
        columns = slice(first, first + step)
        part = None if bias is None else bias[columns].float()
        out[:, columns] = torch.nn.functional.linear(wide, weight[columns].float(), part)
    return out.view(*rows.shape[:-1], len(weight))
