"""llmcomp/reuse.py: a loop over growing ids computes only what is new, and never anything else than eager."""

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import llmcomp
from llmcomp import reuse
from llmcomp.errors import MemoryFullError
from llmcomp.reuse import ReusingProgram
from tests import sequence_models as sm


@pytest.fixture(scope="module")
def fast() -> Iterator[nn.Module]:
    """A decoder that is compiled once for all tests here: its programs are fill, step and chunk."""
    torch._dynamo.reset()
    model = sm.Decoder(sm.Design(layers=2, keys_too=True)).requires_grad_(False)
    compiled = torch.compile(model, backend="llmcomp", dynamic=True)
    yield compiled
    torch._dynamo.reset()


@pytest.fixture
def kinds(fast: nn.Module, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kinds of programs that run during a test, which begins with nothing kept."""
    llmcomp.reset()
    seen: list[str] = []
    run = ReusingProgram._run

    def spy(self: ReusingProgram, kind: str, *args: Any) -> object:
        seen.append(kind)
        return run(self, kind, *args)

    monkeypatch.setattr(ReusingProgram, "_run", spy)
    for program in reuse._reusing:
        program._copies = False
    return seen


def kept() -> int:
    """Bytes of all caches."""
    return sum(p.bytes for p in reuse._reusing)


def ids(length: int, batch: int = 1, seed: int = 0) -> Tensor:
    return torch.randint(sm.VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def eager(fast: nn.Module, tokens: Tensor) -> tuple[Tensor, ...]:
    results: tuple[Tensor, ...] = fast._orig_mod(tokens)
    return results


def check(fast: nn.Module, tokens: Tensor) -> tuple[Tensor, ...]:
    """The results of a call, which equal eager's."""
    tokens = tokens.clone(memory_format=torch.contiguous_format)  # another stride would be another graph
    results = fast(tokens)
    for a, b in zip(results, eager(fast, tokens), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    return results


def loop(fast: nn.Module, start: int = 4, stop: int = 10, batch: int = 1, seed: int = 0) -> Tensor:
    """Calls with tokens that grow by one; returns the last ones."""
    tokens = ids(stop, batch, seed)
    for length in range(start, stop + 1):
        check(fast, tokens[:, :length])
    return tokens


def test_a_loop_computes_one_position_per_call(fast: nn.Module, kinds: list[str]) -> None:
    loop(fast)
    assert kinds == ["fill", "step", "step", "step", "step"]


def test_results_grow_in_place(fast: nn.Module, kinds: list[str]) -> None:
    tokens = loop(fast)
    before = check(fast, torch.cat([tokens, tokens[:, :1]], 1))
    after = check(fast, torch.cat([tokens, tokens[:, :2]], 1))
    assert before[0].is_contiguous() and before[0].data_ptr() == after[0].data_ptr()  # the logits
    assert before[1].data_ptr() == after[1].data_ptr()  # keys


def test_several_tokens_at_once(fast: nn.Module, kinds: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    loop(fast)
    for length in (13, 16, 17, 20):
        check(fast, torch.cat([ids(10), ids(10, seed=3)], 1)[:, :length])
    assert kinds[-2:] == ["step", "chunk"]


def test_other_prefixes_and_shorter_ones(fast: nn.Module, kinds: list[str]) -> None:
    tokens = loop(fast)
    check(fast, tokens)
    check(fast, tokens[:, :6])
    other = tokens.clone()
    other[0, 7] = (other[0, 7] + 1) % sm.VOCAB
    check(fast, other)
    check(fast, torch.cat([other, other[:, :2]], 1))
    check(fast, torch.cat([tokens, other[:, :2]], 1))
    check(fast, ids(10, seed=9))
    check(fast, tokens[:, :2])


def test_two_sequences_in_turns_keep_their_caches(fast: nn.Module, kinds: list[str]) -> None:
    a, b = ids(12, seed=1), ids(12, seed=2)
    for length in range(4, 13):
        check(fast, a[:, :length])
        check(fast, b[:, :length])
    assert kinds.count("fill") == 2 and kinds.count("step") == 12


@pytest.mark.slow
def test_batches(fast: nn.Module, kinds: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    loop(fast, batch=3)
    assert kinds == ["fill", "step", "step", "step", "step"]
    check(fast, ids(11, batch=2))


def test_keys_and_values_of_several_rows_grow_in_place(fast: nn.Module, kinds: list[str]) -> None:
    tokens = loop(fast, batch=3)
    before = check(fast, torch.cat([tokens, tokens[:, :1]], 1))
    after = check(fast, torch.cat([tokens, tokens[:, :2]], 1))
    assert before[1].data_ptr() == after[1].data_ptr()
    # Where eager's result is contiguous, callers may rely on it: what they write into a view of it is in it.
    after[0].view(-1, sm.VOCAB)[:, 3] = -torch.inf
    assert bool((after[0][..., 3] == -torch.inf).all())


def test_logits_of_several_rows_grow_in_place_where_asked_for(kinds: list[str]) -> None:
    torch._dynamo.reset()
    model = sm.Decoder(sm.Design(layers=1)).requires_grad_(False)
    strided = torch.compile(model, backend="llmcomp", dynamic=True, options={"strided_results": True})
    tokens = loop(strided, batch=3)
    before = check(strided, torch.cat([tokens, tokens[:, :1]], 1))
    after = check(strided, torch.cat([tokens, tokens[:, :2]], 1))
    assert kinds[-2:] == ["step", "step"]
    assert before[0].data_ptr() == after[0].data_ptr() and not after[0].is_contiguous()
    after[0][:, -1] = -torch.inf  # is noticed: from here on results are copies
    assert check(strided, torch.cat([tokens, tokens[:, :3]], 1))[0].data_ptr() != after[0].data_ptr()


def test_results_of_several_rows_that_callers_write_into(fast: nn.Module, kinds: list[str]) -> None:
    tokens = ids(14, batch=3)
    for length in range(4, 15):
        results = check(fast, tokens[:, :length])
        results[0][:, -1] = -torch.inf
    assert results[0].is_contiguous() and type(results[0]) is Tensor


def test_results_that_callers_write_into_are_noticed(fast: nn.Module, kinds: list[str]) -> None:
    tokens = ids(14)
    for length in range(4, 15):
        results = check(fast, tokens[:, :length])
        results[0][:, -1] = -torch.inf
        results[1].mul_(2)
    assert any(p._copies for p in reuse._reusing)


def test_writing_into_results_ends_no_reuse(fast: nn.Module, kinds: list[str]) -> None:
    tokens = ids(14)
    for length in range(4, 15):
        check(fast, tokens[:, :length])[0][:, -1] = 0
    assert kinds[-3:] == ["step", "step", "step"]


def test_inference_mode(fast: nn.Module, kinds: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.inference_mode():
        tokens = ids(9)
        for length in range(4, 10):
            results = check(fast, tokens[:, :length])
    results[0].zero_()
    check(fast, ids(10))
    assert "step" in kinds


def test_changed_weights_are_noticed(fast: nn.Module, kinds: list[str]) -> None:
    tokens = loop(fast)
    model = fast._orig_mod
    model.head.weight.mul_(1.5)
    check(fast, tokens)
    loop(fast)
    model.load_state_dict({k: v * 1.01 for k, v in model.state_dict().items()})
    check(fast, ids(11))
    loop(fast)
    model.head.weight.data = model.head.weight.data * 2
    check(fast, ids(11))


def test_reset_forgets_writes_that_torch_does_not_count(fast: nn.Module, kinds: list[str]) -> None:
    tokens = loop(fast)
    model = fast._orig_mod
    model.head.weight.data.mul_(0.5)
    llmcomp.reset(model)
    assert kept() == 0
    check(fast, tokens)


def test_reset_of_another_model_changes_nothing(fast: nn.Module, kinds: list[str]) -> None:
    loop(fast)
    before = kept()
    llmcomp.reset(nn.Linear(2, 2))
    assert kept() == before > 0
    llmcomp.reset()
    assert kept() == 0


def test_two_models_of_one_class_share_no_cache(fast: nn.Module, kinds: list[str]) -> None:
    other = sm.Decoder(fast._orig_mod.design).requires_grad_(False)
    other.head.weight.neg_()
    tokens = loop(fast)
    call = torch.compile(other, backend="llmcomp", dynamic=True)
    check(call, tokens)
    loop(call)
    check(fast, tokens)


@pytest.mark.slow
def test_caches_go_with_their_weights() -> None:
    model = sm.Decoder(sm.Design()).requires_grad_(False)
    call = torch.compile(model, backend="llmcomp", dynamic=True)
    llmcomp.reset()
    loop(call, stop=7)
    assert kept() > 0
    del model, call
    gc.collect()
    assert kept() == 0


def test_the_bound_on_memory_evicts_the_least_recently_used(fast: nn.Module, kinds: list[str]) -> None:
    loop(fast, seed=1)
    one = kept()
    with bound(int(one * 2.5)):
        for seed in (2, 3):
            loop(fast, seed=seed)
        assert kept() == 2 * one
        kinds.clear()
        check(fast, torch.cat([ids(10, seed=3), ids(1)], 1))
        check(fast, torch.cat([ids(10, seed=1), ids(1)], 1))
        assert kinds == ["step"]


def test_a_bound_below_one_cache_says_so(fast: nn.Module, kinds: list[str], caplog: pytest.LogCaptureFixture) -> None:
    with bound(1):
        loop(fast)
    assert kept() == 0 and "kv_cache_bytes" in caplog.text


def test_a_full_device_is_no_failure(
    fast: nn.Module, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*args: object) -> None:
        raise MemoryFullError("expected 1 MiB")

    llmcomp.reset()
    monkeypatch.setattr(ReusingProgram, "_run", full)
    loop(fast)
    assert kept() == 0 and "expected 1 MiB" in caplog.text


@contextmanager
def bound(most: int) -> Iterator[None]:
    """Programs keep at most so many bytes."""
    before = [(p, p._most) for p in reuse._reusing]
    for program, _ in before:
        program._most = most
    yield
    for program, value in before:
        program._most = value


@pytest.mark.slow
def test_threads(fast: nn.Module, kinds: list[str]) -> None:
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            with torch.no_grad():
                loop(fast, 4, 24, seed=seed % 2)
        except BaseException as error:  # told to the main thread
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_nothing_piles_up(fast: nn.Module, kinds: list[str]) -> None:
    for seed in range(30):
        fast(ids(5, seed=100 + seed))
    assert all(len(p._entries) <= reuse.REMEMBERED for p in reuse._reusing) and kept() == 0
    tokens = ids(60)
    loop(fast, 4, 8)
    for length in range(9, 60):
        check(fast, tokens[:, :length])
    assert sum(bool(e.slots) for p in reuse._reusing for e in p._entries) == 1


def test_verify_names_the_program_that_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    model = sm.Decoder(sm.Design()).requires_grad_(False)
    call = torch.compile(model, backend="llmcomp", dynamic=True, options={"verify": True})
    for length in range(4, 7):
        check(call, ids(length))
    run = ReusingProgram._outputs

    def wrong(self: ReusingProgram, kind: str | None, *args: Any) -> object:
        step = self._programs.get("step")
        if step is not None:
            self._programs["step"] = lambda *inputs: tuple(t + 1 for t in step(*inputs))  # type: ignore[assignment]
        return run(self, kind, *args)

    program = next(p for p in reuse._reusing if p._unverified == {"step", "chunk"})
    check(call, ids(7))  # compiles the step, and checks it
    program._unverified.add("step")
    monkeypatch.setattr(ReusingProgram, "_outputs", wrong)
    with pytest.raises(llmcomp.VerifyError, match="the step program of insert_kv_cache changed the result at output 0"):
        call(ids(8))


def test_switched_off() -> None:
    model = sm.Decoder(sm.Design()).requires_grad_(False)
    before = len(reuse._reusing)
    call = torch.compile(model, backend="llmcomp", dynamic=True, options={"kv_cache": "off"})
    check(call, ids(5))
    assert len(reuse._reusing) == before


def test_training_is_left_alone() -> None:
    model = sm.Decoder(sm.Design())
    before = len(reuse._reusing)
    call = torch.compile(model, backend="llmcomp", dynamic=True)
    call(ids(5))[0].sum().backward()
    assert len(reuse._reusing) == before and model.head.weight.grad is not None
