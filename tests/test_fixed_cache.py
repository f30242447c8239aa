"""A fixed cache holds what the cache held that it was made of, before and after."""

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, MistralConfig, StaticCache
from transformers.cache_utils import Cache, DynamicLayer

from llmcomp.errors import MemoryFullError
from llmcomp.fixed_cache import can_fix, empty, fixed, restore

SIZES = dict(num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, hidden_size=8, head_dim=4)
LLAMA, MISTRAL = LlamaConfig(**SIZES), MistralConfig(**SIZES, sliding_window=5)


def states(count: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(2, 1, count, 4, generator=generator) for _ in range(2))
    return keys, values


def filled(config: LlamaConfig, count: int) -> DynamicCache:
    cache = DynamicCache(config=config)
    for layer in range(2):
        cache.update(*states(count, layer), layer)
    return cache


def offloaded() -> DynamicCache:
    cache = filled(LLAMA, 3)
    cache.offloading = True  # as offloading=True does where there is an accelerator
    return cache


@pytest.mark.parametrize("config", [LLAMA, MISTRAL], ids=["llama", "mistral"])
@pytest.mark.parametrize("count", [3, 9])
def test_there_and_back(config: LlamaConfig, count: int) -> None:
    expected, cache = filled(config, count), filled(config, count)
    moved = fixed(cache, count, 16)
    empty(cache)
    assert moved.capacity == 16 and moved.layers[0].cumulative_length is moved.layers[1].cumulative_length
    for step in range(2):
        for layer in range(2):
            more = states(2, 10 + 2 * step + layer)
            keys, values = moved.update(*more, layer)
            visible, _ = expected.update(*more, layer)
            end = count + 2 * step + 2
            assert torch.equal(keys[:, :, end - visible.shape[2] : end], visible)
            assert keys.data_ptr() == moved.layers[layer].keys.data_ptr() and not values[:, :, end:].any()
        moved.position.add_(2)
    restore(cache, moved, count + 4)
    assert cache.get_seq_length() == expected.get_seq_length() == count + 4
    for ours, theirs in zip(cache.layers, expected.layers, strict=True):
        assert torch.equal(ours.keys, theirs.keys) and torch.equal(ours.values, theirs.values)


def test_a_full_device_names_the_size_and_what_lowers_it() -> None:
    with pytest.raises(
        MemoryFullError, match=r"MiB on cpu for a KV cache of shape \(2, 1, 2199023255552, 4\).*kv_dtype"
    ):
        fixed(filled(LLAMA, 3), 3, 1 << 41)


def test_a_mask_covers_the_capacity() -> None:
    moved = fixed(filled(MISTRAL, 9), 9, 32)
    assert moved.get_mask_sizes(1, 0) == (32, 0)
    assert moved.get_seq_length(0).item() == 9 and moved.is_sliding == [True, True] and moved.is_compileable


@pytest.mark.parametrize(
    ("cache", "can"),
    [
        (filled(LLAMA, 3), True),
        (filled(MISTRAL, 3), True),
        (DynamicCache(config=LLAMA), False),
        (offloaded(), False),
        (StaticCache(config=LLAMA, max_cache_len=8), False),
        (None, False),
        (((torch.zeros(1), torch.zeros(1)),), False),
    ],
    ids=["dynamic", "windows", "empty", "offloaded", "static", "none", "tuple"],
)
def test_what_can_be_fixed(cache: Cache | None, can: bool) -> None:
    assert can_fix(cache) == can


def test_layers_of_other_kinds_are_left_alone() -> None:
    class Other(DynamicLayer):
        pass

    cache = filled(LLAMA, 3)
    cache.layers[1].__class__ = Other
    assert not can_fix(cache)
