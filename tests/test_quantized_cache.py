"""llmcomp/cache_ops.py and llmcomp/quantized_cache.py: codes and scales behave as the tensor that they stand for."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from llmcomp.cache_ops import KV_DTYPES, LEVELS, quantized
from llmcomp.options import KV_DTYPES as NAMES
from llmcomp.quantized_cache import QuantizedCacheTensor

B, H, S, D = 2, 3, 5, 8
DTYPES = pytest.mark.parametrize("dtype", KV_DTYPES.values(), ids=KV_DTYPES)


def held(x: Tensor, dtype: torch.dtype = torch.int8) -> QuantizedCacheTensor:
    return QuantizedCacheTensor(*quantized(x, dtype), x.dtype)


def values(*shape: int) -> Tensor:
    return torch.randn(*(shape or (B, H, S, D)), generator=torch.Generator().manual_seed(len(shape)))


def test_the_option_names_what_there_is() -> None:
    assert tuple(KV_DTYPES) == NAMES and set(KV_DTYPES.values()) == set(LEVELS)


@pytest.mark.parametrize("width", [torch.float32, torch.bfloat16, torch.float16])
def test_int8_is_off_by_half_a_step(width: torch.dtype) -> None:
    x = (values() * torch.logspace(-3, 3, S)[:, None]).to(width)
    codes, scale = quantized(x, torch.int8)
    assert codes.dtype == torch.int8 and scale.shape == (B, H, S, 1) and scale.dtype == torch.float32
    error = (codes.double() * scale.double() - x.double()).abs()
    assert (error <= scale.double() / 2 * (1 + 1e-6)).all()
    assert (codes.abs().amax(-1) == 127).all()


def test_fp8_is_off_by_half_a_step() -> None:
    x = values()
    codes, scale = quantized(x, torch.float8_e4m3fn)
    error = (codes.double() * scale.double() - x.double()).abs()
    # Three bits behind the point; below 2^-6 steps of 2^-9.
    step = scale.double() * torch.maximum(2.0 ** (codes.double().abs().log2().floor() - 3), torch.tensor(2.0**-9))
    assert (error <= step / 2 * (1 + 1e-6)).all() and (codes.float().abs().amax(-1) == 448).all()


@DTYPES
def test_rows_of_zeros_and_rows_that_are_no_numbers(dtype: torch.dtype) -> None:
    x = values()
    x[0, 0, 0], x[0, 0, 1, 2], x[0, 0, 2, 3] = 0.0, torch.nan, torch.inf
    back = held(x, dtype).dequantized()
    assert (back[0, 0, 0] == 0).all() and back[0, 0, 1].isnan().all() and not back[0, 0, 2].isfinite().any()
    assert back[0, 0, 3:].isfinite().all()


@DTYPES
@pytest.mark.parametrize(
    "fn",
    [
        lambda t: t[:, :, :3],
        lambda t: t[..., -4:-1, :],
        lambda t: t[torch.tensor([1, 0, 1]), ...],
        lambda t: t.index_select(0, torch.tensor([1, 1])),
        lambda t: t.narrow(2, 1, 2).clone(),
        lambda t: t.detach(),
        lambda t: t.contiguous(),
        lambda t: t.to("cpu", copy=True),
        lambda t: t[0],
        copy.deepcopy,
    ],
    ids="crop window reorder beams narrow detach contiguous move select deepcopy".split(),
)
def test_what_caches_do_works_on_codes(fn: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    t = held(values(), dtype)
    result = fn(t)
    assert isinstance(result, QuantizedCacheTensor) and result.codes.dtype == dtype
    assert torch.equal(result.dequantized(), fn(t.dequantized())) and result.dtype == t.dtype


@pytest.mark.parametrize(
    "fn",
    [
        lambda t: t + 1,
        lambda t: t.mean(-1),
        lambda t: t.transpose(2, 3),
        lambda t: t[..., :2],
        lambda t: t.float(),
        lambda t: t.repeat_interleave(2, 0),
        lambda t: t == 0,
        lambda t: t[t > 0],
    ],
    ids="add mean transpose channels cast repeat compare mask".split(),
)
def test_anything_else_works_on_what_they_stand_for(fn: Callable[[Tensor], Tensor]) -> None:
    t = held(values().bfloat16())
    result = fn(t)
    assert type(result) is Tensor and torch.equal(result, fn(t.dequantized()))


@DTYPES
def test_concatenation_quantizes_what_is_new(dtype: torch.dtype) -> None:
    past, new = held(values(), dtype), values(B, H, 2, D)
    grown = torch.cat([past, new], dim=-2)
    assert isinstance(grown, QuantizedCacheTensor) and grown.shape == (B, H, S + 2, D)
    assert torch.equal(grown.codes.view(torch.uint8)[:, :, :S], past.codes.view(torch.uint8))
    assert torch.equal(grown[:, :, S:].dequantized(), held(new, dtype).dequantized())
    rows = torch.cat([past, past], dim=0)
    assert isinstance(rows, QuantizedCacheTensor) and rows.shape == (2 * B, H, S, D)
    assert type(torch.cat([past, new.double()], 2)) is Tensor and type(torch.cat([past, past], -1)) is Tensor


def test_writing_quantizes() -> None:
    t, new = held(values()), values(B, H, 2, D)
    t.index_copy_(2, torch.tensor([0, 3]), new)
    assert torch.equal(t[:, :, 3].dequantized(), held(new)[:, :, 1].dequantized())
    t[:, :, :2].copy_(new)
    assert torch.equal(t[:, :, :2].dequantized(), held(new).dequantized())
    expected = held(t.dequantized() * 2).dequantized()
    t.mul_(2)
    assert isinstance(t, QuantizedCacheTensor) and torch.equal(t.dequantized(), expected)


@DTYPES
def test_what_caches_of_fixed_size_do_works_on_codes(dtype: torch.dtype) -> None:
    # Codes that quantizing again would change.
    t, new = QuantizedCacheTensor(values().to(dtype), torch.ones(B, H, S, 1), torch.float32), values(B, H, 1, D)
    rolled = t.roll(-1, dims=-2)
    rolled[:, :, torch.tensor([-1])] = new
    assert isinstance(rolled, QuantizedCacheTensor)
    assert torch.equal(rolled.codes[:, :, :-1].float(), t.codes[:, :, 1:].float())
    assert torch.equal(rolled[:, :, -1:].dequantized(), held(new, dtype).dequantized())
    place = t.codes.data_ptr()
    t.copy_(rolled)
    assert torch.equal(t.dequantized(), rolled.dequantized()) and t.codes.data_ptr() == place
    t.index_copy_(2, torch.tensor([1]), new)
    assert torch.equal(t[:, :, 1:2].dequantized(), held(new, dtype).dequantized())
    t.zero_()
    assert not t.scale.any() and not t.codes.view(torch.uint8).any() and t.codes.data_ptr() == place


def test_writes_of_few_numbers_and_sums() -> None:
    t = held(values())
    expected = t.dequantized()
    for x in (t, expected):
        x[:, :, torch.tensor([1])] = 2.0
        x[:, :, torch.tensor([0])] = values(B, H, 1, 1)
        torch.ops.aten.index_put_(x, [None, None, torch.tensor([2])], torch.ones(B, H, 1, D), True)
    torch.testing.assert_close(t.dequantized(), expected, rtol=0, atol=0.05)
    assert type(t.roll(1, dims=-1)) is Tensor and type(t.roll(1)) is Tensor


def test_it_says_what_it_holds() -> None:
    t = held(values(1, 1, 1, 2))
    assert "int8" in repr(t) and t.element_size() == 4 and t.codes.element_size() == 1
