"""Lowering: a region of the graph becomes one kernel description, or `Unfit` says why it cannot."""

from collections.abc import Set

from torch.fx import Node

from llmcomp.codegen.lower_attend import lower_attend
from llmcomp.codegen.lower_contract import lower_contract
from llmcomp.codegen.lower_map import lower_map
from llmcomp.codegen.lower_rows import lower_rows
from llmcomp.codegen.lowered import Lowered, destination
from llmcomp.codegen.pull import fake
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
