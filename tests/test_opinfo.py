"""Operators and modules of PyTorch's own database give eager's result, or eager's error."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.checks import CountingBackend
from tests.opinfo import Compiler, OpCase, Result, Sample, judge, module_cases, op_cases, run, spread
from tests.opinfo_sweep import Store, print_summary, spawn

# Operators that language models are made of.
OPERATORS = """
    add sub mul div.no_rounding_mode pow neg abs exp log sqrt rsqrt reciprocal sin cos tanh sigmoid erf clamp
    maximum minimum where masked_fill eq lt logical_not nn.functional.relu nn.functional.silu
    nn.functional.gelu nn.functional.softplus softmax log_softmax sum mean var amax argmax cumsum
    mm bmm matmul addmm baddbmm einsum nn.functional.linear nn.functional.embedding
    nn.functional.layer_norm nn.functional.rms_norm nn.functional.scaled_dot_product_attention
    cat stack split chunk expand repeat_interleave transpose permute view reshape unsqueeze
    index_select gather index_put index_copy scatter_add topk sort tril triu arange unfold nn.functional.conv1d
""".split()
MODULES = ("nn.Linear", "nn.Embedding", "nn.LayerNorm", "nn.RMSNorm", "nn.MultiheadAttention")
SAMPLES = 2


@pytest.fixture(scope="module")
def cases() -> dict[str, OpCase]:
    return op_cases() | module_cases()


@pytest.mark.parametrize("name", (*OPERATORS, *MODULES))
def test_operator_equals_eager(cases: dict[str, OpCase], name: str) -> None:
    result = run(cases[name], "llmcomp", limit=SAMPLES)
    assert not result.failures, "\n".join(result.failures)
    assert result.verdicts.keys() & {"equal", "raises", "traced"}, "no sample had a graph"


@pytest.mark.sweep
@pytest.mark.parametrize("shard", range(64))
def test_every_operator_and_module(shard: int) -> None:
    names = sorted(op_cases() | module_cases())[shard::64]
    assert print_summary(spawn(names, "llmcomp", 0, 3600.0)) == 0


def test_the_database_is_whole(cases: dict[str, OpCase]) -> None:
    assert len(cases) > 780


class Changed(Compiler):
    """A backend that computes something else."""

    def __init__(self, changed: Callable[..., Any]) -> None:
        self.counting = CountingBackend("changed", calls=1)
        self.past = []
        self.changed = changed

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return self.changed


def fail(x: Tensor) -> Tensor:
    raise ValueError("no")


@pytest.mark.parametrize(
    ("right", "changed", "verdict", "detail"),
    [
        (torch.neg, lambda x: -x + 1e-3, "wrong", "not close"),
        (torch.neg, lambda x: (-x).double(), "wrong", "dtype"),
        (torch.neg, lambda x: (-x).t().contiguous().t(), "wrong", "strides"),
        (torch.neg, lambda x: (-x, -x), "wrong", "2 outputs"),
        (torch.neg, lambda x: x.neg_(), "wrong", "not close"),
        (lambda x: x.view(6), lambda x: x.clone().view(6), "wrong", "aliases"),
        (lambda x: x.add_(1), lambda x: x + 1, "wrong", "not close"),
        (torch.neg, fail, "error", "ValueError: no"),
        (fail, torch.neg, "silent", "eager raises ValueError: no"),
        (fail, fail, "raises", ""),
        (torch.neg, torch.neg, "eager", ""),
        (torch.rand_like, lambda x: torch.rand_like(x) * 0.5, "random", ""),
        (torch.rand_like, lambda x: torch.rand_like(x[0]), "wrong", "shape"),
        (torch.empty_like, lambda x: x + 1e9, "random", ""),
    ],
)
def test_judge(right: Callable[..., Any], changed: Callable[..., Any], verdict: str, detail: str) -> None:
    found, said = judge(right, Sample((torch.randn(2, 3),), {}), Changed(changed))
    assert found == verdict and detail in said, said


def test_spread_covers_all() -> None:
    assert spread(range(10), 3) == [1, 5, 8]
    assert spread([1, 2], 3) == [1, 2]


def test_the_store_resumes(tmp_path: Path) -> None:
    path = tmp_path / "ops.json"
    Store(path).add([Result("a", Counter(equal=3)), Result("b", Counter(wrong=1), ["wrong #0"])])
    assert Store(path).missing(["a", "b", "c"], again=False) == ["c"]
    assert Store(path).missing(["a", "b", "c"], again=True) == ["b", "c"]
    assert print_summary(Store(path).results.values()) == 1
