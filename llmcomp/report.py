"""What a compilation did, as values: filled by the compiler, printed by llmcomp.explain.

A Program carries its ProgramReport; a GraphReport adds what the passes did. Costs are of one call, counted at
the sizes of the example inputs (the hints of symbolic sizes):

    bytes         read from and written to memory once each; a weight that is read twice counts twice
    weight_bytes  the part of `bytes` that reads parameters
    flops         a multiply-add is 2; pointwise operations count 1 for every element
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from llmcomp.passes.base import PassResult


@dataclass(frozen=True)
class StageTime:
    """Seconds of one stage of compilation: capture, passes, partition, lower, render, build, plan."""

    stage: str
    seconds: float


@dataclass(frozen=True)
class KernelReport:
    """One launch of a generated kernel. Launches that share a kernel have the same `name` and `source`."""

    name: str
    family: str  # map, rows, contract, attend
    nodes: tuple[str, ...]  # the graph nodes that it computes
    bytes: int
    flops: int
    weight_bytes: int = 0
    source: Path | None = None  # where the generated text can be read


@dataclass(frozen=True)
class ExternReport:
    """One call of eager ATen in the program, and why no kernel was generated for it."""

    op: str  # "aten.sort.default"
    node: str
    reason: str
    bytes: int = 0
    flops: int = 0
    weight_bytes: int = 0


@dataclass(frozen=True)
class ProgramReport:
    """What became of the graph after the passes: launches in order, and the work of building them."""

    target: str
    kernels: tuple[KernelReport, ...] = ()
    externs: tuple[ExternReport, ...] = ()
    stages: tuple[StageTime, ...] = ()
    built: int = 0  # kernels that were compiled
    cached: int = 0  # kernels that were found on disk


class Program(Protocol):
    """A compiled graph: flat inputs in, the tuple of flat outputs out."""

    report: ProgramReport
    source: str  # of the host code that launches the kernels

    def __call__(self, *inputs: Any) -> tuple[Any, ...]: ...


@dataclass(frozen=True)
class GraphReport:
    """One ATen graph: `kind` is inference, forward or backward; `nodes` counts those that were captured."""

    kind: str
    nodes: int
    passes: tuple[PassResult, ...]
    program: ProgramReport
    stages: tuple[StageTime, ...] = ()
