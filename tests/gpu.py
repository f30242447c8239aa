"""What the tests that need a GPU share: where they run, and models there.

LLMCOMP_TEST_DEVICE=cpu python -m pytest -m gpu tests/test_gpu_models.py    tries them out without one
"""

import copy
import os

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from llmcomp.report import GraphReport
from tests.checks import exact_copy, generated, next_logits, with_type_of
from tests.models import Case, case_named
from tests.numerics import divergences, is_tie

DEVICE = os.environ.get("LLMCOMP_TEST_DEVICE", "cuda")
TARGET = "triton" if DEVICE == "cuda" else "cpp"
MARKS = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs a CUDA device"),
]
MODELS = ("llama", "gpt2", "gemma2", "mixtral")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def placed(name: str, dtype: torch.dtype = torch.float32) -> tuple[Case, PreTrainedModel]:
    """A small model of an architecture, on the device."""
    case = case_named(name)
    return case, case.build(dtype).to(DEVICE)


def prompt_of(case: Case, batch: int, length: int, padding: int = 0) -> dict[str, Tensor]:
    """Token ids and, where there is padding, a mask; on the device."""
    return {k: v.to(DEVICE) for k, v in case.prompt(batch, length, padding=padding).items()}


def check_tokens(name: str, dtype: torch.dtype, **settings: object) -> None:
    """Greedy tokens of a padded batch equal eager's but for ties, and kernels for the device have computed them."""
    case, model = placed(name, dtype)
    prompt, eager_model = with_type_of(prompt_of(case, 2, 9, padding=3), model), copy.deepcopy(model)
    eager, ours, count = generated(model, prompt, "llmcomp", disable_compile=True, **settings)
    assert count.graphs and count.work.generated_flops
    check_equal(case, eager_model, prompt, ours, eager)


def check_equal(
    case: Case, eager_model: PreTrainedModel, prompt: dict[str, Tensor], ours: Tensor, eager: Tensor
) -> None:
    """Tokens are equal, or split where two candidates tie."""
    for at in divergences(ours, eager):
        logits = next_logits(case, eager_model, prompt, eager, at)
        exact = next_logits(case, exact_copy(eager_model), prompt, eager, at)
        assert is_tie(at, logits, exact), f"{at}: logits {logits[at.ours]:.6g} and {logits[at.eager]:.6g}"


def check_target(graphs: list[GraphReport]) -> None:
    """Every graph was compiled for the device."""
    assert graphs and {g.program.target for g in graphs} == {TARGET}
