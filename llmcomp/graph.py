"""What passes do with FX graphs: read fake values, insert nodes, print, order by reads and writes.

Every tensor or integer node of a captured graph has its fake value in `meta["val"]`; `insert` keeps it so.
"""

import operator
import re
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from functools import cache

import torch
from torch import SymInt, Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch._guards import detect_fake_mode
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.fx.node import Argument, map_arg

Size = int | SymInt


# ---- values


def val(node: Node) -> Tensor:
    """The fake tensor of a node that computes one."""
    value = node.meta["val"]
    assert isinstance(value, Tensor), f"{node.name} is not a tensor"
    return value


def is_tensor(value: object) -> bool:
    """Whether `value` is a node that computes one tensor."""
    return isinstance(value, Node) and isinstance(value.meta.get("val"), Tensor)


def known(value: object) -> object:
    """`value`, or the fake value of the node that it is (a size computed in the graph, for example)."""
    return value.meta["val"] if isinstance(value, Node) else value


def argument(node: Node, name: str) -> Argument:
    """The argument called `name` in the schema of an operator call, its default where it was not given.

    Raises:
        KeyError: the operator has no such argument.
    """
    assert isinstance(node.target, OpOverload)
    for position, formal in enumerate(node.target._schema.arguments):
        if formal.name == name:
            given = node.args[position] if position < len(node.args) else node.kwargs.get(name)
            return formal.default_value if given is None and formal.has_default_value() else given
    raise KeyError(f"{node.target} has no argument {name}")


def source(node: Node, position: int = 0) -> Node:
    """A positional argument that is a node: by default the first, what an operator works on."""
    found = node.args[position]
    assert isinstance(found, Node), f"argument {position} of {node.name} is not a node"
    return found


def tensors(node: Node) -> list[Node]:
    """The nodes in the list that is the first argument of a call such as cat."""
    parts = node.args[0]
    assert isinstance(parts, list | tuple), f"{node.name} takes no list"
    return [part for part in parts if isinstance(part, Node)]


def only_user(node: Node) -> Node | None:
    """The single node that uses `node`, or None where there is not exactly one."""
    return next(iter(node.users)) if len(node.users) == 1 else None


# ---- sizes


def same_size(a: Size, b: Size) -> bool:
    """Whether two sizes are equal for every input; never adds a guard."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    if isinstance(a, SymInt) and isinstance(b, SymInt) and a.node.expr == b.node.expr:
        return True
    if None not in (examples := (_example(a), _example(b))) and examples[0] != examples[1]:
        return False  # in the call that was traced already: no need to ask algebra
    return statically_known_true(a == b)


def _example(n: Size) -> int | None:
    """A size in the call that was traced, where it is known."""
    if isinstance(n, int):
        return n
    return int(n.node.hint) if n.node.has_hint() else None


def same_shape(a: Sequence[Size], b: Sequence[Size]) -> bool:
    """Whether two shapes are equal for every input; never adds a guard."""
    return len(a) == len(b) and all(map(same_size, a, b))


def same_layout(a: Tensor, b: Tensor) -> bool:
    """Whether two fake tensors agree in shape and strides (strides of axes of one element do not count)."""
    if not same_shape(a.shape, b.shape):
        return False
    axes = (d for d in range(a.dim()) if not same_size(a.shape[d], 1))
    return all(same_size(a.stride(d), b.stride(d)) for d in axes)


def is_contiguous(t: Tensor) -> bool:
    """Whether a fake tensor is contiguous for every input; never adds a guard."""
    expected: Size = 1
    for size, stride in zip(reversed(t.shape), reversed(t.stride()), strict=True):
        if same_size(size, 1):
            continue
        if not same_size(stride, expected):
            return False
        expected = expected * size
    return True


# ---- edits


def insert(graph: Graph, target: OpOverload | Callable[..., object], *args: Argument, **kwargs: Argument) -> Node:
    """Insert a call at the graph's insertion point; running it on fake values gives its `meta["val"]`."""
    node = graph.call_function(target, args, kwargs)
    node.meta["val"] = fake_result(node)
    return node


def insert_once(before: Node, target: OpOverload, *args: Argument) -> Node:
    """An earlier call with the same arguments where there is one, else a call inserted before `before`."""
    operands: list[Node] = []
    map_arg(args, operands.append)
    for user in operands[0].users:
        if user.target is target and user.args == args and not user.kwargs and user < before:
            return user
    with before.graph.inserting_before(before):
        return insert(before.graph, target, *args)


def fake_result(node: Node) -> object:
    """The value of a call, computed on the fake values of its arguments.

    Calls of our operators on values that differ in nothing but identity have one value: a model has many equal
    layers, and calling operators is most of what a rewrite costs. (Those of aten may make views, or new symbols.)
    """
    args, kwargs = map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    mode = detect_fake_mode(args) or _fake_mode(node.graph)
    assert mode is not None and callable(node.target)
    # The values refer to their mode: kept there, they live as long as it does.
    known: dict[Hashable, object] = vars(mode).setdefault("_llmcomp_results", {})
    key = (node.target, _description(args), _description(kwargs))
    if key in known:
        return known[key]
    # Padding keeps symbolic sizes in its Python form alone.
    with torch.no_grad(), mode, enable_python_dispatcher():
        value: object = node.target(*args, **kwargs)
    if isinstance(node.target, OpOverload) and node.target.namespace == "llmcomp":
        known[key] = value
    return value


def _fake_mode(graph: Graph) -> FakeTensorMode | None:
    """The mode of the fake values of a graph."""
    values = (n.meta.get("val") for n in graph.nodes)
    return next((mode for v in values if (mode := detect_fake_mode([v])) is not None), None)


def _description(value: object) -> Hashable:
    """All that the value of a call may depend on: equal for tensors of one shape and layout."""
    if isinstance(value, Tensor):
        return Tensor, value.dtype, value.device, _description((*value.shape, *value.stride()))
    if isinstance(value, dict):
        return tuple((name, _description(v)) for name, v in value.items())
    if isinstance(value, list | tuple):
        return tuple(map(_description, value))
    # 1, 1.0 and True are equal, and different arguments.
    return (type(value), value.node.expr if isinstance(value, SymInt) else value)


def replace(node: Node, new: Node) -> None:
    """Let every user of `node` read `new`, and remove `node`; what only `node` used is left to dead code
    removal.
    """
    assert new is not node
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)


def replace_by(node: Node, target: OpOverload, *args: Argument, **kwargs: Argument) -> Node:
    """Replace `node` by a call of `target`, inserted at its place; returns the call."""
    with node.graph.inserting_before(node):
        new = insert(node.graph, target, *args, **kwargs)
    replace(node, new)
    return new


# ---- memory


def is_view(node: Node) -> bool:
    """Whether the result of a call shares the memory of its first argument (a write returns its
    destination).
    """
    if node.target is operator.getitem:
        return is_view(source(node))
    if not isinstance(node.target, OpOverload) or not node.args or not isinstance(node.args[0], Node):
        return False
    if node.target is torch.ops.aten._unsafe_view.default:
        return True
    return any(r.alias_info is not None for r in node.target._schema.returns)


def base(node: Node) -> Node:
    """The node whose memory `node` shows: the end of its chain of views."""
    while is_view(node):
        node = source(node)
    return node


def views(node: Node) -> Iterator[Node]:
    """`node` and every view of it, of its views, and so on."""
    yield node
    for user in node.users:
        if is_view(user) and user.args[0] is node:
            yield from views(user)


def is_returned(node: Node) -> bool:
    """Whether the graph returns `node` or a view of it."""
    return any(user.op == "output" for view in views(node) for user in view.users)


def written(node: Node) -> tuple[Node, ...]:
    """The arguments that a call writes into, such as the destination of `copy_`."""
    nodes: list[Node] = []
    for name in _written_arguments(node.target):
        map_arg(argument(node, name), nodes.append)
    return tuple(nodes)


@cache
def _written_arguments(target: object) -> tuple[str, ...]:
    """The names of the arguments that an operator writes into."""
    if not isinstance(target, OpOverload) or not target._schema.is_mutable:
        return ()
    arguments = target._schema.arguments
    return tuple(a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write)


def mutated(graph: Graph) -> frozenset[Node]:
    """The bases that some node of the graph writes into."""
    return frozenset(base(target) for node in graph.nodes for target in written(node))


def dependencies(graph: Graph) -> dict[Node, set[Node]]:
    """For each node those that have to run before it.

    Those are the nodes it uses, and, so that memory is read and written as the graph's order says: for a
    write every earlier reader and writer of the same memory, for a reader the last write before it. Random
    operators keep their order, for they all advance one generator. A view reads nothing: its readers do.
    """
    before: dict[Node, set[Node]] = {}
    readers: dict[Node | None, list[Node]] = {}
    writer: dict[Node | None, Node] = {}
    for node in graph.nodes:
        needs = before[node] = set(node.all_input_nodes)
        writes = {*(base(n) for n in written(node)), *([None] if is_random(node) else [])}
        reads = set() if is_view(node) and not writes else {base(n) for n in node.all_input_nodes}
        for memory in reads | writes:
            if memory in writer:
                needs.add(writer[memory])
        for memory in writes:
            needs.update(readers.pop(memory, ()))
            writer[memory] = node
        for memory in reads - writes:
            readers.setdefault(memory, []).append(node)
        needs.discard(node)
    return before


def is_random(node: Node) -> bool:
    """Whether a call draws from torch's random generator."""
    return isinstance(node.target, OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags


# ---- text

SHORT: Mapping[torch.dtype, str] = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "bool",
}
_SYMBOL = re.compile(r"\b[suz]f?\d+\b(?!\[)")


def text(graph: Graph) -> str:
    """The graph in one canonical spelling: equal text for graphs that differ in node names and symbols only.

        def (x0: i64[2, s0], w0: f32[64, 32])
        embedding: f32[2, s0, 32] = aten.embedding(w0, x0)
        return (embedding)

    Inputs are x0, x1, ...; parameters and buffers w0, w1, ...; size symbols s0, s1, ... by first use.
    """
    names = _names(graph)
    inputs = [f"{names[n]}{_annotation(n)}" for n in graph.nodes if n.op == "placeholder"]
    lines = [f"def ({', '.join(inputs)})"]
    for node in graph.nodes:
        if node.op == "output":
            lines.append(f"return {_argument(node.args[0], names)}")
        elif node.op != "placeholder":
            lines.append(f"{names[node]}{_annotation(node)} = {_call(node, names)}")
    return _renamed_symbols("\n".join(lines))


def _names(graph: Graph) -> dict[Node, str]:
    names: dict[Node, str] = {}
    counts: dict[str, int] = {}
    for node in graph.nodes:
        stem = _stem(node)
        number = counts[stem] = counts.get(stem, -1) + 1
        names[node] = f"{stem}{number}" if node.op == "placeholder" else f"{stem}_{number}" if number else stem
    return names


def _stem(node: Node) -> str:
    if node.op == "placeholder":
        return "w" if node.meta.get("static") else "x"
    if node.op == "get_attr":
        return "constant"
    return _operator(node.target).rpartition(".")[2] if node.op == "call_function" else str(node.target)


def _operator(target: object) -> str:
    if isinstance(target, OpOverload):
        return f"{target.namespace}.{target._opname}"
    return str(getattr(target, "__name__", target))


def _annotation(node: Node) -> str:
    value = node.meta.get("val")
    if isinstance(value, Tensor):
        return f": {_tensor(value)}"
    return f": {value}" if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool) else ""


def _tensor(value: Tensor) -> str:
    return f"{SHORT.get(value.dtype, str(value.dtype))}[{', '.join(map(str, value.shape))}]"


def _call(node: Node, names: Mapping[Node, str]) -> str:
    if node.op == "get_attr":
        return f"self.{node.target}"
    args = [_argument(a, names) for a in node.args]
    args += [f"{k}={_argument(v, names)}" for k, v in node.kwargs.items()]
    return f"{_operator(node.target)}({', '.join(args)})"


def _argument(value: object, names: Mapping[Node, str]) -> str:
    if isinstance(value, Node):
        return names[value]
    if isinstance(value, list | tuple):
        opening, closing = "()" if isinstance(value, tuple) else "[]"
        return f"{opening}{', '.join(_argument(v, names) for v in value)}{closing}"
    if isinstance(value, torch.dtype):
        return SHORT.get(value, str(value))
    return str(value) if not isinstance(value, str) else repr(value)


def _renamed_symbols(printed: str) -> str:
    order: dict[str, str] = {}
    return _SYMBOL.sub(lambda m: order.setdefault(m[0], f"s{len(order)}"), printed)
