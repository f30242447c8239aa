"""recognize_gated: activation(gate) * up becomes llmcomp.gated."""

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import Tensor, nn
from transformers import LlamaConfig, Phi3Config
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.phi3.modeling_phi3 import Phi3MLP

from llmcomp.passes.canonicalize import CANONICALIZE
from llmcomp.passes.recognize_activation import RECOGNIZE_ACTIVATION
from llmcomp.passes.recognize_gated import RECOGNIZE_GATED
from llmcomp.passes.recognize_linear import RECOGNIZE_LINEAR
from tests.graphs import rewrite

PASSES = (RECOGNIZE_LINEAR, CANONICALIZE, RECOGNIZE_ACTIVATION, RECOGNIZE_GATED)
SIZES = {"hidden_size": 8, "intermediate_size": 12, "vocab_size": 9, "pad_token_id": 0, "num_attention_heads": 2}

# Activations of transformers configs, and what they are called here.
NAMES = {
    "silu": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "relu2": "relu2",
    "sigmoid": "sigmoid",
    "tanh": "tanh",
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_activations_of_transformers(name: str, dtype: torch.dtype) -> None:
    mlp = LlamaMLP(LlamaConfig(**SIZES, hidden_act=name)).to(dtype)
    printed, results = rewrite(
        lambda x: mlp(x), (torch.randn(2, 3, 8).to(dtype),), *PASSES, rtol=1e-6 if dtype == torch.float32 else 2e-2
    )
    assert f"llmcomp.gated(linear, linear_1, '{NAMES[name]}')" in printed, printed
    assert len(printed.splitlines()) == 6 and results[-1].report.rewrites == 1


def test_one_linear_layer_for_both() -> None:
    mlp = Phi3MLP(Phi3Config(**SIZES))
    printed, _ = rewrite(lambda x: mlp(x), (torch.randn(2, 3, 8),), *PASSES, dynamic=True)
    assert_expected_inline(
        printed,
        """\
def (w0: f32[24, 8], x0: s0, x1: s1, x2: f32[s0, s1, 8], w1: f32[8, 12])
linear: f32[s0, s1, 24] = llmcomp.linear(x2, w0, None, False)
split = aten.split(linear, 12, -1)
getitem: f32[s0, s1, 12] = getitem(split, 0)
getitem_1: f32[s0, s1, 12] = getitem(split, 1)
gated: f32[s0, s1, 12] = llmcomp.gated(getitem, getitem_1, 'silu')
linear_1: f32[s0, s1, 8] = llmcomp.linear(gated, w1, None, False)
return (linear_1)""",
    )


def test_the_gate_may_come_second() -> None:
    printed, _ = rewrite(lambda x, y: (x + 1) * F.silu(y), (torch.randn(3, 4), torch.randn(3, 4)), *PASSES)
    assert "llmcomp.gated(x1, add, 'silu')" in printed


def test_near_misses_say_why() -> None:
    def fn(x: Tensor, row: Tensor, wide: Tensor) -> tuple[Tensor, ...]:
        opened = F.silu(x)
        return opened * (x + 1), opened, F.gelu(x) * row, torch.sigmoid(x) * wide

    inputs = torch.randn(3, 4), torch.randn(4), torch.randn(3, 4).double()
    printed, results = rewrite(fn, inputs, *PASSES)
    assert "llmcomp" not in printed
    assert [miss.reason for miss in results[-1].report.near_misses] == [
        "arg0_1 is torch.float32 and arg2_1 is torch.float64",
        "arg0_1 and arg1_1 differ in shape",
        "the activation silu has another user",
    ]


def test_activations_alone_are_no_gate() -> None:
    def fn(x: Tensor) -> tuple[Tensor, ...]:
        r = F.relu(x)
        return (
            r * r,
            F.silu(x),
            x * torch.sigmoid(x),
            x * torch.sigmoid(1.702 * x),
            torch.tanh(x) * 30.0,
            F.elu(x) * (x + 1),
        )

    assert "llmcomp" not in rewrite(fn, (torch.randn(3, 4),), *PASSES)[0]


def test_names_are_those_of_transformers() -> None:
    x = torch.linspace(-3, 3, 31)
    up = torch.ones(31)
    for config, name in NAMES.items():
        module = ACT2FN[config]
        assert isinstance(module, nn.Module)
        torch.testing.assert_close(torch.ops.llmcomp.gated(x, up, name), module(x), rtol=1e-6, atol=1e-6)
