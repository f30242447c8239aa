"""`llmcomp.explain(model, *inputs)`: what compiling a call does, as a value that prints as tables."""

import io
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text
from torch import nn
from torch.fx import GraphModule

from llmcomp import compat
from llmcomp.backend import Compiled, compile_model
from llmcomp.options import read_options
from llmcomp.passes.base import Saving
from llmcomp.quantization import put_back
from llmcomp.report import ExternReport, GraphReport, KernelReport


@dataclass(frozen=True)
class Explanation:
    """What compiling one call did. `print(explanation)` shows it as tables."""

    graphs: tuple[GraphReport, ...]  # the ATen graphs, in the order they were compiled
    breaks: tuple[str, ...]  # why Dynamo ended a graph before the end of the function
    seconds: float  # of the whole first call, with Dynamo's trace and the run itself

    @property
    def kernels(self) -> tuple[KernelReport, ...]:
        """All launches of generated kernels."""
        return tuple(k for g in self.graphs for k in g.program.kernels)

    @property
    def externs(self) -> tuple[ExternReport, ...]:
        """All eager calls."""
        return tuple(e for g in self.graphs for e in g.program.externs)

    def __rich__(self) -> RenderableType:
        parts = (_graphs, _breaks, _passes, _savings, _near_misses, _kernels, _externs, _times)
        return Group(*(shown for part in parts if (shown := part(self)) is not None))

    def __str__(self) -> str:
        out = io.StringIO()
        Console(file=out, width=120).print(self)
        return out.getvalue()


def explain(
    model: Callable[..., Any], *inputs: Any, options: Mapping[str, object] | None = None, **keywords: Any
) -> Explanation:
    """Compile and run `model(*inputs, **keywords)` and tell what was done.

    A model that is compiled already is explained as if it were not, and stays as it is: the weights of an
    `nn.Module` that the option `weights` quantizes are put back. Under `torch.no_grad()` graphs are those of inference.

    Raises:
        OptionError: an unknown option.
    """
    graphs: list[GraphReport] = []
    breaks: list[str] = []
    chosen = read_options(options)

    def backend(gm: GraphModule, example_inputs: Sequence[Any]) -> Compiled:
        compiled = compile_model(gm, example_inputs, chosen, graphs.append)
        if reason := compat.graph_break(gm):  # of the trace that is kept: another one may follow
            breaks.append(reason)
        return compiled

    start = time.perf_counter()
    with put_back(model) if isinstance(model, nn.Module) else nullcontext():
        compat.compile_apart(compat.uncompiled(model), backend)(*inputs, **keywords)
    return Explanation(tuple(graphs), tuple(breaks), time.perf_counter() - start)


def _graphs(e: Explanation) -> RenderableType:
    table = _table("graphs", "graph", "nodes*", "launches*", "eager calls*", "in kernels: FLOPs*", "weight bytes*")
    for i, g in enumerate(e.graphs):
        kernels, externs = g.program.kernels, g.program.externs
        table.add_row(
            f"{i} {g.kind} ({g.program.target})",
            str(g.nodes),
            str(len(kernels)),
            str(len(externs)),
            _share((k.flops for k in kernels), (x.flops for x in externs)),
            _share((k.weight_bytes for k in kernels), (x.weight_bytes for x in externs)),
        )
    if any(g.kind == "forward" for g in e.graphs):
        table.caption = "forward graphs record gradients; under torch.no_grad() they are inference graphs"
    return table


def _share(ours: Iterable[int], others: Iterable[int]) -> str:
    mine, rest = sum(ours), sum(others)
    return f"{mine / (mine + rest):.1%}" if mine + rest else "-"


def _breaks(e: Explanation) -> RenderableType | None:
    table = _table("graph breaks", "count*", "reason")
    for reason, count in Counter(e.breaks).items():
        table.add_row(str(count), Text(reason))
    return table if e.breaks else Text("graph breaks: none\n")


def _passes(e: Explanation) -> RenderableType | None:
    rewrites: Counter[str] = Counter()
    misses: Counter[str] = Counter()
    seconds: defaultdict[str, float] = defaultdict(float)
    for result in (r for g in e.graphs for r in g.passes):
        rewrites[result.name] += result.report.rewrites
        misses[result.name] += len(result.report.near_misses)
        seconds[result.name] += result.seconds
    table = _table("passes", "pass", "rewrites*", "near misses*", "ms*")
    for name in seconds:
        table.add_row(name, str(rewrites[name]), str(misses[name]), f"{seconds[name] * 1e3:.1f}")
    return table if seconds else None


def _savings(e: Explanation) -> RenderableType | None:
    found: defaultdict[str, list[Saving]] = defaultdict(list)
    for saving in (s for g in e.graphs for r in g.passes for s in r.report.savings):
        found[saving.rewrite].append(saving)
    table = _table("saved in every call", "by", "rewrites*", "weight bytes*", "FLOPs*")
    for name, savings in found.items():
        counts = (sum(getattr(s, key) for s in savings) for key in ("count", "weight_bytes", "flops"))
        count, weight_bytes, flops = counts
        table.add_row(name, str(count), quantity(weight_bytes), quantity(flops))
    return table if found else None


def _near_misses(e: Explanation) -> RenderableType | None:
    found: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
    for result in (r for g in e.graphs for r in g.passes):
        for miss in result.report.near_misses:
            found[result.name, miss.reason].append(miss.node)
    table = _table("near misses", "pass", "count*", "reason", "nodes")
    for (name, reason), nodes in found.items():
        table.add_row(name, str(len(nodes)), Text(reason), _few(nodes))
    return table if found else None


def _kernels(e: Explanation) -> RenderableType | None:
    groups: defaultdict[tuple[str, str], list[KernelReport]] = defaultdict(list)
    for kernel in e.kernels:
        groups[kernel.name, kernel.family].append(kernel)
    table = _table("kernels", "kernel", "family", "launches*", "nodes", "bytes*", "FLOPs*")
    for (name, family), launches in groups.items():
        table.add_row(
            name,
            family,
            str(len(launches)),
            _few(launches[0].nodes),
            quantity(sum(k.bytes for k in launches)),
            quantity(sum(k.flops for k in launches)),
        )
    if sources := [k.source for k in e.kernels if k.source is not None]:
        built, cached = (sum(getattr(g.program, n) for g in e.graphs) for n in ("built", "cached"))
        table.caption = f"{built} built, {cached} found on disk; sources in {sources[0].parent}"
    return table if groups else None


def _externs(e: Explanation) -> RenderableType | None:
    groups: defaultdict[tuple[str, str], list[ExternReport]] = defaultdict(list)
    for extern in e.externs:
        groups[extern.op, extern.reason].append(extern)
    table = _table("eager calls", "operator", "count*", "bytes*", "FLOPs*", "why no kernel")
    for (op, reason), calls in groups.items():
        bytes_, flops = sum(c.bytes for c in calls), sum(c.flops for c in calls)
        table.add_row(op, str(len(calls)), quantity(bytes_), quantity(flops), Text(reason))
    return table if groups else None


def _times(e: Explanation) -> RenderableType:
    seconds: defaultdict[str, float] = defaultdict(float)
    for stage in (s for g in e.graphs for s in g.stages):
        seconds[stage.stage] += stage.seconds
    seconds["trace, capture, first run"] = e.seconds - sum(seconds.values())
    table = _table("time", "stage", "seconds*")
    for stage_name, spent in seconds.items():
        table.add_row(stage_name, f"{spent:.2f}")
    return table


def _table(title: str, *columns: str) -> Table:
    """A table; columns whose name ends in a star are numbers."""
    table = Table(title=title, title_justify="left", caption_justify="left")
    for column in columns:
        table.add_column(column.rstrip("*"), justify="right" if column.endswith("*") else "left")
    return table


def _few(names: Sequence[str]) -> Text:
    return Text(", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else ""))


def quantity(n: int) -> str:
    """A count with three digits and a unit: 1.23 G."""
    for unit, size in (("T", 10**12), ("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if n >= size:
            return f"{n / size:.3g} {unit}"
    return str(n)
