"""passes/shrink_experts.py: every expert loses channels of its own, exactly, and products get smaller."""

import copy
from collections.abc import Callable

import pytest
import torch
import transformers.integrations.moe  # noqa: F401  (registers the grouped product)
from expecttest import assert_expected_inline
from torch import Tensor, nn

import llmcomp
from llmcomp.masks import release
from llmcomp.report import GraphReport
from tests.test_unit_blocks import IDS, MODELS
from tests.zeros import pruned

E, H, C = 3, 8, 64  # experts, hidden size, channels
X = torch.randn(7, H, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
ENDS = torch.tensor([2, 2, 7], dtype=torch.int32)
OF_ROWS = torch.tensor([0, 0, 2, 2, 2, 2, 2])
GROUPED = torch.ops.transformers.grouped_mm_fallback
Gate = Callable[[Tensor], Tensor]


def halves(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    return nn.functional.silu(gate) * up


class Experts(nn.Module):
    """down(gate(up(x))) of the expert of each row; weights are kept as (E, N, K), or (E, K, N) where `transposed`."""

    def __init__(self, gate: Gate = halves, transposed: bool = False, bias: bool = False, rows: int = 2 * C) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Parameter(torch.randn(E, *((H, rows) if transposed else (rows, H)), dtype=torch.float64))
        self.down = nn.Parameter(torch.randn(E, *((C, H) if transposed else (H, C)), dtype=torch.float64))
        self.bias = nn.Parameter(torch.randn(E, rows, dtype=torch.float64)) if bias else None
        self.gate, self.transposed = gate, transposed

    def forward(self, x: Tensor, ends: Tensor, of_rows: Tensor) -> Tensor:
        return self.last(self.first(x, ends, of_rows), ends)

    def first(self, x: Tensor, ends: Tensor, of_rows: Tensor) -> Tensor:
        made = GROUPED(x, self.up if self.transposed else self.up.mT, ends)
        return self.gate(made if self.bias is None else made + self.bias[of_rows])

    def last(self, x: Tensor, ends: Tensor) -> Tensor:
        result: Tensor = GROUPED(x, self.down if self.transposed else self.down.mT, ends)
        return result

    def drop(self, *channels: slice) -> "Experts":
        """Set channels of the experts, one after the other, to zero where they are read."""
        with torch.no_grad():
            for matrix, some in zip(self.down, channels, strict=True):
                (matrix if self.transposed else matrix.t())[some] = 0
        return self


DROPPED = slice(0, 20), slice(30, 62), slice(3, 24)


def test_channels_of_a_gated_expert() -> None:
    printed, report, parts = pruned(Experts().drop(*DROPPED), (X, ENDS, OF_ROWS))
    assert report.rewrites == 1 and not report.near_misses and len(parts.checks) == 1 and len(parts.pieces) == 2
    assert report.savings[0].rewrite == "channels of experts" and report.savings[0].flops > 0
    assert report.savings[0].weight_bytes == 3 * (3 * 16 * H) * 8  # 48 of 64 channels stay
    assert_expected_inline(
        printed,
        """\
constant: i64[288] = self.kept_0
view: i64[3, 96, 1] = aten.view(constant, [3, 96, 1])
take_along_dim: f64[3, 96, 8] = aten.take_along_dim(w0, view, 1)
transpose: f64[3, 8, 96] = aten.transpose(take_along_dim, 1, 2)
grouped_linear: f64[7, 96] = llmcomp.grouped_linear(x0, transpose, x1, True)
slice: f64[7, 48] = aten.slice(grouped_linear, 1, 0, 48)
slice_1: f64[7, 48] = aten.slice(grouped_linear, 1, 48, 96)
gated: f64[7, 48] = llmcomp.gated(slice_1, slice, 'silu')
constant_1: i64[144] = self.kept_1
view_1: i64[3, 1, 48] = aten.view(constant_1, [3, 1, 48])
take_along_dim_1: f64[3, 8, 48] = aten.take_along_dim(w1, view_1, 2)
transpose_1: f64[3, 48, 8] = aten.transpose(take_along_dim_1, 1, 2)
grouped_linear_1: f64[7, 8] = llmcomp.grouped_linear(gated, transpose_1, x1, True)
return (grouped_linear_1)""",
    )


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "gate,rows",
    [
        (halves, 2 * C),
        (lambda x: torch.tanh(x[..., ::2]) * (x[..., 1::2].clamp(-1, 1) + 1), 2 * C),
        (lambda x: nn.functional.gelu(x), C),
        (lambda x: x, C),
        (lambda x: x[..., C:], 2 * C),
    ],
    ids=["halves", "one after the other", "no gate", "nothing between", "the rest unread"],
)
def test_forms(gate: Gate, rows: int, bias: bool, transposed: bool) -> None:
    printed, report, _ = pruned(Experts(gate, transposed, bias, rows).drop(*DROPPED), (X, ENDS, OF_ROWS))
    assert report.rewrites == 1, report
    assert printed.count("= llmcomp.grouped_linear") == 2 and "f64[7, 64]" not in printed


def test_rows_may_be_symbolic() -> None:
    _, report, _ = pruned(Experts(bias=True).drop(*DROPPED), (X, ENDS, OF_ROWS), dynamic=True)
    assert report.rewrites == 1


# ---- what is left alone ---------------------------------------------------------------------------------------------


def reason(fn: Callable[..., object]) -> str:
    _, report, _ = pruned(fn, (X, ENDS, OF_ROWS))
    assert report.rewrites == 0
    return report.near_misses[0].reason


def test_one_expert_that_needs_all() -> None:
    assert "0 of the 64 channels of every expert do not count: too few" in reason(
        Experts().drop(slice(0, 0), *DROPPED[1:])
    )


def test_dense_experts() -> None:
    assert not pruned(Experts(), (X, ENDS, OF_ROWS))[1].near_misses


@pytest.mark.parametrize(
    "gate,rows,says",
    [
        (lambda x: x.softmax(-1), C, "softmax is not computed channel by channel"),
        (lambda x: x * torch.arange(64.0, dtype=torch.float64), C, "reads a vector of channels"),
        (lambda x: X.repeat(1, 8), C, "not computed channel by channel"),
        (lambda x: x[..., :C] * GROUPED(X, torch.ones(E, H, C, dtype=torch.float64), ENDS), 2 * C, "two products"),
    ],
)
def test_what_lies_between(gate: Gate, rows: int, says: str) -> None:
    assert says in reason(Experts(gate, rows=rows).drop(*DROPPED))


def test_channels_that_somebody_else_reads() -> None:
    model = Experts().drop(*DROPPED)

    def both(x: Tensor, ends: Tensor, of_rows: Tensor) -> tuple[Tensor, Tensor]:
        hidden = model.first(x, ends, of_rows)
        return model.last(hidden, ends), hidden

    def summed(x: Tensor, ends: Tensor, of_rows: Tensor) -> Tensor:
        made = GROUPED(x, model.up.mT, ends)
        return model.last(halves(made), ends) + made.sum(-1, keepdim=True)

    assert "it is returned" in reason(both) and "reads them" in reason(summed)


# ---- compiled -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MODELS)
def test_models_compiled(kind: str, graphs: list[GraphReport]) -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = MODELS[kind]().eval()
    original = copy.deepcopy(model.state_dict())
    llmcomp.prune_(model, llmcomp.Structured(channels=0.34))
    expected = model(IDS, use_cache=False).logits
    compiled = torch.compile(model, backend="llmcomp")
    with torch.no_grad():
        torch.testing.assert_close(compiled(IDS, use_cache=False).logits, expected, rtol=1e-4, atol=1e-5)
        reports = [r.report for g in graphs for r in g.passes if r.name == "prune"]
        assert "channels of experts" in {saving.rewrite for report in reports for saving in report.savings}
        release(model)
        model.load_state_dict(original)  # without zeros: all channels count again
        dense = copy.deepcopy(model)(IDS, use_cache=False).logits
        torch.testing.assert_close(compiled(IDS, use_cache=False).logits, dense, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(dense, expected, rtol=1e-3)
