"""Small questions about a node that the recognizing passes share."""

import torch
from torch.fx import Node
from torch.fx.node import Argument

from llmcomp.graph import argument, is_tensor, only_user, same_size, source, val

aten = torch.ops.aten

# Each dtype with the dtypes that hold all of its values.
_FLOATS = {
    torch.bfloat16: {torch.float32, torch.float64},
    torch.float16: {torch.float32, torch.float64},
    torch.float32: {torch.float64},
}
_INTEGERS = {
    torch.bool: {torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, *_FLOATS, torch.float64},
    torch.uint8: {torch.int16, torch.int32, torch.int64, torch.float32, torch.float64},
    torch.int8: {torch.int16, torch.int32, torch.int64, torch.float32, torch.float64},
    torch.int16: {torch.int32, torch.int64, torch.float32, torch.float64},
    torch.int32: {torch.int64, torch.float64},
}
HOLDS = _FLOATS | _INTEGERS


def is_cast(node: object) -> bool:
    """Whether a node changes the dtype of a tensor and nothing else (or not even that)."""
    if not isinstance(node, Node) or node.target is not aten._to_copy.default:
        return False
    x = source(node)
    same_place = val(node).device == val(x).device and val(node).layout == val(x).layout
    return same_place and argument(node, "memory_format") in (None, torch.preserve_format)


def uncast(node: Node) -> Node:
    """What `node` was before a cast that lost nothing, or `node` itself."""
    if not is_cast(node):
        return node
    x = source(node)
    return x if val(node).dtype in HOLDS.get(val(x).dtype, ()) else node


def narrowed(node: Node) -> Node:
    """The only user of `node` where that rounds it to a narrower float, else `node`."""
    user = only_user(node)
    if user is None or not is_cast(user):
        return node
    narrower = user.args[0] is node and val(node).dtype in HOLDS.get(val(user).dtype, ())
    return user if narrower and val(user).dtype.is_floating_point else node


def operands(node: object, *targets: object) -> tuple[Node, Node] | None:
    """The two tensor operands of a call of one of `targets`, or None."""
    if not isinstance(node, Node) or node.target not in targets or node.kwargs or len(node.args) != 2:
        return None
    a, b = node.args
    if isinstance(a, Node) and isinstance(b, Node) and is_tensor(a) and is_tensor(b):
        return a, b
    return None


def other_operand(node: object, one: Node, *targets: object) -> Node | None:
    """The operand beside `one` in a call of one of `targets`, which commute; or None."""
    pair = operands(node, *targets)
    if pair is None or one not in pair:
        return None
    return pair[1] if pair[0] is one else pair[0]


def with_number(node: object, *targets: object) -> tuple[Node, float] | None:
    """(tensor, number) of a call such as add(x, 1e-6), or None."""
    if not isinstance(node, Node) or node.target not in targets or node.kwargs or len(node.args) != 2:
        return None
    x, number = node.args
    if isinstance(x, Node) and isinstance(number, int | float) and is_tensor(x):
        return x, number
    return None


def is_last_axis(dims: Argument, node: Node) -> bool:
    """Whether `dims`, a dimension or a list of one, is the last dimension of `node`."""
    if isinstance(dims, list | tuple):
        return len(dims) == 1 and is_last_axis(dims[0], node)
    return isinstance(dims, int) and dims % max(val(node).dim(), 1) == val(node).dim() - 1


def is_vector(node: Node, length: int | torch.SymInt) -> bool:
    """Whether a node is a tensor of shape (length,)."""
    return is_tensor(node) and val(node).dim() == 1 and same_size(val(node).shape[0], length)
