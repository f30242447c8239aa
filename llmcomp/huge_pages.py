"""Weights on a CPU are read through huge pages, where Linux has them.

A decoding step reads every weight once: with pages of 4 KiB the processor looks up an address for each of them, and
hardware stops to fetch ahead at their ends. Linux gives memory that a program asks for pages of 2 MiB where it is told
to (`madvise`, which most systems leave to programs), and makes them of small ones that are in use, in place: addresses
and values stay.
"""

import ctypes
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

SETTINGS = Path("/sys/kernel/mm/transparent_hugepage")
# Of madvise: use them for what is touched from now on (Linux 2.6.38), and for what was before (Linux 6.1).
HUGEPAGE, COLLAPSE = 14, 25
FEWEST = 4  # huge pages: smaller tensors stay as they are


def back_by_huge_pages(tensors: Iterable[Tensor], settings: Path = SETTINGS) -> int:
    """Back large tensors on the CPU by huge pages, where the system allows it; returns the bytes that are so now.

    Memory that can't be (parts of files, systems without) is left alone.
    """
    size = _page_size(settings)
    if size == 0:
        return 0
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    done = 0
    for first, last in _ranges(tensors, size):
        if madvise(first, last - first, HUGEPAGE) == 0 and madvise(first, last - first, COLLAPSE) == 0:
            done += last - first
    return done


def _page_size(settings: Path) -> int:
    """Bytes of a huge page, 0 where there are none for us."""
    if sys.platform != "linux":
        return 0
    try:
        if "[never]" in (settings / "enabled").read_text():
            return 0
        return int((settings / "hpage_pmd_size").read_text())
    except (OSError, ValueError):
        return 0


def _ranges(tensors: Iterable[Tensor], size: int) -> Iterable[tuple[int, int]]:
    """The addresses of whole pages inside of large tensors."""
    for tensor in tensors:
        plain = type(tensor) in (Tensor, torch.nn.Parameter)  # others need not have memory of their own
        if not plain or tensor.device.type != "cpu" or tensor.layout != torch.strided:
            continue
        storage = tensor.untyped_storage()
        first = -(-storage.data_ptr() // size) * size
        last = (storage.data_ptr() + storage.nbytes()) // size * size
        if storage.data_ptr() and last - first >= FEWEST * size:
            yield first, last
