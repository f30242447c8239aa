"""A linear layer whose weight is quantized, as a kernel: what the tests of both printers run."""

from collections.abc import Sequence
from dataclasses import replace

import sympy
import torch
from torch import Tensor

from llmcomp.codegen.kernel import (
    MATRIX,
    Accumulator,
    Axis,
    Buffer,
    Compute,
    Contract,
    Load,
    Packing,
    Section,
    Statement,
    Store,
    Weight,
)
from llmcomp.dynamic import quantize_tokens
from llmcomp.formats import Format, Packed
from llmcomp.saliency import keep_of_groups

F32 = torch.float32


def packed_linear(rows: int | sympy.Symbol, k: int, n: int, form: Format, dtype: torch.dtype) -> Contract:
    """out = x @ weight.T + bias, with the weight in `form`."""
    m, depth, column = (_axis(name, size) for name, size in (("m", rows), ("k", k), ("n", n)))
    operand = (Load("x", "x_ptr", m.symbol * k + depth.symbol, F32),)
    at = m.symbol * n + column.symbol
    scaled: tuple[Statement, ...] = (Load("bias", "bias_ptr", column.symbol, F32),)
    value = "acc"
    if not form.group:
        scaled += (Load("scale", "scale_ptr", column.symbol, F32), Compute("scaled", "mul", ("acc", "scale"), F32))
        value = "scaled"
    epilogue = (*scaled, Compute("sum", "add", (value, "bias"), F32), Store("out_ptr", at, "sum"))
    packed = form.quantize(matrix(1, k, form))
    groups = sympy.Integer(k // form.group if form.group else 0)
    packing = Packing(form, groups, "scale_ptr" if groups else None, None if packed.zero is None else "zero_ptr")
    weight = Weight("weight_ptr", sympy.Integer(packed.codes.shape[1]), sympy.Integer(1), packing=packing)
    parts = [("weight_ptr", packed.codes), ("scale_ptr", packed.scale), ("zero_ptr", packed.zero)]
    buffers = (
        Buffer("x_ptr", dtype),
        *(Buffer(name, part.dtype) for name, part in parts if part is not None),
        Buffer("bias_ptr", dtype),
        Buffer("out_ptr", dtype, True),
    )
    sizes = (rows,) if isinstance(rows, sympy.Symbol) else ()
    section = Section((column,), (Accumulator("acc", weight, column.symbol),), epilogue)
    return Contract("packed_linear", buffers, sizes, m, depth, operand, "x", dtype, (section,))


def packed_experts(
    rows: int | sympy.Symbol, experts: int, k: int, n: int, form: Format, dtype: torch.dtype
) -> Contract:
    """out = each row of x @ weight[its expert].T, rows sorted by expert, with the weights in `form`."""
    plain = packed_linear(rows, k, n, form, dtype)
    (section,), at = plain.sections, MATRIX * n + sympy.Symbol("n", integer=True, nonnegative=True)
    scale = () if form.group else (Load("scale", "scale_ptr", at, F32), Compute("out", "mul", ("acc", "scale"), F32))
    (store,) = (s for s in section.epilogue if isinstance(s, Store))
    (a,) = section.accumulators
    weight = replace(a.weight, expert_stride=a.weight.row_stride * n)
    section = replace(
        section,
        accumulators=(replace(a, weight=weight),),
        epilogue=(*scale, replace(store, value="out" if scale else "acc")),
    )
    buffers = (*(b for b in plain.buffers if b.name != "bias_ptr"), Buffer("ends_ptr", torch.int32))
    return replace(plain, buffers=buffers, sections=(section,), experts="ends_ptr", expert_count=sympy.Integer(experts))


def expert_buffers(
    ends: Sequence[int], rows: int, k: int, n: int, form: Format, dtype: torch.dtype
) -> tuple[list[Tensor], Tensor]:
    """The buffers of `packed_experts`, and its exact result in float64: zeros for the rows behind those of the last."""
    x = torch.randn(rows, k).to(dtype)
    packed = form.quantize(matrix(n * len(ends), k, form))
    parts = [t for t in (packed.codes, packed.scale, packed.zero) if t is not None]
    matrices = form.dequantize(packed, k, torch.float64).unflatten(0, (len(ends), n))
    exact, start = torch.zeros(rows, n, dtype=torch.float64), 0
    for expert, end in enumerate(ends):
        exact[start:end] = x[start:end].double() @ matrices[expert].t()
        start = end
    return [x, *parts, torch.full((rows, n), 7.0, dtype=dtype), torch.tensor(ends, dtype=torch.int32)], exact


def _axis(name: str, size: int | sympy.Symbol) -> Axis:
    return Axis(sympy.Symbol(name, integer=True, nonnegative=True), sympy.sympify(size))


def matrix(n: int, k: int, form: Format) -> Tensor:
    """A weight that `form` can hold."""
    weight = torch.randn(n, k) / k**0.5
    return weight * keep_of_groups(weight.abs(), 2, 4) if form.two_four else weight


def packed_buffers(rows: int, k: int, n: int, form: Format, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """The buffers of `packed_linear`, and its exact result in float64; `x` quantized where the format says so."""
    x, weight, bias = torch.randn(rows, k).to(dtype), matrix(n, k, form), torch.randn(n).to(dtype)
    weight[n // 2] = 0
    packed = form.quantize(weight)
    parts = [t for t in (packed.codes, packed.scale, packed.zero) if t is not None]
    exact = products(x, packed, form) + bias.double()
    return [x, *parts, bias, torch.zeros(rows, n, dtype=dtype)], exact


def products(x: Tensor, packed: Packed, form: Format) -> Tensor:
    """Rows of the operand times rows of the weight, in float64."""
    if not form.dynamic:
        return x.double() @ form.dequantize(packed, x.shape[-1], torch.float64).t()
    codes, scale = quantize_tokens(x, form)
    return codes.double() @ packed.codes.double().t() * scale.double() * packed.scale.double()
