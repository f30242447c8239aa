"""llmcomp.train_quantized_: trained with exactly the values that quantize_ stores."""

import copy
import io
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

import llmcomp
from llmcomp.formats import Format, Fp8, Int4, Int8, Mxfp4, Nf4
from llmcomp.latents import latent_of
from llmcomp.report import GraphReport
from tests.quantizable import assert_trains_as_eager, llama, logits

pytestmark = pytest.mark.usefixtures("fresh")

FORMATS: tuple[Format, ...] = (Int8(), Int8(32), Fp8(), Int4(32), Int4(32, symmetric=True), Nf4(32), Mxfp4())


def train(model: nn.Module, steps: int = 3, rate: float = 1e-2) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 64)).square().sum().backward()
        optimizer.step()


def layer() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 16))


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_quantizing_gives_what_was_trained_with(form: Format) -> None:
    model = layer()
    told = llmcomp.train_quantized_(model, {"0": form})
    train(model)
    used = model[0].weight.detach().clone()
    again = layer()
    again.load_state_dict(model.state_dict())  # from a checkpoint, too
    for one in (model, again):
        assert llmcomp.quantize_(one, {"0": form}).rows == told.rows
        assert torch.equal(one[0].weight.dequantize(), used)


def test_the_gradient_passes_straight_through() -> None:
    """One step of plain SGD, by hand."""
    model, x = layer(), torch.randn(8, 64)
    before = model[0].weight.detach().clone()
    llmcomp.train_quantized_(model, "int4_g32")
    rounded = Int4(32).dequantize(Int4(32).quantize(before), 64, torch.float32)
    assert torch.equal(model[0].weight, rounded) and not torch.equal(rounded, before)
    copied = rounded.clone().requires_grad_(True)
    nn.functional.linear(x, copied, model[0].bias).square().sum().backward()
    optimizer = torch.optim.SGD(model.parameters(), 1e-4)
    model(x).square().sum().backward()
    assert torch.equal(model[0].weight.grad, copied.grad)
    optimizer.step()
    latent = before - 1e-4 * copied.grad
    torch.testing.assert_close(model.state_dict()["0.weight"], latent)
    assert torch.equal(model[0].weight, Int4(32).dequantize(Int4(32).quantize(latent), 64, torch.float32))


def test_small_steps_add_up() -> None:
    """What is too small to change a code is not lost."""
    model = layer()
    llmcomp.train_quantized_(model, "int4_g32")
    before = model[0].weight.detach().clone()
    train(model, steps=1, rate=1e-5)
    assert float((model[0].weight != before).float().mean()) < 0.5
    train(model, steps=300, rate=1e-3)
    assert float((model[0].weight != before).float().mean()) > 0.5


class Straight(nn.Module):
    """Straight-through rounding as a parametrization, which keeps the floats and rounds in every forward."""

    def forward(self, weight: Tensor) -> Tensor:
        rounded = Int4(32).dequantize(Int4(32).quantize(weight.detach()), weight.shape[1], torch.float32)
        return rounded + (weight - weight.detach())


class Twice(torch.optim.SGD):
    """Takes two steps of its parent."""

    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        super().step(closure)
        return super().step(closure)


class Ahead(torch.optim.Optimizer):
    """Lookahead (arXiv:1907.08610) with a step of SGD, then half of the way back."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__(parameters, {})
        self.inner = torch.optim.SGD(self.param_groups[0]["params"], 0.01)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        slow = [p.clone() for p in self.param_groups[0]["params"]]
        loss = self.inner.step(closure)
        for p, start in zip(self.param_groups[0]["params"], slow, strict=True):
            p.copy_((p + start) / 2)
        return loss


STEPPERS: list[Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]] = [
    lambda p: torch.optim.SGD(p, 0.01, momentum=0.9),
    lambda p: torch.optim.LBFGS(p, 0.1, max_iter=4),
    lambda p: torch.optim.LBFGS(p, max_iter=4, line_search_fn="strong_wolfe"),
    lambda p: Twice(p, 0.01),
    Ahead,
]


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("make", STEPPERS)
def test_optimizers_with_a_closure(make: Callable[..., torch.optim.Optimizer], named: bool) -> None:
    """Whatever they try is rounded where the closure reads it, and what they step from is not."""
    x, y = torch.randn(64, 64), torch.randn(64, 16)
    ours, plain = layer(), layer()
    plain.load_state_dict(ours.state_dict())
    llmcomp.train_quantized_(ours, "int4_g32")
    nn.utils.parametrize.register_parametrization(plain[0], "weight", Straight())
    torch.optim.SGD(plain.parameters())  # from here on torch tells of its steps, those within another's among them
    losses: list[list[float]] = []
    for model, weight in ((ours, ours[0].weight), (plain, plain[0].parametrizations.weight.original)):
        optimizer, seen = make([weight, model[0].bias]), list[float]()

        def closure(model: nn.Module = model, seen: list[float] = seen) -> Tensor:
            model.zero_grad()
            loss = (model(x) - y).square().mean()
            loss.backward()
            seen.append(loss.item())
            return loss

        for _ in range(3):
            optimizer.step(closure=closure) if named else optimizer.step(closure)
        losses.append(seen)
    assert losses[0] == losses[1] and losses[0][-1] < losses[0][0]
    assert torch.equal(ours.state_dict()["0.weight"], plain[0].parametrizations.weight.original)
    assert torch.equal(ours[0].weight, plain[0].weight)


def test_a_step_that_fails_loses_nothing() -> None:
    model = layer()
    llmcomp.train_quantized_(model, "int4_g32")
    before = model.state_dict()["0.weight"].clone()
    optimizer = torch.optim.SGD(model.parameters(), 0.0)

    def closure() -> Tensor:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step(closure)
    assert torch.equal(model.state_dict()["0.weight"], before)
    train(model)
    optimizer.step()
    latent = latent_of(model[0].weight)
    assert latent is not None and torch.equal(model[0].weight, latent.rounded())
    assert not torch.equal(model.state_dict()["0.weight"], before)


@pytest.mark.parametrize("first", ["prune", "quantize"])
def test_with_masks(first: str) -> None:
    model = layer()
    if first == "prune":
        llmcomp.prune_(model, "2:4")
    llmcomp.train_quantized_(model, "int4_g32")
    if first == "quantize":
        llmcomp.prune_(model, "2:4")
    train(model)
    gone = model.state_dict()["0.weight"] == 0
    assert int(gone.sum()) == 64 * 16 // 2 and not bool(model[0].weight[gone].any())
    llmcomp.quantize_(model, "int4_g32")
    assert int((model[0].weight.dequantize().view(-1, 4) == 0).sum(1).min()) == 2


def test_momentum_of_before_a_mask_changes_no_scale() -> None:
    model = layer()
    llmcomp.train_quantized_(model, "int4_g32")
    llmcomp.prune_(model, "2:4")
    weight = model[0].weight
    optimizer = torch.optim.SGD([weight], 0.1, momentum=0.9)
    optimizer.state[weight]["momentum_buffer"] = torch.randn(16, 64)
    weight.grad = torch.zeros(16, 64)
    optimizer.step()
    used = weight.detach().clone()
    llmcomp.quantize_(model, "int4_g32")
    assert torch.equal(model[0].weight.dequantize(), used)


def test_what_others_write_is_trained_on() -> None:
    model = layer()
    llmcomp.train_quantized_(model, "int8")
    new = torch.randn(16, 64)
    model.load_state_dict({"0.weight": new, "0.bias": torch.zeros(16)})
    assert torch.equal(model[0].weight, Int8().dequantize(Int8().quantize(new), 64, torch.float32))
    assert torch.equal(model.state_dict()["0.weight"], new)
    with torch.no_grad():
        model[0].weight[0] = 5.0
    torch.optim.SGD(model.parameters(), 0.0).step()
    latent = latent_of(model[0].weight)
    assert latent is not None and bool((latent.values[0] == 5).all()) and torch.equal(latent.values[1:], new[1:])


def test_a_model_that_is_moved_is_trained_there() -> None:
    model = layer()
    llmcomp.train_quantized_(model, "int4_g32")
    train(model.bfloat16().float().double().float())
    before = model.state_dict()["0.weight"].clone()
    model.double()
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    optimizer.step()
    saved = model.state_dict()["0.weight"]
    assert saved.dtype == torch.float64 and torch.equal(saved.float(), before)


def test_copies_are_trained_for_themselves() -> None:
    model = layer()
    llmcomp.train_quantized_(model, "int4_g32")
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for made in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert torch.equal(made.state_dict()["0.weight"], model.state_dict()["0.weight"])
        before = model[0].weight.detach().clone()
        train(made)
        assert torch.equal(model[0].weight, before) and not torch.equal(made[0].weight, before)
        assert latent_of(made[0].weight) is not latent_of(model[0].weight)


@pytest.mark.slow
def test_a_decoder_with_a_tied_head_and_the_backend(graphs: list[GraphReport]) -> None:
    model = llama(spread=0.1).train()
    report = llmcomp.train_quantized_(model, "int4_g32")
    assert str(report.rows[-1].format) == "int8" or any(str(r.format) == "int8" for r in report.quantized)
    llmcomp.prune_(model, "2:4")
    assert_trains_as_eager(model, graphs)
    torch.optim.AdamW(model.parameters(), 1e-3).step()
    used = logits(model.eval())
    assert {r.name: str(r.format) for r in llmcomp.quantize_(model, "int4_g32").rows} == {
        r.name: str(r.format) for r in report.rows
    }
    assert torch.equal(logits(model), used)


def test_explaining_with_other_weights_leaves_the_training_alone() -> None:
    model = layer()
    llmcomp.train_quantized_(model, "int4_g32")
    before: Tensor = model.state_dict()["0.weight"].clone()
    with torch.no_grad():
        llmcomp.explain(model.eval(), torch.randn(2, 64), options={"weights": "int8"})
    assert torch.equal(model.state_dict()["0.weight"], before) and not torch.equal(model[0].weight, before)


def test_what_cannot_be_trained_is_left_alone() -> None:
    model = nn.Sequential(nn.Linear(64, 60), nn.Linear(60, 16), nn.LazyLinear(8))
    told = llmcomp.train_quantized_(model, "int4_g32")
    assert [r.name for r in told.quantized] == ["0"] and ["group" in r.reason for r in told.left] == [True, False]
    assert told.left[0].bytes_after == told.left[0].bytes_before == 60 * 16 * 4 and told.left[1].shape == ()


def test_bad_input() -> None:
    model = layer()
    before = model[0].weight.detach().clone()
    with pytest.raises(llmcomp.OptionError, match="train in int8"):
        llmcomp.train_quantized_(model, "int8_dynamic")
    with pytest.raises(llmcomp.OptionError, match="matches"):
        llmcomp.train_quantized_(model, {"nothing": "int8"})
    with torch.no_grad():
        model[0].weight[0, 0] = torch.nan
    with pytest.raises(llmcomp.FormatError, match="finite"):
        llmcomp.train_quantized_(model, "int8")
    assert torch.equal(model[0].weight[1:], before[1:])


def test_a_checkpoint_of_transformers_has_the_floats(tmp_path: Path) -> None:
    model = llama(spread=0.1)
    llmcomp.train_quantized_(model, "int4_g32")
    used = logits(model)
    model.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path).eval()
    assert not torch.equal(logits(loaded), used)
    llmcomp.quantize_(loaded, "int4_g32")
    assert torch.equal(logits(loaded), used)


def test_what_was_written_since_the_last_step_is_saved_and_quantized() -> None:
    model = layer()
    llmcomp.train_quantized_(model, "int8")
    with torch.no_grad():
        model[0].weight.copy_(written := torch.randn_like(model[0].weight))
    assert torch.equal(model.state_dict()["0.weight"], written)
    llmcomp.quantize_(model, "int8")
    assert float((model[0].weight.dequantize() - written).abs().max()) < 0.05


def test_pruned_weights_are_zero_before_any_step() -> None:
    model = layer()
    llmcomp.train_quantized_(model, "int8")
    llmcomp.prune_(model, "2:4")
    assert int((model.state_dict()["0.weight"] == 0).sum()) * 2 == model[0].weight.numel()
    llmcomp.quantize_(model, "int8")
    assert int((model[0].weight.dequantize() == 0).sum()) * 2 >= model[0].weight.numel()


def test_loading_by_assignment_goes_on_training() -> None:
    model, other = layer(), layer()
    llmcomp.train_quantized_(model, "int4_g32")
    llmcomp.train_quantized_(other, "int4_g32")
    other.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    for one in (model, other):
        torch.manual_seed(1)
        train(one)
    assert torch.equal(other.state_dict()["0.weight"], model.state_dict()["0.weight"])
    used = other[0].weight.detach().clone()
    llmcomp.quantize_(other, "int4_g32")
    assert torch.equal(other[0].weight.dequantize(), used)


def test_a_weight_that_is_assigned_to_two_layers_is_trained_once() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    llmcomp.train_quantized_(model, "int8")
    shared = nn.Parameter(torch.randn(64, 64))
    given = shared.detach().clone()
    state = {"0.weight": shared, "1.weight": shared, "0.bias": torch.zeros(64), "1.bias": torch.zeros(64)}
    model.load_state_dict(state, assign=True)
    assert model[0].weight is model[1].weight
    train(model, steps=2)
    state = model.state_dict()
    assert torch.equal(state["0.weight"], state["1.weight"])
    assert 0 < float((state["0.weight"] - given).abs().max()) < 0.1
