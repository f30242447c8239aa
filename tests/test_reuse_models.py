"""Loops of transformers' models over growing ids: with masks, and what is said where nothing is kept."""

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertModel, PreTrainedModel

import llmcomp
from llmcomp import reuse
from llmcomp.report import GraphReport
from tests.test_kv_cache import VOCABULARY, llama, tokens


@pytest.fixture
def kinds(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kinds of programs that run, call by call."""
    reuse.reset()
    seen: list[str] = []
    outputs = reuse.ReusingProgram._outputs

    def spy(self: reuse.ReusingProgram, kind: str | None, *args: object) -> object:
        seen.append(kind or "full")
        return outputs(self, kind, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(reuse.ReusingProgram, "_outputs", spy)
    return seen


def masked(rows: int, length: int, left: int = 0) -> Tensor:
    """A mask of `length` that hides the first `left` tokens of the first row."""
    mask = torch.ones(rows, length, dtype=torch.int64)
    mask[0, :left] = 0
    return mask


@pytest.mark.parametrize("rows, left", [(1, 0), pytest.param(2, 3, marks=pytest.mark.slow)])
def test_a_mask_grows_with_the_tokens(graphs: list[GraphReport], kinds: list[str], rows: int, left: int) -> None:
    model, ids = llama().eval(), tokens(rows, 16)
    fast = torch.compile(model, backend="llmcomp")
    with torch.no_grad():
        for length in range(6, 16):
            mask = masked(rows, length, left)
            found = fast(ids[:, :length], attention_mask=mask).logits
            expected = model(ids[:, :length], attention_mask=mask).logits
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        assert kinds.count("step") >= 5 and kinds[-4:] == ["step"] * 4
        before = len(graphs)
        other = masked(rows, 15, left)
        other[-1, 4] = 0  # the same tokens with another mask
        found = fast(ids[:, :15], attention_mask=other).logits
        torch.testing.assert_close(found, model(ids[:, :15], attention_mask=other).logits, rtol=0, atol=1e-5)
    assert len(graphs) == before


def reasons(graphs: list[GraphReport]) -> list[str]:
    return [m.reason for g in graphs for p in g.passes if p.name == "insert_kv_cache" for m in p.report.near_misses]


def test_graphs_that_record_gradients_say_so(graphs: list[GraphReport]) -> None:
    fast = torch.compile(llama(), backend="llmcomp")
    fast(tokens(1, 6))
    assert any("records gradients" in reason for reason in reasons(graphs))


def bert() -> PreTrainedModel:
    config = BertConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, vocab_size=VOCABULARY
    )
    return BertModel(config).eval()


def test_what_stopped_the_proof_is_explained() -> None:
    with torch.no_grad():
        assert "fixed length" in str(llmcomp.explain(bert(), tokens(1, 6)))
        ids = tokens(1, 6)
        torch._dynamo.mark_dynamic(ids, 1)
        assert "attention that is not causal" in str(llmcomp.explain(bert(), ids))
