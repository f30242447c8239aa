"""Small models for the tests of quantization: a Llama whose weights fit every storage format, and experts."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from llmcomp.report import GraphReport

VOCABULARY = 300
IDS = torch.randint(0, VOCABULARY, (1, 9), generator=torch.Generator().manual_seed(0))
EXPERTS = dict(
    hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=100, num_local_experts=4, num_experts_per_tok=2,
)  # fmt: skip


def llama(tied: bool = True, spread: float = 0.02, heads: int = 4, groups: int = 2) -> LlamaForCausalLM:
    """Two layers with seeded weights of standard deviation `spread`, and so many heads of queries and of keys."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=heads,
        num_key_value_heads=groups, vocab_size=VOCABULARY, tie_word_embeddings=tied, initializer_range=spread,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def mixtral(spread: float = 0.02, hidden: int = 64, intermediate: int = 96) -> MixtralForCausalLM:
    """Two layers of four experts, and seeded weights of standard deviation `spread`."""
    torch.manual_seed(0)
    sizes = EXPERTS | {"hidden_size": hidden, "intermediate_size": intermediate}
    return MixtralForCausalLM(MixtralConfig(**sizes, initializer_range=spread)).eval()


def gpt_oss(spread: float = 0.02) -> GptOssForCausalLM:
    """The same, with experts that keep their weights as (E, K, N), have biases and a gate of their own."""
    torch.manual_seed(0)
    return GptOssForCausalLM(GptOssConfig(**EXPERTS, head_dim=16, initializer_range=spread)).eval()


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
