"""Caches with room behind them: appending to one writes behind its end instead of copying it.

    buffer   [ slice 0 | slice 1 | ... | slice s-1 | room ........................ ]
    past     = buffer[:s]      what the caller holds
    grown    = buffer[:s + n]  what the caller gets; the program writes the slices s .. s+n-1

A storage that was made here carries the number of its elements that some tensor has been given. `past` is
extended in place if it ends exactly there: nobody has been given what lies behind it. A cache that was
appended to before (a fork), a view that ends earlier (a crop) and a tensor of any other origin are copied; a
crop whose other owners are gone is taken back and extended in place.

The one thing that differs from torch.cat: `grown` shows the memory of `past`, so writing into one of them in
place, by hand, is seen by the other.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from llmcomp.compat import mark_growing, owners
from llmcomp.errors import MemoryFullError
from llmcomp.ops import outermost

_TAKEN = "_llmcomp_taken"
_lock = threading.Lock()


def capacity(count: int) -> int:
    """Slices to reserve for a cache of `count`: a quarter more, so that copying costs O(1) for every slice."""
    return count + max(128, count // 4)


def room(shape: Sequence[int], dim: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A new cache of undefined content with room behind it: llmcomp::cache_room of a program.

    Raises:
        MemoryFullError: the device has too little memory.
    """
    strides = outermost(shape, dim)
    step = strides[dim]
    count = capacity(shape[dim]) * step
    with telling(count * dtype.itemsize, shape, device):
        buffer = torch.empty(count, dtype=dtype, device=device)
    setattr(buffer.untyped_storage(), _TAKEN, shape[dim] * step)
    cache = buffer.as_strided(shape, strides)
    mark_growing(cache, dim)  # a decode step is traced once, for all lengths
    return cache


@contextmanager
def telling(count: int, shape: Sequence[int], device: torch.device) -> Iterator[None]:
    """Have a failure to get `count` bytes for a cache of `shape` say so, and what lowers it.

    Raises:
        MemoryFullError: the device has too little memory.
    """
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError is one; the CPU's allocator raises plain ones
        raise memory_full(count, f"a KV cache of shape {tuple(shape)}", device, error) from error


def memory_full(count: int, what: str, device: torch.device | str, error: RuntimeError) -> MemoryFullError:
    """The error of a device that has no `count` bytes for `what`.

    It ends with the words of torch's error, by which others (accelerate's find_executable_batch_size) know it.
    """
    return MemoryFullError(
        f"expected {count / 2**20:.1f} MiB on {device} for {what}, found too little memory: shorten the sequences or "
        f"the batch (of a static cache: max_cache_len), free other caches (llmcomp.reset()), hold them in 8 bits with "
        f"options={{'kv_dtype': 'int8'}}, or lower what programs keep: kv_cache_bytes, kv_cache='off'. {error}"
    )


def grow(past: Tensor, count: int, dim: int) -> Tensor:
    """`past` with `count` more slices of undefined content along `dim`: llmcomp::cache_grow of a program."""
    shape = list(past.shape)
    shape[dim] += count
    strides = outermost(shape, dim)
    grown = _extended(past, shape, strides, count * strides[dim]) if past.stride() == tuple(strides) else None
    if grown is None:
        grown = room(shape, dim, past.dtype, past.device)
        grown.narrow(dim, 0, past.shape[dim]).copy_(past)
    return grown


def _extended(past: Tensor, shape: list[int], strides: list[int], added: int) -> Tensor | None:
    """`past` with `added` more elements of the room behind it, unless somebody else was given that room."""
    storage = past.untyped_storage()
    end = past.storage_offset() + past.numel() + added
    if not hasattr(storage, _TAKEN) or end * past.itemsize > storage.nbytes():
        return None
    with _lock:
        taken = getattr(storage, _TAKEN)
        if taken != end - added and (taken < end - added or not _only_owner(past)):
            return None
        setattr(storage, _TAKEN, end)
        # Made inside the lock: from here on the room has an owner that others can count.
        return past.as_strided(shape, strides)


def _only_owner(past: Tensor) -> bool:
    """Whether no tensor but `past` (and the one that it is a view of, made here) shows this memory."""
    return owners(past) == (1 if past._base is None else 2)


def reserved(cache: Tensor) -> int:
    """Bytes of the memory that a cache keeps, with the room behind it."""
    return int(cache.untyped_storage().nbytes())
