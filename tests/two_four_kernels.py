"""A linear layer whose weight is 2:4 sparse, as a kernel, and beside it the same with a dense weight."""

from dataclasses import replace

import sympy
import torch
from torch import Tensor

from llmcomp.blocks import Blocks
from llmcomp.codegen.kernel import Accumulator, Axis, Buffer, Contract, Load, Packing, Section, Store, Weight
from llmcomp.masked import ENTRY, Masked
from llmcomp.pairs import BLOCK
from llmcomp.saliency import keep_of_groups
from llmcomp.two_four import BYTES, TwoFour, pack

BF16, F32 = torch.bfloat16, torch.float32


def sparse_linear(rows: int | sympy.Symbol, k: int, n: int, dense: bool = False) -> Contract:
    """out = x @ weight.T, in bfloat16."""
    m, depth, column = (
        Axis(sympy.Symbol(name, integer=True, nonnegative=True), sympy.sympify(size))
        for name, size in (("m", rows), ("k", k), ("n", n))
    )
    operand = (Load("x", "x_ptr", m.symbol * k + depth.symbol, F32),)
    epilogue = (Store("out_ptr", m.symbol * n + column.symbol, "acc"),)
    row = sympy.Integer(k if dense else -(-k // BLOCK) * BYTES)
    weight = Weight("weight_ptr", row, sympy.Integer(1), packing=None if dense else Packing(TwoFour()))
    buffers = (
        Buffer("x_ptr", BF16),
        Buffer("weight_ptr", BF16 if dense else torch.uint8),
        Buffer("out_ptr", BF16, True),
    )
    sizes = (rows,) if isinstance(rows, sympy.Symbol) else ()
    section = Section((column,), (Accumulator("acc", weight, column.symbol),), epilogue)
    name = f"{'dense' if dense else 'sparse'}_linear_{k}_{n}"
    return Contract(name, buffers, sizes, m, depth, operand, "x", BF16, (section,))


def two_four_weight(n: int, k: int) -> Tensor:
    """A matrix that is 2:4 sparse, with groups that hold less, and a row of zeros."""
    weight = (torch.randn(n, k) / k**0.5).bfloat16()
    weight *= keep_of_groups(weight.abs(), 2, 4)
    weight[n // 2] = 0
    weight[0, : k // 2 : 3] = 0
    return weight


def sparse_buffers(rows: int, k: int, n: int) -> tuple[list[Tensor], Tensor]:
    """The buffers of `sparse_linear`, and its exact result in float64."""
    x, weight = torch.randn(rows, k).bfloat16(), two_four_weight(n, k)
    return [x, pack(weight), torch.zeros(rows, n, dtype=BF16)], x.double() @ weight.double().t()


def masked_linear(rows: int | sympy.Symbol, k: int, n: int) -> Contract:
    """The same with zeros anywhere."""
    kernel = sparse_linear(rows, k, n)
    section = kernel.sections[0]
    weight = Weight("weight_ptr", sympy.Integer(ENTRY), sympy.Integer(1), packing=Packing(Masked()))
    accumulators = tuple(replace(a, weight=weight) for a in section.accumulators)
    sections = (replace(section, accumulators=accumulators),)
    return replace(kernel, name=f"masked_linear_{k}_{n}", sections=sections)


def scattered_weight(n: int, k: int, zeros: float) -> Tensor:
    """A matrix of which this part is zero, with a row of zeros and one of none."""
    weight = (torch.randn(n, k) / k**0.5 * (torch.rand(n, k) >= zeros)).bfloat16()
    weight[n // 2], weight[-1] = 0, 1 / k
    return weight


def block_linear(rows: int | sympy.Symbol, k: int, n: int, form: Blocks, dtype: torch.dtype = BF16) -> Contract:
    """The same with zeros in blocks."""
    kernel = sparse_linear(rows, k, n)
    section = kernel.sections[0]
    weight = Weight("weight_ptr", sympy.Integer(ENTRY), sympy.Integer(1), packing=Packing(form))
    accumulators = tuple(replace(a, weight=weight) for a in section.accumulators)
    sections = (replace(section, accumulators=accumulators),)
    buffers = tuple(b if b.name == "weight_ptr" else replace(b, dtype=dtype) for b in kernel.buffers)
    name = f"block_linear_{str(dtype)[6:]}_{form.height}_{form.width}_{k}_{n}"
    return replace(kernel, name=name, buffers=buffers, operand_dtype=dtype, sections=sections)


def block_weight(n: int, k: int, form: Blocks, zeros: float, dtype: torch.dtype = BF16) -> Tensor:
    """A matrix of which about this part of its blocks is zero."""
    kept = torch.rand(-(-n // form.height), -(-k // form.width)) >= zeros
    whole = kept.repeat_interleave(form.height, 0).repeat_interleave(form.width, 1)[:n, :k]
    return (torch.randn(n, k) / k**0.5 * whole).to(dtype)
