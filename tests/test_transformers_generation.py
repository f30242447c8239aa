"""The generation tests of transformers pass with its models compiled by us.

They are in no wheel. With LLMCOMP_TRANSFORMERS_TESTS=CHECKOUT, a checkout of the installed version, they run here
(`-m sweep`; minutes for each model): GenerationTesterMixin, what has the mark torch_compile_test, and what is slow.
"""

import os
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from transformers import CompileConfig

from tests.children import Outcome, run_all, run_child
from tests.models import case_named
from tests.transformers_child import everything_compiled

CHECKOUT = os.environ.get("LLMCOMP_TRANSFORMERS_TESTS", "")
SECONDS = 3600.0  # for the tests of one model

# Folders of tests/models.
MODELS = """llama gpt2 mistral gemma2 gemma3 qwen3 mixtral phi3 gpt_neox opt bloom falcon gpt_oss
    deepseek_v3 mamba t5 bart""".split()

FLASH = "needs a GPU and the package flash_attn"
TWO_GPUS = "needs two GPUs"
GPU = "needs a GPU"
QUANTO = "needs the package optimum-quanto"

# What is not run, for any model; a test that skips itself and is in no table fails here.
SKIPPED: Mapping[str, str] = {
    "test_eager_matches_fa2_generate": FLASH,
    "test_eager_matches_fa3_generate": FLASH,
    "test_eager_matches_fa4_generate": FLASH,
    "test_flash_attention_2_continue_generate_with_position_ids": FLASH,
    "test_flash_attention_2_padding_matches_padding_free_with_position_ids": FLASH,
    "test_flash_attention_2_padding_matches_padding_free_with_position_ids_and_fa_kwargs": FLASH,
    "test_flash_attention_3_padding_matches_padding_free_with_position_ids": FLASH,
    "test_flash_attention_3_padding_matches_padding_free_with_position_ids_and_fa_kwargs": FLASH,
    "test_flash_attention_4_padding_matches_padding_free_with_position_ids": FLASH,
    "test_flash_attention_4_padding_matches_padding_free_with_position_ids_and_fa_kwargs": FLASH,
    "test_flash_attn_2_can_compile_with_attention_mask_None_without_graph_break": FLASH,
    "test_model_parallel_beam_search": TWO_GPUS,
    "test_sdpa_can_compile_dynamic": GPU,
    "test_torch_compile_for_training": GPU,
    "test_generate_with_quant_cache": QUANTO,
    "test_generate_with_mtp": "needs a model that was published with layers that draft tokens",
}

NO_RECURRENCE = "has no recurrent layers"
RECURRENT = ("mamba",)

# What is not run for single models: (model, test) -> reason.
SKIPPED_OF: Mapping[tuple[str, str], str] = {
    (model, "test_recurrent_layers_mask_padding_on_continued_forward"): NO_RECURRENCE
    for model in MODELS
    if model not in RECURRENT
}

# Tests that call no model.
WITHOUT_GRAPHS = (
    "test_generate_from_inputs_embeds",  # what is left of a test that has parameters
    "test_inherits_generation_mixin",
    "test_prepare_inputs_for_generation_kwargs_forwards",
    "test_prompt_lookup_decoding_stops_at_eos",
)


def command(checkout: str, model: str, names: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "tests.transformers_child", checkout, model, *names]


def names_of(checkout: str, model: str) -> list[str]:
    """The tests of a model that this test runs."""
    found, _, detail = run_child(command(checkout, model, ()), SECONDS, {})
    assert found, f"no generation tests in {checkout} of {model}: {detail}"
    names: list[str] = found[0]["names"]
    return [n for n in names if not skipped(model, n)]


def skipped(model: str, name: str) -> str | None:
    """Why a test of a model is not run; None if it is."""
    test = name.rpartition("::")[2]
    return SKIPPED.get(test) or SKIPPED_OF.get((model, test)) or SKIPPED_OF.get((model, name))


def run(checkout: str, model: str, names: Sequence[str]) -> Iterator[Outcome]:
    return run_all(names, lambda left: command(checkout, model, left), SECONDS)


def fault(outcome: Outcome) -> str | None:
    """What is wrong with the outcome of one test; None if it passed and ran our graphs."""
    if outcome.fields is None:
        return f"{outcome.item} {outcome.verdict}: {outcome.detail}"
    verdict, detail, graphs = (outcome.fields[k] for k in ("verdict", "detail", "graphs"))
    if verdict != "passed":
        return f"{outcome.item} {verdict}: {detail}"
    if not graphs and not outcome.item.endswith(WITHOUT_GRAPHS):
        return f"{outcome.item} passed without a graph of ours"
    return None


@pytest.mark.sweep
@pytest.mark.skipif(not CHECKOUT, reason="LLMCOMP_TRANSFORMERS_TESTS names no checkout of transformers")
@pytest.mark.parametrize("model", MODELS)
def test_of_transformers(model: str) -> None:
    outcomes = list(run(CHECKOUT, model, names_of(CHECKOUT, model)))
    faults = [found for o in outcomes if (found := fault(o))]
    print(f"{model}: {len(outcomes) - len(faults)} of {len(outcomes)} passed")
    assert not faults, "\n".join(faults)


THEIRS = {
    "tests/__init__.py": "",
    "tests/models/__init__.py": "",
    "tests/models/llama/__init__.py": "",
    "tests/mixin.py": """
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        SMALL = dict(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
                     num_key_value_heads=2, intermediate_size=48)

        class GenerationTesterMixin:
            def test_generates(self):
                model = LlamaForCausalLM(LlamaConfig(**SMALL)).eval()
                with torch.no_grad():
                    self.assertEqual(model(torch.tensor([[3, 1]])).logits.shape, (1, 2, 64))

            def test_fails(self):
                raise ValueError("wrong")

            def test_skips(self):
                self.skipTest("too small")
    """,
    "tests/models/llama/test_modeling_llama.py": """
        import pytest, unittest
        from tests.mixin import GenerationTesterMixin

        class LlamaModelTest(GenerationTesterMixin, unittest.TestCase):
            @pytest.mark.torch_compile_test
            def test_marked(self):
                pass

            def test_of_something_else(self):
                pass
    """,
}


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder that looks like theirs."""
    for name, text in THEIRS.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(textwrap.dedent(text))
    return tmp_path


def test_every_outcome_is_told(checkout: Path) -> None:
    names = [f"LlamaModelTest::test_{n}" for n in ("marked", "skips", "generates", "fails", "of_something_else")]
    outcomes = list(run(str(checkout), "llama", names))
    assert [o.item for o in outcomes] == names
    assert [found and found.partition("::test_")[2] for found in map(fault, outcomes)] == [
        "marked passed without a graph of ours",
        "skips skipped: Skipped: too small",
        None,
        "fails failed: ValueError: wrong",
        "of_something_else crash: exit 1: ",
    ]


def test_models_are_compiled_when_built() -> None:
    graphs: list[None] = []
    config = CompileConfig()
    with everything_compiled(lambda: graphs.append(None), in_place=True):
        model = case_named("llama").build()
        assert config.to_dict()["backend"] == "llmcomp"
        with torch.no_grad():
            model(torch.tensor([[3, 1, 4]]))
        inner = model.model._compiled_call_impl
    assert model._compiled_call_impl is not None and inner is None and len(graphs) == 1
    assert case_named("llama").build()._compiled_call_impl is None
    assert config.to_dict()["backend"] == "inductor"


def test_every_row_has_a_reason() -> None:
    assert all(SKIPPED.values()) and all(SKIPPED_OF.values())
    assert {model for model, _ in SKIPPED_OF} <= set(MODELS)
