"""llmcomp/lent.py: what grows in place looks like eager's result to callers, `view` included."""

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor

from llmcomp.headroom import room
from llmcomp.lent import LentTensor, lent

B, S, V = 3, 4, 5


def grown() -> Tensor:
    """A result of several rows, position by position."""
    made = room([B, S, V], 1, torch.float32, torch.device("cpu"))
    return made.copy_(torch.arange(B * S * V).view(B, S, V))


def test_memory_is_shared_and_writes_are_counted() -> None:
    slot = grown()
    result, version = lent(slot), slot._version
    assert result.data_ptr() == slot.data_ptr() and result.shape == slot.shape and not result.is_contiguous()
    result[:, -1] = 0
    assert slot._version > version and not slot[:, -1].any()


def test_a_contiguous_one_is_returned_as_it_is() -> None:
    plain = room([1, S, V], 1, torch.float32, torch.device("cpu"))
    assert lent(plain) is plain


@pytest.mark.parametrize("shape", [(-1, V), (B * S, V), ((B, S * V),), (torch.Size([B * S, V]),), (B, S, V)])
def test_view_works_as_on_a_contiguous_tensor(shape: tuple[object, ...]) -> None:
    slot = grown()
    found = lent(slot).view(*shape)
    assert type(found) is Tensor and torch.equal(found, slot.contiguous().view(*shape))
    with pytest.raises(RuntimeError, match="invalid for input of size"):
        lent(slot).view(7, 11)


def test_view_as() -> None:
    slot = grown()
    assert torch.equal(lent(slot).view_as(torch.empty(B * S, V)), slot.reshape(-1, V))


def test_what_is_made_of_it_is_plain() -> None:
    result, slot = lent(grown()), grown()
    assert isinstance(result, LentTensor)
    made = (result[:, -1], result + 1, result.softmax(-1), result.contiguous(), result.reshape(-1))
    assert all(type(t) is Tensor for t in made) and torch.equal(made[0], slot[:, -1])


def test_copies_and_what_is_saved_are_plain() -> None:
    result, slot = lent(grown()), grown()
    file = io.BytesIO()
    torch.save({"logits": result}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)["logits"]
    for other in (copy.deepcopy(result), pickle.loads(pickle.dumps(result)), loaded):
        assert type(other) is Tensor and other.is_contiguous() and torch.equal(other, slot)


def test_it_goes_into_compiled_functions() -> None:
    def chosen(logits: Tensor) -> Tensor:
        return logits[:, -1].argmax(-1) + logits.shape[0]

    torch._dynamo.reset()
    slot = grown()
    compiled = torch.compile(chosen, backend="eager", fullgraph=True)
    assert torch.equal(compiled(lent(slot)), chosen(slot))
