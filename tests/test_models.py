"""A dozen architectures end to end, compiled, equal to eager; the sweep runs them all."""

from functools import partial

import pytest
import torch

from tests.checks import CHECKS, exact_copy
from tests.models import EXCLUDED, all_cases, case_named, causal_lm_cases
from tests.numerics import Divergence, assert_no_worse, divergences, is_tie

SLOW = partial(pytest.param, marks=pytest.mark.slow)
# Each adds something: q/k norms, post-norms and soft caps, windows, Conv1D, parallel layers, alibi, experts,
# sinks, latent attention, fused q/k/v, state-space layers.
# The number is how much of the FLOPs and of the weight bytes has to be in generated kernels, in percent.
GENERATE = {
    "llama": 98,
    "qwen3": 90,
    "gemma2": 90,
    "gemma3_text": 90,
    "gpt2": 90,
    "gpt_neox": 90,
    "phi3": 90,
    "olmo2": 90,
    "bloom": 90,
    "mixtral": 90,
    "gpt_oss": 90,
    "deepseek_v3": 90,
    "mamba": 90,
}
LONG = ("gpt_neox", "olmo2", "gpt_oss", "deepseek_v3")
LOGITS = ("llama", "bert-sequence", "modernbert-token", *map(SLOW, ("whisper-speech", "t5")))
LEFT_PADDED = ("llama", "gpt2")
BEAMS = ("gemma2", "bart-seq2seq")
BFLOAT16 = ("llama", *map(SLOW, "mixtral qwen3 gemma2 gpt2 bloom bert-token".split()))


@pytest.mark.parametrize("name", [SLOW(name) if name in LONG else name for name in GENERATE])
def test_greedy_tokens_of_a_padded_batch_equal_eager(name: str) -> None:
    count = CHECKS["generate"](case_named(name), "llmcomp")
    assert count.breaks == 0
    flops, weights = count.work.shares
    print(f"{name}: {flops:.0%} of the FLOPs and {weights:.0%} of the weight bytes in generated kernels")
    assert min(flops, weights) >= GENERATE[name] / 100


@pytest.mark.parametrize("name", LOGITS)
def test_logits_of_two_shapes_equal_eager(name: str) -> None:
    assert CHECKS["logits"](case_named(name), "llmcomp").breaks == 0


@pytest.mark.parametrize("name", BFLOAT16)
def test_bfloat16_is_no_less_exact_than_eager(name: str) -> None:
    assert CHECKS["bfloat16"](case_named(name), "llmcomp").breaks == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", LEFT_PADDED)
def test_greedy_tokens_of_three_prompts_equal_eager(name: str) -> None:
    assert CHECKS["left-padded"](case_named(name), "llmcomp").breaks == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", BEAMS)
def test_two_beams_equal_eager(name: str) -> None:
    assert CHECKS["beams"](case_named(name), "llmcomp").breaks == 0


@pytest.mark.slow
def test_static_cache() -> None:
    assert CHECKS["static"](case_named("llama"), "llmcomp").breaks == 0


def test_every_case_can_be_made_small() -> None:
    assert len(causal_lm_cases()) >= 170
    assert len({c.name for c in all_cases()}) == len(all_cases())
    assert all(reason for reason in EXCLUDED.values())


def test_a_wrong_result_is_seen() -> None:
    exact = torch.randn(4, 50, dtype=torch.float64)
    eager = exact.bfloat16()
    worse = (exact + 3 * (eager.double() - exact)).bfloat16()
    assert_no_worse(eager, eager, exact)
    with pytest.raises(AssertionError, match="rms error"):
        assert_no_worse(worse + worse.abs().max() / 50, eager, exact)


def test_a_tie_is_a_gap_within_the_error_of_eager() -> None:
    assert divergences(torch.tensor([[1, 2, 3], [1, 1, 1]]), torch.tensor([[1, 2, 3], [1, 2, 1]])) == (
        Divergence(1, 1, 1, 2),
    )
    exact, eager = torch.tensor([0.0, 1.0, 1.01]), torch.tensor([0.0, 1.0, 1.0])
    assert is_tie(Divergence(0, 0, 1, 2), eager, exact)
    assert not is_tie(Divergence(0, 0, 0, 2), eager, exact)


def test_candidates_that_the_errors_of_eager_drove_apart_are_a_tie() -> None:
    exact = torch.tensor([0.0, 1.62, 1.63])
    eager = exact + torch.tensor([0.02, -0.02, 0.02])
    assert is_tie(Divergence(0, 0, 1, 2), eager, exact)
    assert not is_tie(Divergence(0, 0, 0, 2), eager, exact)


def test_the_exact_copy_leaves_the_model_alone() -> None:
    model = case_named("mixtral").build(torch.bfloat16)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    exact_copy(model)
    assert model.dtype == torch.bfloat16 and model.config._experts_implementation != "eager"
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
