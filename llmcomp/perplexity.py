"""Perplexity of a causal language model on a text, counted with sliding windows."""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORED = -100


@dataclass(frozen=True)
class Perplexity:
    """What a model loses on a text: `nll` is the sum over all tokens, in nats."""

    nll: float
    tokens: int
    bytes: int

    @property
    def per_token(self) -> float:
        """e to the mean loss of a token."""
        return math.exp(self.nll / self.tokens)

    @property
    def per_byte(self) -> float:
        """Comparable between tokenizers, which `per_token` is not."""
        return math.exp(self.nll / self.bytes)

    def __str__(self) -> str:
        return (
            f"perplexity {self.per_token:.3f} per token, {self.per_byte:.4f} per byte "
            f"({self.tokens} tokens, {self.bytes} bytes)"
        )


def windows(tokens: Tensor, bos: int, window: int, stride: int) -> tuple[Tensor, Tensor]:
    """Cut `tokens` [T] into inputs and labels, both [number of windows, window].

    Every input is `bos` and the tokens that precede its labels. Each token is a label exactly once: the first
    window has all of its own, the others their last `stride`, and IGNORED stands everywhere else. All
    windows have one shape, so that a compiled model sees one.
    """
    starts = range(0, max(len(tokens) - window, 0) + stride, stride)
    inputs = torch.full((len(starts), window), bos)
    labels = torch.full((len(starts), window), IGNORED)
    for row, start in enumerate(starts):
        piece = tokens[start : start + window]
        fresh = 0 if row == 0 else window - stride
        inputs[row, 1 : len(piece)] = piece[:-1]
        labels[row, fresh : len(piece)] = piece[fresh:]
    return inputs, labels


@torch.no_grad()
def perplexity(
    model: nn.Module,
    tokenizer: Any,
    text: str,
    *,
    window: int = 512,
    stride: int = 256,
    batch: int = 4,
    use_cache: bool = False,
) -> Perplexity:
    """Perplexity of `model`, a transformers causal language model, compiled or not, on `text`.

    `tokenizer` is one of transformers. Each token is predicted from at least `window - stride` tokens before it (the
    first window apart), and from at most `window`, the start token included. The sum is taken in float32 on the model's
    device. With `use_cache` the model makes a KV cache, and where that is quantized, predictions come from what it
    holds.
    """
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    inputs, labels = windows(ids, tokenizer.bos_token_id, window, stride)
    device = next(model.parameters()).device
    nll = 0.0
    for x, y in zip(torch.split(inputs, batch), torch.split(labels, batch), strict=True):
        logits = model(input_ids=x.to(device), use_cache=use_cache).logits
        nll += F.cross_entropy(
            logits.flatten(0, 1).float(), y.flatten().to(device), ignore_index=IGNORED, reduction="sum"
        ).item()
    return Perplexity(nll, len(ids), len(text.encode()))
