"""C++ kernels compiled for another machine and run by an emulator, where both are installed."""

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from llmcomp.codegen.build import HEADERS
from llmcomp.codegen.render import render_cpp
from tests.cpp_kernels import MAIN, Call

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", ("qemu-aarch64-static", "qemu-aarch64")
FLAGS = "-std=c++17 -O0 -fwrapv -ffp-contract=off -static -w".split()

emulator = next(filter(None, map(shutil.which, EMULATOR)), None)
arm = pytest.mark.skipif(
    emulator is None or shutil.which(COMPILER) is None, reason="wants a compiler for aarch64 and an emulator of it"
)


def run_on_arm(calls: Sequence[Call], folder: Path, architecture: str) -> None:
    """Make the calls on an emulated machine; their buffers hold the results afterwards."""
    assert emulator is not None
    lines = [*{c.kernel.name: render_cpp(c.kernel, ()).text for c in calls}.values(), MAIN]
    for call in calls:
        sizes = [b.numel() * b.element_size() for b in call.buffers]
        lines.append(f"    {{ void* p[] = {{{', '.join(f'filled({n})' for n in sizes)}}}; int64_t status = 0;")
        arguments = [f"p[{k}]" for k in range(len(sizes))] + [f"int64_t({n})" for n in (*call.sizes, 1)]
        lines.append(f"      op::call(&status, (void*){call.kernel.name}, {', '.join(arguments)});")
        lines += [f"      fwrite(p[{k}], 1, {n}, stdout);" for k, n in enumerate(sizes)]
        lines.append("    }")
    source, program, data = folder / "arm.cpp", folder / "arm", folder / "arm_data"
    source.write_text("\n".join([*lines, "}"]))
    data.write_bytes(b"".join(bytes_of(b) for c in calls for b in c.buffers))
    command = [COMPILER, *FLAGS, f"-march={architecture}", f"-I{HEADERS}", str(source), "-o", str(program)]
    subprocess.run(command, check=True)
    found = subprocess.run([emulator, "-cpu", "max", str(program), str(data)], capture_output=True, check=True).stdout
    for buffer in (b for c in calls for b in c.buffers):
        size = buffer.numel() * buffer.element_size()
        raw = torch.frombuffer(bytearray(found[:size]), dtype=torch.uint8)
        buffer.view(-1).view(torch.uint8).copy_(raw)
        found = found[size:]
    assert not found


def bytes_of(buffer: torch.Tensor) -> bytes:
    """What a contiguous tensor is in memory."""
    return buffer.view(-1).view(torch.uint8).numpy().tobytes()
