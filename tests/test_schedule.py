"""The kernels of a decode step, pinned for one layer of each kind of model."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    StaticCache,
)

from llmcomp.codegen.fit import Lowerer
from llmcomp.passes import pipeline
from llmcomp.passes.base import run_passes
from llmcomp.passes.facts import SHAPES
from llmcomp.passes.partition import read_partition
from llmcomp.quantization import quantize_
from llmcomp.target import Target
from tests.graphs import capture

SMALL = dict(
    vocab_size=64,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=48,
)


def layer(gm: torch.fx.GraphModule) -> list[str]:
    """What each kernel from the first attention to the second computes: family and operators."""
    lowerer = Lowerer()
    run_passes(gm, pipeline(Target("cpp", "cpu"), lowerer.fits), frozenset({SHAPES}))
    found = read_partition(gm.graph)
    launches = [
        f"{r.family} {lowerer.lower(r, found.inlined).kernel.name}" for r in found.regions if r.family != "extern"
    ]
    first, second = [i for i, text in enumerate(launches) if text.startswith("attend")][:2]
    # The position of the cache and the mask of the other layers, which all layers share, run beside the layer.
    return [text for text in launches[first:second] if text not in ("map add", "map add_copy", "map le_where")]


def decode(model: PreTrainedModel, config: PretrainedConfig) -> list[str]:
    cache = StaticCache(config=config, max_cache_len=16)
    with torch.no_grad():
        model(torch.zeros(1, 3, dtype=torch.long), past_key_values=cache, use_cache=True)
        step = torch.ones(1, 1, dtype=torch.long)
        return layer(capture(lambda ids: model(ids, past_key_values=cache, use_cache=True).logits, step))


@pytest.mark.parametrize(
    ("config", "kernels"),
    [
        (
            LlamaConfig(**SMALL),
            [
                "attend attention",
                "contract linear_add",
                "contract rms_norm_linear_gated",
                "contract linear_add",
                "contract rms_norm_linear_rope_cache_write",
            ],
        ),
        (
            GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64),
            [
                "attend attention",
                "contract linear_add",
                "contract layer_norm_linear_gelu",
                "contract linear_add",
                "contract layer_norm_linear_cache_write",
            ],
        ),
        (
            Gemma2Config(**SMALL, head_dim=8, attn_implementation="eager"),
            [
                "attend attention",
                "contract linear",
                "rows rms_norm_add",
                "contract rms_norm_linear_gated",
                "contract linear",
                "rows rms_norm_add",
                "contract rms_norm_linear_rope_cache_write",
            ],
        ),
    ],
    ids=["llama", "gpt2", "gemma2"],
)
def test_a_decode_step_of_a_layer(config: PretrainedConfig, kernels: list[str]) -> None:
    torch.manual_seed(0)
    assert decode(AutoModelForCausalLM.from_config(config).eval(), config) == kernels


@pytest.mark.parametrize(
    "name", ["int8", *(pytest.param(n, marks=pytest.mark.slow) for n in ("fp8", "int8_dynamic", "fp8_dynamic"))]
)
def test_quantized_weights_take_no_more_kernels(name: str) -> None:
    config = LlamaConfig(**SMALL)
    model = AutoModelForCausalLM.from_config(config).eval()
    quantize_(model, name)
    assert decode(model, config) == [
        "attend attention",
        "contract packed_linear_add",
        "contract rms_norm_packed_linear_gated",
        "contract packed_linear_add",
        "contract rms_norm_packed_linear_rope_cache_write",
    ]


def test_an_encoder_layer_of_few_rows() -> None:
    config = BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
    model = BertModel(config).eval()
    with torch.no_grad():
        assert layer(capture(lambda ids: model(ids)[0], torch.zeros(1, 5, dtype=torch.long))) == [
            "attend attention",
            "contract linear_add",
            "rows layer_norm",
            "contract linear_gelu",
            "contract linear_add",
            "rows layer_norm",
            "contract linear",
        ]
