"""The model that a benchmark runs: any config class of transformers, with random weights.

Setup("LlamaConfig", {"hidden_size": 2048}, "bfloat16", "cpu").build()
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import transformers
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers.initialization import no_init_weights

NARROW = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
TINY = {
    "vocab_size": 1000,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
}
LLAMA_1B = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
}
LLAMA_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
}
MODELS: dict[str, dict[str, object]] = {
    "narrow": dict(NARROW),
    "tiny": dict(TINY),
    "llama-3.2-1b": dict(LLAMA_1B),
    "llama-3-8b": dict(LLAMA_8B),
}

# Random numbers are slow to draw by the billion: one stretch of them is repeated, of a prime length, so that
# no two rows of a weight are equal.
STRETCH = 1_000_003


@dataclass(frozen=True)
class Setup:
    """A model, its type and where it runs."""

    config: str  # the name of a config class of transformers
    settings: dict[str, Any]
    dtype: str
    device: str
    threads: int

    def build(
        self, then: Callable[[transformers.PreTrainedModel, nn.Parameter], object] = lambda model, weight: None
    ) -> transformers.PreTrainedModel:
        """The model in eval mode, with seeded weights.

        `then` is called for each weight when it has its numbers. Memory is taken as weights get them: with weights that
        are packed there, a model is never held whole in floats, as when it is loaded so from a checkpoint.
        """
        config = getattr(transformers, self.config)(**self.settings)
        torch.set_default_dtype(getattr(torch, self.dtype))
        try:
            with no_init_weights(), torch.device(self.device):
                model: transformers.PreTrainedModel = transformers.AutoModelForCausalLM.from_config(config)
        finally:
            torch.set_default_dtype(torch.float32)
        model.tie_weights()
        fill(model, then)
        # Every run is to give as many tokens as it was asked for.
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = 0
        model.eval()
        return model

    def prompt(self, batch: int, length: int) -> Tensor:
        """Token ids (batch, length)."""
        vocabulary = getattr(transformers, self.config)(**self.settings).get_text_config().vocab_size
        generator = torch.Generator().manual_seed(0)
        return torch.randint(3, vocabulary, (batch, length), generator=generator).to(self.device)


def fill(
    model: transformers.PreTrainedModel, then: Callable[[transformers.PreTrainedModel, nn.Parameter], object]
) -> None:
    """Matrices get random numbers of standard deviation 0.02, biases 0, other vectors (norm weights) 1."""
    parameters = dict(model.named_parameters())
    stretch = 0.02 * torch.randn(STRETCH, generator=torch.Generator().manual_seed(0))
    stretch = stretch.to(model.device, model.dtype)
    with torch.no_grad():
        for name in list(parameters):
            p = parameters.pop(name)
            if p.ndim < 2:
                p.fill_(0.0 if name.endswith("bias") else 1.0)
                continue
            for piece in torch.split(p.view(-1), STRETCH):
                piece.copy_(stretch[: piece.numel()])
            del piece  # it holds the weight
            then(model, p)


def bytes_per_token(model: transformers.PreTrainedModel) -> int:
    """Bytes of weights that one decoding step reads: all but the rows of an untied input embedding."""
    total = sum(stored_bytes(p) for p in model.parameters())
    inputs = cast(nn.Embedding, model.get_input_embeddings()).weight
    outputs = cast(nn.Linear, model.get_output_embeddings()).weight
    return total if inputs is outputs else total - stored_bytes(inputs)


def stored_bytes(tensor: Tensor) -> int:
    """Bytes that a tensor takes; one that is made of others (a quantized weight) takes theirs."""
    if not is_traceable_wrapper_subclass(tensor):
        return tensor.numel() * tensor.element_size()
    names, _ = tensor.__tensor_flatten__()
    return sum(stored_bytes(getattr(tensor, name)) for name in names)
