"""llmcomp/allocation.py: a program on a full device says what it wanted memory for."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

from llmcomp.allocation import empty_strided, intermediates
from llmcomp.errors import MemoryFullError

CPU = torch.device("cpu")


def test_what_fits_is_there() -> None:
    made = empty_strided((2, 3), (1, 2), torch.bfloat16, CPU)
    assert made.shape == (2, 3) and made.stride() == (1, 2) and made.dtype == torch.bfloat16
    assert intermediates(5).shape == (5,) and intermediates(5).dtype == torch.uint8


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(
        MemoryFullError, match=r"2199023255552.0 MiB on cpu for a tensor of shape \(1, 1152921504606846976\)"
    ):
        empty_strided((1, 1 << 60), (1 << 60, 1), torch.bfloat16, CPU)
    with pytest.raises(MemoryFullError, match="MiB on cpu for intermediate results, .*allocate memory"):
        intermediates(1 << 60)


def test_the_cache_of_a_call_that_does_not_fit_is_named_and_the_next_call_is_right() -> None:
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=64, num_attention_heads=2, num_key_value_heads=1, vocab_size=99)
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=1, max_position_embeddings=1 << 50)).eval()
    ids = torch.arange(5)[None]
    with torch.no_grad():
        right = model(ids).logits
        model.compile(backend="llmcomp")
        with pytest.raises(
            MemoryFullError, match=r"for a KV cache of shape \(1, 1, 17592186044416, 16\).*max_cache_len"
        ):
            model(ids, past_key_values=StaticCache(model.config, max_cache_len=1 << 44))
        found = model(ids, past_key_values=StaticCache(model.config, max_cache_len=16)).logits
    torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-5)
