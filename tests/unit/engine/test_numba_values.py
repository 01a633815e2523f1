import numba
import numpy as np
import torch

from pdserve.engine.numba_values import Values, as_values, load_value, store_value

torch.set_num_threads(1)


@numba.njit(error_model="numpy")
def copy(source: Values, target: Values) -> None:
    for place in range(np.uint64(len(source))):
        store_value(target, place, load_value(source, place))


def bits_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view({2: torch.int16, 4: torch.int32}[tensor.itemsize])


def test_every_half_precision_number_is_read_and_written_exactly() -> None:
    all_bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.bfloat16, torch.float16):
        halves = all_bits.view(dtype)
        wide, back = torch.empty(2**16), torch.empty(2**16, dtype=dtype)
        copy(as_values(halves), as_values(wide))
        copy(as_values(halves), as_values(back))
        is_number = ~halves.isnan()
        assert torch.equal(bits_of(wide)[is_number], bits_of(halves.float())[is_number])
        assert torch.equal(bits_of(back)[is_number], all_bits[is_number])
        assert bool(
            (wide.isnan() == halves.isnan()).all() and (back.isnan() == halves.isnan()).all()
        )


def test_float32_is_rounded_as_torch_rounds_it() -> None:
    generator = torch.Generator().manual_seed(5)
    bits = torch.randint(-(2**31), 2**31, (200_000,), generator=generator).to(torch.int32)
    ties = (bits & ~0xFFFF) | 0x8000  # halfway between two bfloat16
    close = torch.randn(100_000, generator=generator)
    for dtype in (torch.bfloat16, torch.float16):
        for wide in (bits.view(torch.float32), ties.view(torch.float32), close):
            rounded = torch.empty(len(wide), dtype=dtype)
            copy(as_values(wide), as_values(rounded))
            expected = wide.to(dtype)
            is_number = ~expected.isnan()
            assert torch.equal(bits_of(rounded)[is_number], bits_of(expected)[is_number])
            assert torch.equal(rounded.isnan(), expected.isnan())
