"""The product of an activation and another tensor becomes llmcomp::gated.

    silu(gate) * up                              ->  gated(gate, up, "silu")
    gate * sigmoid(1.702 * gate) * up            ->  gated(gate, up, "quick_gelu")
    relu(gate) ** 2 * up                         ->  gated(gate, up, "relu2")

Whether gate and up are two linear layers or two halves of one does not matter here.
"""

import torch
from torch.fx import Graph, Node

from llmcomp.graph import argument, insert, only_user, same_shape, source, val
from llmcomp.ops import OPS
from llmcomp.passes.base import Pass, Report
from llmcomp.passes.facts import SHAPES
from llmcomp.passes.layout import adopt
from llmcomp.passes.match import operands, with_number

aten = torch.ops.aten

NAMES = {
    aten.silu.default: "silu",
    aten.relu.default: "relu",
    aten.sigmoid.default: "sigmoid",
    aten.tanh.default: "tanh",
}


def _run(graph: Graph, report: Report) -> None:
    # From the end: gate * sigmoid(1.702 * gate) is an activation where it is multiplied once more.
    for node in reversed(list(graph.nodes)):
        pair = operands(node, aten.mul.Tensor)
        if pair is None or not node.users or activation(node) is not None:
            continue
        report.rewrites += _rewrite(node, *pair, report) or _rewrite(node, *pair[::-1], report)


RECOGNIZE_GATED = Pass("recognize_gated", _run, needs=frozenset({SHAPES}))


def _rewrite(node: Node, opened: Node, up: Node, report: Report) -> bool:
    """Rewrite opened * up, where `opened` is an activation."""
    found = activation(opened)
    if found is None:
        return False
    name, gate = found
    if gate is up:
        return False
    if (reason := _unfit(node, opened, gate, up)) is not None:
        report.miss(node, reason)
        return False
    with node.graph.inserting_before(node):
        new = insert(node.graph, OPS.gated.default, gate, up, name)
    adopt(node, new)
    return True


def _unfit(node: Node, opened: Node, gate: Node, up: Node) -> str | None:
    if only_user(opened) is not node:
        return f"the activation {opened.name} has another user"
    if not same_shape(val(gate).shape, val(up).shape):
        return f"{gate.name} and {up.name} differ in shape"
    if val(gate).dtype != val(up).dtype:
        return f"{gate.name} is {val(gate).dtype} and {up.name} is {val(up).dtype}"
    return None if val(gate).dtype.is_floating_point else f"{gate.name} is {val(gate).dtype}"


def activation(node: Node) -> tuple[str, Node] | None:
    """(name in `llmcomp.ops.ACTIVATIONS`, its input) where `node` computes an activation."""
    if node.target in NAMES:
        return NAMES[node.target], source(node)
    if node.target is aten.gelu.default:
        tanh = argument(node, "approximate") == "tanh"
        return "gelu_tanh" if tanh else "gelu", source(node)
    return _squared_relu(node) or _quick_gelu(node)


def _squared_relu(node: Node) -> tuple[str, Node] | None:
    power, pair = with_number(node, aten.pow.Tensor_Scalar), operands(node, aten.mul.Tensor)
    inner = power[0] if power is not None and power[1] == 2 else None
    if pair is not None and pair[0] is pair[1]:
        inner = pair[0]
    return ("relu2", source(inner)) if inner is not None and inner.target is aten.relu.default else None


def _quick_gelu(node: Node) -> tuple[str, Node] | None:
    pair = operands(node, aten.mul.Tensor)
    for x, gate in (pair, pair[::-1]) if pair is not None else ():
        scaled = with_number(gate.args[0], aten.mul.Tensor) if gate.target is aten.sigmoid.default else None
        if scaled is not None and scaled[0] is x and abs(scaled[1] - 1.702) < 1e-6:
            return "quick_gelu", x
    return None
