"""What a pass is, and how a list of them runs. Read this file, then passes/__init__.py."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch.fx import Graph, GraphModule, Node

from llmcomp.errors import PassError


@dataclass(frozen=True)
class Fact:
    """A checkable property of a whole graph, such as "every tensor node knows its shape"."""

    name: str
    holds: Callable[[Graph], bool]


@dataclass(frozen=True)
class NearMiss:
    """A place where a reader would expect a rewrite that did not happen, and the reason."""

    node: str
    reason: str


@dataclass(frozen=True)
class Saving:
    """What rewrites of one kind save in a call: bytes of weights that are not read, FLOPs that are not done."""

    rewrite: str
    count: int
    weight_bytes: int
    flops: int


@dataclass
class Report:
    """What one pass did: rewrites made, what they save where that is known, and near misses with their reasons."""

    rewrites: int = 0
    near_misses: list[NearMiss] = field(default_factory=list)
    savings: list[Saving] = field(default_factory=list)

    def miss(self, node: Node, reason: str) -> None:
        """Record that `node` looked like a match and why it was left alone."""
        self.near_misses.append(NearMiss(node.name, reason))


@dataclass(frozen=True)
class Pass:
    """A named graph rewrite. `run` edits the graph in place, valid before and after, and reports."""

    name: str
    run: Callable[[Graph, Report], None]
    needs: frozenset[Fact] = frozenset()
    gives: frozenset[Fact] = frozenset()


@dataclass(frozen=True)
class PassResult:
    """One line of the report: the pass, its rewrites and near misses, node counts and seconds."""

    name: str
    report: Report
    nodes_before: int
    nodes_after: int
    seconds: float


Watcher = Callable[[Pass, GraphModule, PassResult], None]
Gate = Callable[[Pass], bool]


def run_passes(
    gm: GraphModule,
    passes: Sequence[Pass],
    facts: frozenset[Fact] = frozenset(),
    enabled: Gate = lambda p: True,
    watch: Watcher = lambda p, gm, result: None,
) -> tuple[PassResult, ...]:
    """Run `passes` over `gm` in order, in place.

    Checks before each pass that the facts it needs are given, and after it that every fact still holds.
    `enabled` may switch passes off (the bisector does); `watch` sees the graph after each one.

    Raises:
        PassError: a pass needs a fact that nobody gave, or broke one.
    """
    results = []
    for p in passes:
        if missing := p.needs - facts:
            names = ", ".join(sorted(f.name for f in missing))
            raise PassError(f"pass {p.name} needs {names}, which no earlier pass gives: reorder the pipeline")
        if not enabled(p):
            continue
        start, size, report = time.perf_counter(), len(gm.graph.nodes), Report()
        p.run(gm.graph, report)
        gm.graph.eliminate_dead_code(_is_needed)  # and lint
        facts |= p.gives
        if broken := sorted(f.name for f in facts if not f.holds(gm.graph)):
            raise PassError(f"pass {p.name} broke {', '.join(broken)}")
        result = PassResult(p.name, report, size, len(gm.graph.nodes), time.perf_counter() - start)
        gm.recompile()
        watch(p, gm, result)
        results.append(result)
    return tuple(results)


def _is_needed(node: Node) -> bool:
    """Whether dead code removal has to leave a node; its effects are looked up only where nobody reads it."""
    return bool(node.users) or node.is_impure()
