"""A region: the nodes of a graph that one kernel computes."""

from collections.abc import Callable, Iterable, Iterator, Set
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


def readers(node: Node, inlined: Set[Node]) -> Iterator[Node]:
    """Nodes that read elements of `node`, seen through inlined nodes."""
    return _through(node, inlined, lambda n: n.users)


def sources(node: Node, inlined: Set[Node]) -> Iterator[Node]:
    """Nodes whose elements `node` reads, seen through inlined nodes."""
    return _through(node, inlined, lambda n: n.all_input_nodes)


def _through(node: Node, inlined: Set[Node], neighbours: Callable[[Node], Iterable[Node]]) -> Iterator[Node]:
    stack, done = list(neighbours(node)), set[Node]()
    while stack:
        found = stack.pop()
        if found in done:
            continue
        done.add(found)
        if found in inlined:
            stack.extend(neighbours(found))
        else:
            yield found


class Unfit(Exception):
    """A region cannot be one kernel; the text is the reason, reported as a near miss."""
