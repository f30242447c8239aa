"""Linear layers read quantized weights as they are stored.

    linear(x, dequantize(codes, scale, zero, "int4", K), b)   ->   packed_linear(x, codes, scale, zero, b, "int4")

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
from llmcomp.products import LINEAR, PACKED, bias_of

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
    for node in graph.find_nodes(op="call_function", target=DEQUANTIZE):
        if source(node).op == "placeholder" and node.users:
            readers = ", ".join(sorted({str(user.target) for user in node.users}))
            report.miss(node, f"the whole matrix is made float for {readers}")


def _unfit(node: Node, weight: Node) -> str | None:
    """Why a layer can't read its weight as it is stored, or None."""
    if node.args[3]:
        return "the quantized matrix is multiplied from its other side"
    if val(node).dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the layer computes in {val(node).dtype}"
    form = parse_format(str(weight.args[3]))
    if form.dynamic:
        return "this product is none of those whose operand is quantized"
    if form.two_four and form.bits == 4 and val(node).device.type != "cpu":
        return f"no kernel of this device reads {form}"
    if val(weight).dim() != 2:
        return "the weight is not a matrix"
    return None


QUANTIZE = Pass("quantize", _run, needs=frozenset({SHAPES}))
