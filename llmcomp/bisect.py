"""Which passes torch's CompilerBisector may switch off, and the question whether it wants to.

result = CompilerBisector.do_bisect(lambda: torch.equal(compiled(x), eager(x)))
result.backend, result.subsystem, result.bisect_number      ("llmcomp", "fuse_epilogue", 2)
"""

from collections.abc import Sequence

from torch.fx import GraphModule

from llmcomp import compat
from llmcomp.passes.base import Gate, Pass

# The program is made of what this pass writes down.
ESSENTIAL = "partition"


def optional(passes: Sequence[Pass]) -> list[str]:
    """Names of the passes that the compiler works without: nothing needs a fact that they give."""
    needed = frozenset(fact for p in passes for fact in p.needs)
    return [p.name for p in passes if p.name != ESSENTIAL and not p.gives & needed]


def gate(gm: GraphModule, passes: Sequence[Pass]) -> Gate:
    """Ask the bisector, if one is running, about each optional pass over `gm`."""
    names = frozenset(optional(passes))

    def enabled(p: Pass) -> bool:
        detail = f"{p.name} of a graph of {len(gm.graph.nodes)} nodes"
        return p.name not in names or not compat.bisect_disables("llmcomp", p.name, lambda: detail)

    return enabled
