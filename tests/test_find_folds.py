"""Folds are found in decoders of many kinds, and those that are found leave the model what it is."""

from collections.abc import Mapping

import pytest
import torch
import transformers
from torch import Tensor, nn

from llmcomp.find_folds import find_folds
from llmcomp.folding import Form, fold
from llmcomp.layerwise import layerwise
from llmcomp.quantization import quantize_
from tests.quantizable import llama

COMMON = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = COMMON | {"num_key_value_heads": 2}
SPLIT = ("input_layernorm>q_proj,k_proj,v_proj", "post_attention_layernorm>gate_proj,up_proj", "up_proj>down_proj")
GROUPED_SPLIT = (*SPLIT, "v_proj>o_proj")
FUSED = ("input_layernorm>query_key_value", "query_key_value>dense")
GPT = (*FUSED, "post_attention_layernorm>dense_h_to_4h")
IDS = torch.randint(0, 300, (2, 16), generator=torch.Generator().manual_seed(0))

KINDS: Mapping[str, tuple[str, dict[str, object], tuple[str, ...]]] = {
    "llama": ("Llama", GROUPED, GROUPED_SPLIT),
    "biases": ("Qwen2", GROUPED, GROUPED_SPLIT),
    "norms of queries": ("Qwen3", GROUPED | {"head_dim": 32}, GROUPED_SPLIT),
    "mistral": ("Mistral", COMMON | {"num_key_value_heads": 1}, GROUPED_SPLIT),
    "norms of 1 + weight": (
        "Gemma2",
        GROUPED | {"head_dim": 16},
        (*GROUPED_SPLIT[:1], "pre_feedforward_layernorm>gate_proj,up_proj", *GROUPED_SPLIT[2:]),
    ),
    "masks that differ": (
        "Gemma3",
        GROUPED | {"head_dim": 16, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
        (*GROUPED_SPLIT[:1], "pre_feedforward_layernorm>gate_proj,up_proj", *GROUPED_SPLIT[2:]),
    ),
    "fused": (
        "Phi3",
        GROUPED | {"pad_token_id": 0},
        (
            *("input_layernorm>qkv_proj", "post_attention_layernorm>gate_up_proj"),
            *("qkv_proj>o_proj", "gate_up_proj>down_proj"),
        ),
    ),
    "transposed": (
        "GPT2",
        {"n_embd": 64, "n_layer": 2, "n_head": 4},
        ("ln_1>c_attn", "ln_2>c_fc", "c_attn>c_proj"),
    ),
    "relu": (
        "OPT",
        COMMON | {"ffn_dim": 96, "word_embed_proj_dim": 64, "max_position_embeddings": 64},
        ("self_attn_layer_norm>q_proj,k_proj,v_proj", "final_layer_norm>fc1", "v_proj>out_proj", "fc1>fc2"),
    ),
    "experts": (
        "Mixtral",
        GROUPED | {"num_local_experts": 4, "experts_implementation": "eager"},
        ("input_layernorm>q_proj,k_proj,v_proj", "v_proj>o_proj"),
    ),
    "heads side by side": ("GPTNeoX", COMMON, GPT),
    "bloom": ("Bloom", {"hidden_size": 64, "n_layer": 2, "n_head": 4}, GPT),
    "parallel": ("Falcon", COMMON, ("input_layernorm>query_key_value,dense_h_to_4h", "query_key_value>dense")),
    "groups side by side": (
        "Falcon",
        COMMON | {"new_decoder_architecture": True, "num_kv_heads": 2},
        ("ln_attn>query_key_value", "ln_mlp>dense_h_to_4h", "query_key_value>dense"),
    ),
    "norms without weights": ("Olmo", COMMON, ("v_proj>o_proj", "up_proj>down_proj")),
}


def built(kind: str) -> nn.Module:
    stem, settings, _ = KINDS[kind]
    torch.manual_seed(0)
    name = "Gemma3Text" if stem == "Gemma3" else stem
    experts = settings.get("experts_implementation")
    given = {key: value for key, value in settings.items() if key != "experts_implementation"}
    config = getattr(transformers, f"{name}Config")(vocab_size=300, bos_token_id=0, eos_token_id=0, **given)
    if experts:
        config._experts_implementation = experts
    model = getattr(transformers, "GPT2LMHeadModel" if stem == "GPT2" else f"{stem}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms among them
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.double().eval()  # type: ignore[no-any-return]


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(IDS).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", KINDS)
def test_a_folded_model_computes_the_same(kind: str) -> None:
    model = built(kind)
    exact, shown, weights = logits(model), [], {n: p.clone() for n, p in model.named_parameters()}
    with layerwise(model, [IDS]) as steps:
        for step in steps:
            folds = find_folds(step, list(step.linears))
            for found in folds.found:
                readers = ",".join(steps.names[r].split(".")[-1] for r in found.readers)
                shown.append(f"{steps.names[found.source].split('.')[-1]}>{readers}")
                generator = torch.Generator().manual_seed(len(shown))
                fold(found, 0.3 + 2 * torch.rand(len(found.rows), generator=generator, dtype=torch.float64))
    assert sorted(shown) == sorted(2 * KINDS[kind][2])
    assert sum(not torch.equal(weights[n], p) for n, p in model.named_parameters()) >= 2 * len(KINDS[kind][2])
    # Norms of transformers compute in float32.
    assert float((logits(model) - exact).abs().max()) < 1e-6 * float(exact.abs().max())


def reasons(model: nn.Module, index: int = 0) -> dict[str, str]:
    """Why linear modules of a layer are in no fold, by the last part of their names."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with layerwise(model, [IDS[:, :7]]) as steps:
        for step in steps:
            if step.index == index:
                found = {
                    steps.names[m].split(".")[-1]: w for m, w in find_folds(step, list(step.linears)).reasons.items()
                }
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())  # as they were
    return found


def test_what_is_not_linear_in_between_is_told() -> None:
    assert "does not scale with what transformer.h.0.mlp.c_fc gives" in reasons(built("transposed"))["c_proj"]
    found = reasons(built("norms without weights"))
    assert found.keys() == {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}
    assert found["q_proj"] == "nothing before it gives its channels one by one"


def test_other_readers_of_a_norm_are_noticed() -> None:
    model = llama(spread=0.2)
    layer = model.model.layers[0]
    gate = nn.Parameter(torch.randn(128))  # as the router of a mixture of experts, in a module of its own

    def gated(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        return output * (args[0] @ gate).sigmoid()[..., None]

    layer.mlp.register_forward_hook(gated)
    found = reasons(model)
    assert found.keys() == {"gate_proj", "up_proj"}
    assert found["up_proj"] == "something else reads what model.layers.0.post_attention_layernorm gives"


def test_weights_that_are_shared_or_quantized_are_not_scaled() -> None:
    model = llama(spread=0.2)
    first, second = model.model.layers
    second.mlp.up_proj.weight = first.mlp.up_proj.weight
    second.input_layernorm = first.input_layernorm
    found = reasons(model)
    assert "model.layers.1.mlp.up_proj shares a weight" in found["gate_proj"] == found["up_proj"] == found["down_proj"]
    quantize_(model, {"model.layers.0.self_attn.v_proj": "int8"})
    assert "v_proj is quantized already" in reasons(model)["q_proj"]


def test_parametrized_weights_are_not_scaled() -> None:
    model = llama(spread=0.2)
    nn.utils.parametrizations.weight_norm(model.model.layers[0].mlp.up_proj)
    with layerwise(model, [IDS]) as steps:
        (step, *_) = steps
        found = find_folds(step, list(step.linears)).reasons
    assert {why for m, why in found.items() if "up_proj" in steps.names[m]} == {
        "model.layers.0.mlp.up_proj has a weight that is computed"
    }


def test_a_norm_in_bfloat16_loses_nothing() -> None:
    for kind, form in (("llama", Form.SCALE), ("norms of 1 + weight", Form.ONE_PLUS)):
        model = built(kind).bfloat16()
        one = float(form is Form.ONE_PLUS)
        with layerwise(model, [IDS]) as steps:
            (step, *_) = steps
            found = find_folds(step, [step.layer.self_attn.q_proj]).found[0]
            assert found.form is form and len(found.readers) == 3
            weight = found.source.weight
            assert isinstance(weight, Tensor)
            before, scales = weight.float() + one, torch.rand(64) * 8 + 0.1
            taken = fold(found, scales)
        torch.testing.assert_close((weight.float() + one) * taken, before, rtol=1e-6, atol=0)
        torch.testing.assert_close(taken, scales, rtol=0.1, atol=0)
