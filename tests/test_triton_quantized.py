"""A model whose weights are quantized, on the Triton target: the host code and every kernel, under the interpreter.

What needs transformers imports it where it runs: it takes seconds, and each process of a test run imports this file.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

import llmcomp
from llmcomp.report import GraphReport
from tests.numerics import assert_equal_float32, assert_no_worse
from tests.test_triton_program import compiled
from tests.triton_worker import interpreted

BATCH, PROMPT, VOCABULARY = 2, 7, 40  # 14 rows go to tensor cores, the 2 of a step do not


def steps(model: Any) -> list[Tensor]:
    """The logits of a prompt, and of a step after it."""
    ids = torch.randint(VOCABULARY, (BATCH, PROMPT + 1), generator=torch.Generator().manual_seed(1))
    prompt = model(input_ids=ids[:, :-1], use_cache=True)
    return [prompt.logits, model(input_ids=ids[:, -1:], past_key_values=prompt.past_key_values).logits]


def quantized(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """A Llama of one layer, whose weights are multiples of 2**-8: they are the same in all dtypes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=VOCABULARY, initializer_range=0.1, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((parameter * 256).round().clamp(-255, 255) / 256)
    model = model.to(dtype)
    done = llmcomp.quantize_(model, name)
    assert len(done.quantized) == 7 + 1
    return model


def ours(model: Any) -> list[Tensor]:
    """The logits that Triton kernels compute, none of them from a dequantized weight."""
    reports: list[GraphReport] = []
    model.forward = compiled(model.forward, reports, None)
    found = steps(model)
    assert len(reports) >= 2
    for report in reports:
        assert not [e.op for e in report.program.externs if "linear" in e.op or "dequantize" in e.op or "mm" in e.op]
        assert sum(k.family == "contract" for k in report.program.kernels) == 4 + 1
    return found


@pytest.mark.slow
@interpreted
@pytest.mark.parametrize("name", ["int4_g32", "int8", "nf4_g32"])
def test_prompts_and_steps(name: str) -> None:
    model = quantized(name)
    with torch.no_grad():
        eager = steps(model)
        for found, expected in zip(ours(model), eager, strict=True):
            assert_equal_float32(found, expected)


@pytest.mark.slow
@interpreted
def test_prompts_and_steps_in_bfloat16() -> None:
    model = quantized("int4_g32", torch.bfloat16)
    with torch.no_grad():
        eager, exact = steps(model), steps(quantized("int4_g32"))
        for found, expected, truth in zip(ours(model), eager, exact, strict=True):
            assert_no_worse(found, expected, truth)


@pytest.mark.slow
@interpreted
@pytest.mark.parametrize("name", ["int8_dynamic"])
def test_tokens_that_are_quantized(name: str) -> None:
    """A code that falls on the other side of a tie moves what follows by more than the order of a sum does."""
    model = quantized(name)
    with torch.no_grad():
        eager = steps(model)
        for found, expected in zip(ours(model), eager, strict=True):
            assert (found - expected).norm() <= 0.01 * expected.norm()
