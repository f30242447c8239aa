"""Which nodes share a kernel, as text: what tests of the fusing passes show."""

from collections.abc import Callable

from torch.fx import Graph, Node

from llmcomp.codegen.fit import Lowerer
from llmcomp.passes.base import Pass, PassResult, run_passes
from llmcomp.passes.canonicalize import CANONICALIZE
from llmcomp.passes.facts import SHAPES
from llmcomp.passes.fuse_linear import fuse_epilogue, fuse_prologue, fuse_siblings
from llmcomp.passes.groups import Fits, Groups
from llmcomp.passes.partition import partition
from tests.graphs import capture


def never(node: Node) -> bool:
    """No linear layer is left to the library."""
    return False


def fusing(fits: Fits, rows: int = 1) -> tuple[Pass, ...]:
    """Every pass that groups nodes, as if linear layers had `rows` rows."""
    return (
        fuse_siblings(fits, never),
        fuse_epilogue(fits),
        fuse_prologue(fits, lambda n: rows, 16),
        partition(fits),
    )


def grouped(
    fn: Callable[..., object],
    *inputs: object,
    passes: Callable[[Fits], tuple[Pass, ...]] = fusing,
    dynamic: bool | None = None,
) -> tuple[str, tuple[PassResult, ...]]:
    """Run the grouping passes over the graph of `fn(*inputs)`; returns (one line per kernel, pass results)."""
    gm = capture(fn, *inputs, dynamic=dynamic)
    results = run_passes(gm, (CANONICALIZE, *passes(Lowerer().fits)), frozenset({SHAPES}))
    return show(gm.graph), results[1:]


def show(graph: Graph) -> str:
    """One line per kernel, in order: family, nodes, stored results; then the nodes that no kernel has taken."""
    groups = Groups(graph)
    lines = []
    for label in groups.order():
        region = groups.region(label[0], groups.members[label])
        nodes, outputs = (" ".join(n.name for n in ns) for ns in (region.nodes, region.outputs))
        lines.append(f"{label[0]}: {nodes} -> {outputs}")
    free = [n.name for n in graph.nodes if n.op == "call_function" and groups.label(n) is None]
    loose = [n for n in free if n not in {i.name for i in groups.inlined}]
    return "\n".join([*lines, *(["free: " + " ".join(loose)] if loose else [])])
