"""Models on a GPU give what eager gives: tokens, logits, gradients, and loops without a cache."""

import copy

import pytest
import torch

import llmcomp
from llmcomp import reuse
from llmcomp.cuda_graph import Recording
from llmcomp.report import GraphReport
from tests import sequence_models
from tests.gpu import DEVICE, DTYPES, MARKS, MODELS, check_equal, check_target, check_tokens, placed, prompt_of

pytestmark = MARKS


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MODELS)
def test_generate(name: str, dtype: torch.dtype) -> None:
    check_tokens(name, dtype)


@pytest.mark.parametrize("name", MODELS)
def test_generate_with_a_static_cache(name: str) -> None:
    check_tokens(name, torch.bfloat16, cache_implementation="static")


@pytest.mark.parametrize("graphs_are", [None, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MODELS)
def test_our_generate(
    name: str,
    dtype: torch.dtype,
    graphs_are: bool | None,
    graphs: list[GraphReport],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    replays: list[Recording] = []
    replay = Recording.replay
    monkeypatch.setattr(Recording, "replay", lambda self, inputs: replays.append(self) or replay(self, inputs))
    case, model = placed(name, dtype)
    eager_model, prompt = copy.deepcopy(model), prompt_of(case, 2, 9, padding=3)
    settings = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False}
    with torch.no_grad():
        eager = eager_model.generate(**prompt, disable_compile=True, **settings)
        model.compile(backend="llmcomp", options={"cuda_graphs": graphs_are})
        ours = llmcomp.generate(model, prompt["input_ids"], attention_mask=prompt["attention_mask"], **settings)
        check_equal(case, eager_model, prompt, ours, eager)
    check_target(graphs)
    assert bool(replays) == (graphs_are is None and DEVICE == "cuda")


@pytest.mark.parametrize("name", MODELS)
def test_gradients(name: str, graphs: list[GraphReport]) -> None:
    case, model = placed(name)
    feed = {k: v.to(DEVICE) for k, v in case.inputs(2, 11).items()}
    found = []
    for compiles in (False, True):
        model.zero_grad()
        if compiles:
            model.compile(backend="llmcomp")
        model(**feed).logits.square().mean().backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for parameter, eager in found[0].items():
        close = 1e-3 * float(eager.abs().max()) + 1e-7
        torch.testing.assert_close(found[1][parameter], eager, rtol=1e-3, atol=close)
    check_target(graphs)
    assert {"forward", "backward"} <= {g.kind for g in graphs}


def test_a_loop_without_a_cache_computes_what_is_new(graphs: list[GraphReport]) -> None:
    design = sequence_models.Design(positions=sequence_models.learned, layers=2, keys_too=True)
    model = sequence_models.Decoder(design).requires_grad_(False).to(DEVICE)
    fast = torch.compile(model, backend="llmcomp", dynamic=True)
    tokens = torch.randint(sequence_models.VOCAB, (1, 24), device=DEVICE)
    llmcomp.reset()
    for length in range(4, 24):
        given = tokens[:, :length].clone(memory_format=torch.contiguous_format)
        for ours, eager in zip(fast(given), model(given), strict=True):
            torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-5)
    assert sum(program.bytes for program in reuse._reusing) > 0
    check_target(graphs)
    llmcomp.reset()
