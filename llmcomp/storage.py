"""Where the results of a program's kernels lie: in tensors of their own, or side by side in one block of memory."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import sympy
import torch
from torch.fx import GraphModule, Node

from llmcomp.arena import Arena, Lifetime, plan_arena
from llmcomp.codegen.index import sizes
from llmcomp.codegen.lowered import destination
from llmcomp.region import Partition, readers, sources
from llmcomp.target import Target

if TYPE_CHECKING:
    from llmcomp.program import Step


@dataclass(frozen=True)
class Storage:
    """Where results lie: `arena` holds those that only kernels see, `tensors` those that need a torch.Tensor."""

    arena: Arena
    tensors: frozenset[Node]


def assign_storage(gm: GraphModule, partition: Partition, steps: "Sequence[Step]", target: Target) -> Storage:
    """Decide for every stored result whether it needs a tensor of its own, and place the others in the arena."""
    stored = {o for s in steps if s.lowered is not None for o in s.region.outputs if destination(o)[0] is o}
    step_of = {n: i for i, s in enumerate(steps) for n in s.region.nodes}
    visible = set(sources(gm.graph.output_node(), partition.inlined))
    for step in steps:
        if step.lowered is None:
            visible.update(sources(step.region.nodes[0], partition.inlined))
    tensors = stored & visible if target.name == "cpp" else stored
    lifetimes = []
    for node in stored - tensors:
        ends = [step_of[n] for n in readers(node, partition.inlined) if n in step_of]
        value = node.meta["val"]
        extent = _storage_elements(value) * value.dtype.itemsize
        lifetimes.append(Lifetime(node, extent, step_of[node], max([step_of[node], *ends])))
    order = {n: i for i, n in enumerate(gm.graph.nodes)}
    lifetimes.sort(key=lambda v: order[v.node])
    return Storage(plan_arena(lifetimes), frozenset(tensors))


def _storage_elements(value: torch.Tensor) -> sympy.Expr:
    """Elements from the first to the last of a tensor of positive strides."""
    return sympy.expand(
        1 + sympy.Add(*((n - 1) * s for n, s in zip(sizes(value.shape), sizes(value.stride()), strict=True)))
    )
