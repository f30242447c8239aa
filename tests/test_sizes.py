"""passes/sizes.py: sizes become nodes."""

import torch
from torch import Tensor
from torch.fx import GraphModule

from llmcomp.graph import val
from llmcomp.passes.sizes import size_node, writable
from tests.graphs import capture


def graph(fn: object, *inputs: Tensor) -> GraphModule:
    assert callable(fn)
    return capture(fn, *inputs, dynamic=True)


def evaluated(gm: GraphModule, size: int | torch.SymInt) -> object:
    """The value of `size_node` in a call of the graph."""
    (output,) = gm.graph.find_nodes(op="output")
    with gm.graph.inserting_before(output):
        node = size_node(gm.graph, size)
    output.args = ((node,),)
    gm.recompile()
    return gm(*gm.meta["inputs"])[0]


def test_sums_and_products_of_sizes():
    gm = graph(lambda x, y: torch.cat([x, x, y]).expand(3, -1), torch.ones(5), torch.ones(7))
    (result,) = (n for n in gm.graph.nodes if n.target is torch.ops.aten.expand.default)
    length = val(result).shape[1]
    assert isinstance(length, torch.SymInt) and writable(length - 4)
    assert evaluated(gm, length - 4) == 13


def test_numbers_stay_numbers():
    gm = graph(lambda x: x + 1, torch.ones(5))
    assert size_node(gm.graph, 3) == 3
    length = gm.graph.find_nodes(op="placeholder")[-1].meta["val"].shape[0]
    assert size_node(gm.graph, length - length + 2) == 2


def test_quotients_and_remainders():
    gm = graph(lambda x: (x[: x.shape[0] // 3] + 1, x[: x.shape[0] % 4] * 2), torch.ones(7))
    sizes = [
        val(n).shape[0] for n in gm.graph.nodes if n.target in (torch.ops.aten.add.Tensor, torch.ops.aten.mul.Tensor)
    ]
    assert all(writable(n) for n in sizes)
    assert [evaluated(gm, n) for n in sizes] == [2, 3]


def test_what_cannot_be_written():
    gm = graph(lambda x: x[: torch.sym_max(x.shape[0] // 3, x.shape[0] - 5)] + 1, torch.ones(7))
    (result,) = (n for n in gm.graph.nodes if n.target is torch.ops.aten.add.Tensor)
    assert not writable(val(result).shape[0])
