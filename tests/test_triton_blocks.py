"""Weights with zeros in blocks in Triton Contracts: both forms, odd sizes; and what the assembler makes of them."""

from dataclasses import replace

import pytest
import sympy
import torch

from llmcomp.blocks import ENTRY, Blocks, pack, room
from llmcomp.codegen.kernel import (
    Accumulator,
    Buffer,
    Compute,
    Contract,
    Packing,
    Reduce,
    Section,
    Statement,
    Store,
    Weight,
)
from llmcomp.codegen.triton import render
from tests.numerics import assert_equal_float32, assert_no_worse
from tests.test_assemble import assemblies
from tests.test_triton_contract import gated, qkv
from tests.triton_kernels import axis, load, run, symbol
from tests.triton_worker import assembled, interpreted
from tests.two_four_kernels import BF16, F32, block_linear, block_weight

S0 = sympy.Symbol("s0", integer=True, nonnegative=True)


@interpreted
@pytest.mark.parametrize("rows", [1, 3, 20])
@pytest.mark.parametrize(
    "height,width,k,n,dtype",
    [
        (32, 32, 256, 96, BF16),
        (16, 16, 200, 40, BF16),
        (64, 64, 192, 100, F32),
        (1, 32, 100, 9, BF16),
        (8, 64, 128, 24, BF16),
    ],
)
def test_products(rows: int, height: int, width: int, k: int, n: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    form = Blocks(height=height, width=width)
    weight, x = block_weight(n, k, form, 0.5, dtype), torch.randn(rows, k).to(dtype)
    out = x.new_zeros(rows, n)
    run(block_linear(rows, k, n, form, dtype), [x, pack(weight, height, width, room(weight, height, width)), out])
    exact = x.double() @ weight.double().t()
    if dtype == F32:
        assert_equal_float32(out, exact.float())
    else:
        assert_no_worse(out, exact.to(dtype), exact)


def halves(k: int, heads: int, dim: int, form: Blocks, normed: bool) -> Contract:
    """Products of the two halves of every head, as a rotary embedding reads them; `normed`: over the largest."""
    kernel = block_linear(S0, k, heads * dim, form)
    (one,) = kernel.sections[0].accumulators
    h, c, m = symbol("h"), symbol("c"), kernel.rows.symbol
    accumulators = tuple(Accumulator(f"acc{i}", one.weight, h * dim + c + i * dim // 2) for i in range(2))
    epilogue: list[Statement] = [Compute("product", "mul", ("acc0", "acc1"), F32)]
    if normed:
        epilogue += [Reduce("most", "max", "product", F32), Compute("result", "sub", ("product", "most"), F32)]
    epilogue.append(Store("out_ptr", m * heads * dim // 2 + h * dim // 2 + c, "result" if normed else "product"))
    section = Section((axis("h", heads), axis("c", dim // 2)), accumulators, tuple(epilogue))
    return replace(kernel, name=f"halves_{normed}", sections=(section,))


@interpreted
@pytest.mark.parametrize("rows", [2, 20])
@pytest.mark.parametrize(
    "height,dim,normed", [(32, 64, False), (16, 96, False), (32, 48, False), (32, 128, True), (1, 64, True)]
)
def test_accumulators_have_lists_of_their_own(rows: int, height: int, dim: int, normed: bool) -> None:
    torch.manual_seed(0)
    form = Blocks(height=height, width=32)
    weight, x = block_weight(2 * dim, 160, form, 0.5), torch.randn(rows, 160).to(BF16)
    out = x.new_zeros(rows, dim)
    run(halves(160, 2, dim, form, normed), [x, pack(weight, height, 32, room(weight, height, 32)), out], [rows])
    first, second = (x.double() @ weight.double().t()).view(rows, 2, 2, dim // 2).unbind(2)
    exact = first * second
    exact = (exact - exact.amax(2, keepdim=True) if normed else exact).flatten(1)
    assert_no_worse(out, exact.to(BF16), exact)


@assembled
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("height,width,rows", [(32, 32, 1), (64, 64, 4), (16, 16, 1)])
def test_decode_streams_what_is_kept_in_loads_of_16_bytes(height: int, width: int, rows: int, capability: int) -> None:
    kernel = block_linear(rows, 4096, 4096, Blocks(height=height, width=width))
    (one,) = assemblies(kernel, (), capability)
    assert one.narrowest_streamed_load == 16 and one.spills == 0
    assert one.tensor_core_instructions == 0
    config = load(render(kernel)).default(())
    weights = config["BLOCK_N"] * config["BLOCK_K"] / (32 * config.warps)
    assert rows > 1 or one.loop.total() / weights <= 8  # at the memory's pace a H200 has time for 15.5 of a thread


@assembled
@pytest.mark.parametrize("capability,instruction", [(80, "HMMA"), (90, "HGMMA")])
@pytest.mark.parametrize("height,width", [(32, 32), (64, 64)])
def test_prefill_multiplies_on_tensor_cores(height: int, width: int, capability: int, instruction: str) -> None:
    (one,) = assemblies(block_linear(S0, 2048, 2048, Blocks(height=height, width=width)), (512,), capability)
    assert any(op.startswith(instruction) for op in one.instructions) and one.spills == 0


def with_blocks(kernel: Contract, form: Blocks) -> Contract:
    """The kernel with weights of the same shapes in blocks."""
    buffers = {b.name: b for b in kernel.buffers}

    def stored(a: Accumulator) -> Accumulator:
        buffers[a.weight.buffer] = Buffer(a.weight.buffer, torch.uint8)
        weight = Weight(a.weight.buffer, sympy.Integer(ENTRY), sympy.Integer(1), packing=Packing(form))
        return replace(a, weight=weight)

    sections = tuple(replace(s, accumulators=tuple(map(stored, s.accumulators))) for s in kernel.sections)
    return replace(kernel, buffers=tuple(buffers.values()), sections=sections)


@assembled
@pytest.mark.parametrize("capability", [80, 90])
def test_layers_of_a_model(capability: int) -> None:
    """Norms in front of them, rotated heads and gates behind them, one to many rows."""
    form = Blocks(height=32, width=32)
    decode = [(with_blocks(qkv(1, 2048, 32, 8, 64, BF16, normed), form), ()) for normed in (True, False)]
    gate = with_blocks(gated(S0, 2048, 8192, BF16), form)
    for kernel, sizes in [*decode, (gate, (1,)), (gate, (4,))]:
        (one,) = assemblies(kernel, sizes, capability)
        assert one.narrowest_streamed_load == 16
    (one,) = assemblies(gate, (512,), capability)
    assert one.tensor_core_instructions > 0
