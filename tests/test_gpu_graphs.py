"""CUDA graphs on a GPU: what is replayed equals what is launched, whatever moves in between."""

import threading

import pytest
import torch
from torch import Tensor
from transformers import StaticCache

from llmcomp.cuda_graph import GRAPHS, Recording
from llmcomp.report import GraphReport
from tests.gpu import DEVICE, MARKS, check_target, placed

pytestmark = MARKS


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[Recording]:
    """Grows with every replay."""
    seen: list[Recording] = []
    replay = Recording.replay
    monkeypatch.setattr(Recording, "replay", lambda self, inputs: seen.append(self) or replay(self, inputs))
    return seen


def affine(x: Tensor, weight: Tensor, total: Tensor) -> Tensor:
    y = torch.nn.functional.linear(x, weight).relu()
    total += y.sum()
    return y


def replayed(replays: list[Recording]) -> bool:
    return bool(replays) == (DEVICE == "cuda")


def test_calls_are_replayed(replays: list[Recording], graphs: list[GraphReport]) -> None:
    fast = torch.compile(affine, backend="llmcomp", mode="reduce-overhead", dynamic=False)
    weight, total, expected = (torch.randn(64, 32, device=DEVICE), *torch.zeros(2, 1, device=DEVICE))
    kept = []
    with torch.no_grad():
        for _ in range(8):
            x = torch.randn(3, 32, device=DEVICE)
            kept.append((x, fast(x, weight, total)))
            expected += torch.nn.functional.linear(x, weight).relu().sum()
        for x, y in kept:  # later replays have left earlier results alone
            torch.testing.assert_close(y, torch.nn.functional.linear(x, weight).relu(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(total, expected, rtol=1e-4, atol=1e-3)
    check_target(graphs)
    assert replayed(replays)


def test_decoding_with_a_static_cache(replays: list[Recording]) -> None:
    case, model = placed("llama")
    ids = case.prompt(2, 9)["input_ids"].to(DEVICE)

    def step(cache: StaticCache, token: Tensor) -> Tensor:
        return model(input_ids=token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)

    fast = torch.compile(step, backend="llmcomp", mode="reduce-overhead", fullgraph=True)
    found = []
    with torch.no_grad():
        for run in (step, fast, fast):  # the second time with a cache elsewhere
            cache = StaticCache(config=model.config, max_cache_len=48)
            tokens = [step(cache, ids)]
            for _ in range(20):
                tokens.append(run(cache, tokens[-1]))
            found.append(torch.cat(tokens, 1))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    assert replayed(replays)


def test_memory_is_bounded(replays: list[Recording]) -> None:
    fast = torch.compile(affine, backend="llmcomp", mode="reduce-overhead", dynamic=True)
    weight, total = torch.randn(64, 32, device=DEVICE), torch.zeros(1, device=DEVICE)
    with torch.no_grad():
        for rows in range(2, 2 + 3 * GRAPHS):
            for _ in range(4):
                x = torch.randn(rows, 32, device=DEVICE)
                eager = torch.nn.functional.linear(x, weight).relu()
                torch.testing.assert_close(fast(x, weight, total), eager, rtol=1e-4, atol=1e-4)
    assert replayed(replays)


def test_threads_with_streams_of_their_own() -> None:
    fast = torch.compile(affine, backend="llmcomp", mode="reduce-overhead", dynamic=False)
    weight, problems = torch.randn(64, 32, device=DEVICE), []
    with torch.no_grad():
        fast(torch.randn(3, 32, device=DEVICE), weight, torch.zeros(1, device=DEVICE))  # compiles

    def work() -> None:
        try:
            with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream() if DEVICE == "cuda" else None):
                total = torch.zeros(1, device=DEVICE)
                for _ in range(30):
                    x = torch.randn(3, 32, device=DEVICE)
                    eager = torch.nn.functional.linear(x, weight).relu()
                    torch.testing.assert_close(fast(x, weight, total), eager, rtol=1e-4, atol=1e-4)
        except BaseException as problem:
            problems.append(problem)

    threads = [threading.Thread(target=work) for _ in range(3)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert not problems, problems
