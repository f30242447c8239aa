"""Lowering of attention: strided q, k and v, and everything that happens to a score as its body."""

from collections.abc import Sequence, Set
from dataclasses import dataclass

import sympy
import torch
from torch.fx import Node

from llmcomp.codegen import kernel as K
from llmcomp.codegen.index import ZERO, Space, axis_symbol, size
from llmcomp.codegen.lowered import Lowered, finish, kernel_name, members
from llmcomp.codegen.pull import NARROW_FLOATS, Puller, broadcast, fake
from llmcomp.codegen.rules import rules
from llmcomp.codegen.rules_reduce import argument
from llmcomp.codegen.rules_view import _extent
from llmcomp.hints import hint
from llmcomp.region import Region, Unfit

NEGATIVE_INFINITY = float("-inf")


def lower_attend(region: Region, inlined: Set[Node]) -> Lowered:
    """One Attend for the attention node of a region."""
    node = next(n for n in region.nodes if n.target is torch.ops.llmcomp.attention.default)
    if region.outputs != (node,):
        raise Unfit("attention with an epilogue")
    q, k, v = (n for n in node.args[:3] if isinstance(n, Node))
    if fake(q).dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise Unfit(f"attention in {fake(q).dtype}")
    b, h, i, j = (axis_symbol(s) for s in ("b", "h", "i", "j"))
    batch, heads, queries = (K.Axis(s, size(n)) for s, n in zip((b, h, i), fake(q).shape[:3], strict=True))
    keys = K.Axis(j, size(fake(k).shape[2]))
    group = hint(fake(q).shape[1]) // hint(fake(k).shape[1])
    space = Space({a.symbol: a.size for a in (batch, heads, queries, keys)})
    p = Puller(space, members(region, inlined).__contains__, rules())
    (q_at, _), (k_at, k_scale), (v_at, v_scale) = (_operand(p, n, stem) for n, stem in ((q, "q"), (k, "k"), (v, "v")))
    if (k_scale is None) != (v_scale is None) or _dtype(p, k_at) != _dtype(p, v_at):
        raise Unfit("one of keys and values is quantized")
    score = _score(p, node, (b, h, i, j), queries, keys)
    sinks = argument(node, "sinks")
    sink_buffer = p.buffer(sinks, "sinks").name if isinstance(sinks, Node) else None
    if isinstance(sinks, Node) and sinks in members(region, inlined):
        raise Unfit("sinks are computed")
    out = p.buffer(node, "out")
    p.buffers[node] = K.Buffer(out.name, out.dtype, written=True)
    destination = K.Strided(out.name, tuple(size(s) for s in fake(node).stride()))
    return finish(
        p,
        lambda buffers, symbols: K.Attend(
            kernel_name(region), buffers, symbols, batch, heads, queries, keys, group,
            hint(fake(q).shape[3]), hint(fake(v).shape[3]), q_at, k_at, v_at, destination,
            float(argument(node, "scale")),  # type: ignore[arg-type]
            tuple(p.statements), score.value, score.key_start, score.key_end, sink_buffer, score.visible,
            k_scale, v_scale,
        ),
    )  # fmt: skip


def _dtype(p: Puller, operand: K.Strided) -> torch.dtype:
    return next(b.dtype for b in p.buffers.values() if b.name == operand.buffer)


def _operand(p: Puller, node: Node, stem: str) -> tuple[K.Strided, K.Strided | None]:
    """An operand in memory, seen through whatever views lie before it, and the scales of its rows if it has them."""
    symbols = [axis_symbol(f"{stem}_{n}") for n in range(4)]
    extents = {s: size(n) for s, n in zip(symbols, fake(node).shape, strict=True)}
    probe = Puller(Space(extents), p.inside, rules())
    probe.buffers, probe._names = p.buffers, p._names
    index = tuple(ZERO if n == 1 else s for s, n in zip(symbols, fake(node).shape, strict=True))
    probe.at(node, index, stem)
    loads = [s for s in probe.statements if isinstance(s, K.Load)]
    if not _is_read(probe.statements, loads):
        raise Unfit(f"{node.name} is computed by attention")
    places = [_strided(load, symbols, node) for load in loads]
    if len(places) == 2 and places[1].strides[3] != 0:
        raise Unfit(f"{node.name} has a scale for each channel")
    return places[0], places[1] if len(places) == 2 else None


def _is_read(body: Sequence[K.Statement], loads: Sequence[K.Load]) -> bool:
    """Whether an element is one that lies in memory, or a code times its scale."""
    if len(body) == 1:
        return len(loads) == 1
    steps = {s.out: s for s in body if isinstance(s, K.Compute)}
    product = next((s for s in steps.values() if s.op == "mul"), None)
    if product is None or len(loads) != 2 or len(loads) + len(steps) != len(body):
        return False
    codes, scale = loads
    rest = {s.op for s in steps.values()} - {"mul"}
    read = {steps[a].args[0] if a in steps else a for a in product.args if isinstance(a, str)}
    return read == {codes.out, scale.out} and rest <= {"convert", *NARROW_FLOATS.values()}


def _strided(load: K.Load, symbols: Sequence[sympy.Symbol], node: Node) -> K.Strided:
    """Where the elements of an operand lie."""
    strides = tuple(load.index.coeff(s) for s in symbols)
    offset = sympy.expand(load.index - sympy.Add(*(c * s for c, s in zip(strides, symbols, strict=True))))
    if offset.has(*symbols):
        raise Unfit(f"{node.name} is not strided")
    return K.Strided(load.buffer, strides, offset)


@dataclass(frozen=True)
class Score:
    """The final score, the keys that structure leaves, and the value that says which of them a mask leaves."""

    value: str
    key_start: sympy.Expr
    key_end: sympy.Expr
    visible: str | None


def _score(p: Puller, node: Node, at: tuple[sympy.Symbol, ...], queries: K.Axis, keys: K.Axis) -> Score:
    """Soft cap, mask, causal and window limits, as statements."""
    i, j = at[2], at[3]
    p.dtype = torch.float32
    p.dtypes["score"] = torch.float32
    p.name("score")
    score: K.Argument = "score"
    if cap := float(argument(node, "softcap")):  # type: ignore[arg-type]
        score = p.op("mul", p.op("tanh", p.op("div", score, cap)), cap)
    mask = argument(node, "mask")
    visible: str | None = None
    if isinstance(mask, Node):
        index = (
            broadcast(at, fake(mask)) if fake(mask).dim() == 4 else broadcast(at[4 - fake(mask).dim() :], fake(mask))
        )
        seen = p.at(mask, index, "mask")
        if fake(mask).dtype == torch.bool:
            visible = p.named(seen, torch.bool)
            score = p.op("where", visible, score, NEGATIVE_INFINITY)
        else:
            score = p.op("add", score, p.convert(seen, torch.float32))
    causal, window = bool(argument(node, "causal")), int(argument(node, "window"))  # type: ignore[call-overload]
    position = sympy.expand(i + _extent(argument(node, "offset")))
    start, end = ZERO, keys.size
    limits = []
    if causal:
        end = sympy.Min(keys.size, position + 1)
        limits.append(("le", j - position, 0))
    if window:
        start = sympy.Max(ZERO, position - window + 1)
        limits.append(("gt", j - position, -window))
        if not causal:
            end = sympy.Min(keys.size, position + window)
            limits.append(("lt", j - position, window))
    if queries.size != 1:
        for op, distance, bound in limits:
            near = p.test(op, p.named(p.integer(sympy.expand(distance)), torch.int64), bound)
            score = p.op("where", near, score, NEGATIVE_INFINITY)
    if queries.size == 1:
        start, end = start.subs(i, 0), end.subs(i, 0)
    return Score(p.named(score, torch.float32), start, end, visible)
