"""Channels of experts that count for nothing are left out, of each expert its own.

    up = grouped_linear(x, a, ends)                        ->  up' = grouped_linear(x, a', ends)
    h = gated(up[:, :K], up[:, K:])                            h' = gated(up'[:, :n], up'[:, n:])
    grouped_linear(h, b, ends), b zero in some rows            grouped_linear(h', b', ends)

a' and b' hold n channels for every expert: those that count, and others where it has fewer. Biases that are picked for
each row by its expert get smaller too. A part of passes/prune.py.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Graph, Node

from llmcomp.graph import argument, insert, is_tensor, known, replace, same_size, source, val
from llmcomp.passes.base import Report
from llmcomp.passes.narrow import Indices, Whole
from llmcomp.passes.parts import place_in_split
from llmcomp.passes.relations import is_pointwise
from llmcomp.passes.shrink import LEAST, pays
from llmcomp.passes.zero_structure import CASTS, PREPARED, Values
from llmcomp.products import GROUPED, operand_of

aten = torch.ops.aten


@dataclass(frozen=True)
class Made:
    """Rows (T, R) that one product gives, perhaps with a bias that is picked for each of them."""

    result: Node
    product: Node
    bias: Node | None = None


@dataclass(frozen=True)
class Chain:
    """What lies between two products: `parts` are columns of `made`, with the numbers of these; `nodes` is the rest."""

    made: Made
    parts: Mapping[Node, range]
    nodes: tuple[Node, ...]


def shrink_experts(graph: Graph, values: Values, indices: Indices, report: Report) -> None:
    """Leave out channels of experts that their last matrix multiplies with zeros."""
    for down in list(graph.find_nodes(op="call_function", target=GROUPED)):
        zero = values.zeros_of_experts(*_kept_as(_weight(down), 1 if down.args[3] else 2))
        if zero is None:
            continue
        kept = _kept(zero)
        gone = zero.shape[1] - kept.shape[1]
        if not pays(gone, zero.shape[1]):
            report.miss(down, f"{gone} of the {zero.shape[1]} channels of every expert do not count: too few to pay")
            continue
        try:
            _leave_out(down, _chain(down), kept, indices)
            report.rewrites += 1
        except Whole as problem:
            report.miss(down, f"{gone} of the {zero.shape[1]} channels of every expert do not count: {problem}")


def _weight(product: Node) -> Node:
    return source(product, 1)


def _kept_as(weight: Node, dim: int) -> tuple[Node, int]:
    """What matrices of experts are a transposed view of, and the axis that is `dim` there."""
    turned = weight.target is aten.transpose.int and {int(n) % 3 for n in weight.args[1:]} == {1, 2}  # type: ignore[arg-type]
    return (source(weight), 3 - dim) if turned else (weight, dim)


def _kept(zero: Tensor) -> Tensor:
    """The channels (E, n) that stay: those of an expert that count, and others to make up the number."""
    most = int((~zero).sum(1).max())
    number = min(max(LEAST, -(-most // LEAST) * LEAST), zero.shape[1])
    return zero.to(torch.int8).argsort(dim=1, stable=True)[:, :number].sort(1).values


# ---- what lies between ----------------------------------------------------------------------------------------------


def _chain(down: Node) -> Chain:
    """From a product back to the one that makes its operand.

    Raises:
        Whole: something between is not computed channel by channel, or is read elsewhere.
    """
    parts: dict[Node, range] = {}
    nodes: dict[Node, None] = {}
    made: Made | None = None
    stack = [operand_of(down)]
    while stack:
        node = stack.pop()
        if node in parts or node in nodes:
            continue
        if (found := _part(node)) is not None:
            if made is not None and made.result is not found[0].result:
                raise Whole("they are made by two products")
            made, parts[node] = found
            continue
        nodes[node] = None
        stack += _operands(node)
    if made is None:
        raise Whole("they are made by no product of experts")
    chain = Chain(made, parts, tuple(sorted(nodes)))
    _require_own(chain, down)
    return chain


def _operands(node: Node) -> Iterator[Node]:
    """What a node takes of channels, where it computes each by itself."""
    if not (is_pointwise(node) or node.target in (*CASTS, torch.ops.llmcomp.gated.default)):
        raise Whole(f"{node.name} is not computed channel by channel")
    for operand in node.all_input_nodes:
        if not is_tensor(operand) or val(operand).dim() == 0 or same_size(val(operand).shape[-1], 1):
            continue
        if val(operand).dim() != 2 or not same_size(val(operand).shape[1], val(node).shape[1]):
            raise Whole(f"{node.name} reads a vector of channels")
        yield operand


def _part(node: Node) -> tuple[Made, range] | None:
    """The product of which a node is some columns, and which they are; or None."""
    if not is_tensor(node) or val(node).dim() != 2:
        return None
    whole, columns = node, range(int(val(node).shape[1]))
    if (place := place_in_split(node)) is not None and place[1] == 1:
        whole, columns = place[0], range(*place[2:])
    elif node.target is aten.slice.Tensor and argument(node, "dim") in (1, -1):
        start, end, step = (known(argument(node, name)) for name in ("start", "end", "step"))
        if isinstance(start, int | None) and isinstance(end, int | None) and isinstance(step, int | None):
            whole, columns = source(node), range(int(val(source(node)).shape[1]))[slice(start, end, step)]
    made = _made(whole)
    return None if made is None else (made, columns)


def _made(node: Node) -> Made | None:
    if node.target is GROUPED:
        return Made(node, node)
    if node.target is aten.add.Tensor and len(node.all_input_nodes) == 2 and not node.kwargs:
        for product, bias in (node.all_input_nodes, node.all_input_nodes[::-1]):
            if product.target is GROUPED and bias.target is aten.index.Tensor and val(source(bias)).dim() == 2:
                return Made(node, product, bias)
    return None


def _require_own(chain: Chain, down: Node) -> None:
    """Refuse what somebody else reads: it would be computed whole beside the smaller one."""
    made = chain.made
    inner = {*chain.parts, *chain.nodes, made.result, made.product, down}
    inner |= {user for user in made.result.users if any(part in inner for part in user.users)}  # a split
    for node in inner - {down}:
        if other := next((user for user in node.users if user not in inner), None):
            raise Whole("it is returned" if other.op == "output" else f"{other.name} reads them")


# ---- making it ------------------------------------------------------------------------------------------------------


def _leave_out(down: Node, chain: Chain, kept: Tensor, indices: Indices) -> None:
    graph, made, width = down.graph, chain.made, kept.shape[1]
    rows = torch.cat([columns[0] + columns.step * kept for columns in chain.parts.values()], 1)
    with graph.inserting_before(made.product):
        up = _smaller(made.product, rows, outputs=True, indices=indices)
    with graph.inserting_before(min([*chain.parts, *chain.nodes])):
        if made.bias is not None:
            some = _taken(source(made.bias), rows, 1, indices)
            up = insert(graph, aten.add.Tensor, up, insert(graph, aten.index.Tensor, some, made.bias.args[1]))
        new = {
            part: insert(graph, aten.slice.Tensor, up, 1, i * width, (i + 1) * width) if len(chain.parts) > 1 else up
            for i, part in enumerate(chain.parts)
        }
    for node in chain.nodes:
        with graph.inserting_before(node):
            args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: new.get(n, n))
            assert callable(node.target)
            new[node] = insert(graph, node.target, *args, **kwargs)
    with graph.inserting_before(down):
        smaller = _smaller(down, kept, outputs=False, indices=indices, operand=new[operand_of(down)])
    replace(down, smaller)


def _smaller(product: Node, kept: Tensor, outputs: bool, indices: Indices, operand: Node | None = None) -> Node:
    """A product for some of the outputs or inputs of every expert."""
    weight, kn = _weight(product), bool(product.args[3])
    less = _taken(weight, kept, 2 if outputs == kn else 1, indices)
    return insert(product.graph, GROUPED, operand or operand_of(product), less, product.args[2], kn)


def _taken(weight: Node, kept: Tensor, dim: int, indices: Indices) -> Node:
    """Of each matrix (or vector) of a weight the slices `kept` (E, n) along `dim`, laid out as the weight is."""
    inner, along = _kept_as(weight, dim)
    if inner is not weight:
        part = insert(weight.graph, aten.transpose.int, _taken(inner, kept, along, indices), 1, 2)
    else:
        shape = [len(kept) if d == 0 else kept.shape[1] if d == dim else 1 for d in range(val(weight).dim())]
        index = insert(weight.graph, aten.view.default, indices.node(kept.flatten().tolist(), val(weight)), shape)
        index.meta[PREPARED] = True
        part = insert(weight.graph, aten.take_along_dim.default, weight, index, dim)
    part.meta[PREPARED] = True
    return part
