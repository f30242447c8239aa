"""What calibration data may be, and what is said of data that is not."""

import pytest
import torch
from torch import Tensor
from transformers import BatchEncoding

from llmcomp.errors import FormatError
from llmcomp.token_batches import token_batches
from tests.quantizable import llama

IDS = torch.tensor([[5, 6, 7, 8], [1, 2, 3, 4]])


def cut(batch: object) -> list[list[list[int]]]:
    return [found.ids.tolist() for found in token_batches(llama(), [batch])]  # type: ignore[list-item]


def test_what_a_mask_hides_is_cut_off() -> None:
    mask = torch.tensor([[1, 1, 1, 0], [0, 0, 1, 1]])
    assert cut(IDS) == cut({"input_ids": IDS}) == cut({"input_ids": IDS, "attention_mask": mask * 0 + 1})
    assert cut(BatchEncoding({"input_ids": IDS, "attention_mask": mask})) == [[[5, 6, 7]], [[3, 4]]]
    assert cut({"input_ids": IDS, "attention_mask": mask * torch.tensor([[1], [0]])}) == [[[5, 6, 7]]]


def test_positions_follow_their_tokens() -> None:
    mask, positions = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]]), torch.arange(8).view(2, 4)
    found = token_batches(llama(), [{"input_ids": IDS, "attention_mask": mask, "position_ids": positions}])
    assert [b.positions.tolist() for b in found if b.positions is not None] == [[[1, 2, 3]], [[4, 5, 6, 7]]]


def test_other_whole_numbers_and_any_iterable() -> None:
    found = token_batches(llama(), (ids for ids in [IDS.int(), IDS.byte()]))
    assert [b.ids.dtype for b in found] == [torch.int64, torch.int64]


@pytest.mark.parametrize(
    "batches,says",
    [
        ([], "found none"),
        (IDS, "several batches"),
        ([IDS, IDS[0]], "batch 1 .*shape \\(4,\\)"),
        ([IDS.float()], "batch 0 .*float32"),
        ([IDS > 3], "bool"),
        ([IDS[:, :0]], "\\(2, 0\\)"),
        ([IDS, IDS, IDS - 2], "from 0 to 299 in batch 2, found -1"),
        ([IDS + 295], "found 303"),
        ([["text"]], "list"),
        ([{"ids": IDS}], "a mapping with ids"),
        ([{"input_ids": IDS, "attention_mask": IDS[:1]}], "attention_mask.*\\(1, 4\\)"),
        ([{"input_ids": IDS, "attention_mask": torch.tensor([[1, 0, 1, 1], [1, 1, 1, 1]])}], "between others"),
        ([{"input_ids": IDS, "attention_mask": IDS * 0}], "found none"),
    ],
)
def test_what_is_refused(batches: list[Tensor], says: str) -> None:
    with pytest.raises(FormatError, match=says):
        token_batches(llama(), batches)
