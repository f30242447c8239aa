"""recognize_activation: formulas are recognized by what they compute, in whatever order they are written."""

import math

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor

from llmcomp.passes.canonicalize import CANONICALIZE
from llmcomp.passes.recognize_activation import RECOGNIZE_ACTIVATION
from tests.graphs import Function, rewrite

PASSES = (CANONICALIZE, RECOGNIZE_ACTIVATION)
C = math.sqrt(2 / math.pi)

SPELLINGS: dict[str, tuple[Function, str]] = {
    "gpt2": (lambda x: 0.5 * x * (1 + torch.tanh(C * (x + 0.044715 * torch.pow(x, 3)))), "gelu tanh"),
    "fast": (lambda x: 0.5 * x * (1 + torch.tanh(x * 0.7978845608 * (1 + 0.044715 * x * x))), "gelu tanh"),
    "bloom": (lambda x: x * 0.5 * (1 + torch.tanh(0.79788456 * x * (1 + 0.044715 * x * x))), "gelu tanh"),
    "sigmoid_of_twice": (lambda x: x * torch.sigmoid(2 * C * (x + 0.044715 * x**3)), "gelu tanh"),
    "erf": (lambda x: x * 0.5 * (1 + torch.erf(x / math.sqrt(2))), "gelu"),
    "swish": (lambda x: torch.sigmoid(x) * x, "silu"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings(name: str, dtype: torch.dtype) -> None:
    fn, expected = SPELLINGS[name]
    x = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    rtol = 1e-6 if dtype == torch.float32 else 2e-2
    # The input is itself arithmetic: where the formula begins has to be found.
    printed, results = rewrite(lambda x: fn(x + 1).sin(), (x,), *PASSES, rtol=rtol)
    assert results[-1].report.rewrites == 1
    call = {
        "gelu tanh": "aten.gelu(add, approximate='tanh')",
        "gelu": "aten.gelu(add)",
        "silu": "aten.silu(add)",
    }[expected]
    assert [line.partition(" = ")[2] for line in printed.splitlines()[1:-1]] == [
        "aten.add(x0, 1)",
        call,
        f"aten.sin({call[5:9]})",
    ]


def test_before_and_after() -> None:
    fn = SPELLINGS["gpt2"][0]
    printed, _ = rewrite(lambda x: fn(x).exp(), (torch.randn(2, 3),), *PASSES, dynamic=True)
    assert_expected_inline(
        printed,
        """\
def (x0: s0, x1: s1, x2: f32[s0, s1])
gelu: f32[s0, s1] = aten.gelu(x2, approximate='tanh')
exp: f32[s0, s1] = aten.exp(gelu)
return (exp)""",
    )


def test_computed_in_float32() -> None:
    fn = SPELLINGS["erf"][0]
    printed, _ = rewrite(lambda x: fn(x.float()).to(x.dtype), (torch.randn(8).to(torch.bfloat16),), *PASSES)
    assert_expected_inline(
        printed,
        """\
def (x0: bf16[8])
_to_copy: f32[8] = aten._to_copy(x0, dtype=f32)
gelu: f32[8] = aten.gelu(_to_copy)
_to_copy_1: bf16[8] = aten._to_copy(gelu, dtype=bf16)
return (_to_copy_1)""",
    )


def test_other_formulas_stay() -> None:
    def fn(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        off = 0.5 * x * (1 + torch.tanh(0.8 * (x + 0.044715 * torch.pow(x, 3))))
        quick = x * torch.sigmoid(1.702 * x) + x * torch.sigmoid(x.int().float())
        return off, quick, y * torch.sigmoid(x), 30.0 * torch.tanh(x / 30.0), torch.erf(x) * 0.5 * (1 + x)

    _, (_, result) = rewrite(fn, (torch.randn(9), torch.randn(9)), *PASSES)
    assert result.report.rewrites == 0 and not result.report.near_misses


def test_a_value_that_something_else_reads_stays() -> None:
    def fn(x: Tensor) -> tuple[Tensor, Tensor]:
        gate = torch.sigmoid(x)
        return x * gate, gate.exp()

    assert rewrite(fn, (torch.randn(9),), *PASSES)[1][-1].report.rewrites == 0


def test_near_miss_says_why() -> None:
    _, (_, result) = rewrite(lambda x: x * torch.sigmoid(x.float()), (torch.randn(9).to(torch.bfloat16),), *PASSES)
    assert [miss.reason for miss in result.report.near_misses] == ["silu of torch.bfloat16 gives torch.float32"]
