"""The matrices of a model, each once, and which of them a spec means."""

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from llmcomp.errors import OptionError
from llmcomp.sites import by_function, by_patterns, matrix, names_of, sites


def llama(tied: bool) -> LlamaForCausalLM:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=64, num_hidden_layers=1, tie_word_embeddings=tied))


def test_tied_weights_are_one_site() -> None:
    model = llama(tied=True)
    found = {site.name: site for site in sites(model)}
    assert len(found) == 8 and "model.embed_tokens" not in found
    head = found["lm_head"]
    assert head.is_head and head.weight is model.model.embed_tokens.weight
    assert [name for name, _ in names_of(model, head)] == ["model.embed_tokens", "lm_head"]


def test_the_head_that_is_not_tied_is_the_head() -> None:
    assert [site.name for site in sites(llama(tied=False)) if site.is_head] == ["lm_head"]


def test_a_conv1d_is_turned() -> None:
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_head=4, n_layer=1, vocab_size=64, n_positions=16))
    site = next(site for site in sites(model) if site.name.endswith("mlp.c_fc"))
    assert site.transposed and site.matrix.shape == (128, 32)
    assert site.matrix.data_ptr() == site.weight.data_ptr()
    assert torch.equal(matrix(site.holders[0]), site.matrix)


def test_a_parameter_that_others_read_too_is_named() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)
            self.again = self.layer.weight

    assert [site.elsewhere for site in sites(Both())] == ["again"]


def test_names_of_parameters_that_will_be_tied() -> None:
    model = llama(tied=False)
    found = list(sites(model, {"lm_head.weight": "model.embed_tokens.weight"}))
    assert [len(site.holders) for site in found if site.is_head] == [2]


def test_the_first_pattern_counts() -> None:
    model = llama(tied=False)
    choose = by_patterns(model, {"*.q_proj": 1, "*.self_attn.*": None, "*_proj": 2}, sites(model))
    found = {site.name.rsplit(".", 1)[-1]: choose(site) for site in sites(model)}
    assert found["q_proj"] == (1, "") and found["up_proj"] == (2, "")
    assert found["k_proj"] == (None, "'*.self_attn.*' leaves it alone")
    assert found["lm_head"] == (None, "no pattern matches it")


def test_a_pattern_without_a_match_is_refused() -> None:
    with pytest.raises(OptionError, match=r"found '\*\.query', which matches none: the names are model\.embed_tokens"):
        by_patterns(model := llama(tied=False), {"*.query": 1}, sites(model))


def test_a_function_sees_every_holder() -> None:
    model = llama(tied=True)
    seen: list[str] = []
    choose = by_function(model, lambda name, module: seen.append(name) if name != "lm_head" else "it")
    found = {site.name: choose(site) for site in sites(model)}
    assert found["lm_head"] == ("it", "") and "model.embed_tokens" in seen
    assert found["model.layers.0.mlp.up_proj"] == (None, "the function leaves it alone")


def test_a_layer_alone_has_a_label() -> None:
    assert [site.label for site in sites(nn.Linear(4, 4))] == ["(the layer itself)"]
