"""recognize_norm: the norms of transformers become rms_norm and layer_norm, and nothing else does."""

from collections.abc import Callable

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, nn
from transformers.models.cohere.modeling_cohere import CohereLayerNorm
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4UnweightedRMSNorm
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.gemma3n.modeling_gemma3n import Gemma3nRMSNorm
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.llama4.modeling_llama4 import Llama4TextL2Norm
from transformers.models.nemotron.modeling_nemotron import NemotronLayerNorm1P
from transformers.models.olmo.modeling_olmo import OlmoLayerNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

from llmcomp.passes.base import PassResult
from llmcomp.passes.canonicalize import CANONICALIZE
from llmcomp.passes.recognize_norm import RECOGNIZE_NORM
from llmcomp.passes.share import SHARE
from tests.graphs import Function, rewrite

PASSES = (CANONICALIZE, SHARE, RECOGNIZE_NORM)
N = 16


class WrittenLayerNorm(nn.Module):
    def __init__(self, n: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(n)), nn.Parameter(torch.zeros(n))

    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        centred = h - h.mean(-1, keepdim=True)
        scaled = centred / torch.sqrt(centred.pow(2).mean(-1, keepdim=True) + 1e-5)
        return (self.weight * scaled + self.bias).to(x.dtype)


class VarianceLayerNorm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        scale = torch.rsqrt(h.var(-1, keepdim=True, unbiased=False) + 1e-5)
        return ((h - h.mean(-1, keepdim=True)) * scale).to(x.dtype)


# What each becomes in bfloat16: the arguments after the tensor.
MODULES: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "llama": (lambda: LlamaRMSNorm(N, eps=1e-5), "rms_norm(x0, w0, 1e-05, False, True)"),
    "t5": (lambda: T5LayerNorm(N, eps=1e-5), "rms_norm(x0, w0, 1e-05, False, True)"),
    "gpt_oss": (lambda: GptOssRMSNorm(N, eps=1e-5), "rms_norm(x0, w0, 1e-05, False, False)"),
    "gemma": (lambda: GemmaRMSNorm(N, eps=1e-5), "rms_norm(x0, w0, 1e-05, True, False)"),
    "gemma3n": (lambda: Gemma3nRMSNorm(N, eps=1e-5), "rms_norm(x0, w0, 1e-05, False, False)"),
    "olmo2": (lambda: Olmo2RMSNorm(N, eps=1e-5), "rms_norm(x0, w0, 1e-05, False, False)"),
    "torch_rms": (lambda: nn.RMSNorm(N, eps=2**-16), "rms_norm(x0, w0, 1.52587890625e-05, False, False)"),
    "torch_rms_bare": (
        lambda: nn.RMSNorm(N, eps=2**-16, elementwise_affine=False),
        "rms_norm(x0, None, 1.52587890625e-05, False, False)",
    ),
    "llama4": (lambda: Llama4TextL2Norm(eps=1e-5), "rms_norm(x0, None, 1e-05, False, False)"),
    "deepseek_v4": (lambda: DeepseekV4UnweightedRMSNorm(1e-5), "rms_norm(x0, None, 1e-05, False, False)"),
    "torch_layer": (lambda: nn.LayerNorm(N), "layer_norm(x0, w0, w1, 1e-05)"),
    "torch_layer_bare": (
        lambda: nn.LayerNorm(N, elementwise_affine=False),
        "layer_norm(x0, None, None, 1e-05)",
    ),
    "olmo": (lambda: OlmoLayerNorm(N), "layer_norm(x0, None, None, 1e-05)"),
    "cohere": (lambda: CohereLayerNorm(N, eps=1e-5), "layer_norm(x0, w0, None, 1e-05)"),
    "nemotron": (lambda: NemotronLayerNorm1P(N), "layer_norm(x0, add, w1, 1e-05)"),
    "written": (lambda: WrittenLayerNorm(N), "layer_norm(x0, w0, w1, 1e-05)"),
    "variance": (lambda: VarianceLayerNorm(), "layer_norm(x0, None, None, 1e-05)"),
}


def stirred(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.3)
    return module


def recognized(fn: Function, *inputs: Tensor, dynamic: bool | None = None) -> tuple[str, PassResult]:
    printed, results = rewrite(fn, inputs, *PASSES, dynamic=dynamic)
    return printed, results[-1]


@pytest.mark.parametrize("name", MODULES)
def test_norms_of_transformers(name: str) -> None:
    build, expected = MODULES[name]
    module = stirred(build())
    x = torch.randn(2, 3, N, generator=torch.Generator().manual_seed(0))
    # In float32 there is nothing to round, and no weight is rounded first.
    printed, _ = recognized(lambda x: module(x), x)
    assert printed.count("norm: f32") == 1 and ", True)" not in printed.replace("05, True, False)", "")
    module = module.to(torch.bfloat16)
    printed, result = recognized(lambda x: module(x), x.to(torch.bfloat16))
    assert f"llmcomp.{expected}" in printed, printed
    assert result.report.rewrites == 1 and not result.report.near_misses
    extra = 1 if name == "nemotron" else 0
    assert len(printed.splitlines()) == 3 + extra, printed


def test_llama_before_and_after() -> None:
    module = LlamaRMSNorm(N).to(torch.bfloat16)
    printed, _ = recognized(lambda x: module(x).sin(), torch.randn(2, 3, N).to(torch.bfloat16), dynamic=True)
    assert_expected_inline(
        printed,
        """\
def (x0: s0, x1: s1, x2: bf16[s0, s1, 16], w0: bf16[16])
rms_norm: bf16[s0, s1, 16] = llmcomp.rms_norm(x2, w0, 1e-06, False, True)
sin: bf16[s0, s1, 16] = aten.sin(rms_norm)
return (sin)""",
    )


def test_gated_norm_leaves_its_casts_where_they_are() -> None:
    """As in Mamba-2: the gate is applied in float32, the weight after rounding to the dtype of the input."""
    weight = torch.randn(N).to(torch.bfloat16)

    def fn(x: Tensor, gate: Tensor) -> Tensor:
        h = x.float() * torch.nn.functional.silu(gate.float())
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5)
        return weight * h.to(x.dtype)

    x, gate = (torch.randn(3, N).to(torch.bfloat16) for _ in range(2))
    printed, _ = recognized(fn, x, gate)
    assert_expected_inline(
        printed,
        """\
def (x0: bf16[3, 16], x1: bf16[3, 16], x2: bf16[16])
_to_copy: f32[3, 16] = aten._to_copy(x0, dtype=f32)
_to_copy_1: f32[3, 16] = aten._to_copy(x1, dtype=f32)
silu: f32[3, 16] = aten.silu(_to_copy_1)
mul: f32[3, 16] = aten.mul(_to_copy, silu)
rms_norm: bf16[3, 16] = llmcomp.rms_norm(mul, x2, 1e-05, False, True, bf16)
return (rms_norm)""",
    )


def test_weight_of_another_shape_or_dtype_stays_outside() -> None:
    per_head, wide = torch.randn(3, N), torch.randn(N)

    def fn(x: Tensor) -> tuple[Tensor, Tensor]:
        h = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5)
        g = x.float()
        g = (g / torch.sqrt(g.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)
        return h * per_head, g * wide

    # Eager rounds the square and its mean to bfloat16, which shows in the float32 result.
    printed, results = rewrite(fn, (torch.randn(2, 3, N).to(torch.bfloat16),), *PASSES, rtol=2e-2)
    assert results[-1].report.rewrites == 2 and printed.count("aten.mul(") == 2
    assert printed.count("None, 1e-0") == 2


def test_norm_of_a_sum_of_squares_is_scaled() -> None:
    def fn(x: Tensor) -> Tensor:
        return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6)

    for dtype in (torch.float32, torch.bfloat16):
        printed, _ = recognized(fn, torch.randn(2, 3, N).to(dtype), dynamic=None)
    assert_expected_inline(
        printed,
        """\
def (x0: bf16[2, 3, 16])
rms_norm: f32[2, 3, 16] = llmcomp.rms_norm(x0, None, 6.25e-08, False, False, f32)
mul: f32[2, 3, 16] = aten.mul(rms_norm, 0.25)
_to_copy: bf16[2, 3, 16] = aten._to_copy(mul, dtype=bf16)
return (_to_copy)""",
    )


def test_heads_in_any_memory_order() -> None:
    module = stirred(LlamaRMSNorm(8))

    def fn(x: Tensor) -> Tensor:
        return module(x.view(2, 5, 4, 8).transpose(1, 2)).transpose(1, 2).view(2, 5, 32)

    assert recognized(fn, torch.randn(2, 5, 32))[1].report.rewrites == 1


def test_near_misses_say_why() -> None:
    def other_axis(x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-6)

    def second_user(x: Tensor) -> tuple[Tensor, Tensor]:
        root = torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
        return x * root, root

    def other_value(x: Tensor) -> Tensor:
        return x.exp() * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)

    def unknown_length(x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)

    x = torch.randn(2, 3, N)
    reasons = {
        fn: [miss.reason for miss in recognized(fn, x, dynamic=fn is unknown_length)[1].report.near_misses]
        for fn in (other_axis, second_user, other_value, unknown_length)
    }
    assert reasons == {
        other_axis: ["the mean is not over the last axis"],
        second_user: ["rsqrt has another user"],
        other_value: ["what is normalized is not what the mean is taken of"],
        unknown_length: ["the vector is of a length that is not known"],
    }


def test_statistics_that_are_read_keep_the_operator() -> None:
    def fn(x: Tensor) -> tuple[Tensor, ...]:
        return torch.native_layer_norm(x, [N], None, None, 1e-5)

    printed, result = recognized(fn, torch.randn(3, N))
    assert "llmcomp" not in printed
    assert [m.reason for m in result.report.near_misses] == ["the mean or the deviation is read too"]


def test_norms_over_two_axes_stay() -> None:
    printed, _ = recognized(nn.LayerNorm([3, N]), torch.randn(2, 3, N))
    assert "native_layer_norm" in printed
