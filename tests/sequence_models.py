"""Decoders written without a cache, in plain PyTorch, for the tests of KV cache insertion."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCAB, WIDTH, HEADS = 37, 16, 2
HEAD = WIDTH // HEADS

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
Positions = Callable[[Tensor], Tensor]


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As nanoGPT does without SDPA."""
    length = q.shape[2]
    scores = q @ k.transpose(-2, -1) * HEAD**-0.5
    visible = torch.tril(torch.ones(length, length, dtype=torch.bool))
    return torch.softmax(scores.masked_fill(~visible, -torch.inf), -1) @ v


def windowed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i, j = torch.arange(q.shape[2])[:, None], torch.arange(q.shape[2])[None, :]
    return F.scaled_dot_product_attention(q, k, v, (j <= i) & (j > i - 3))


def alibi(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i, j = torch.arange(q.shape[2])[:, None], torch.arange(q.shape[2])[None, :]
    slopes = torch.tensor([0.5, 0.25])[:, None, None]
    bias = torch.where(j <= i, slopes * (j - i), -torch.inf)
    return torch.softmax(q @ k.mT * HEAD**-0.5 + bias, -1) @ v


def bidirectional(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def learned(table: Tensor, x: Tensor) -> Tensor:
    return x + table[: x.shape[1]]


def counted(table: Tensor, x: Tensor) -> Tensor:
    return x + F.embedding(torch.arange(x.shape[1]), table)


@dataclass(frozen=True)
class Design:
    """The choices that random decoders are made of."""

    attention: Attention = sdpa
    positions: Callable[[Tensor, Tensor], Tensor] = counted
    before: Callable[[Tensor], Tensor] = lambda x: x  # of a block's input
    layers: int = 1
    last: int | None = None  # how many positions the logits keep
    keys_too: bool = False  # whether keys and values are returned


class Decoder(nn.Module):
    """A GPT without a cache: ids (B, S) to logits (B, S, VOCAB)."""

    def __init__(self, design: Design) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.design = design
        self.tokens, self.table = nn.Embedding(VOCAB, WIDTH), nn.Parameter(torch.randn(64, WIDTH))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(design.layers))
        self.qkv = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(design.layers))
        self.out = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(design.layers))
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, ids: Tensor) -> tuple[Tensor, ...]:
        x = self.design.positions(self.table, self.tokens(ids))
        kept = []
        for norm, qkv, out in zip(self.norms, self.qkv, self.out, strict=True):
            q, k, v = (
                t.unflatten(-1, (HEADS, HEAD)).transpose(1, 2) for t in qkv(norm(self.design.before(x))).chunk(3, -1)
            )
            x = x + out(self.design.attention(q, k, v).transpose(1, 2).flatten(2))
            kept += [k, v] if self.design.keys_too else []
        x = x if self.design.last is None else x[:, -self.design.last :]
        return (self.head(x), *kept)
