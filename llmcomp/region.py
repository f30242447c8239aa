"""A region: the nodes of a graph that one kernel computes."""

from dataclasses import dataclass

from torch.fx import Node

FAMILIES = ("map", "rows", "contract", "attend", "extern")


@dataclass(frozen=True)
class Region:
    """`nodes` in graph order; `outputs` are those that are stored or that write into memory (effects).

    Nodes of a region that are not outputs live only in registers. A node of family "extern" is called in eager ATen.
    """

    family: str
    nodes: tuple[Node, ...]
    outputs: tuple[Node, ...]


@dataclass(frozen=True)
class Partition:
    """Every call of the graph, assigned: regions in an order that respects data and writes, and inlined nodes.

    Inlined nodes (views, index arithmetic, masks) are recomputed by each region that reads them.
    """

    regions: tuple[Region, ...]
    inlined: frozenset[Node]


class Unfit(Exception):
    """A region cannot be one kernel; the text is the reason, reported as a near miss."""
