"""Activations written out in arithmetic become one operator, recognized by their values.

    0.5 * x * (1 + tanh(0.7978845608 * (x + 0.044715 * x ** 3)))   ->  gelu(x, approximate="tanh")
    x * 0.5 * (1 + erf(x / 1.41421))                               ->  gelu(x)
    x * sigmoid(x)                                                 ->  silu(x)

Models write these in many orders. So the nodes between x and the result are evaluated in float64 on sample
points and compared with each activation: the formula need not be known, and a wrong constant is noticed.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Graph, Node

from llmcomp.graph import insert, is_tensor, val
from llmcomp.passes.base import Pass, Report
from llmcomp.passes.facts import SHAPES
from llmcomp.passes.layout import adopt

aten = torch.ops.aten

CURVES = (aten.tanh.default, aten.erf.default, aten.sigmoid.default)
ARITHMETIC = frozenset(
    {
        *CURVES,
        aten._to_copy.default,
        aten.add.Tensor,
        aten.div.Tensor,
        aten.exp.default,
        aten.mul.Tensor,
        aten.neg.default,
        aten.pow.Tensor_Scalar,
        aten.sub.Tensor,
        aten.rsub.Scalar,
    }
)
# A formula has about ten nodes; longer paths are something else.
LONGEST = 12
TOLERANCE = 1e-6

Formula = Callable[[Tensor], Tensor]
KNOWN: Mapping[str, Formula] = {
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu": F.gelu,
    "silu": F.silu,
}


def _run(graph: Graph, report: Report) -> None:
    for node in list(graph.nodes):
        if node.target in CURVES:
            report.rewrites += _rewrite(node, report)


RECOGNIZE_ACTIVATION = Pass("recognize_activation", _run, needs=frozenset({SHAPES}))


def _rewrite(curve: Node, report: Report) -> bool:
    """Rewrite the activation that `curve` is the heart of."""
    for x in _above(curve):
        for last in _below(curve):
            values = _evaluated(last, x)
            name = None if values is None else _name(values)
            if name is None:
                continue
            if val(last).dtype != val(x).dtype:
                report.miss(last, f"{name} of {val(x).dtype} gives {val(last).dtype}")
                continue
            _replace(last, x, name)
            return True
    return False


def _above(node: Node) -> Iterator[Node]:
    """The nodes that `node` is computed from by arithmetic, nearest first."""
    queue, seen = [node], {node}
    for current in queue:
        for x in current.all_input_nodes if current.target in ARITHMETIC else ():
            if x not in seen and is_tensor(x) and len(queue) < LONGEST:
                seen.add(x)
                queue.append(x)
                yield x


def _below(node: Node) -> Iterator[Node]:
    """The products and casts that only `node` leads to, farthest first."""
    chain: list[Node] = []
    current = node
    while len(current.users) == 1 and len(chain) < LONGEST:
        current = next(iter(current.users))
        if current.target not in ARITHMETIC:
            break
        chain.append(current)
    return reversed(chain)


def _evaluated(last: Node, x: Node) -> Tensor | None:
    """The values of `last` where those of `x` are the sample points; None where it needs anything else."""
    values: dict[Node, Tensor | None] = {x: _points()}

    def value(node: Node) -> Tensor | None:
        if node not in values:
            values[node] = None if len(values) > 2 * LONGEST else _computed(node, value)
        return values[node]

    return value(last)


def _computed(node: Node, value: Callable[[Node], Tensor | None]) -> Tensor | None:
    if node.target not in ARITHMETIC or not val(node).dtype.is_floating_point:
        return None
    inputs = {n: value(n) for n in node.all_input_nodes}
    if not inputs or any(v is None for v in inputs.values()):
        return None
    if node.target is aten._to_copy.default:
        return inputs[node.all_input_nodes[0]]
    args = [inputs[a] if isinstance(a, Node) else a for a in node.args]
    assert callable(node.target)
    result = node.target(*args, **node.kwargs)
    assert isinstance(result, Tensor)
    return result


@cache
def _points() -> Tensor:
    return torch.linspace(-8.0, 8.0, 65, dtype=torch.float64)


def _name(values: Tensor) -> str | None:
    expected = ((name, formula(_points())) for name, formula in KNOWN.items())
    return next((name for name, e in expected if (values - e).abs().max() < TOLERANCE), None)


def _replace(last: Node, x: Node, name: str) -> None:
    with last.graph.inserting_before(last):
        if name == "silu":
            new = insert(last.graph, aten.silu.default, x)
        elif name == "gelu":
            new = insert(last.graph, aten.gelu.default, x)
        else:
            new = insert(last.graph, aten.gelu.default, x, approximate="tanh")
    adopt(last, new)
