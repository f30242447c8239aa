"""Shared by the tests of C++ kernels: symbols, many kernels in one library, and calling one on tensors."""

import ctypes
from collections.abc import Sequence
from pathlib import Path

import sympy
import torch

from llmcomp.codegen.build import Cache, Compiler, Source, build
from llmcomp.codegen.cpp import render
from llmcomp.codegen.kernel import Kernel


def axis(name: str) -> sympy.Symbol:
    """The symbol of an axis, or of an integer value: not negative."""
    return sympy.Symbol(name, integer=True, nonnegative=True)


def size(name: str) -> sympy.Symbol:
    """The symbol of a size: positive."""
    return sympy.Symbol(name, integer=True, positive=True)


class Library:
    """Kernels compiled as one translation unit: a compiler run is the expensive part of a test."""

    def __init__(
        self, kernels: Sequence[Kernel | Source], folder: Path, compiler: Compiler | None = None
    ) -> None:
        sources = [k if isinstance(k, Source) else render(k) for k in kernels]
        whole = Source(sources[0].name, "cpp", "\n".join(s.text for s in sources))
        (self.built,) = build([whole], Cache(folder), compiler)
        self.library = ctypes.CDLL(str(self.built.path))

    def call(
        self, name: str, buffers: Sequence[torch.Tensor], sizes: Sequence[int] = (), threads: int = 1
    ) -> int:
        """Run the kernel `name`; returns its status."""
        status = ctypes.c_int64(0)
        pointers = [ctypes.c_void_p(b.data_ptr()) for b in buffers]
        numbers = [ctypes.c_int64(n) for n in (*sizes, threads)]
        self.library[name](*pointers, *numbers, ctypes.byref(status))
        return status.value
