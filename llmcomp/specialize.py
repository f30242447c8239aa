"""Python floats that a model reads from attributes (eps, scaling) become constants of its graph.

    item = l_self_eps.item(); y = x + item    ->    y = x + 1e-06

With dynamic=True Dynamo passes every Python float as an input that may change from call to call, and no
pass could then know the eps of a norm. A float argument (a temperature) stays an input; an attribute gets a
guard on its value, so that a changed one is traced again.
"""

import torch
from torch.fx import GraphModule, Node

from llmcomp import compat


def specialize_attributes(gm: GraphModule) -> int:
    """Replace the floats of the Dynamo graph `gm` that come from attributes, in place; return how many.

    To be called while Dynamo compiles: the guards are those of the frame that is being compiled.
    """
    found = [node for node in gm.graph.nodes if _is_attribute(node)]
    for node in found:
        # float() of a symbolic float gives its value in this call and adds the guard.
        node.replace_all_uses_with(float(node.meta["example_value"]))
        gm.graph.erase_node(node)
    if found:
        gm.recompile()
    return len(found)


def _is_attribute(node: Node) -> bool:
    if node.target != "item" or not isinstance(node.meta.get("example_value"), torch.SymFloat):
        return False
    tensor = node.args[0]
    graph_argument = tensor.meta.get("grapharg") if isinstance(tensor, Node) else None
    source = getattr(graph_argument, "source", None)
    attribute = compat.private("torch._dynamo.source", "AttrSource", "tells where an input comes from")
    return isinstance(source, attribute)
