"""A cache of keys and values that never moves: written in place at a position that is a tensor.

    keys[:, :, position] = new keys, for every layer; the position is shared and counted up once a step

A step of a generation then has the same inputs as the one before, at the same addresses, and nothing of it is Python.
Transformers' StaticCache is the same idea with a position for every layer, and with a number in Python where a window
slides. Here layers with a window keep all positions; the mask hides what is outside the window, and attention skips it.
What a program quantized (options={"kv_dtype": ...}) is kept as codes and scales, and so is what is written behind it.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer, StaticLayer

from llmcomp.headroom import telling
from llmcomp.quantized_cache import QuantizedCacheTensor


class FixedLayer(StaticLayer):
    """Keys and values (rows, heads, capacity, size) of one layer."""

    keys: Any
    values: Any

    def __init__(self, keys: Tensor, values: Tensor, position: Tensor, slides: bool) -> None:
        """`position` is int64 (): how many positions are in use."""
        super().__init__(max_cache_len=keys.shape[2])
        self.keys, self.values, self.cumulative_length = keys, values, position
        self.dtype, self.device = keys.dtype, keys.device
        self.batch_size, self.num_heads = keys.shape[:2]
        self.k_head_dim, self.v_head_dim = keys.shape[3], values.shape[3]
        self.is_sliding = slides
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write behind the positions in use; all keys and values."""
        count = key_states.shape[2]
        index = torch.arange(count, device=self.keys.device) + self.cumulative_length
        self.keys.index_copy_(2, index, key_states)
        self.values.index_copy_(2, index, value_states)
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many keys a mask covers, as a size that may be a symbol, and which is the first."""
        return self.keys.shape[2], 0


class FixedCache(Cache):
    """The layers, and the `position` that they share."""

    def __init__(self, layers: list[FixedLayer], position: Tensor) -> None:
        super().__init__(layers=list(layers))
        self.position = position

    @property
    def capacity(self) -> int:
        """Positions that there is room for."""
        return int(_layers(self)[0].keys.shape[2])


def can_fix(cache: object) -> bool:
    """Whether `fixed` can take over what `cache` holds."""
    layers = _layers(cache) if isinstance(cache, Cache) and not cache.offloading else []
    known = (DynamicLayer, DynamicSlidingWindowLayer)
    filled = bool(layers) and all(type(layer) in known and layer.is_initialized for layer in layers)
    return filled and len({layer.keys.device for layer in layers}) == 1


def _layers(cache: Cache) -> list[Any]:
    return cache.layers


def fixed(cache: Cache, length: int, capacity: int) -> FixedCache:
    """A cache of `capacity` positions, `length` of them with the content of `cache`.

    Raises:
        MemoryFullError: the device has too little memory.
    """
    position = torch.tensor(length, device=_layers(cache)[0].keys.device)
    layers = [
        FixedLayer(_moved(x.keys, length, capacity), _moved(x.values, length, capacity), position, x.is_sliding)
        for x in _layers(cache)
    ]
    return FixedCache(layers, position)


def _moved(past: Tensor, length: int, capacity: int) -> Tensor:
    """`past` in a larger buffer that ends at `length`: a layer with a window has forgotten what was first."""
    rows, heads, held, size = past.shape
    held = min(held, length)
    shape = (rows, heads, capacity, size)
    size_of_row = size + 4 if isinstance(past, QuantizedCacheTensor) else size * past.itemsize
    with telling(rows * heads * capacity * size_of_row, shape, past.device):
        buffer = past.room(shape) if isinstance(past, QuantizedCacheTensor) else past.new_zeros(shape)
    buffer[:, :, length - held : length] = past[:, :, :held]
    # A program that was compiled for one capacity serves all, and for several rows any number of them.
    torch._dynamo.maybe_mark_dynamic(buffer, [0, 2] if rows > 1 else 2)
    return buffer


def restore(cache: Cache, from_: FixedCache, length: int) -> None:
    """Give `cache`, which `from_` was made of, the first `length` positions of it."""
    for layer, held in zip(_layers(cache), _layers(from_), strict=True):
        slides = isinstance(layer, DynamicSlidingWindowLayer)
        start = max(length - layer.sliding_window + 1, 0) if slides else 0
        layer.keys, layer.values = held.keys[:, :, start:length], held.values[:, :, start:length]
        if slides:
            layer.cumulative_length = length


def empty(cache: Cache) -> None:
    """Let go of the memory of a cache that `restore` may fill again."""
    for layer in _layers(cache):
        layer.keys = layer.values = None
