"""Calibration data: what a user passes as batches of tokens, checked, without padding.

tensor (batch, length)                                ->  itself
{"input_ids": ..., "attention_mask": no zeros}        ->  the ids
{"input_ids": ..., "attention_mask": zeros at ends}   ->  one batch for each row, without what the mask hides
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmcomp.errors import FormatError

Batches = Iterable[Tensor | Mapping[str, Tensor]]
WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
TO_DO = "pass tensors (batch, length) of token ids, or what a tokenizer of transformers gives with return_tensors='pt'"


@dataclass(frozen=True)
class TokenBatch:
    """Token ids (batch, length) that all count, and their positions where they were given."""

    ids: Tensor
    positions: Tensor | None = None


def token_batches(model: nn.Module, batches: Batches) -> list[TokenBatch]:
    """Read and check calibration data for `model`. Of mappings, input_ids, attention_mask and position_ids are used.

    Raises:
        FormatError: there are none, or one has another shape or type, or tokens that the model does not know, or a
            mask with holes; says which batch.
    """
    if isinstance(batches, Tensor | Mapping | str):
        raise FormatError(
            f"expected several batches of token ids, found one {type(batches).__name__}: put it in a list"
        )
    if not isinstance(batches, Iterable):
        raise FormatError(f"expected batches of token ids, found {batches!r}: {TO_DO}, in a list")
    size = _vocabulary(model)
    found = [part for number, batch in enumerate(batches) for part in _parts(number, batch, size)]
    if not found:
        raise FormatError("expected batches of token ids to calibrate on, found none: pass text of the model's kind")
    return found


def _vocabulary(model: nn.Module) -> int | None:
    """How many tokens a model knows, where it says."""
    get = getattr(model, "get_input_embeddings", None)
    try:
        table = get() if callable(get) else None
    except (AttributeError, NotImplementedError):
        return None
    size = getattr(table, "num_embeddings", None)
    return size if isinstance(size, int) else None


def _parts(number: int, batch: Tensor | Mapping[str, Tensor], size: int | None) -> list[TokenBatch]:
    if isinstance(batch, Tensor):
        return [TokenBatch(_checked(number, batch, size))]
    if not isinstance(batch, Mapping) or not isinstance(batch.get("input_ids"), Tensor):
        found = f"a mapping with {', '.join(batch) or 'nothing'}" if isinstance(batch, Mapping) else repr(type(batch))
        raise FormatError(f"expected token ids as batch {number}, found {found}: {TO_DO}")
    ids = _checked(number, batch["input_ids"], size)
    mask, positions = batch.get("attention_mask"), batch.get("position_ids")
    for name, given in (("attention_mask", mask), ("position_ids", positions)):
        if given is not None and (not isinstance(given, Tensor) or given.shape != ids.shape):
            shape = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
            raise FormatError(
                f"expected the {name} of batch {number} to have the shape of its ids, {tuple(ids.shape)}, found {shape}"
            )
    if mask is None or bool((mask != 0).all()):
        return [TokenBatch(ids, positions)]
    ends = [_ends(number, row) for row in mask]
    return [
        TokenBatch(ids[i : i + 1, a:b], None if positions is None else positions[i : i + 1, a:b])
        for i, (a, b) in enumerate(ends)
        if a < b
    ]


def _checked(number: int, ids: Tensor, size: int | None) -> Tensor:
    if ids.dim() != 2 or ids.numel() == 0 or ids.dtype not in WHOLE:
        raise FormatError(
            f"expected batch {number} to be whole numbers of shape (batch, length), found {ids.dtype} of shape "
            f"{tuple(ids.shape)}: {TO_DO}"
        )
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or (size is not None and high >= size):
        known = "of 0 or more" if size is None else f"from 0 to {size - 1}"
        raise FormatError(
            f"expected token ids {known} in batch {number}, found {low if low < 0 else high}: use the model's tokenizer"
        )
    return ids.long()


def _ends(number: int, row: Tensor) -> tuple[int, int]:
    """Where what a row of a mask leaves begins and ends."""
    kept = row.nonzero().flatten()
    if len(kept) == 0:
        return 0, 0
    first, last = int(kept[0]), int(kept[-1]) + 1
    if last - first != len(kept):
        raise FormatError(
            f"expected the attention_mask of batch {number} to hide tokens at the ends of a row, found some hidden "
            "between others: cut the text there"
        )
    return first, last
