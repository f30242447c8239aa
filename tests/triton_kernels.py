"""Shared by the tests of Triton kernels: symbols, and running a kernel description on tensors."""

import atexit
import functools
import importlib.util
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import sympy
import torch

from llmcomp.codegen.build import Source
from llmcomp.codegen.kernel import Axis, Kernel
from llmcomp.codegen.triton import render


def symbol(name: str) -> sympy.Symbol:
    """An axis, a size, or an integer value that is not negative."""
    return sympy.Symbol(name, integer=True, nonnegative=True)


def axis(name: str, extent: int | sympy.Expr) -> Axis:
    """A loop over [0, extent)."""
    return Axis(symbol(name), sympy.sympify(extent))


@functools.cache
def folder() -> Path:
    """Where this process keeps generated files: Triton reads the text of kernels from there."""
    path = tempfile.mkdtemp(prefix="llmcomp-triton-")
    atexit.register(shutil.rmtree, path)
    return Path(path)


@functools.cache
def load(source: Source) -> ModuleType:
    """The module of a Triton source."""
    path = folder() / f"{source.name}_{abs(hash(source))}.py"
    path.write_text(source.text)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(
    kernel: Kernel,
    buffers: Sequence[torch.Tensor],
    sizes: Sequence[int] = (),
    status: torch.Tensor | None = None,
    config: object = None,
) -> None:
    """Render, load and launch a kernel, in place."""
    module = load(render(kernel))
    module.launch(buffers, sizes, config, status)


def every_config(kernel: Kernel, sizes: Sequence[int] = ()) -> list[object]:
    """The launch configurations that a kernel says are worth a try."""
    return list(load(render(kernel)).configs(sizes))
