"""Lowering: a region of the graph becomes one kernel description, or `Unfit` says why it cannot."""

from collections.abc import Set

from torch.fx import Node

from llmcomp.codegen.lower_attend import lower_attend
from llmcomp.codegen.lower_contract import lower_contract
from llmcomp.codegen.lower_map import lower_map
from llmcomp.codegen.lower_rows import lower_rows
from llmcomp.codegen.lowered import Lowered, destination
from llmcomp.codegen.pull import fake
from llmcomp.graph import base
from llmcomp.region import Region, Unfit


def lower(region: Region, inlined: Set[Node]) -> Lowered:
    """The kernel of a region.

    Raises:
        Unfit: the region is not one kernel of its family; the text is the reason.
    """
    if not region.outputs:
        raise Unfit("nothing reads it")
    if any(n == 0 for o in region.outputs for n in fake(destination(o)[1]).shape if isinstance(n, int)):
        raise Unfit("no elements")
    _refuse_stale_reads(region)
    match region.family:
        case "map":
            return lower_map(region, inlined)
        case "rows":
            return lower_rows(region, inlined)
        case "contract":
            return lower_contract(region, inlined)
        case "attend":
            return lower_attend(region, inlined)
    raise AssertionError(f"no family {region.family}")


def _refuse_stale_reads(region: Region) -> None:
    """A kernel computes values, it has no order in time: what is written in place may not be read after that."""
    written: set[Node] = set()
    for node in region.nodes:
        target = destination(node)[0]
        for source in node.all_input_nodes:
            if source is not target and base(source) in written:
                raise Unfit(f"{node.name} reads what was written in place")
        if target is node:
            continue
        if base(target) in region.nodes:
            raise Unfit(f"{node.name} writes to what would not lie in memory")
        written.add(base(target))
