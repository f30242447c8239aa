"""passes/prune.py: what is zero is neither read nor multiplied, exactly."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.utils.prune as torch_prune
from expecttest import assert_expected_inline
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from llmcomp.ops import ACTIVATIONS
from llmcomp.passes.zero_structure import VANISHING
from tests.quantizable import IDS, llama
from tests.zeros import Mlp, drop, pruned

X = torch.randn(2, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def mlp(bias: bool = False) -> Mlp:
    torch.manual_seed(0)
    return Mlp(bias=bias).double()


# ---- channels -------------------------------------------------------------------------------------------------------


def test_channels_of_an_mlp() -> None:
    model = mlp()
    drop(model, slice(10, 30))
    printed, report, parts = pruned(model, (X,))
    assert report.rewrites == 1 and len(parts.pieces) == 3 and not report.near_misses
    assert_expected_inline(
        printed,
        """\
constant: i64[48] = self.kept_0
index_select: f64[48, 32] = aten.index_select(w0, 0, constant)
linear: f64[2, 48] = llmcomp.linear(x0, index_select, None, False)
constant_1: i64[48] = self.kept_0
index_select_1: f64[48, 32] = aten.index_select(w1, 0, constant_1)
linear_1: f64[2, 48] = llmcomp.linear(x0, index_select_1, None, False)
gated: f64[2, 48] = llmcomp.gated(linear, linear_1, 'silu')
constant_2: i64[48] = self.kept_0
index_select_2: f64[32, 48] = aten.index_select(w2, 1, constant_2)
linear_2: f64[2, 32] = llmcomp.linear(gated, index_select_2, None, False)
add: f64[2, 32] = aten.add(x0, linear_2)
return (add)""",
    )


@pytest.mark.parametrize("which", ["down", "up", "gate"])
def test_one_side_is_enough(which: str) -> None:
    model = mlp()
    with torch.no_grad():
        (model.down.weight.t() if which == "down" else getattr(model, which).weight)[:32] = 0
    _, report, parts = pruned(model, (X,))
    assert report.rewrites == 1
    assert [tuple(p.gm(*(torch.zeros(64, 32),)).shape) for p in parts.pieces if p.key.count(", 0, ")] == [(32, 32)] * 2


def test_activations_that_are_zero_at_zero() -> None:
    zero = torch.zeros(1)
    assert {name for name, function in ACTIVATIONS.items() if float(function(zero)) == 0} == VANISHING


def test_a_bias_counts() -> None:
    model = mlp(bias=True)
    with torch.no_grad():
        model.up.weight[:32] = 0
    _, report, _ = pruned(model, (X,))
    assert report.rewrites == 0
    drop(model, slice(0, 32))
    assert pruned(model, (X,))[1].rewrites == 1


def test_sizes_may_be_symbolic_and_layers_transposed() -> None:
    torch.manual_seed(0)
    up, down = Conv1D(64, 32).double(), Conv1D(32, 64).double()
    with torch.no_grad():
        down.weight[5:40] = 0

    def fn(x: Tensor) -> Tensor:
        return down(nn.functional.gelu(up(x), approximate="tanh"))

    printed, report, _ = pruned(fn, (torch.randn(3, 32, dtype=torch.float64),), dynamic=True)
    assert report.rewrites == 1 and "gelu: f64[s0, 32]" in printed


def test_what_cannot_be_smaller_is_gathered() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(64, 8, bias=False).double()
    with torch.no_grad():
        layer.weight[:, :32] = 0

    def fn(x: Tensor) -> Tensor:
        return layer(nn.functional.softmax(x, -1))

    printed, report, _ = pruned(fn, (torch.randn(2, 64, dtype=torch.float64),))
    assert report.rewrites == 1
    assert_expected_inline(
        printed,
        """\
_softmax: f64[2, 64] = aten._softmax(x0, -1, False)
constant: i64[32] = self.kept_0
index_select: f64[2, 32] = aten.index_select(_softmax, -1, constant)
constant_1: i64[32] = self.kept_0
index_select_1: f64[8, 32] = aten.index_select(w0, 1, constant_1)
linear: f64[2, 8] = llmcomp.linear(index_select, index_select_1, None, False)
return (linear)""",
    )
    assert "not computed slice by slice" in report.near_misses[0].reason


def test_a_gather_that_does_not_pay() -> None:
    layer = nn.Linear(64, 600, bias=False).double()
    with torch.no_grad():
        layer.weight[:, :32] = 0
    x = torch.randn(2, 64, dtype=torch.float64)
    printed, report, _ = pruned(lambda x: layer(nn.functional.softmax(x, -1)), (x,), gathers=False)
    assert report.rewrites == 0 and "index_select" not in printed
    assert "to gather the 32 that count costs more" in report.near_misses[0].reason
    wide = nn.Linear(64, 1200, bias=False).double()
    with torch.no_grad():
        wide.weight[:, :32] = 0
    assert pruned(lambda x: wide(nn.functional.softmax(x, -1)), (x,), gathers=False)[1].rewrites == 1


def test_a_removed_channel_that_somebody_else_reads() -> None:
    model = mlp()
    drop(model, slice(0, 32))

    def fn(x: Tensor) -> tuple[Tensor, Tensor]:
        inner = nn.functional.silu(model.gate(x)) * model.up(x)
        return model.down(inner), inner.sum(-1)

    printed, report, _ = pruned(fn, (X,))
    assert "gated: f64[2, 64]" in printed
    assert "sum_1 reads all of it" in report.near_misses[0].reason


def test_siblings_must_agree() -> None:
    a, b = nn.Linear(64, 8).double(), nn.Linear(64, 8).double()
    with torch.no_grad():
        a.weight[:, :48] = 0
        b.weight[:, 40:] = 0
    x = torch.randn(2, 64, dtype=torch.float64)
    assert pruned(lambda x: (a(x.exp()), b(x.exp())), (x,))[1].rewrites == 0
    with torch.no_grad():
        b.weight[:, :48] = 0
    assert pruned(lambda x: (a(x.exp()), b(x.exp())), (x,))[1].rewrites == 2


def test_too_few_do_not_pay() -> None:
    model = mlp()
    drop(model, slice(3, 10))
    _, report, _ = pruned(model, (X,))
    assert report.rewrites == 0 and "too few to pay" in report.near_misses[0].reason


# ---- layers, masks --------------------------------------------------------------------------------------------------


def test_a_layer_that_adds_nothing() -> None:
    model = mlp()
    drop(model, slice(None))
    printed, report, parts = pruned(lambda x: model(x) * 2, (X,))
    assert report.rewrites == 1 and not parts.pieces and len(parts.checks) > 0
    assert_expected_inline(
        printed,
        """\
mul: f64[2, 32] = aten.mul(x0, 2)
return (mul)""",
    )


def test_a_whole_layer_of_a_decoder_goes() -> None:
    model = llama(tied=False).double()
    with torch.no_grad():
        first, _ = model.model.layers
        first.self_attn.o_proj.weight.zero_()
        first.mlp.down_proj.weight.zero_()
    printed, report, _ = pruned(lambda ids: model(ids, use_cache=False).logits, (IDS,))
    assert report.rewrites == 2 and printed.count("llmcomp.attention") == 1


def test_masks_of_torch_are_folded() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(32, 8).double()
    torch_prune.l1_unstructured(layer, "weight", 0.5)
    printed, report, parts = pruned(layer, (X,))
    assert report.rewrites == 1 and len(parts.pieces) == 1
    (piece,) = parts.pieces
    assert len(piece.positions) == 2 and "aten.mul" not in [str(n.target) for n in parts.main.graph.nodes]
    assert any("scattered" in miss.reason for miss in report.near_misses)
    assert_expected_inline(
        printed,
        """\
mul: f64[8, 32] = aten.mul(w0, w1)
linear: f64[2, 8] = llmcomp.linear(x0, mul, w2, False)
return (linear, mul)""",
    )


def test_folded_masks_show_their_structure() -> None:
    model = mlp()
    for layer, dim in ((model.down, 1), (model.up, 0)):
        torch_prune.ln_structured(layer, "weight", 0.5, n=2, dim=dim)
        mask = torch.ones_like(layer.weight)
        mask.narrow(dim, 0, 32).zero_()
        layer.weight_mask.copy_(mask)
    _, report, parts = pruned(model, (X,))
    assert report.rewrites == 3
    shapes = {tuple(n.meta["val"].shape) for n in parts.main.graph.nodes if n.name.startswith("prepared")}
    assert shapes == {(32, 32), (64, 32), (32, 64)}  # the layers keep the masked weights, so they are returned


class Masked(nn.Module):
    """A plain weight * mask."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 32, dtype=torch.float64))
        self.mask = mask

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight * self.mask)


def some() -> Tensor:
    return (torch.randn(8, 32, generator=torch.Generator().manual_seed(0)) > 0).double()


def test_a_plain_mask() -> None:
    model = Masked(nn.Parameter(some(), requires_grad=False))
    assert pruned(model, (X,))[1].rewrites == 1


MASKINGS: list[Callable[[Tensor, Tensor], Tensor]] = [
    lambda weight, mask: weight * mask,
    lambda weight, mask: weight * mask.long(),
    lambda weight, mask: ~mask * weight,
    lambda weight, mask: weight * mask[:, :1],
    lambda weight, mask: torch.where(mask, weight, 0),
    lambda weight, mask: torch.where(mask == 0, torch.zeros_like(weight), weight),
    lambda weight, mask: weight.masked_fill(~mask, 0),
    lambda weight, mask: weight.masked_fill(mask.logical_not(), torch.tensor(0.0, dtype=weight.dtype)),
]


@pytest.mark.parametrize("masked", MASKINGS)
def test_masks_that_are_no_floats(masked: Callable[[Tensor, Tensor], Tensor]) -> None:
    model = Masked(some().bool())
    _, report, parts = pruned(lambda x: nn.functional.linear(x, masked(model.weight, model.mask)), (X,))
    assert report.rewrites == 1 and len(parts.pieces) == 1
    assert [n.name for n in parts.main.graph.nodes if n.op == "call_function"] == ["linear_default"]


def test_chosen_zeros_are_folded() -> None:
    model = Masked(some().bool())
    printed, _, _ = pruned(lambda x: nn.functional.linear(x, torch.where(model.mask, model.weight, 0)), (X,))
    assert_expected_inline(
        printed,
        """\
scalar_tensor: f64[] = aten.scalar_tensor(0, dtype=f64, layout=torch.strided, device=cpu)
where: f64[8, 32] = aten.where(w1, w0, scalar_tensor)
linear: f64[2, 8] = llmcomp.linear(x0, where, None, False)
return (linear)""",
    )


@pytest.mark.parametrize("value", [1.0, -0.5])
def test_what_is_filled_with_something_is_left_alone(value: float) -> None:
    model = Masked(some().bool())
    fn = lambda x: nn.functional.linear(x, model.weight.masked_fill(model.mask, value))  # noqa: E731
    assert pruned(fn, (X,))[1].rewrites == 0
    fn = lambda x: nn.functional.linear(x, torch.where(model.mask, model.weight, value))  # noqa: E731
    assert pruned(fn, (X,))[1].rewrites == 0


def test_what_is_chosen_by_an_input_is_left_alone() -> None:
    model = Masked(some().bool())
    fn = lambda x: nn.functional.linear(x, torch.where(x[:1] > 0, model.weight, 0))  # noqa: E731
    assert pruned(fn, (X,))[1].rewrites == 0
    fn = lambda x: torch.where(model.mask[0], x, 0) * 2  # noqa: E731
    assert pruned(fn, (X,))[1].rewrites == 0


def test_a_mask_that_learns_is_left_alone() -> None:
    _, report, _ = pruned(Masked(nn.Parameter(some())), (X,))
    assert report.rewrites == 0 and "requires grad" in report.near_misses[0].reason


def test_a_mask_that_the_graph_writes_is_left_alone() -> None:
    model = Masked(nn.Parameter(some(), requires_grad=False))

    def fn(x: Tensor) -> Tensor:
        y = model(x)
        model.mask.mul_(0.5)
        return y

    _, report, _ = pruned(fn, (X,))
    assert report.rewrites == 0


def test_numbers_that_are_no_mask() -> None:
    assert pruned(Masked(nn.Parameter(torch.rand(8, 32).double(), requires_grad=False)), (X,))[1].rewrites == 0
    assert pruned(Masked(nn.Parameter(torch.ones(8, 32).double(), requires_grad=False)), (X,))[1].rewrites == 0


def test_dense_weights_are_left_alone() -> None:
    printed, report, parts = pruned(mlp(), (X,))
    assert report.rewrites == 0 and not report.near_misses and not parts.checks and "kept" not in printed
