"""What a kernel description means: its bodies evaluated in float64, all points at once."""

from collections.abc import Callable, Mapping, Sequence

import sympy
import torch
from torch.utils._sympy.functions import FloorDiv, Mod

from llmcomp.codegen.kernel import (
    Attend,
    Body,
    Check,
    Compute,
    Contract,
    Index,
    Load,
    Reduce,
    Section,
    Store,
    Strided,
    Weight,
)

Values = dict[str, torch.Tensor]
F64 = torch.float64

OPERATIONS: dict[str, Callable[..., torch.Tensor]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "rsqrt": torch.rsqrt,
    "exp": torch.exp,
    "le": torch.le,
    "lt": torch.lt,
    "logical_and": torch.logical_and,
    "gt": torch.gt,
    "where": torch.where,
    "convert": lambda x: x,
    "round_bfloat16": lambda x: x.to(torch.bfloat16).to(F64),
    "round_float16": lambda x: x.to(torch.float16).to(F64),
}


def evaluate(expr: sympy.Expr, values: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """An index expression at every point."""
    if expr.is_Symbol:
        return values[expr.name].long()
    if expr.is_Integer:
        return torch.tensor(int(expr))
    arguments = [evaluate(a, values) for a in expr.args]
    result = arguments[0]
    for other in arguments[1:]:
        match expr:
            case sympy.Add():
                result = result + other
            case sympy.Mul():
                result = result * other
            case FloorDiv():
                result = torch.div(result, other, rounding_mode="floor")
            case Mod():
                result = result % other
            case sympy.Min():
                result = torch.minimum(result, other)
            case sympy.Max():
                result = torch.maximum(result, other)
            case _:
                raise NotImplementedError(expr)
    return result


def run_body(body: Body, values: Values, buffers: Mapping[str, torch.Tensor], shape: Sequence[int]) -> None:
    """Execute the statements of a body for all points of `shape`, the last axis being the reduced one."""
    for s in body:
        match s:
            case Load():
                loaded = buffers[s.buffer].flatten()[evaluate(s.index, values)]
                values[s.out] = loaded.to(F64) if loaded.is_floating_point() else loaded
            case Compute():
                values[s.out] = OPERATIONS[s.op](
                    *(values[a] if isinstance(a, str) else torch.tensor(a, dtype=F64) for a in s.args)
                )
            case Index():
                values[s.out] = evaluate(s.expr, values)
            case Check():
                size = evaluate(s.size, values)
                index = values[s.value] + size * ((values[s.value] < 0) & s.wrap)
                values[s.out] = index.clamp(torch.tensor(0), size - 1)
            case Reduce(op="sum"):
                values[s.out] = values[s.value].expand(shape).sum(-1, keepdim=True)
            case Store():
                at = evaluate(s.index, values).expand(shape)
                buffers[s.buffer].view(-1)[at] = values[s.value].to(F64).expand(shape)
            case _:
                raise NotImplementedError(s)


def grid(sizes: Sequence[int]) -> list[torch.Tensor]:
    """The coordinates of an index space, each broadcastable to it."""
    return list(torch.meshgrid(*(torch.arange(n) for n in sizes), indexing="ij"))


def contract(kernel: Contract, tensors: Sequence[torch.Tensor], sizes: Sequence[int]) -> list[torch.Tensor]:
    """The buffers after the kernel: float64 copies of those of floating point, the others as they are."""
    copies = [t.to(F64) if t.is_floating_point() else t.clone() for t in tensors]
    buffers = {b.name: t for b, t in zip(kernel.buffers, copies, strict=True)}
    known: Values = {str(s): torch.tensor(n) for s, n in zip(kernel.sizes, sizes, strict=True)}
    rows, depth = (int(evaluate(a.size, known)) for a in (kernel.rows, kernel.depth))
    m, k = grid((rows, depth))
    values = {**known, str(kernel.rows.symbol): m, str(kernel.depth.symbol): k}
    run_body(kernel.operand, values, buffers, (rows, depth))
    operand = values[kernel.operand_value].expand(rows, depth).clone()
    for section in kernel.sections:
        _section(kernel, section, operand, known, buffers)
    return copies


def _section(
    kernel: Contract,
    section: Section,
    operand: torch.Tensor,
    known: Values,
    buffers: Mapping[str, torch.Tensor],
) -> None:
    shape = (operand.shape[0], *(int(evaluate(a.size, known)) for a in section.axes))
    points = grid(shape)
    names = [kernel.rows.symbol, *(a.symbol for a in section.axes)]
    values = {**known, **{str(n): p for n, p in zip(names, points, strict=True)}}
    expert = _experts(kernel, operand.shape[0], known, buffers)
    for a in section.accumulators:
        row = evaluate(a.row, values)
        columns = row[0].flatten()
        total = torch.zeros(shape, dtype=F64)
        for e in range(int(expert.max()) + 1 if len(expert) else 0):
            matrix = _matrix(a.weight, e, columns, operand.shape[1], known, buffers)
            product = (operand @ matrix.T).view(shape)
            total = torch.where((expert == e).view(-1, *[1] * (len(shape) - 1)), product, total)
        values[a.name] = total
    run_body(section.epilogue, values, buffers, shape)


def _experts(kernel: Contract, rows: int, known: Values, buffers: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The expert of each row."""
    if kernel.experts is None:
        return torch.zeros(rows, dtype=torch.long)
    return torch.searchsorted(buffers[kernel.experts], torch.arange(rows), right=True)


def _matrix(
    weight: Weight,
    expert: int,
    columns: torch.Tensor,
    depth: int,
    known: Values,
    buffers: Mapping[str, torch.Tensor],
) -> torch.Tensor:
    strides = [weight.offset, weight.expert_stride, weight.row_stride, weight.k_stride]
    offset, across, row, along = (evaluate(sympy.sympify(s), known) for s in strides)
    at = offset + expert * across + columns[:, None] * row + torch.arange(depth) * along
    return buffers[weight.buffer].flatten()[at]


def attend(kernel: Attend, tensors: Sequence[torch.Tensor], sizes: Sequence[int]) -> list[torch.Tensor]:
    """The buffers after the kernel: float64 copies of those of floating point, the others as they are."""
    copies = [t.to(F64) if t.is_floating_point() else t.clone() for t in tensors]
    buffers = {b.name: t for b, t in zip(kernel.buffers, copies, strict=True)}
    known: Values = {str(s): torch.tensor(n) for s, n in zip(kernel.sizes, sizes, strict=True)}
    axes = (kernel.batch, kernel.heads, kernel.queries, kernel.keys)
    shape = tuple(int(evaluate(a.size, known)) for a in axes)
    batch, heads, queries, keys = shape
    q = _strided(kernel.q, (batch, heads, queries, kernel.head_dim), known, buffers)
    k = _strided(kernel.k, (batch, heads // kernel.group, keys, kernel.head_dim), known, buffers)
    v = _strided(kernel.v, (batch, heads // kernel.group, keys, kernel.value_dim), known, buffers)
    if kernel.k_scale is not None and kernel.v_scale is not None:
        rows = (batch, heads // kernel.group, keys, 1)
        k = k * _strided(kernel.k_scale, rows, known, buffers)
        v = v * _strided(kernel.v_scale, rows, known, buffers)
    k, v = (t.repeat_interleave(kernel.group, 1) for t in (k, v))
    points = grid(shape)
    values = {**known, **{str(a.symbol): p for a, p in zip(axes, points, strict=True)}}
    values["score"] = kernel.scale * q @ k.transpose(-1, -2)
    run_body(kernel.score, values, buffers, shape)
    score = values[kernel.score_value]
    start, end = (evaluate(sympy.sympify(e), values) for e in (kernel.key_start, kernel.key_end))
    score = score.masked_fill((points[3] < start) | (points[3] >= end), float("-inf"))
    if kernel.sinks is not None:
        sinks = buffers[kernel.sinks].view(1, -1, 1, 1).expand(batch, heads, queries, 1)
        score = torch.cat([score, sinks], -1)
    weights = torch.softmax(score, -1).nan_to_num(0.0)[..., :keys]
    at = _positions(kernel.out, (batch, heads, queries, kernel.value_dim), known)
    buffers[kernel.out.buffer].view(-1)[at] = weights @ v
    return copies


def _positions(operand: Strided, shape: Sequence[int], known: Values) -> torch.Tensor:
    offset, *strides = (evaluate(sympy.sympify(s), known) for s in (operand.offset, *operand.strides))
    return offset + sum(p * s for p, s in zip(grid(shape), strides, strict=True))


def _strided(
    operand: Strided, shape: Sequence[int], known: Values, buffers: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    return buffers[operand.buffer].flatten()[_positions(operand, shape, known)]
