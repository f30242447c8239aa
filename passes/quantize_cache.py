"""Keys and values that a graph returns are quantized, and attention reads what the caller will get.

    k = rope(...); attention(q, k, v); return k
        ->  scale = cache_scale(k); codes = cache_quantize(k, scale)
            attention(q, cache_dequantize(codes, scale), ...); return cache_tensor(codes, scale)

    keys = zeros(...); cache_write_(keys, k, position, 2); attention(q, keys, v); return keys
        ->  codes = zeros(...); scales = zeros(...); cache_write_ of the codes and the scales of k; the rest as above

The first call of a generation makes such a graph: of a cache that grows, or of one of fixed size. The next one is given
the cache that it returned, a QuantizedCacheTensor, whose own rules write codes and scales; there the pass finds nothing
to do. Attention over a prompt reads quantized keys too, so that results do not depend on how a text was cut into calls.
What is not returned stays as it is, unless a program keeps it itself: passes/insert_kv_cache.py asks for it then.
The kernel of attention reads codes and scales where they lie: cache_dequantize is a notation, no kernel.
"""

import torch
from torch.fx import Graph, Node

from llmcomp import graph as g
from llmcomp.graph import argument, base, insert, source, val
from llmcomp.passes.base import Pass, Report
from llmcomp.passes.constants import number
from llmcomp.passes.facts import SHAPES
from llmcomp.passes.recognize_cache import FRESH
from llmcomp.quantized_cache import cache_tensor

aten = torch.ops.aten
ops = torch.ops.llmcomp
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
UNSUPPORTED, WRITTEN = "are not quantized", "has the graph write into them"
NOT_RETURNED = "the graph does not return them: no cache, unless the program keeps them itself (insert_kv_cache)"


def stays_plain(reason: str) -> bool:
    """Whether a near miss is of a cache, which then stays in the dtype of the model, or of attention without one."""
    return reason.endswith((UNSUPPORTED, WRITTEN))


def quantize_cache(dtype: torch.dtype) -> Pass:
    """Caches that a graph makes hold codes of `dtype`, one of llmcomp.cache_ops.LEVELS."""

    def run(graph: Graph, report: Report) -> None:
        writes = g.mutated(graph)
        for operand in attended(graph):
            reason, memory = _obstacle(operand, writes), base(operand)
            if reason is not None:
                report.miss(operand, reason)
            elif memory.target is not ops.cache_dequantize.default:
                _rewrite_buffer(memory, dtype) if memory in writes else quantize_operand(operand, dtype)
                report.rewrites += 1

    return Pass("quantize_cache", run, needs=frozenset({SHAPES}))


def attended(graph: Graph) -> list[Node]:
    """What attention reads as keys and as values."""
    attentions = graph.find_nodes(op="call_function", target=ops.attention.default)
    return list(dict.fromkeys(source(n, position) for n in attentions for position in (1, 2)))


def _obstacle(operand: Node, writes: frozenset[Node]) -> str | None:
    """Why keys or values are not quantized by this pass, or None where they are, or have been before."""
    memory = base(operand)
    if memory.target is ops.cache_dequantize.default:
        return None
    if val(operand).dtype not in FLOATS:
        return f"keys and values in {val(operand).dtype} {UNSUPPORTED}"
    if memory in writes and memory.target in FRESH:
        return _obstacle_of_buffer(memory)
    if memory in writes:
        return f"their caller holds them in {val(operand).dtype} and {WRITTEN}"
    if memory.op == "placeholder":
        return f"their caller holds them in {val(operand).dtype}: no cache"
    if not _results(operand):
        return NOT_RETURNED
    if any(_cut(r, operand) is None for r in _results(operand)):
        return "what the graph returns of them is no part along the sequence"
    return None


def _results(operand: Node) -> list[Node]:
    """What the graph returns of an operand: it, its copies, views of these, and copies of parts."""
    copies = [u for u in operand.users if u.target is aten.clone.default]
    shown = [v for n in (operand, *copies) for v in g.views(n)]
    shown += [u for v in shown if v.target is aten.slice.Tensor for u in v.users if u.target is aten.clone.default]
    return [v for v in dict.fromkeys(shown) if any(u.op == "output" for u in v.users)]


def _cut(result: Node, operand: Node) -> list[Node] | None:
    """The slices, and copies of them, the first one last, that lead from an operand to what is returned of it."""
    cuts = []
    while result is not operand:
        if result.target is aten.slice.Tensor and int(argument(result, "dim")) % 4 == 3:  # type: ignore[arg-type]
            return None
        if result.target not in (aten.slice.Tensor, aten.clone.default):
            return None
        cuts.append(result)
        result = source(result)
    while cuts and cuts[-1].target is aten.clone.default:  # codes are a copy anyway
        cuts.pop()
    return cuts


def quantize_operand(operand: Node, dtype: torch.dtype) -> None:
    """Have attention, and whoever is returned an operand of it, read codes of `dtype`."""
    graph, results = operand.graph, _results(operand)
    with graph.inserting_before(operand.next):
        scale = insert(graph, ops.cache_scale.default, operand, dtype)
        codes = insert(graph, ops.cache_quantize.default, operand, scale, dtype)
        plain = insert(graph, ops.cache_dequantize.default, codes, scale, val(operand).dtype)
    output = graph.output_node()
    for result in results:
        cuts = _cut(result, operand)
        assert cuts is not None
        with graph.inserting_before(output):
            parts = [_sliced(part, cuts) for part in (codes, scale)]
            held = insert(graph, cache_tensor, *parts, val(operand).dtype)
        output.replace_input_with(result, held)
    operand.replace_all_uses_with(plain, lambda user: user not in (scale, codes))


def _sliced(part: Node, cuts: list[Node]) -> Node:
    for cut in reversed(cuts):
        if cut.target is aten.slice.Tensor:
            part = insert(part.graph, aten.slice.Tensor, part, *cut.args[1:])
        else:
            part = insert(part.graph, aten.clone.default, part, memory_format=torch.contiguous_format)
    return part


# ---- caches of fixed size, in the graph that makes their memory


def _obstacle_of_buffer(memory: Node) -> str | None:
    """Why a buffer that a graph makes and writes into holds no codes, or None where it does."""
    shown = list(g.views(memory))
    if not any(u.op == "output" for u in memory.users):
        return NOT_RETURNED
    if any(u.op == "output" for v in shown[1:] for u in v.users):
        return "a part of the memory is returned as well"
    if number(memory) != 0:
        return "their memory does not begin with zeros"
    if not all(_is_row_write(u, memory) for v in shown for u in v.users if v in g.written(u)):
        return "they are not written row by row"
    return None


def _is_row_write(write: Node, memory: Node) -> bool:
    """Whether a call writes whole rows of channels."""
    if write.target is not ops.cache_write_.default or write.args[0] is not memory:
        return False
    return int(argument(write, "dim")) % val(memory).dim() != val(memory).dim() - 1  # type: ignore[arg-type]


def _rewrite_buffer(memory: Node, dtype: torch.dtype) -> None:
    graph, output = memory.graph, memory.graph.output_node()
    shape, device, plain = list(memory.args[0]), val(memory).device, val(memory).dtype  # type: ignore[arg-type]
    with graph.inserting_before(memory):
        codes = insert(graph, aten.full.default, shape, 0, dtype=dtype, device=device)
        scale = insert(graph, aten.full.default, [*shape[:-1], 1], 0, dtype=torch.float32, device=device)
    for user in list(memory.users):
        with graph.inserting_before(user):
            if user is output:
                new = insert(graph, cache_tensor, codes, scale, plain)
            elif user.target is ops.cache_write_.default:
                _write(user, codes, scale, dtype)
                continue
            else:
                new = insert(graph, ops.cache_dequantize.default, codes, scale, plain)
        user.replace_input_with(memory, new)
    graph.erase_node(memory)


def _write(write: Node, codes: Node, scale: Node, dtype: torch.dtype) -> None:
    """Write what `write` does, at the insertion point, as codes and scales."""
    graph, (_, value, position, dim) = write.graph, write.args
    scales = insert(graph, ops.cache_scale.default, value, dtype)
    rows = insert(graph, ops.cache_quantize.default, value, scales, dtype)
    insert(graph, ops.cache_write_.default, codes, rows, position, dim)
    insert(graph, ops.cache_write_.default, scale, scales, position, dim)
    graph.erase_node(write)
