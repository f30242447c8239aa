"""What the kernels are made for: which printer, and what the machine offers."""

import os
from collections.abc import Collection
from dataclasses import dataclass

import torch

from llmcomp.errors import OptionError
from llmcomp.options import Options, triton_interprets


@dataclass(frozen=True)
class Target:
    """A printer ("cpp", "triton" or "reference") and the measures of the device that its kernels run on."""

    name: str
    device: str  # device type of the tensors: "cpu", "cuda", ...
    arch: str = ""  # "AVX2", "sm_90", "gfx942"
    cores: int = 1  # CPU cores this process may use, or streaming multiprocessors
    vector_bytes: int = 16  # width of a CPU vector register, or of the widest load of a GPU thread
    shared_bytes: int = 0  # on-chip memory that one GPU block may use
    cache_bytes: int = 0  # last-level cache of a GPU; 0 where unknown
    interpreted: bool = False  # Triton kernels run in its interpreter


A100 = Target("triton", "cuda", "sm_80", cores=108, shared_bytes=166_912, cache_bytes=40 << 20)
H100 = Target("triton", "cuda", "sm_90", cores=132, shared_bytes=232_448, cache_bytes=50 << 20)


def detect(options: Options, devices: Collection[torch.device]) -> Target:
    """Choose the target of a graph whose tensors live on `devices`.

    "auto" is Triton where any tensor is on a CUDA (or ROCm) device, C++ where all are on the CPU, and the
    eager references on any other device.

    Raises:
        OptionError: the asked target cannot run on these devices.
    """
    kinds = {d.type for d in devices} or {"cpu"}
    if options.target == "reference":
        return reference(min(kinds))
    if "cuda" in kinds and options.target in ("auto", "triton"):
        return cuda(next(d for d in devices if d.type == "cuda"))
    if kinds == {"cpu"} and options.target in ("auto", "cpp"):
        return cpu()
    if kinds == {"cpu"} and triton_interprets():
        return interpreter()
    if options.target == "auto":
        return reference(min(kinds))
    needs = {"cpp": "the CPU", "triton": "a CUDA device (or on the CPU with TRITON_INTERPRET=1)"}[options.target]
    raise OptionError(
        f"expected tensors on {needs} for target {options.target!r}, found {', '.join(sorted(kinds))}: "
        f"move the model, or leave the option target out"
    )


def reference(device: str = "cpu") -> Target:
    """The eager references, one by one."""
    return Target("reference", device)


def cpu() -> Target:
    """The C++ target of this machine."""
    arch = torch.backends.cpu.get_cpu_capability()
    widths = {"AVX512": 64, "AVX2": 32, "SVE256": 32}
    return Target("cpp", "cpu", arch, cores=_usable_cores(), vector_bytes=widths.get(arch, 16))


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def interpreter() -> Target:
    """Triton's interpreter on CPU tensors, posing as a small sm_80."""
    return Target("triton", "cpu", "sm_80", cores=4, shared_bytes=A100.shared_bytes, interpreted=True)


def cuda(device: torch.device) -> Target:
    """The Triton target of a CUDA or ROCm device."""
    found = torch.cuda.get_device_properties(device)
    arch = getattr(found, "gcnArchName", "").split(":")[0] if torch.version.hip else f"sm_{found.major}{found.minor}"
    shared = getattr(found, "shared_memory_per_block_optin", 0) or getattr(found, "shared_memory_per_block", 0)
    return Target(
        "triton",
        "cuda",
        arch,
        cores=found.multi_processor_count,
        shared_bytes=shared,
        cache_bytes=getattr(found, "L2_cache_size", 0),
    )
