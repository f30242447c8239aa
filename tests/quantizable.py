"""A Llama whose weights fit every storage format, for the tests of quantization."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from llmcomp.report import GraphReport

VOCABULARY = 300
IDS = torch.randint(0, VOCABULARY, (1, 9), generator=torch.Generator().manual_seed(0))


def llama(tied: bool = True, spread: float = 0.02, heads: int = 4, groups: int = 2) -> LlamaForCausalLM:
    """Two layers with seeded weights of standard deviation `spread`, and so many heads of queries and of keys."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=heads,
        num_key_value_heads=groups, vocab_size=VOCABULARY, tie_word_embeddings=tied, initializer_range=spread,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def logits(model: nn.Module) -> Tensor:
    """What the model makes of IDS."""
    with torch.no_grad():
        return model(IDS).logits  # type: ignore[no-any-return]


def assert_trains_as_eager(model: nn.Module, graphs: Sequence[GraphReport]) -> None:
    """Every parameter gets (and keeps) the gradient of eager for the loss of IDS; `graphs` notes what is compiled."""
    model(IDS, labels=IDS).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    torch.compile(model, backend="llmcomp")(IDS, labels=IDS).loss.backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-4, atol=1e-6)
    assert {"forward", "backward"} <= {g.kind for g in graphs}
