"""Numbers in compiled Python that are computed as float32 whatever memory holds.

numba computes no half precision on CPUs. The kind of an array says what its values are: float32
itself; uint16 are the bits of bfloat16, int16 those of float16. Loops of these loads and stores are
vectorised, and a float32 array costs nothing more than it does by itself.
"""

from typing import TYPE_CHECKING, Any

import numba
import numpy as np
import numpy.typing as npt
from llvmlite import ir  # type: ignore[import-untyped]
from numba.extending import intrinsic

if TYPE_CHECKING:
    from torch import Tensor

Values = npt.NDArray[np.float32] | npt.NDArray[np.uint16] | npt.NDArray[np.int16]

KINDS: dict[str, type[np.generic]] = {
    "float32": np.float32,
    "bfloat16": np.uint16,
    "float16": np.int16,
}

_LINE_BYTES = 64  # of the processor's cache
_WORD, _HALF_WORD = ir.IntType(32), ir.IntType(16)
_FLOAT, _HALF = ir.FloatType(), ir.HalfType()


def as_values(tensor: "Tensor") -> Values:
    """A tensor's own memory as an array of its kind."""
    import torch

    kinds = {torch.bfloat16: torch.uint16, torch.float16: torch.int16}
    kind = kinds.get(tensor.dtype)
    values: Values = (tensor if kind is None else tensor.view(kind)).numpy()
    return values


def _loader(_typing: Any, array: Any, index: Any) -> Any:
    """array[index] as float32; `index` is not checked."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        value = builder.load(builder.gep(data, [arguments[1]]))
        if signature.args[0].dtype == numba.uint16:
            wide = builder.zext(value, _WORD)
            return builder.bitcast(builder.shl(wide, _WORD(16)), _FLOAT)
        if signature.args[0].dtype == numba.int16:
            return builder.fpext(builder.bitcast(value, _HALF), _FLOAT)
        return value

    return numba.float32(array, index), generate


def _storer(_typing: Any, array: Any, index: Any, value: Any) -> Any:
    """array[index] = value, rounded to nearest, ties to even; NaN stays NaN."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        value = arguments[2]
        if signature.args[0].dtype == numba.uint16:
            value = _rounded_bits(builder, value)
        elif signature.args[0].dtype == numba.int16:
            value = builder.bitcast(builder.fptrunc(value, _HALF), _HALF_WORD)
        builder.store(value, builder.gep(data, [arguments[1]]))
        return context.get_dummy_value()

    return numba.void(array, index, numba.float32), generate


def _rounded_bits(builder: Any, value: Any) -> Any:
    """The upper half of a float32's bits, which is a bfloat16."""
    bits = builder.bitcast(value, _WORD)
    is_odd = builder.and_(builder.lshr(bits, _WORD(16)), _WORD(1))
    rounded = builder.add(bits, builder.add(is_odd, _WORD(0x7FFF)))
    is_nan = builder.fcmp_unordered("uno", value, value)
    chosen = builder.select(is_nan, _WORD(0x7FC00000), rounded)
    return builder.trunc(builder.lshr(chosen, _WORD(16)), _HALF_WORD)


def _line_fetcher(_typing: Any, array: Any, index: Any) -> Any:
    """Begin to load the cache line of array[index]; never faults, whatever the index."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        values = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        address = builder.bitcast(builder.gep(values, [arguments[1]]), ir.IntType(8).as_pointer())
        number = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [address.type, number, number, number])
        prefetch = builder.module.declare_intrinsic("llvm.prefetch", (address.type,), kind)
        builder.call(prefetch, [address, number(0), number(2), number(1)])  # to read, into L2, data
        return context.get_dummy_value()

    return numba.types.void(array, index), generate


load_value: Any = intrinsic(_loader)
store_value: Any = intrinsic(_storer)
_fetch_line: Any = intrinsic(_line_fetcher)


@numba.njit(error_model="numpy", inline="always")
def fetch(memory: Values, first: np.uint64, count: np.uint64) -> None:
    values = np.uint64(_LINE_BYTES // memory.itemsize)
    for line in range((count + values - np.uint64(1)) // values):
        _fetch_line(memory, first + line * values)
