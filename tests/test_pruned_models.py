"""Models without some of their heads, compiled: the tokens of eager, with every kind of cache."""

import pytest
import torch

import llmcomp
from llmcomp.report import GraphReport
from tests.numerics import assert_equal_float32
from tests.quantizable import IDS, llama, logits
from tests.test_unit_layout import model_of

FUSED = ("gpt2", "phi3", "neox", "falcon, by groups")
pytestmark = pytest.mark.usefixtures("fresh")


def without_heads() -> torch.nn.Module:
    """A Llama of four key/value heads, each read by two others, without one of the former and one of the latter."""
    model = llama(spread=0.1, heads=8, groups=4)
    llmcomp.prune_(model, llmcomp.Structured(heads=1))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[:, -16:] = 0
    return model


def check_saved(graphs: list[GraphReport], kind: str) -> None:
    """Every graph was rewritten so, and is made of kernels."""
    pruning = [r.report for g in graphs for r in g.passes if r.name == "prune"]
    assert len(pruning) >= 2 and all(kind in [s.rewrite for s in report.savings] for report in pruning), pruning
    assert not [e for g in graphs for e in g.program.externs if not e.op.startswith("llmcomp.cache_")]


@pytest.mark.parametrize("cache", [pytest.param("dynamic", marks=pytest.mark.slow), "static"])
def test_generate(cache: str, graphs: list[GraphReport]) -> None:
    model = without_heads()
    eager = logits(model)
    with torch.no_grad():
        tokens = model.generate(IDS, max_new_tokens=6, do_sample=False, cache_implementation=cache)
        model.forward = torch.compile(model.forward, backend="llmcomp")
        assert_equal_float32(logits(model), eager)
        assert torch.equal(model.generate(IDS, max_new_tokens=6, do_sample=False, cache_implementation=cache), tokens)
    check_saved(graphs, "heads of attention")


@pytest.mark.slow
def test_a_grown_cache_is_still_appended_to_in_place(graphs: list[GraphReport]) -> None:
    model = without_heads()
    with torch.no_grad():
        model.forward = torch.compile(model.forward, backend="llmcomp")
        model.generate(IDS, max_new_tokens=6, do_sample=False)
    appends = [r.report.rewrites for g in graphs for r in g.passes if r.name == "recognize_append"]
    assert appends and all(n == 4 for n in appends)


@pytest.mark.parametrize("kind", ["bloom", *(pytest.param(k, marks=pytest.mark.slow) for k in FUSED)])
def test_fused_layers(kind: str, graphs: list[GraphReport]) -> None:
    model = model_of(kind).float()
    llmcomp.prune_(model, llmcomp.Structured(heads=1))
    ids = IDS % 100
    with torch.no_grad():
        tokens = model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=-1, pad_token_id=0)
        model.forward = torch.compile(model.forward, backend="llmcomp")
        again = model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=-1, pad_token_id=0)
    assert torch.equal(again, tokens)
    check_saved(graphs, "heads of attention")


@pytest.mark.slow
def test_our_own_generation() -> None:
    model = without_heads()
    with torch.no_grad():
        tokens = model.generate(IDS, max_new_tokens=6, do_sample=False)
        assert torch.equal(llmcomp.generate(model, IDS, max_new_tokens=6, do_sample=False), tokens)


@pytest.mark.slow
def test_between_calls(graphs: list[GraphReport]) -> None:
    """A model that is called with ever more tokens keeps the keys of the heads that are left."""
    model = without_heads()
    fast = torch.compile(lambda ids: model(ids, use_cache=False).logits, backend="llmcomp")
    with torch.no_grad():
        for length in (4, 5, 6, 9):
            assert_equal_float32(fast(IDS[:, :length]), model(IDS[:, :length], use_cache=False).logits)


@pytest.mark.slow
def test_hidden_channels(graphs: list[GraphReport]) -> None:
    model = llama(spread=0.1)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, :64] = 0
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[:64] = 0
            layer.mlp.down_proj.weight[:64] = 0
        tokens, eager = model.generate(IDS, max_new_tokens=6, do_sample=False), logits(model)
        model.forward = torch.compile(model.forward, backend="llmcomp")
        assert_equal_float32(logits(model), eager)
        assert torch.equal(model.generate(IDS, max_new_tokens=6, do_sample=False), tokens)
    check_saved(graphs, "hidden channels")


def test_what_is_saved_is_explained() -> None:
    with torch.no_grad():
        explained = llmcomp.explain(without_heads().requires_grad_(False), IDS)
    assert "heads of attention" in str(explained) and "saved in every call" in str(explained)


class Mixing(torch.nn.Module):
    """Attention whose first four heads have no values, and something between it and the layer that reads it."""

    def __init__(self, mix: str) -> None:
        super().__init__()
        self.mix = mix
        self.q, self.k, self.v, self.o, self.other = (torch.nn.Linear(256, 256, bias=False) for _ in range(5))
        with torch.no_grad():
            self.v.weight[:128] = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (f(x).view(1, -1, 8, 32).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        mixed = {"add": lambda: y + self.other(x), "one": lambda: y + 1, "gate": lambda: y * self.other(x)}
        return self.o(mixed[self.mix]())


@pytest.mark.parametrize("mix", ["add", "one", "gate"])
def test_heads_without_values_count_where_something_is_added(mix: str, graphs: list[GraphReport]) -> None:
    model = Mixing(mix).eval()
    x = torch.randn(1, 5, 256)
    with torch.no_grad():
        assert_equal_float32(torch.compile(model, backend="llmcomp")(x), model(x))
    saved = [s.rewrite for g in graphs for r in g.passes for s in r.report.savings]
    assert ("heads of attention" in saved) == (mix == "gate")
