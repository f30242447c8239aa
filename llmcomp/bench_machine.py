"""What a benchmark ran on: hardware, versions, and how fast the machine reads memory."""

import ctypes
import os
import platform
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from llmcomp.codegen.build import Source, build
from llmcomp.codegen.cache import Cache
from llmcomp.errors import BuildError
from llmcomp.options import read_options

BYTES = 1 << 30
READ = """\
#include <stdint.h>

// Adds up `count` integers: nothing but reading, in wide loads on every thread.
extern "C" int64_t read_memory(const int64_t* data, int64_t count, int64_t threads) {
    int64_t sum = 0;
    #pragma omp parallel for simd num_threads(threads) reduction(+ : sum) schedule(static)
    for (int64_t i = 0; i < count; ++i) sum += data[i];
    return sum;
}
"""


class Bandwidth:
    """Reads a gigabyte of memory, more than any cache holds."""

    def __init__(self, device: str, threads: int) -> None:
        self.data = torch.ones(BYTES // 8, dtype=torch.int64, device=device)
        self.threads = threads
        self.read = None if device == "cuda" else compiled_reader()

    def measure(self, repeats: int = 5) -> float:
        """Bytes per second, the median of `repeats` readings."""
        times = sorted(self._seconds() for _ in range(repeats))
        return BYTES / times[repeats // 2]

    def _seconds(self) -> float:
        start = time.perf_counter()
        if self.read is not None:
            total = self.read(self.data.data_ptr(), self.data.numel(), self.threads)
        else:
            total = self.data.sum().item()
        seconds = time.perf_counter() - start
        assert total == self.data.numel()
        return seconds


def compiled_reader() -> "ctypes._FuncPointer | None":
    """The compiled READ, or None where there is no C++ compiler."""
    try:
        built = build([Source("read_memory", "cpp", READ)], Cache(read_options().cache))[0]
    except BuildError:
        return None
    kind = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)
    return kind(built.function())


def describe(device: str, threads: int) -> str:
    """One line: processor, memory, versions."""
    names = ("torch", "transformers", "triton", "torch-llmcomp")
    versions = ", ".join(f"{n} {installed(n)}" for n in names)
    where = torch.cuda.get_device_name() if device == "cuda" else f"{processor()}, {threads} threads"
    return f"{where}, {memory('MemTotal'):.0f} GB; Python {platform.python_version()}, {versions}"


def installed(name: str) -> str:
    """The version of a distribution."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"


def processor() -> str:
    """The name of the processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def memory(field: str) -> float:
    """A field of /proc/meminfo in GB; 0 where there is none."""
    info = Path("/proc/meminfo")
    for line in info.read_text().splitlines() if info.exists() else ():
        if line.startswith(field):
            return int(line.split()[1]) / 1e6
    return 0.0


def free_memory() -> str:
    """For progress lines: what is left for the next peer."""
    return f"{memory('MemAvailable'):.1f} GB free, load {os.getloadavg()[0]:.1f}"
