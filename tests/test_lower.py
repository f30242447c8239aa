"""Regions become kernels: what is stored, what is recomputed, what is refused."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import Tensor
from torch.fx import Node

from llmcomp.codegen.describe import describe
from llmcomp.codegen.fit import Lowerer
from llmcomp.passes.base import run_passes
from llmcomp.passes.canonicalize import CANONICALIZE
from llmcomp.passes.facts import SHAPES
from llmcomp.passes.fuse_linear import fuse_epilogue, fuse_prologue, fuse_siblings
from llmcomp.passes.partition import partition, read_partition
from llmcomp.report import GraphReport
from tests.graphs import capture

ops = torch.ops.llmcomp


def kernels(fn: Callable[..., object], *inputs: object, dynamic: bool | None = None) -> list[str]:
    """The kernels of a function, as text; an Extern call by the name of its operator."""
    gm = capture(fn, *inputs, dynamic=dynamic)
    lowerer = Lowerer()
    passes = (
        CANONICALIZE,
        fuse_siblings(lowerer.fits, never),
        fuse_epilogue(lowerer.fits),
        fuse_prologue(lowerer.fits, lambda n: 1, 16),
        partition(lowerer.fits),
    )
    run_passes(gm, passes, frozenset({SHAPES}))
    found = read_partition(gm.graph)
    return [
        str(r.nodes[0].target) if r.family == "extern" else describe(lowerer.lower(r, found.inlined).kernel)
        for r in found.regions
    ]


def never(node: Node) -> bool:
    return False


def test_pointwise_through_views_is_one_flat_loop() -> None:
    def fn(x: Tensor, y: Tensor) -> Tensor:
        return (x.view(6, 4) + y.view(6, 4)).relu().view(2, 3, 4)

    (text,) = kernels(fn, torch.randn(2, 3, 4), torch.randn(2, 3, 4))
    assert_expected_inline(
        text,
        """\
map add_relu(out_ptr: float32 out, x_ptr: float32, x_ptr_1: float32)
  for i1 < 24
    x = x_ptr[i1]
    x_1 = x_ptr_1[i1]
    add = add(x, x_1)
    maximum = maximum(add, 0)
    out_ptr[i1] = maximum
""",
    )


def test_sizes_stay_symbols() -> None:
    def fn(x: Tensor, y: Tensor) -> Tensor:
        return x.transpose(0, 1) * y

    (text,) = kernels(fn, torch.randn(5, 4), torch.randn(4, 5), dynamic=True)
    assert_expected_inline(
        text,
        """\
map mul(out_ptr: float32 out, x_ptr: float32, other_ptr: float32)
  for i1 < n0, i0 < n1
    x = x_ptr[i0 + i1*n1]
    other = other_ptr[i0*n0 + i1]
    mul = mul(x, other)
    out_ptr[i0 + i1*n1] = mul
""",
    )


def test_norm_is_one_kernel_of_rows() -> None:
    def fn(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        total = x + residual
        return total, ops.rms_norm(total, weight, 1e-6, False, True)

    x = torch.randn(3, 8)
    (text,) = kernels(fn, x, x.clone(), torch.randn(8))
    assert_expected_inline(
        text,
        """\
rows add_rms_norm(out_ptr: float32 out, x_ptr: float32, other_ptr: float32, out_ptr_1: float32 out, weight_ptr: float32)
  for r0 < 3; along c < 8
    x = x_ptr[c + 8*r0]
    other = other_ptr[c + 8*r0]
    add = add(x, other)
    out_ptr[c + 8*r0] = add
    mul = mul(add, add)
    sum_mul = sum of mul
    div = div(sum_mul, 8.0)
    add_1 = add(div, 1e-06)
    rsqrt = rsqrt(add_1)
    mul_1 = mul(add, rsqrt)
    weight = weight_ptr[c]
    mul_2 = mul(mul_1, weight)
    out_ptr_1[c + 8*r0] = mul_2
""",  # noqa: E501
    )


def test_gate_and_up_are_two_accumulators() -> None:
    def fn(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
        return ops.gated(ops.linear(x, gate, None, False), ops.linear(x, up, None, False), "silu")

    (text,) = kernels(fn, torch.randn(1, 8), torch.randn(6, 8), torch.randn(6, 8))
    assert_expected_inline(
        text,
        """\
contract linear_gated(x_ptr: float32, out_ptr: float32 out, weight_ptr: float32, weight_ptr_1: float32)
  operand m < 1, k < 8 = x
    x = x_ptr[k]
  section n < 6
    acc = operand . weight_ptr[row n]
    acc_1 = operand . weight_ptr_1[row n]
    sigmoid = sigmoid(acc)
    mul = mul(acc, sigmoid)
    mul_1 = mul(mul, acc_1)
    out_ptr[n] = mul_1
""",
    )


def test_a_fused_gate_and_up_reads_two_rows_of_one_weight() -> None:
    def fn(x: Tensor, weight: Tensor) -> Tensor:
        gate, up = ops.linear(x, weight, None, False).chunk(2, -1)
        return F.silu(gate) * up

    (text,) = kernels(fn, torch.randn(1, 8), torch.randn(12, 8))
    assert "acc = operand . weight_ptr[row n]" in text
    assert "acc_1 = operand . weight_ptr[row n + 6]" in text


def test_rotary_halves_are_two_accumulators_and_the_cache_is_written_in_place() -> None:
    def fn(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        heads = ops.linear(x, weight, None, False).view(2, 1, 2, 8).transpose(1, 2)
        return ops.rope(heads, cos, sin, False)

    (text,) = kernels(fn, torch.randn(2, 1, 4), torch.randn(16, 4), torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8))
    assert_expected_inline(
        text,
        """\
contract linear_rope(x_ptr: float32, out_ptr: float32 out, weight_ptr: float32, cos_ptr: float32, sin_ptr: float32)
  operand m < 2, k < 4 = x
    x = x_ptr[k + 4*m]
  section h0 < 2, n < 4
    acc = operand . weight_ptr[row 8*h0 + n]
    acc_1 = operand . weight_ptr[row 8*h0 + n + 4]
    cos = cos_ptr[n]
    sin = sin_ptr[n]
    mul = mul(acc_1, sin)
    mul_1 = mul(acc, cos)
    sub = sub(mul_1, mul)
    out_ptr[8*h0 + 16*m + n] = sub
    cos_1 = cos_ptr[n + 4]
    sin_1 = sin_ptr[n + 4]
    mul_2 = mul(acc, sin_1)
    mul_3 = mul(acc_1, cos_1)
    add = add(mul_3, mul_2)
    out_ptr[8*h0 + 16*m + n + 4] = add
""",  # noqa: E501
    )


def test_a_norm_of_a_whole_row_does_not_join_the_layer_before_it() -> None:
    def fn(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        return ops.rms_norm(ops.linear(x, weight, None, False), scale, 1e-6, False, True)

    first, second = kernels(fn, torch.randn(1, 8), torch.randn(6, 8), torch.randn(6))
    assert first.startswith("contract linear(") and second.startswith("rows rms_norm(")


def test_attention_takes_its_limits_and_reads_through_views() -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ops.attention(q, k.transpose(1, 2), v, None, None, 0.5, True, 0, 3, 20.0)

    (text,) = kernels(fn, torch.randn(1, 4, 5, 8), torch.randn(1, 5, 2, 8), torch.randn(1, 2, 5, 8))
    assert_expected_inline(
        text,
        """\
attend attention(q_ptr: float32, x_ptr: float32, v_ptr: float32, out_ptr: float32 out)
  for b < 1, h < 4, i < 5, j < 5; 2 query heads a key head; head 8, 8
  keys from Max(0, i - 2) to Min(5, i + 1); scale 0.5
    div = div(score, 20.0)
    tanh = tanh(div)
    mul = mul(tanh, 20.0)
    at = -i + j
    le = le(at, 0)
    where = where(le, mul, -inf)
    gt = gt(at, -3)
    where_1 = where(gt, where, -inf)
  score = where_1
""",
    )


def test_alike_layers_are_lowered_once() -> None:
    def fn(x: Tensor, *weights: Tensor) -> Tensor:
        for w in weights:
            x = x + ops.linear(x, w, None, False)
        return x

    gm = capture(fn, torch.randn(1, 8), *(torch.randn(8, 8) for _ in range(4)))
    lowerer = Lowerer()
    passes = (fuse_siblings(lowerer.fits, never), fuse_epilogue(lowerer.fits), partition(lowerer.fits))
    run_passes(gm, passes, frozenset({SHAPES}))
    found = read_partition(gm.graph)
    assert len(found.regions) == 4
    assert len({lowerer.lower(r, found.inlined).kernel for r in found.regions}) == 1


@pytest.mark.parametrize(
    "fn",
    [lambda x: torch.sort(x)[0], lambda x: x.cumsum(0), lambda x: x.to(torch.complex64).abs()],
    ids=["sort", "cumsum", "complex"],
)
def test_what_has_no_rule_is_an_eager_call(fn: Callable[[Tensor], Tensor]) -> None:
    assert any(k.startswith("aten.") for k in kernels(fn, torch.randn(4, 4)))


def test_what_is_scattered_into_a_slice_is_chosen_by_position() -> None:
    def fn(x: Tensor, y: Tensor) -> Tensor:
        return torch.slice_scatter(x, y, 1, 2, 4) * 2

    (text,) = kernels(fn, torch.randn(3, 6), torch.randn(3, 2))
    assert_expected_inline(
        text,
        """\
map slice_scatter_mul(out_ptr: float32 out, x_ptr: float32, x_ptr_1: float32)
  for i0 < 3, i1 < 6
    at = i1
    ge = ge(at, 2)
    lt = lt(at, 4)
    logical_and = logical_and(ge, lt)
    x = x_ptr[2*i0 + i1 - 2] if logical_and
    x_1 = x_ptr_1[6*i0 + i1]
    where = where(logical_and, x, x_1)
    mul = mul(where, 2.0)
    out_ptr[6*i0 + i1] = mul
""",
    )


def test_scatters_into_slices_equal_eager() -> None:
    def fn(x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, ...]:
        part = torch.slice_scatter(x, y, 1, 2, 4)
        one = torch.select_scatter(part, z, 0, -1)
        return one * 2, torch.slice_scatter(x, x[:, 1:] + 1, 1, 1), torch.select_scatter(x, z, 0, 0)[1:] + 1

    inputs = torch.randn(3, 6), torch.randn(3, 2), torch.randn(6)
    for dynamic in (False, True):
        torch._dynamo.reset()
        compiled = torch.compile(fn, backend="llmcomp", dynamic=dynamic)
        for ours, eager in zip(compiled(*inputs), fn(*inputs), strict=True):
            torch.testing.assert_close(ours, eager)
    assert not [k for k in kernels(fn, *inputs) if k.startswith("aten.")]


@pytest.mark.parametrize("value", [-1, 2, 0.5])
def test_a_comparison_of_constants_is_one_of_numbers(value: float) -> None:
    def fn(x: Tensor) -> tuple[Tensor, ...]:
        constant = torch.full_like(x, value)
        return constant >= 0, constant > 1, constant == value, torch.where(constant < 1, x, -x)

    x = torch.randn(5)
    for ours, eager in zip(torch.compile(fn, backend="llmcomp")(x), fn(x), strict=True):
        assert torch.equal(ours, eager)
    torch._dynamo.reset()


def test_what_is_written_in_place_is_read_by_another_kernel(graphs: list[GraphReport]) -> None:
    def fn(x: Tensor) -> tuple[Tensor, Tensor]:
        state = torch.zeros(3, 4)
        before = state + 1
        state[1] = x * 2
        return before, state.relu() + x

    x = torch.randn(4)
    for ours, eager in zip(torch.compile(fn, backend="llmcomp")(x), fn(x), strict=True):
        assert torch.equal(ours, eager)
    (graph,) = graphs
    assert not graph.program.externs and len(graph.program.kernels) >= 2


@pytest.mark.parametrize("mode", ["bilinear", "nearest", "area"])
def test_sizes_that_are_computed_with_fractions(mode: str) -> None:
    def fn(x: Tensor) -> Tensor:
        return F.interpolate(x * 2, scale_factor=1.7, mode=mode, recompute_scale_factor=True) + 1

    torch._dynamo.reset()
    compiled = torch.compile(fn, backend="llmcomp", dynamic=True)
    for side in (4, 7):
        x = torch.randn(2, 3, side, side)
        torch.testing.assert_close(compiled(x), fn(x))
