"""The operators that multiply an operand with matrices of weights, and where their arguments stand.

linear(x, weight, bias, kn)
grouped_linear(x, weight, ends, kn)
packed_linear(x, codes, scale, zero, bias, format)
packed_grouped_linear(x, codes, scale, zero, ends, format)
two_four_linear(x, codes, bias)
masked_linear(x, codes, bias, outputs)
block_linear(x, codes, bias, outputs, height, width)
"""

import torch
from torch.fx import Node

import llmcomp.blocks
import llmcomp.masked
import llmcomp.ops
import llmcomp.packed_ops
import llmcomp.two_four  # noqa: F401  (all of them register operators)

LINEAR = torch.ops.llmcomp.linear.default
GROUPED = torch.ops.llmcomp.grouped_linear.default
PACKED = torch.ops.llmcomp.packed_linear.default
PACKED_GROUPED = torch.ops.llmcomp.packed_grouped_linear.default
TWO_FOUR = torch.ops.llmcomp.two_four_linear.default
MASKED = torch.ops.llmcomp.masked_linear.default
BLOCKS = torch.ops.llmcomp.block_linear.default
PRODUCTS = (LINEAR, GROUPED, PACKED, PACKED_GROUPED, TWO_FOUR, MASKED, BLOCKS)


def is_product(node: Node) -> bool:
    """Whether a node multiplies an operand with a matrix of weights, or with one of several."""
    return node.target in PRODUCTS


def operand_of(node: Node) -> Node:
    """What is multiplied with the weights: (..., K)."""
    operand = node.args[0]
    assert isinstance(operand, Node)
    return operand


def ends_of(node: Node) -> Node | None:
    """The table that says which rows of the operand meet which matrix, of a grouped product."""
    at = {GROUPED: 2, PACKED_GROUPED: 4}.get(node.target)  # type: ignore[call-overload]
    ends = None if at is None else node.args[at]
    assert ends is None or isinstance(ends, Node)
    return ends


def bias_of(node: Node) -> Node | None:
    """The vector that is added to every row, if any."""
    at = {LINEAR: 2, PACKED: 4, TWO_FOUR: 2, MASKED: 2, BLOCKS: 2}.get(node.target)  # type: ignore[call-overload]
    bias = None if at is None else node.args[at]
    assert bias is None or isinstance(bias, Node)
    return bias
