"""Keys and values that a graph returns are quantized, and attention reads what the caller will get.

    k = rope(...); attention(q, k, v); return k
        ->  scale = cache_scale(k); codes = cache_quantize(k, scale)
            attention(q, cache_dequantize(codes, scale), ...); return cache_tensor(codes, scale)

The first call of a generation makes such a graph. The next one is given the cache that it returned, a
QuantizedCacheTensor, whose own rules append to codes and scales; there the pass finds nothing to do. Attention over a
prompt reads quantized keys too, so that results do not depend on how a text was cut into calls. The kernel of
attention reads codes and scales where they lie: cache_dequantize is a notation, no kernel.
"""

import torch
from torch.fx import Graph, Node

from llmcomp import graph as g
from llmcomp.graph import argument, base, insert, source, val
from llmcomp.passes.base import Pass, Report
from llmcomp.passes.facts import SHAPES
from llmcomp.quantized_cache import cache_tensor

aten = torch.ops.aten
ops = torch.ops.llmcomp
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def quantize_cache(dtype: torch.dtype) -> Pass:
    """Caches that a graph makes hold codes of `dtype`, one of llmcomp.cache_ops.LEVELS."""

    def run(graph: Graph, report: Report) -> None:
        writes = g.mutated(graph)
        for operand in _operands(graph):
            reason = _obstacle(operand, writes)
            if reason is not None:
                report.miss(operand, reason)
            elif base(operand).target is not ops.cache_dequantize.default:
                _rewrite(operand, dtype)
                report.rewrites += 1

    return Pass("quantize_cache", run, needs=frozenset({SHAPES}))


def _operands(graph: Graph) -> list[Node]:
    """What attention reads as keys and as values."""
    attentions = graph.find_nodes(op="call_function", target=ops.attention.default)
    return list(dict.fromkeys(source(n, position) for n in attentions for position in (1, 2)))


def _obstacle(operand: Node, writes: frozenset[Node]) -> str | None:
    """Why keys or values are not quantized by this pass, or None where they are, or have been before."""
    memory = base(operand)
    if memory.target is ops.cache_dequantize.default:
        return None
    if val(operand).dtype not in FLOATS:
        return f"keys and values in {val(operand).dtype} are not quantized"
    if memory in writes or memory.op == "placeholder":
        return f"its caller holds them in {val(operand).dtype}: a cache of fixed size, or no cache"
    if not _results(operand):
        return "the graph does not return them: there is no cache to quantize"
    if any(_cut(r, operand) is None for r in _results(operand)):
        return "what the graph returns of them is no part along the sequence"
    return None


def _results(operand: Node) -> list[Node]:
    """What the graph returns of an operand: it, its copies, and views of these."""
    copies = [u for u in operand.users if u.target is aten.clone.default]
    shown = [v for n in (operand, *copies) for v in g.views(n)]
    return [v for v in dict.fromkeys(shown) if any(u.op == "output" for u in v.users)]


def _cut(result: Node, operand: Node) -> list[Node] | None:
    """The slices, the first one last, that lead from an operand to what is returned of it."""
    cuts = []
    while result is not operand:
        if result.target is aten.slice.Tensor and int(argument(result, "dim")) % 4 != 3:  # type: ignore[arg-type]
            cuts.append(result)
        elif result.target is not aten.clone.default:
            return None
        result = source(result)
    return cuts


def _rewrite(operand: Node, dtype: torch.dtype) -> None:
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
        part = insert(part.graph, aten.slice.Tensor, part, *cut.args[1:])
    return part
