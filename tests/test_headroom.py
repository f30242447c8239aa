"""llmcomp/headroom.py: caches grow in place exactly where nobody can tell."""

import copy
import threading

import pytest
import torch
from torch import Tensor

from llmcomp import headroom
from llmcomp.errors import MemoryFullError
from llmcomp.headroom import capacity, grow, room

B, H, D = 2, 3, 4


def cache(count: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A cache with room behind it, filled with random numbers."""
    made = room([B, H, count, D], 2, dtype, torch.device("cpu"))
    return made.copy_(torch.randn(B, H, count, D))


def appended(past: Tensor, new: Tensor) -> Tensor:
    """What a program does: grow, then write behind the past."""
    grown = grow(past, new.shape[2], 2)
    grown[:, :, past.shape[2] :] = new
    return grown


def new(count: int = 1) -> Tensor:
    return torch.randn(B, H, count, D)


def shares(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_appending_moves_nothing(dtype: torch.dtype) -> None:
    past = cache(5, dtype)
    expected, grown = past.clone(), past
    for count in (1, 3, 1):
        more = new(count).to(dtype)
        expected, grown = torch.cat([expected, more], 2), appended(grown, more)
        assert torch.equal(grown, expected) and shares(grown, past) and grown.stride() == past.stride()
    assert torch.equal(past, expected[:, :, :5])


def test_a_full_device_names_the_size_and_what_lowers_it() -> None:
    with pytest.raises(
        MemoryFullError, match=r"MiB on cpu for a KV cache of shape \(1, 1, 1099511627776, 4096\).*kv_cache"
    ):
        room([1, 1, 1 << 40, 1 << 12], 2, torch.float32, torch.device("cpu"))


def test_a_tensor_of_other_origin_is_copied_once() -> None:
    past = new(5)
    kept = past.clone()
    first = appended(past, new())
    second = appended(first, new())
    assert not shares(first, past) and shares(second, first) and torch.equal(past, kept)


def test_a_fork_is_copied() -> None:
    past, a, b = cache(5), new(), new()
    left, right = appended(past, a), appended(past, b)
    assert shares(left, past) and not shares(right, past)
    assert torch.equal(left, torch.cat([past, a], 2)) and torch.equal(right, torch.cat([past, b], 2))


def test_a_crop_with_another_owner_is_copied() -> None:
    past = cache(5)
    kept, cropped, more = past.clone(), past[:, :, :3], new()
    grown = appended(cropped, more)
    assert not shares(grown, past) and torch.equal(past, kept)
    assert torch.equal(grown, torch.cat([kept[:, :, :3], more], 2))


def test_a_crop_that_is_the_only_owner_is_extended() -> None:
    past = appended(cache(5), new(2))
    address, expected, more = past.data_ptr(), past[:, :, :3].clone(), new()
    past = past[:, :, :3]
    grown = appended(past, more)
    assert grown.data_ptr() == address and torch.equal(grown, torch.cat([expected, more], 2))
    # Later steps find the end where the crop put it.
    assert appended(grown, new()).data_ptr() == address


def test_a_window_slides_in_place_and_is_copied_at_the_end_of_the_room() -> None:
    window, moves = cache(4), 0
    expected = window.clone()
    for _ in range(3 * capacity(4)):
        more, before = new(), window.untyped_storage().data_ptr()
        grown = appended(window, more)
        expected = torch.cat([expected, more], 2)[:, :, -4:]
        window = grown[:, :, -4:]
        moves += window.untyped_storage().data_ptr() != before
        assert torch.equal(window, expected)
    assert 1 <= moves <= 4


def test_growth_across_the_capacity_copies_rarely() -> None:
    grown, moves = cache(1), 0
    expected = grown.clone()
    for _ in range(600):
        more, before = new(), grown.data_ptr()
        expected, grown = torch.cat([expected, more], 2), appended(grown, more)
        moves += grown.data_ptr() != before
    assert torch.equal(grown, expected) and moves <= 4


@pytest.mark.parametrize(
    "other",
    [
        lambda t: t.clone(),
        lambda t: copy.deepcopy(t),
        lambda t: t[torch.tensor([1, 0])],
        lambda t: t.repeat_interleave(2, 0)[::2],
        lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    ],
)
def test_copies_and_reorders_have_a_room_of_their_own(other) -> None:
    past, more = cache(5), new()
    mine = other(past)
    expected = torch.cat([mine, more], 2)
    appended(past, new())
    assert torch.equal(appended(mine, more), expected)


def test_two_threads_that_append_to_one_cache_get_one_room_each() -> None:
    for _ in range(50):
        past, results, go = cache(5), [], threading.Barrier(2)

        def run(past=past, results=results, go=go) -> None:
            go.wait()
            results.append(grow(past, 1, 2))

        threads = [threading.Thread(target=run) for _ in range(2)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        assert sum(shares(r, past) for r in results) == 1 and not shares(*results)


def test_memory_is_given_back() -> None:
    past = cache(5)
    storage = past.untyped_storage()
    assert headroom.reserved(past) == capacity(5) * B * H * D * 4
    del past
    assert headroom.owners(torch.empty(0).set_(storage)) == 1


def test_sequence_first_and_empty_pasts() -> None:
    past = room([2, 5, 3], 1, torch.float32, torch.device("cpu")).copy_(torch.randn(2, 5, 3))
    assert shares(grow(past, 2, 1), past) and grow(torch.empty(2, 0, 3), 2, 1).shape == (2, 2, 3)
