"""Numbers that are written into a graph as tensors."""

import torch
from torch import Tensor
from torch.fx import Node

from llmcomp.compat import real_tensors
from llmcomp.graph import argument

aten = torch.ops.aten


def number(value: object) -> float | None:
    """The number that an argument holds everywhere, or None where elements may differ or are not known."""
    if isinstance(value, bool | int | float):
        return float(value)
    if not isinstance(value, Node):
        return None
    if value.op == "get_attr":
        return _attribute(value)
    if value.target in _COPIES:
        return number(value.args[0])
    if value.target in (aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default):
        return 0.0
    if value.target in (aten.ones.default, aten.ones_like.default, aten.new_ones.default):
        return 1.0
    if value.target in (aten.full.default, aten.full_like.default, aten.new_full.default):
        return number(argument(value, "fill_value"))
    return number(argument(value, "s")) if value.target is aten.scalar_tensor.default else None


_COPIES = (
    aten.clone.default,
    aten.lift_fresh_copy.default,
    aten.expand.default,
    aten._to_copy.default,
)


def _attribute(node: Node) -> float | None:
    """A constant of one element, as torch.tensor(2.0) in a model leaves in the graph."""
    constant = getattr(node.graph.owning_module, str(node.target), None)
    if not isinstance(constant, Tensor) or constant.numel() != 1 or constant.dtype.is_complex:
        return None
    with real_tensors():
        return float(constant)
