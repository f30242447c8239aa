"""Convolutions along a sequence, in operators that have kernels.

    convolution(x, w (C, 1, K), b)  ->  b + x[..., 0:] * w[..., 0] + x[..., 1:] * w[..., 1] + ...
    convolution(x, w (O, C, K), b)  ->  linear(windows of x, w.view(O, C * K), b)

x is (B, C, T), padded with zeros before. The first has a filter for each channel, as recurrent layers do; the
second is what makes tokens of speech.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.fx import Node

from llmcomp.graph import argument, insert, same_size, source, val
from llmcomp.passes.layout import adopt
from llmcomp.passes.positions import constant
from llmcomp.passes.sizes import size_node, writable

aten = torch.ops.aten
FEW = 8  # positions that a filter sees where every one of them becomes an operator
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Convolution:
    """The arguments of a convolution along one axis."""

    x: Node
    weight: Node
    bias: Node | None
    stride: int
    padding: int
    dilation: int

    @property
    def taps(self) -> int:
        """The positions that a result sees."""
        return int(val(self.weight).shape[2])


def rewrite_convolution(node: Node) -> str | None:
    """Replace an aten.convolution; why it stays, or None."""
    if (reason := _unfit(node)) is not None:
        return reason
    bias = argument(node, "bias")
    stride, padding, dilation = (_number(node, name) for name in ("stride", "padding", "dilation"))
    weight = source(node, 1)
    conv = Convolution(source(node), weight, bias if isinstance(bias, Node) else None, stride, padding, dilation)
    if argument(node, "groups") == 1:
        if dilation != 1:
            return "the windows have gaps"
        _as_linear(node, conv)
        return None
    if not _is_depthwise(conv, argument(node, "groups")):
        return "the channels are in groups"
    if conv.taps > FEW or stride != 1:
        return f"a filter of {conv.taps} positions with a stride of {stride}"
    _as_sum(node, conv)
    return None


def _unfit(node: Node) -> str | None:
    """Why this is no convolution along a sequence, or None."""
    x, weight = val(source(node)), val(source(node, 1))
    if x.dim() != 3 or argument(node, "transposed") is not False:
        return "it is not along one axis"
    if {x.dtype, weight.dtype} - set(DTYPES) or x.dtype != weight.dtype:
        return f"the operands are of {x.dtype} and {weight.dtype}"
    if any(constant(n) is None for n in weight.shape):
        return f"the weight is of {tuple(weight.shape)}"
    if not all(writable(n) for n in val(node).shape):
        return f"the result is of {tuple(val(node).shape)}"
    return None


def _number(node: Node, name: str) -> int:
    numbers = argument(node, name)
    assert isinstance(numbers, Sequence)
    assert isinstance(numbers[0], int)
    return numbers[0]


def _is_depthwise(conv: Convolution, groups: object) -> bool:
    """Whether every channel has a filter of its own."""
    outputs, inputs, _ = val(conv.weight).shape
    return inputs == 1 and outputs == groups and same_size(val(conv.x).shape[1], outputs)


def _as_sum(node: Node, conv: Convolution) -> None:
    """In float32, as a convolution accumulates."""
    graph, dtype, length = node.graph, val(node).dtype, val(node).shape[2]
    with graph.inserting_before(node):
        x = _wide(_padded(conv))
        weight, bias = _wide(conv.weight), conv.bias
        total = None if bias is None else insert(graph, aten.unsqueeze.default, _wide(bias), 1)
        for tap in range(conv.taps):
            start = tap * conv.dilation
            seen = insert(graph, aten.slice.Tensor, x, 2, start, size_node(graph, start + length))
            term = insert(graph, aten.mul.Tensor, seen, insert(graph, aten.select.int, weight, 2, tap))
            total = term if total is None else insert(graph, aten.add.Tensor, total, term)
        assert total is not None
        result = total if dtype == torch.float32 else insert(graph, aten._to_copy.default, total, dtype=dtype)
    adopt(node, result)


def _as_linear(node: Node, conv: Convolution) -> None:
    graph, (outputs, inputs, taps) = node.graph, val(conv.weight).shape
    batch, _, length = val(node).shape
    with graph.inserting_before(node):
        windows = insert(graph, aten.unfold.default, _padded(conv), 2, conv.taps, conv.stride)
        windows = insert(graph, aten.permute.default, windows, [0, 2, 1, 3])
        shape = [size_node(graph, n) for n in (batch, length, inputs * taps)]
        rows = insert(graph, aten.reshape.default, windows, shape)
        matrix = insert(graph, aten.reshape.default, conv.weight, [outputs, inputs * taps])
        product = insert(graph, torch.ops.llmcomp.linear.default, rows, matrix, conv.bias, False)
        result = insert(graph, aten.permute.default, product, [0, 2, 1])
    adopt(node, result)


def _padded(conv: Convolution) -> Node:
    if not conv.padding:
        return conv.x
    return insert(conv.x.graph, aten.constant_pad_nd.default, conv.x, [conv.padding, conv.padding], 0.0)


def _wide(x: Node) -> Node:
    return x if val(x).dtype == torch.float32 else insert(x.graph, aten._to_copy.default, x, dtype=torch.float32)
