"""Shared by the tests of C++ kernels: symbols, many kernels in one library, and calling one on tensors."""

import ctypes
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import sympy
import torch

from llmcomp.codegen.build import HEADERS, Compiler, Source, build, find_compiler
from llmcomp.codegen.cache import Cache
from llmcomp.codegen.cpp import render
from llmcomp.codegen.kernel import Kernel, Map, Rows
from llmcomp.codegen.render import render_cpp


def axis(name: str) -> sympy.Symbol:
    """The symbol of an axis, or of an integer value: not negative."""
    return sympy.Symbol(name, integer=True, nonnegative=True)


def size(name: str) -> sympy.Symbol:
    """The symbol of a size: positive."""
    return sympy.Symbol(name, integer=True, positive=True)


class Library:
    """Kernels compiled as one translation unit: a compiler run is the expensive part of a test."""

    def __init__(self, kernels: Sequence[Map | Rows | Source], folder: Path, compiler: Compiler | None = None) -> None:
        sources = [k if isinstance(k, Source) else render(k) for k in kernels]
        whole = Source(sources[0].name, "cpp", "\n".join(s.text for s in sources))
        (self.built,) = build([whole], Cache(folder), compiler)
        self.library = ctypes.CDLL(str(self.built.path))

    def call(self, name: str, buffers: Sequence[torch.Tensor], sizes: Sequence[int] = (), threads: int = 1) -> int:
        """Run the kernel `name`; returns its status."""
        status = ctypes.c_int64(0)
        pointers = [ctypes.c_void_p(b.data_ptr()) for b in buffers]
        numbers = [ctypes.c_int64(n) for n in (*sizes, threads)]
        self.library[name](*pointers, *numbers, ctypes.byref(status))
        return status.value


@dataclass(frozen=True)
class Call:
    """A kernel and what to run it on."""

    kernel: Kernel
    buffers: Sequence[torch.Tensor]
    sizes: Sequence[int]


MAIN = """
#include <stdio.h>
#include <stdlib.h>

static FILE* data;

static void* filled(size_t size) {
    void* memory = malloc(size);
    if (fread(memory, 1, size, data) != size) abort();
    return memory;
}

int main(int, char** arguments) {
    data = fopen(arguments[1], "rb");
"""
FLAGS = "-std=c++17 -O1 -fopenmp -fwrapv -ffp-contract=off -fsanitize=address,undefined -w".split()


def sanitize(calls: Sequence[Call], folder: Path) -> str:
    """What the address and undefined-behaviour sanitizers say when a program makes the calls."""
    sources = {c.kernel.name: render_cpp(c.kernel, ()).text for c in calls}
    lines = [*sources.values(), MAIN]
    for call in calls:
        buffers = [f"filled({b.numel() * b.element_size()})" for b in call.buffers]
        lines.append(f"    {{ void* p[] = {{{', '.join(buffers)}}}; int64_t status = 0;")
        pointers = [f"p[{k}]" for k in range(len(buffers))]
        arguments = [*pointers, *(f"int64_t({n})" for n in call.sizes), "int64_t(2)"]
        lines.append(f"      op::call(&status, (void*){call.kernel.name}, {', '.join(arguments)});")
        lines.append("      for (void* q : p) free(q); }")
    source, program, data = folder / "program.cpp", folder / "program", folder / "data"
    source.write_text("\n".join([*lines, "}"]))
    with data.open("wb") as file:
        for buffer in (b for c in calls for b in c.buffers):
            file.write(buffer.view(-1).view(torch.uint8).numpy().tobytes())
    compiler = find_compiler(Cache(folder / "cache"))
    assert compiler is not None
    subprocess.run([*compiler.command, *FLAGS, f"-I{HEADERS}", str(source), "-o", str(program)], check=True)
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
    done = subprocess.run([str(program), str(data)], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0 or done.stderr, "the program failed in silence"
    return done.stderr
