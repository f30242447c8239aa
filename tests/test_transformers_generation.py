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
    deepseek_v3 mamba mamba2 qwen3_next t5 bart whisper""".split()

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

NO_LOGITS = "has no argument logits_to_keep"
NO_POSITIONS = "has no argument position_ids"
NO_PACKING = "takes no more than one sequence in a row, says transformers"
NO_SDPA = "refuses the attention implementation sdpa"
NO_ATTENTION = "has no attention"
NO_CACHE = "returns no past_key_values"
NO_RECURRENCE = "has no recurrent layers"
STATEFUL = "a recurrent state can't be cropped, which is what assisted generation does"
WINDOWS = "the test's mask knows of no sliding window"
NO_STATIC = "takes no StaticCache"
TWO_CACHES = "the test knows of no cache for an encoder and a decoder"
DECODER = "the test is about models without an encoder"
IMAGES = "the test makes no embeddings of images"
NOT_ASSISTED = "is not compatible with assisted generation, says transformers"
LATENT = "the test's shapes are not those of latent attention"

PACKING = {f"test_{kind}_padding_matches_padding_free_with_position_ids": NO_PACKING for kind in ("eager", "sdpa")}
LOGITS = {
    "test_forward_with_logits_to_keep": NO_LOGITS,
    "test_generate_methods_with_logits_to_keep": NO_LOGITS,
}
ASSISTED = (
    "test_assisted_decoding_matches_greedy_search_0_random",
    "test_assisted_decoding_matches_greedy_search_1_same",
    "test_assisted_decoding_sample",
    "test_prompt_lookup_decoding_matches_greedy_search",
)
FROM_EMBEDDINGS = (
    "test_generate_continue_from_inputs_embeds",
    "test_generate_from_inputs_embeds_with_static_cache",
    "test_generate_from_inputs_embeds_0_greedy",
    "test_generate_from_inputs_embeds_1_beam_search",
)
NOT_RECURRENT = {"test_recurrent_layers_mask_padding_on_continued_forward": NO_RECURRENCE}
SCAN = {
    **dict.fromkeys(ASSISTED, STATEFUL),
    "test_custom_4d_attention_mask": NO_ATTENTION,
    "test_left_padding_compatibility": NO_ATTENTION,
    "test_eager_matches_sdpa_generate": NO_SDPA,
    **dict.fromkeys(PACKING, NO_ATTENTION),
    "test_generate_continue_from_inputs_embeds": NO_CACHE,
    "test_generate_continue_from_past_key_values": NO_CACHE,
    "test_past_key_values_format": NO_CACHE,
    "test_generate_with_and_without_position_ids": NO_POSITIONS,
}
TWO_STACKS = {
    **PACKING,
    **LOGITS,
    **dict.fromkeys(FROM_EMBEDDINGS, DECODER),
    "test_generate_with_static_cache": TWO_CACHES,
    "test_left_padding_compatibility": DECODER,
    "test_generate_with_and_without_position_ids": NO_POSITIONS,
}

# What is not run for single models: model -> test (of all its classes, or of the one that is named) -> reason.
SKIPPED_OF: Mapping[str, Mapping[str, str]] = {
    "llama": NOT_RECURRENT,
    "gpt2": NOT_RECURRENT | LOGITS,
    "mistral": NOT_RECURRENT | {"test_custom_4d_attention_mask": WINDOWS},
    "gemma2": NOT_RECURRENT
    | {
        "test_custom_4d_attention_mask": WINDOWS,
        "test_eager_matches_sdpa_generate": NO_SDPA,
        "test_sdpa_padding_matches_padding_free_with_position_ids": NO_SDPA,
    },
    "gemma3": NOT_RECURRENT
    | PACKING
    | {
        "Gemma3TextModelTest::test_custom_4d_attention_mask": WINDOWS,
        **{f"Gemma3Vision2TextModelTest::{test}": IMAGES for test in FROM_EMBEDDINGS},
    },
    "qwen3": NOT_RECURRENT,
    "mixtral": NOT_RECURRENT,
    "phi3": NOT_RECURRENT,
    "gpt_neox": NOT_RECURRENT,
    "opt": NOT_RECURRENT | PACKING,
    "bloom": NOT_RECURRENT
    | PACKING
    | {
        "test_custom_4d_attention_mask": "biases by position come from a mask of two dimensions",
        "test_eager_matches_sdpa_generate": NO_SDPA,
        "test_generate_with_and_without_position_ids": NO_POSITIONS,
    },
    "falcon": NOT_RECURRENT | PACKING,
    "gpt_oss": NOT_RECURRENT
    | PACKING
    | {"test_custom_4d_attention_mask": WINDOWS, "test_eager_matches_sdpa_generate": NO_SDPA},
    "deepseek_v3": NOT_RECURRENT
    | dict.fromkeys(ASSISTED, NOT_ASSISTED)
    | {
        "test_beam_search_generate_dict_outputs_use_cache": LATENT,
        "test_greedy_generate_dict_outputs_use_cache": LATENT,
        "test_eager_matches_sdpa_generate": "needs a GPU with 20 GiB",
    },
    "mamba": SCAN
    | {
        "test_beam_sample_generate": "embeddings give other results than tokens, says transformers",
        "test_generate_compilation_all_outputs": NO_STATIC,
        "test_generate_compile_model_forward_fullgraph": NO_STATIC,
        "test_generate_from_inputs_embeds_with_static_cache": NO_STATIC,
        "test_generate_with_static_cache": NO_STATIC,
        "test_static_cache_no_recompile_with_smaller_length": NO_STATIC,
        "test_recurrent_layers_mask_padding_on_continued_forward": "its convolution can't go on from a chunk",
    },
    "mamba2": SCAN,
    "qwen3_next": PACKING | dict.fromkeys(ASSISTED, STATEFUL),
    "t5": NOT_RECURRENT | TWO_STACKS,
    "bart": NOT_RECURRENT
    | PACKING
    | {"test_generate_with_and_without_position_ids": NO_POSITIONS}
    | {f"BartModelTest::{test}": reason for test, reason in TWO_STACKS.items()}
    | {
        "BartStandaloneDecoderModelTest::test_generate_continue_from_inputs_embeds": NO_CACHE,
        "BartStandaloneDecoderModelTest::test_generate_continue_from_past_key_values": NO_CACHE,
        "BartStandaloneDecoderModelTest::test_left_padding_compatibility": "was not made for padding on the left",
    },
    "whisper": NOT_RECURRENT
    | PACKING
    | LOGITS
    | {"test_generate_with_and_without_position_ids": NO_POSITIONS}
    | {f"WhisperModelTest::{test}": reason for test, reason in TWO_STACKS.items()}
    | {
        "WhisperModelTest::test_generate_compile_model_forward_fullgraph": "its own generate returns other caches",
        "WhisperModelTest::test_generate_compilation_all_outputs": "its own generate returns other outputs",
        "WhisperModelTest::test_generate_without_input_ids": "starts from features of sound",
        "WhisperStandaloneDecoderModelTest::test_left_padding_compatibility": "was not made for padding on the left",
    },
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
    assert found and found[0]["names"], f"no generation tests in {checkout} of {model}: {detail}"
    names: list[str] = found[0]["names"]
    return [n for n in names if not skipped(model, n)]


def skipped(model: str, name: str) -> str | None:
    """Why a test of a model is not run; None if it is."""
    test = name.rpartition("::")[2]
    own = SKIPPED_OF.get(model, {})
    return SKIPPED.get(test) or own.get(test) or own.get(name)


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


@pytest.mark.slow
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
    assert set(SKIPPED_OF) == set(MODELS)
    for tests in (SKIPPED, *SKIPPED_OF.values()):
        assert all(reason and "test_" in name for name, reason in tests.items())


def test_rows_are_of_a_test_or_of_a_test_of_one_class() -> None:
    assert skipped("llama", "LlamaModelTest::test_generate_with_mtp") == SKIPPED["test_generate_with_mtp"]
    assert skipped("llama", "LlamaModelTest::test_greedy_generate") is None
    assert skipped("bart", "BartModelTest::test_generate_with_static_cache") == TWO_CACHES
    assert skipped("bart", "BartStandaloneDecoderModelTest::test_generate_with_static_cache") is None
