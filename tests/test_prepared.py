"""llmcomp/prepared.py: compiled without zeros, and right when weights change."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
import torch.nn.utils.prune as torch_prune
from torch import Tensor, nn

import llmcomp
from llmcomp.backend import llmcomp as backend
from llmcomp.capture import capture
from llmcomp.prepared import STORE, PreparedProgram, weights_of
from llmcomp.report import GraphReport
from tests.numerics import assert_equal_float32
from tests.quantizable import IDS, assert_trains_as_eager, llama, logits
from tests.zeros import Mlp, drop

pytestmark = pytest.mark.usefixtures("fresh")

X = torch.randn(2, 32)


def pruned_mlp() -> Mlp:
    model = Mlp()
    drop(model, slice(0, 32))
    return model


def bytes_read(model: nn.Module, *inputs: Tensor) -> int:
    with torch.no_grad():
        graphs = llmcomp.explain(model, *inputs).graphs
    return sum(k.weight_bytes for k in graphs[0].program.kernels)


def check(compiled: nn.Module, model: nn.Module) -> None:
    with torch.no_grad():
        assert_equal_float32(compiled(X), model(X))


def test_fewer_bytes_are_read() -> None:
    dense, model = Mlp(), pruned_mlp()
    assert bytes_read(model, X) * 2 == bytes_read(dense, X)
    explained = str(llmcomp.explain(model.requires_grad_(False), X))
    assert "prune" in explained


@pytest.mark.slow
def test_compiled_decoder_equals_eager(graphs: list[GraphReport]) -> None:
    model = llama(spread=0.1)
    llmcomp.prune_(model, llmcomp.Structured(heads=0.5, channels=0.25))
    llmcomp.prune_(model, llmcomp.Structured(layers=1))
    eager = logits(model)
    with torch.no_grad():
        tokens = model.generate(IDS, max_new_tokens=6, do_sample=False)
        assert torch.equal(llmcomp.generate(model, IDS, max_new_tokens=6, do_sample=False), tokens)
        model.forward = torch.compile(model.forward, backend="llmcomp")
        assert_equal_float32(logits(model), eager)
        assert torch.equal(model.generate(IDS, max_new_tokens=6, do_sample=False), tokens)
    assert any(r.name == "prune" and r.report.rewrites for g in graphs for r in g.passes)


def test_what_does_not_pay_is_said() -> None:
    model = Mlp().requires_grad_(False)
    llmcomp.prune_(model, "50%")
    with torch.no_grad():
        (graph,) = llmcomp.explain(model, X).graphs
    (pruning,) = [result for result in graph.passes if result.name == "prune"]
    assert pruning.report.rewrites == 0 and len(pruning.report.near_misses) == 3
    assert "50% of its weights are zeros, scattered" in pruning.report.near_misses[0].reason


def test_passes_are_reported_once() -> None:
    with torch.no_grad():
        (graph,) = llmcomp.explain(pruned_mlp(), X).graphs
    found = {result.name: result.report.rewrites for result in graph.passes if result.name != "canonicalize"}
    assert found["recognize_linear"] == 3 and found["recognize_gated"] == 1 and found["prune"] == 1
    assert len([r for r in graph.passes if r.name == "recognize_gated"]) == 1


def test_in_inference_mode() -> None:
    model = pruned_mlp()
    expected = model(X).detach()
    compiled = torch.compile(model, backend="llmcomp")
    with torch.inference_mode():
        assert_equal_float32(compiled(X.clone()), expected)
    check(compiled, model)


def test_verify_goes_with_it() -> None:
    model = pruned_mlp()
    check(torch.compile(model, backend="llmcomp", options={"verify": True}), model)


def test_weights_that_change_are_noticed(graphs: list[GraphReport]) -> None:
    model = pruned_mlp()
    compiled = torch.compile(model, backend="llmcomp")
    check(compiled, model)
    for change in (
        lambda: model.up.weight[40:].mul_(2),  # elsewhere: made again
        lambda: (model.up.weight[:8].add_(1), model.gate.weight[:8].add_(1)),  # columns of down still hide them
        lambda: model.down.weight[:, :8].add_(1),  # where zeros were relied on
        lambda: drop(model, slice(0, 32)),
    ):
        with torch.no_grad():
            change()
        for _ in range(2):
            check(compiled, model)
    assert len(graphs) >= 1


def test_weights_that_change_in_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[object] = []
    original = PreparedProgram._made
    monkeypatch.setattr(PreparedProgram, "_made", lambda *args: made.append(1) or original(*args))
    model = pruned_mlp()
    compiled = torch.compile(model, backend="llmcomp")
    for _ in range(6):
        with torch.no_grad():
            model.up.weight[40:].mul_(1.5)
        check(compiled, model)
    assert made


def test_models_of_one_shape_share_a_program_and_not_their_zeros() -> None:
    sparse, dense = pruned_mlp(), Mlp()
    other = copy.deepcopy(sparse)
    with torch.no_grad():
        other.up.weight[32:].mul_(3)
    call = torch.compile(lambda model, x: model(x), backend="llmcomp")
    with torch.no_grad():
        for model in (sparse, dense, other, sparse, dense):
            assert_equal_float32(call(model, X), model(X))


@pytest.mark.slow
def test_programs_share_what_they_prepare_and_keep_no_model() -> None:
    model = llama()
    llmcomp.prune_(model, llmcomp.Structured(channels=0.5))
    with torch.no_grad():
        model.forward = torch.compile(model.forward, backend="llmcomp")
        model.generate(IDS, max_new_tokens=4, do_sample=False)
    weight = model.model.layers[0].mlp.up_proj.weight
    assert len(weight.__dict__[STORE]) == 1  # one for the prompt and for the steps
    alive = weakref.ref(weight)
    del model, weight
    torch._dynamo.reset()
    gc.collect()
    assert alive() is None


def test_torch_prune(graphs: list[GraphReport]) -> None:
    model = Mlp()
    for layer in (model.gate, model.up, model.down):
        torch_prune.l1_unstructured(layer, "weight", 0.5)
    compiled = torch.compile(model, backend="llmcomp")
    check(compiled, model)
    assert not any("mul" in n for k in graphs[0].program.kernels for n in k.nodes if "weight" in n)
    assert sum(r.report.rewrites for g in graphs for r in g.passes if r.name == "prune") == 3
    with torch.no_grad():
        model.up.weight_mask.copy_(1 - model.up.weight_mask)
    check(compiled, model)


class Chosen(nn.Module):
    """A dense weight of which a buffer says what counts."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(32, 32))
        self.register_buffer("mask", torch.rand(32, 32) > 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight * self.mask)


def test_a_mask_of_bools_over_a_dense_weight(graphs: list[GraphReport]) -> None:
    torch.manual_seed(0)
    model, x = Chosen(), torch.randn(3, 32)
    run = torch.compile(model, backend="llmcomp")
    with torch.no_grad():
        for _ in range(2):
            assert_equal_float32(run(x), model(x))
            model.mask.logical_not_()
    assert sum(r.report.rewrites for g in graphs for r in g.passes if r.name == "prune") == 1


def test_training_gives_the_gradients_of_eager(graphs: list[GraphReport]) -> None:
    model = llama().train()
    llmcomp.prune_(model, "2:4")
    assert_trains_as_eager(model, graphs)
    weight = model.model.layers[0].mlp.up_proj.weight
    assert bool((weight.grad[weight == 0] == 0).all())


def test_dense_models_are_not_looked_at_twice() -> None:
    gm = capture(Mlp(), X)
    gm.meta["kind"] = "inference"
    assert weights_of(gm, gm.meta["inputs"]) == {}
    gm = capture(pruned_mlp(), X)
    gm.meta["kind"] = "inference"
    assert len(weights_of(gm, gm.meta["inputs"])) == 3
    assert weights_of(gm, gm.meta["inputs"][:-1]) == {} and callable(backend)


def test_what_is_left_out_meets_no_nan() -> None:
    """The documented difference from eager, where zero times NaN is NaN."""
    model = pruned_mlp()
    expected = model(X).detach()
    with torch.no_grad():
        model.up.weight[:32] = torch.nan
        assert bool(model(X).isnan().all())
        assert_equal_float32(torch.compile(model, backend="llmcomp")(X), expected)


def test_reset_tells_of_writes_that_torch_does_not_count() -> None:
    model = pruned_mlp()
    compiled = torch.compile(model, backend="llmcomp")
    with torch.no_grad():
        compiled(X)
        model.up.weight.data.mul_(2)
        llmcomp.reset(model)
        assert_equal_float32(compiled(X), model(X))


def test_reset_tells_of_writes_into_codes() -> None:
    model = nn.Sequential(nn.Linear(128, 64)).requires_grad_(False)
    llmcomp.prune_(model, "2:4")
    llmcomp.quantize_(model, "int8")
    compiled, x = torch.compile(model, backend="llmcomp"), torch.randn(1, 128)
    compiled(x)
    assert STORE in model[0].weight.codes.__dict__
    model[0].weight.codes.data.neg_()
    llmcomp.reset(model)
    assert_equal_float32(compiled(x), model(x))


def test_what_is_prepared_is_neither_saved_nor_copied() -> None:
    model = pruned_mlp()
    plain = len(pickle.dumps(model))
    with torch.no_grad():
        torch.compile(model, backend="llmcomp")(X)
    assert all(p.__dict__[STORE] for p in model.parameters())
    assert len(pickle.dumps(model)) < plain + 2000
    assert copy.deepcopy(model.up.weight.__dict__[STORE]) == {}


def test_what_was_prepared_of_old_weights_is_not_kept() -> None:
    model = pruned_mlp()
    for first in (0, 8, 16):
        with torch.no_grad():
            model.load_state_dict(Mlp().state_dict())
            drop(model, slice(first, first + 32))
            torch._dynamo.reset()
            torch.compile(model, backend="llmcomp")(X)
        assert [len(p.__dict__[STORE]) for p in model.parameters()] == [1, 1, 1]


def test_parts_of_one_weight_are_kept_beside_each_other() -> None:
    first, second, shared = (nn.Linear(32, 32, bias=False) for _ in range(3))
    with torch.no_grad():
        first.weight[:16], second.weight[16:] = 0, 0
        compiled = torch.compile(lambda x: shared(first(x).relu()) + shared(second(x).relu()), backend="llmcomp")
        for _ in range(2):
            expected = shared(first(X).relu()) + shared(second(X).relu())
            assert_equal_float32(compiled(X), expected)
            shared.weight.mul_(2)
    assert len(shared.weight.__dict__[STORE]) == 2
