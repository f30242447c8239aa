"""`python -m llmcomp.evaluate`: names of formats with methods, and a table of a small model."""

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from llmcomp.errors import FormatError, OptionError
from llmcomp.evaluate import DEFAULT_FORMATS, evaluate, main, parse, pieces, quantize, table
from llmcomp.formats import Int4, Int8
from llmcomp.mixed_precision import Budget
from llmcomp.quantized import QuantizedTensor

FOLDER = Path(__file__).parent.parent / "examples" / "tiny_llama"


def small() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2, vocab_size=4096,
        initializer_range=0.1, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def test_names() -> None:
    assert parse("int4") == (Int4(), None)
    assert parse("int8_dynamic+smoothquant+gptq") == (Int8(dynamic=True), "smoothquant+gptq")
    dynamic = [str(parse(name)[0]) for name in DEFAULT_FORMATS.split(",") if parse(name)[0].dynamic]  # type: ignore[union-attr]
    assert dynamic == ["int8_dynamic", "fp8_dynamic"]
    assert parse("mixed4.5+awq") == (Budget(bits=4.5), "awq")
    for name, says in (
        ("int4+owq", "found 'owq'"),
        ("int5+awq", "int5"),
        ("mixed", "mixed4.5"),
        ("mixed-1", "above 0"),
    ):
        with pytest.raises(OptionError, match=says):
            parse(name)


def test_pieces_lie_all_over_a_text() -> None:
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    found = pieces(tokenizer, "import os\n" * 200, 16, 4)
    assert len(found) == 4 and all(ids.shape == (1, 16) for ids in found)
    assert len(pieces(tokenizer, "import os\n" * 20, 16, 400)) < 10


@pytest.mark.parametrize("name", ["int4_g32+awq", "int8_dynamic+smoothquant", "mixed6+gptq", "mixed6", "int8"])
def test_every_kind_of_name_quantizes(name: str, tmp_path: Path) -> None:
    data = [torch.arange(48).view(2, 24), torch.arange(100, 148).view(2, 24)]
    models = [small() for _ in range(2)]
    for model in models:
        quantize(model, name, data, tmp_path / "kept")
        assert isinstance(model.model.layers[0].mlp.up_proj.weight, QuantizedTensor)
    assert (tmp_path / "kept").exists() == ("+" in name)
    with torch.no_grad():
        first, second = (model(data[0]).logits for model in models)
    assert torch.equal(first, second)


@pytest.mark.slow
def test_the_table_begins_with_the_float_model() -> None:
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    found = evaluate(small(), tokenizer, "import os\nimport sys\n" * 20, ["int4_g32"], window=32, rounds=0)
    rows = [[cell.strip() for cell in line.split("|")[1:6]] for line in table(found).splitlines()[2:]]
    assert [row[0] for row in rows] == ["float32", "int4_g32"] and rows[0][3] == ""
    assert float(rows[1][1]) < 0.5 * float(rows[0][1]) and rows[1][3].endswith("%") and rows[1][4] == "-"


def test_what_is_missing_is_told(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    with pytest.raises(FormatError, match="batches of token ids"):
        evaluate(small(), tokenizer, "import os\n" * 30, ["mixed5"], window=32, rounds=0)
    with pytest.raises(SystemExit, match="no .*nothing"):
        main([str(tmp_path / "nothing")])
