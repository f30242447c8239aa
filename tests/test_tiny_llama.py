"""The shipped model is what its card says: it loads, it is small, its tokenizer round-trips, it predicts."""

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from llmcomp.perplexity import IGNORED, windows

EXAMPLES = Path(__file__).parent.parent / "examples"
FOLDER = EXAMPLES / "tiny_llama"
TEXTS = [
    "def f(x):\n    return x + 1\n",
    "\tmixed \t  white   space  \r\n\n\n",
    "caf\u00e9 \u4f60\u597d \u03bb \U0001f600 na\u0308ive",
    '0x1F 3.14e-10 \'quotes\' """doc""" # , .',
    "",
]


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("perplexity", EXAMPLES / "perplexity.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up by name.
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "perplexity", module)
        spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()


def card_row(name: str) -> list[float]:
    """The numbers of the row of the card's perplexity table that begins with `name`."""
    row = re.search(rf"^\| {re.escape(name)} \|(.*)\|$", (FOLDER / "README.md").read_text(), re.MULTILINE)
    assert row is not None, f"no row {name!r} in the model card"
    return [float(cell) for cell in row[1].split("|")]


def test_folder_is_below_10_megabytes() -> None:
    assert sum(path.stat().st_size for path in FOLDER.rglob("*")) < 10_000_000


def test_folder_carries_the_licence_of_the_sources() -> None:
    assert "Python Software Foundation; All Rights Reserved" in " ".join(
        (FOLDER / "LICENSE.cpython.txt").read_text().split()
    )


def test_model_is_a_small_grouped_query_llama(model: PreTrainedModel) -> None:
    assert isinstance(model, LlamaForCausalLM)
    assert 3_000_000 <= model.num_parameters() <= 8_000_000
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    assert model.config.max_position_embeddings == 2048


def test_saved_weights_are_bfloat16() -> None:
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype="auto")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("text", TEXTS)
def test_tokenizer_round_trips(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_special_tokens_agree_with_the_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
    generation = model.generation_config
    assert len(set(special)) == 3
    assert [model.config.bos_token_id, model.config.eos_token_id, model.config.pad_token_id] == special
    assert [generation.bos_token_id, generation.eos_token_id, generation.pad_token_id] == special
    assert len(tokenizer) == model.config.vocab_size


def test_windows_predict_every_token_once() -> None:
    for length in (1, 7, 8, 9, 30):
        tokens = torch.arange(100, 100 + length)
        inputs, labels = windows(tokens, bos=1, window=8, stride=3)
        assert labels[labels != IGNORED].tolist() == tokens.tolist()
        assert (inputs[:, 0] == 1).all()
        counted = labels != IGNORED
        before = torch.where(labels == 100, 1, labels - 1)
        assert torch.equal(inputs[counted], before[counted])


def test_perplexity_of_a_uniform_model_is_its_vocabulary(
    example: ModuleType, tokenizer: PreTrainedTokenizerBase
) -> None:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    model = LlamaForCausalLM(config)
    torch.nn.init.zeros_(model.lm_head.weight)
    result = example.perplexity(model, tokenizer, "import os\n" * 50, window=16, stride=8)
    assert result.per_token == pytest.approx(len(tokenizer), rel=1e-4)
    assert result.bytes == 500


def test_perplexity_is_what_the_card_says(
    example: ModuleType,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    size = 16_000
    text = (FOLDER / "heldout.txt").read_bytes()[:size].decode(errors="ignore")
    _, tokens, per_token, per_byte = card_row(f"heldout.txt, first {size} bytes")
    result = example.perplexity(model, tokenizer, text)
    assert result.tokens == tokens
    assert result.per_token == pytest.approx(per_token, rel=2e-3)
    assert result.per_byte == pytest.approx(per_byte, rel=1e-3)


def test_generates_from_a_padded_batch_as_from_each_prompt(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    prompts = ["import os\n", "class Stack:\n    def push(self, item):\n"]
    batch = tokenizer(prompts, padding=True, return_tensors="pt", return_token_type_ids=False)
    together = model.generate(**batch, max_new_tokens=8, min_new_tokens=8, do_sample=False)[:, -8:]
    for prompt, row in zip(prompts, together, strict=True):
        alone = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        assert torch.equal(model.generate(**alone, max_new_tokens=8, min_new_tokens=8, do_sample=False)[0, -8:], row)
