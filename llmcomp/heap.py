"""Memory that nobody needs any more goes back to the system.

glibc keeps what is freed between blocks that are in use: after the float weights of a model were replaced by packed
ones, one by one, that is most of them. And a loaded norm weight that shows a part of a file keeps all of it in memory.
"""

import ctypes
import sys

from torch import nn


def release_memory() -> None:
    """Give pages of the heap that nobody uses back to the system, where the C library can (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(ctypes.c_size_t(0))


def leave_files(model: nn.Module) -> None:
    """Copy the float parameters of a loaded model: each may show a part of a mapped file, and keep all of it."""
    for parameter in model.parameters():
        if type(parameter) is nn.Parameter and parameter.device.type == "cpu":
            parameter.data = parameter.data.clone()
