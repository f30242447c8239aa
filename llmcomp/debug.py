"""Reading the compiler: what LLMCOMP_DEBUG prints and what LLMCOMP_DUMP writes.

    LLMCOMP_DEBUG=1  passes, rewrites and times          3  and the graph after each pass
                  2  and operator counts, near misses    4  and the source of the kernels
    LLMCOMP_DUMP=d   d/000_inference/00_captured.py, 01_canonicalize.py, ...: each a program of its own that
                     builds the graph of that stage and runs it on random inputs

Near misses are also logged at level INFO by the logger "llmcomp".
"""

import logging
import re
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import torch
from torch.fx import GraphModule

from llmcomp.options import Options
from llmcomp.passes.base import Pass, PassResult
from llmcomp.report import ProgramReport

log = logging.getLogger("llmcomp")


class Stages:
    """Watches one graph on its way through the compiler; prints and writes what the options ask for."""

    def __init__(self, gm: GraphModule, options: Options) -> None:
        self._level = options.debug
        self._folder = None if options.dump is None else _new_folder(options.dump, gm.meta.get("kind", "graph"))
        self._written = 0
        self._counts = operator_counts(gm)
        self._print(1, f"llmcomp: {gm.meta.get('kind', 'graph')} of {len(gm.graph.nodes)} nodes")
        self._show_graph("captured", gm)

    def after_pass(self, p: Pass, gm: GraphModule, result: PassResult) -> None:
        """Report what `p` has just done to `gm`: a Watcher of run_passes."""
        for miss in result.report.near_misses:
            log.info("%s left %s alone: %s", p.name, miss.node, miss.reason)
            self._print(2, f"    left {miss.node} alone: {miss.reason}")
        nodes = f"{result.nodes_before} -> {result.nodes_after} nodes"
        self._print(1, f"  {p.name:24} {result.report.rewrites:5} rewrites {nodes:>22} {_ms(result.seconds)}")
        before, self._counts = self._counts, operator_counts(gm)
        for line in count_changes(before, self._counts):
            self._print(2, f"    {line}")
        if result.report.rewrites or result.nodes_before != result.nodes_after:
            self._show_graph(p.name, gm)

    def built(self, report: ProgramReport, source: str) -> None:
        """Report the finished program; `source` is the text of its host code."""
        for stage in report.stages:
            self._print(1, f"  {stage.stage:24} {_ms(stage.seconds)}")
        launches = f"{len(report.kernels)} launches, {len(report.externs)} eager calls"
        self._print(1, f"  {launches}, {report.built} kernels built, {report.cached} found on disk")
        for path in dict.fromkeys(k.source for k in report.kernels if k.source is not None):
            if self._level >= 4:
                self._print(4, f"\n# {path}\n{path.read_text()}")
            if self._folder is not None:
                shutil.copy(path, self._folder)
        self._print(4, f"\n# host code\n{source}")
        if self._folder is not None:
            (self._folder / f"{self._written:02}_host_code.txt").write_text(source)

    def _show_graph(self, stage: str, gm: GraphModule) -> None:
        if self._level >= 3:
            self._print(3, str(gm.graph.python_code("self", verbose=True).src))
        if self._folder is not None:
            path = self._folder / f"{self._written:02}_{stage}.py"
            path.write_text(runnable(gm, f"{self._folder.name}, {stage}"))
            self._written += 1

    def _print(self, level: int, text: str) -> None:
        if self._level >= level:
            print(text, file=sys.stderr)


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:9.1f} ms"


def _new_folder(root: Path, kind: str) -> Path:
    """Create the next free root/NNN_kind; other processes may be creating theirs."""
    root.mkdir(parents=True, exist_ok=True)
    number = len(list(root.iterdir()))
    while True:
        folder = root / f"{number:03}_{kind}"
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            number += 1


def operator_counts(gm: GraphModule) -> Counter[str]:
    """How often the graph calls each operator."""
    return Counter(str(n.target) for n in gm.graph.nodes if n.op == "call_function")


def count_changes(before: Counter[str], after: Counter[str]) -> list[str]:
    """The operators that a pass added and removed, one a line."""
    changed = sorted(name for name in before | after if before[name] != after[name])
    return [f"{after[name] - before[name]:+4} {name} ({before[name]} -> {after[name]})" for name in changed]


# ---- runnable files


def runnable(gm: GraphModule, title: str) -> str:
    """Return the text of a Python program that builds the graph of `gm` and runs it on random inputs.

    Constants of the graph that are larger than 100 elements are random too.
    """
    imports, classes = ["import llmcomp.ops  # the operators of llmcomp"], []
    for name, module in _graph_modules(gm, "Graph"):
        code = module.graph.python_code("self", verbose=True)
        used = {key: value for key, value in code.globals.items() if re.search(rf"\b{key}\b", code.src)}
        imports += [line for key, value in used.items() if (line := _import(key, value))]
        classes.append(_class(name, module, code.src.strip()))
    inputs = "\n".join(f"        {_literal(n.meta.get('val'))},  # {n.name}" for n in _placeholders(gm))
    return _FILE.format(
        title=title,
        imports="\n".join(dict.fromkeys(sorted(imports))),
        classes="\n\n\n".join(reversed(classes)),
        inputs=inputs,
    )


_FILE = '''"""llmcomp: {title}. Run this file to execute the graph on random inputs."""

import torch
{imports}
from llmcomp.debug import random_tensor


{classes}


def inputs():
    torch.manual_seed(0)
    return [
{inputs}
    ]


if __name__ == "__main__":
    with torch.no_grad():
        for number, output in enumerate(Graph()(*inputs())):
            about = (tuple(output.shape), output.dtype) if isinstance(output, torch.Tensor) else output
            print("output", number, about)
'''


def _graph_modules(gm: GraphModule, name: str) -> Iterator[tuple[str, GraphModule]]:
    """`gm` and the graphs that it holds (branches and bodies of higher-order operators), outermost first."""
    yield name, gm
    for child, module in gm.named_children():
        if isinstance(module, GraphModule):
            yield from _graph_modules(module, f"{name}_{child}")


def _placeholders(gm: GraphModule) -> list[torch.fx.Node]:
    return list(gm.graph.find_nodes(op="placeholder"))


def _class(name: str, gm: GraphModule, forward: str) -> str:
    attributes = {n.target for n in gm.graph.find_nodes(op="get_attr")}
    lines = [f"class {name}(torch.nn.Module):", "    def __init__(self):", "        super().__init__()"]
    for attribute in sorted(attributes):
        value = getattr(gm, attribute)
        made = f"{name}_{attribute}()" if isinstance(value, GraphModule) else _literal(value)
        lines.append(f"        self.{attribute} = {made}")
    return "\n".join(lines) + "\n" + "\n".join(f"    {line}".rstrip() for line in forward.splitlines())


def _import(name: str, value: object) -> str:
    """The import that gives `value` its `name` in a graph's code; empty where the file has it already."""
    if name == "torch":
        return ""
    if name in ("device", "inf", "nan"):
        return f"from torch import {name}"
    if isinstance(value, ModuleType):
        return f"import {value.__name__} as {name}"
    if value is type(None):
        return f"{name} = type(None)"
    module, qualified = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    return f"from {module} import {qualified} as {name}" if module and qualified else ""


def _literal(value: object) -> str:
    """An expression for an input or a constant of the graph."""
    if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
        return repr(_hint(value))
    if not isinstance(value, torch.Tensor):
        return repr(value)
    known = not isinstance(value, torch._subclasses.FakeTensor)
    if known and value.numel() <= 100 and value.layout is torch.strided:
        return f"torch.tensor({value.tolist()!r}, dtype={value.dtype}, device={str(value.device)!r})"
    shape, stride = [_hint(n) for n in value.shape], [_hint(n) for n in value.stride()]
    return f"random_tensor({shape}, {stride}, {value.dtype}, {str(value.device)!r})"


def _hint(value: int | torch.SymInt | torch.SymFloat | torch.SymBool) -> object:
    """The number that a symbol had in the call that was traced; 2 where that is not known."""
    if isinstance(value, int):
        return value
    return value.node.hint if value.node.has_hint() else 2


def random_tensor(shape: list[int], stride: list[int], dtype: torch.dtype, device: str = "cpu") -> torch.Tensor:
    """A tensor of this layout: normally distributed, or zeros and ones where `dtype` is integer or bool."""
    count = 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True)) if 0 not in shape else 0
    if dtype.is_floating_point or dtype.is_complex:
        wide = torch.complex64 if dtype.is_complex else torch.float32
        flat = torch.randn(count, dtype=wide).to(dtype)
    else:
        flat = torch.randint(0, 2, (count,)).to(dtype)
    return flat.to(device).as_strided(shape, stride)
