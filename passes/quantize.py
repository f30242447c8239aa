"""Linear layers and experts read quantized weights as they are stored.

    linear(x, dequantize(codes, scale, zero, "int4", K), b)   ->   packed_linear(x, codes, scale, zero, b, "int4")
    grouped_linear(x, transpose(dequantize(codes, scale, zero, "int4", K), 1, 2), ends, kn=True)
                                             ->   packed_grouped_linear(x, codes, scale, zero, ends, "int4")

No float copy of the weight remains. Layers that quantize their operand too are captured as packed_linear: a graph that
multiplies floats is not made to round them. A dequantized matrix that something other than a linear layer reads is
reported.
"""

import torch
from torch.fx import Graph, Node

from llmcomp.formats import parse_format
from llmcomp.graph import replace_by, source, val
from llmcomp.passes.base import Pass, Report
from llmcomp.passes.facts import SHAPES
from llmcomp.products import GROUPED, LINEAR, PACKED, PACKED_GROUPED, bias_of, ends_of

aten = torch.ops.aten
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SAME = (aten.alias.default, aten.detach.default)
DEQUANTIZE = torch.ops.llmcomp.dequantize.default


def _run(graph: Graph, report: Report) -> None:
    for node in list(graph.find_nodes(op="call_function", target=LINEAR)):
        weight = node.args[1]
        if not isinstance(weight, Node) or weight.target is not DEQUANTIZE:
            continue
        if (reason := _unfit(node, weight)) is not None:
            report.miss(node, reason)
            continue
        codes, scale, zero, name = weight.args[:4]
        replace_by(node, PACKED, node.args[0], codes, scale, zero, bias_of(node), name)
        report.rewrites += 1
    for node in list(graph.find_nodes(op="call_function", target=GROUPED)):
        weight, kn = _stored(node)
        if weight.target is not DEQUANTIZE:
            continue
        if (reason := _unfit_experts(node, weight, kn)) is not None:
            report.miss(node, reason)
            continue
        replace_by(node, PACKED_GROUPED, node.args[0], *weight.args[:3], ends_of(node), weight.args[3])
        report.rewrites += 1
    graph.eliminate_dead_code()  # views between a matrix and what read it
    for node in graph.find_nodes(op="call_function", target=DEQUANTIZE):
        if source(node).op == "placeholder" and node.users:
            readers = ", ".join(sorted({str(user.target) for user in node.users}))
            report.miss(node, f"the whole matrix is made float for {readers}")


def _unfit(node: Node, weight: Node) -> str | None:
    """Why a layer can't read its weight as it is stored, or None."""
    if node.args[3]:
        return "the quantized matrix is multiplied from its other side"
    if val(node).dtype not in FLOATS:
        return f"the layer computes in {val(node).dtype}"
    form = parse_format(str(weight.args[3]))
    if form.dynamic:
        return "this product is none of those whose operand is quantized"
    if val(weight).dim() != 2:
        return "the weight is not a matrix"
    return None


def _stored(product: Node) -> tuple[Node, bool]:
    """The weights of a grouped product, through views that exchange rows and columns: whether they are (E, K, N)."""
    weight, kn = source(product, 1), bool(product.args[3])
    while weight.target in (aten.transpose.int, aten.permute.default, *SAME):
        if weight.target not in SAME:
            before, after = val(source(weight)), val(weight)
            swapped = before.transpose(1, 2) if before.dim() == 3 else before
            if swapped.shape != after.shape or swapped.stride() != after.stride():
                break
            kn = not kn
        weight = source(weight)
    return weight, kn


def _unfit_experts(node: Node, weight: Node, kn: bool) -> str | None:
    """Why a grouped product can't read its weights as they are stored, or None."""
    form = parse_format(str(weight.args[3]))
    if kn or val(weight).dim() != 3:
        return "the quantized matrices are multiplied from their other side"
    if val(node).dtype not in FLOATS:
        return f"the layer computes in {val(node).dtype}"
    if form.dynamic or form.two_four:
        return f"no kernel multiplies the rows of experts with weights in {form}"
    return None


QUANTIZE = Pass("quantize", _run, needs=frozenset({SHAPES}))
