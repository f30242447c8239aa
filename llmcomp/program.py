"""From a partitioned graph to something that can be called: lower, render, build, plan, and the host code.

The program of the CPU target is one Python function that gathers pointers and makes one foreign call for
every run of kernels between two Extern calls (for a decode step: one call in all). Its text is kept as
`Executable.source`.
"""

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.fx import GraphModule, Node

from llmcomp import hostcode
from llmcomp.codegen.build import Built, Source, build, find_compiler
from llmcomp.codegen.cache import Cache
from llmcomp.codegen.fit import Lowerer
from llmcomp.codegen.lowered import Lowered
from llmcomp.codegen.render import render_cpp, render_triton
from llmcomp.costs import extern_cost, kernel_cost
from llmcomp.cuda_graph import Inputs, capturable
from llmcomp.options import Options
from llmcomp.passes.partition import read_partition
from llmcomp.region import Partition, Region
from llmcomp.report import ExternReport, KernelReport, ProgramReport, StageTime
from llmcomp.target import Target, reference


@dataclass(frozen=True)
class Step:
    """One region of the program: a kernel with its arguments, or an eager call where `lowered` is None."""

    region: Region
    lowered: Lowered | None


class Clock:
    """Seconds by stage."""

    def __init__(self) -> None:
        self.stages: list[StageTime] = []
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        """Book the time since the last lap as `stage`."""
        now = time.perf_counter()
        self.stages.append(StageTime(stage, now - self._last))
        self._last = now


class Executable:
    """A compiled graph: flat inputs in, the tuple of flat outputs out. Safe to call from several threads.

    `inputs` is there where the launches can be captured into a CUDA graph.
    """

    def __init__(
        self, run: Callable[..., tuple[Any, ...]], source: str, report: ProgramReport, inputs: Inputs | None = None
    ) -> None:
        self.run = run
        self.source = source
        self.report = report
        self.inputs = inputs

    def __call__(self, *inputs: Any) -> tuple[Any, ...]:
        return self.run(*inputs)


def compile_program(gm: GraphModule, lowerer: Lowerer, options: Options, target: Target) -> Executable:
    """Compile a partitioned graph for `target` ("cpp" or "triton").

    Raises:
        BuildError: generated source did not compile.
        CacheError: the cache folder cannot be used.
    """
    clock = Clock()
    partition = read_partition(gm.graph)
    steps = lower_steps(partition, lowerer)
    clock.lap("lower")
    sources, kernels = render_all(steps, target)
    clock.lap("render")
    built = build_all(sources, options)
    clock.lap("build")
    run, text = hostcode.host_program(gm, partition, steps, kernels, built, options, _cache(options), target)
    clock.lap("plan")
    externs = [s.region.nodes[0] for s in steps if s.lowered is None]
    captures = target.device == "cuda" and options.cuda_graphs is not False
    inputs = capturable(gm.graph, externs) if captures else None
    return Executable(run, text, _report(steps, kernels, built, target, clock), inputs)


def usable(target: Target, options: Options) -> Target:
    """`target`, or the eager references where the C++ target finds no compiler (one warning says so)."""
    if target.name != "cpp" or find_compiler(_cache(options)) is not None:
        return target
    _warn_no_compiler()
    return reference(target.device)


@cache
def _warn_no_compiler() -> None:
    warnings.warn(
        "llmcomp found no C++ compiler ($CXX, c++, g++ or clang++) and calls eager operators instead: results "
        "are right, nothing is faster. Install one, for instance with `apt install g++`.",
        stacklevel=2,
    )


def lower_steps(partition: Partition, lowerer: Lowerer) -> list[Step]:
    """Regions with their kernels, in order."""
    return [Step(r, None if r.family == "extern" else lowerer.lower(r, partition.inlined)) for r in partition.regions]


def render_all(steps: Sequence[Step], target: Target) -> tuple[list[Source], list[int]]:
    """The distinct sources of all kernels, and for every step the index of its source (-1: Extern).

    Equal layers give equal descriptions, so they share a source; its comment names the nodes of the first.
    """
    render = render_triton if target.name == "triton" else render_cpp
    sources: list[Source] = []
    by_kernel: dict[object, int] = {}
    which: list[int] = []
    for step in steps:
        if step.lowered is None:
            which.append(-1)
            continue
        if step.lowered.kernel not in by_kernel:
            by_kernel[step.lowered.kernel] = len(sources)
            sources.append(render(step.lowered.kernel, comment(step.region)))
        which.append(by_kernel[step.lowered.kernel])
    return sources, which


def comment(region: Region) -> tuple[str, ...]:
    """The graph nodes of a region, one line each."""
    return tuple(_describe(n) for n in region.nodes)


def _describe(node: Node) -> str:
    value = node.meta.get("val")
    shape = f" {str(value.dtype).split('.')[-1]}{list(value.shape)}" if isinstance(value, torch.Tensor) else ""
    arguments = ", ".join(a.name if isinstance(a, Node) else str(a) for a in node.args)
    return f"{node.name}{shape} = {node.target}({arguments})"


def build_all(sources: Sequence[Source], options: Options) -> Sequence[Built]:
    """Compile what the cache does not hold yet."""
    return build(sources, _cache(options))


@cache
def _cache_of(root: str) -> Cache:
    return Cache(Path(root))


def _cache(options: Options) -> Cache:
    return _cache_of(str(options.cache))


def _report(
    steps: Sequence[Step], kernels: Sequence[int], built: Sequence[Built], target: Target, clock: Clock
) -> ProgramReport:
    launched, externs = [], []
    for step, which in zip(steps, kernels, strict=True):
        names = tuple(n.name for n in step.region.nodes)
        if step.lowered is None:
            node = step.region.nodes[0]
            reason = str(node.meta.get("extern_reason", ""))
            externs.append(ExternReport(str(node.target), node.name, reason, *extern_cost(node)))
            continue
        total, flops, weights = kernel_cost(step.region, step.lowered.buffers)
        kernel = step.lowered.kernel
        path = built[which].source_path
        launched.append(KernelReport(kernel.name, step.region.family, names, total, flops, weights, path))
    fresh = sum(not b.cached for b in built)
    return ProgramReport(target.name, tuple(launched), tuple(externs), tuple(clock.stages), fresh, len(built) - fresh)
