"""Whole programs of the Triton target: the host code that a GPU would run, its kernels under the interpreter."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.nn import functional as F

from llmcomp.backend import Compiled, compile_model
from llmcomp.cache_ops import KV_DTYPES, quantized
from llmcomp.options import read_options
from llmcomp.quantized_cache import QuantizedCacheTensor
from llmcomp.report import GraphReport
from tests.numerics import assert_equal_float32
from tests.triton_worker import interpreted


def compiled(
    fn: Callable[..., Any], reports: list[GraphReport], dynamic: bool | None = True, **options: object
) -> Callable[..., Any]:
    """`fn` behind the Triton target, all sizes symbolic unless said otherwise."""

    def backend(gm: GraphModule, inputs: Sequence[Any]) -> Compiled:
        return compile_model(gm, inputs, read_options({"target": "triton", **options}), reports.append)

    torch._dynamo.reset()
    return torch.compile(fn, backend=backend, dynamic=dynamic)


def parameters(vocabulary: int = 11, width: int = 24) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(vocabulary, width), torch.randn(width), torch.randn(40, width)


def next_tokens(ids: Tensor, table: Tensor, weight: Tensor, head: Tensor) -> Tensor:
    """An embedding, a norm, a projection, and something left to eager."""
    return F.linear(F.rms_norm(F.embedding(ids, table), weight.shape, weight), head).topk(3).values


@interpreted
def test_a_program_of_several_shapes() -> None:
    reports: list[GraphReport] = []
    fast, given = compiled(next_tokens, reports), parameters()
    with torch.no_grad():
        for shape in ((2, 3), (3, 9), (4, 2)):
            ids = torch.randint(11, shape)
            assert_equal_float32(fast(ids, *given), next_tokens(ids, *given))
    (report,) = reports
    assert report.program.target == "triton" and len(report.program.kernels) >= 2
    assert "aten.topk.default" in [e.op for e in report.program.externs]


@interpreted
def test_an_index_out_of_range_raises_at_the_next_call() -> None:
    fast, given = compiled(next_tokens, []), parameters()
    other = compiled(lambda x: (x * x).sum(-1), [])
    with torch.no_grad():
        good, bad = torch.tensor([[1, 10]]), torch.tensor([[1, 11]])
        fast(good, *given)
        for wrong in (bad, -bad):
            fast(wrong, *given)
            with pytest.raises(IndexError, match="out of range"):
                fast(good, *given)
            assert_equal_float32(fast(good, *given), next_tokens(good, *given))
        fast(bad, *given)
        with pytest.raises(IndexError, match="out of range"):
            other(torch.randn(3, 4))  # whichever program comes next
        fast(good, *given)


def append(q: Tensor, past: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """A call of a model that is given a cache and returns it, longer."""
    keys = torch.cat([past, k * 2], 2)
    return F.scaled_dot_product_attention(q, keys, keys), keys


@interpreted
@pytest.mark.parametrize("kv_dtype", ["int8", "fp8"])
def test_a_quantized_cache(kv_dtype: str) -> None:
    reports: list[GraphReport] = []
    fast, dtype = compiled(append, reports, None, kv_dtype=kv_dtype), KV_DTYPES[kv_dtype]
    keys: Tensor = torch.randn(2, 2, 4, 16)
    exact: Tensor = QuantizedCacheTensor(*quantized(keys, dtype), keys.dtype)
    with torch.no_grad():
        for count in (5, 1, 1, 3):
            q, k = torch.randn(2, 2, count, 16), torch.randn(2, 2, count, 16)
            out, keys = fast(q, keys, k)
            expected, exact = append(q, exact, k)
            assert isinstance(keys, QuantizedCacheTensor) and isinstance(exact, QuantizedCacheTensor)
            assert torch.equal(keys.codes.float(), exact.codes.float()) and torch.equal(keys.scale, exact.scale)
            assert_equal_float32(out, expected)
    assert len(reports) <= 4 and {e.op for e in reports[-1].program.externs} == {"llmcomp.cache_grow.default"}


def written(q: Tensor, past: Tensor | None, k: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
    """A call of a model that writes into a cache of fixed size, and makes it where it is given none."""
    keys = torch.zeros(2, 2, 12, 16) if past is None else past
    keys.index_copy_(2, position, k * 2)
    mask = torch.arange(12) <= position[:, None]
    return F.scaled_dot_product_attention(q, keys, keys, mask), keys


@interpreted
@pytest.mark.parametrize("kv_dtype", ["int8", "fp8"])
def test_a_quantized_cache_of_fixed_size(kv_dtype: str) -> None:
    reports: list[GraphReport] = []
    fast, dtype = compiled(written, reports, None, kv_dtype=kv_dtype), KV_DTYPES[kv_dtype]
    keys, places = None, set()
    exact: Tensor = QuantizedCacheTensor(*quantized(torch.zeros(2, 2, 12, 16), dtype), torch.float32).zero_()
    with torch.no_grad():
        for start, count in ((0, 5), (5, 1), (6, 1), (7, 3)):
            q, k = torch.randn(2, 2, count, 16), torch.randn(2, 2, count, 16)
            position = torch.arange(start, start + count)
            out, keys = fast(q, keys, k, position)
            expected, _ = written(q, exact, k, position)
            assert isinstance(keys, QuantizedCacheTensor) and isinstance(exact, QuantizedCacheTensor)
            assert torch.equal(keys.codes.float(), exact.codes.float()) and torch.equal(keys.scale, exact.scale)
            assert_equal_float32(out, expected)
            places.add((keys.codes.data_ptr(), keys.scale.data_ptr()))
    assert len(places) == 1 and not any(report.program.externs for report in reports)
    assert not any("dequantize" in kernel.name for report in reports for kernel in report.program.kernels)


@interpreted
def test_mutation_of_an_input() -> None:
    def update(cache: Tensor, x: Tensor, position: Tensor) -> Tensor:
        cache.index_copy_(1, position, x * 2)
        return cache.sum(1)

    ours, eager, x = torch.zeros(2, 6, 4), torch.zeros(2, 6, 4), torch.randn(2, 2, 4)
    with torch.no_grad():
        found = compiled(update, [])(ours, x, torch.tensor([4, 1]))
        assert_equal_float32(found, update(eager, x, torch.tensor([4, 1])))
    assert torch.equal(ours, eager)
