"""`options={"kv_dtype": ...}` in a loop of model(ids) whose model returns no cache: what the program keeps is codes."""

import pytest
import torch

from llmcomp import reuse
from llmcomp.passes.insert_kv_cache import Slot
from tests.test_kv_cache import gemma2, gpt2, llama, tokens
from tests.test_kv_dtype import HELD, KV_DTYPES, Make, pair, rounding

STEPS, BEFORE = 10, 5


def kept() -> dict[torch.dtype, int]:
    """Bytes that programs keep between calls, by dtype."""
    found: dict[torch.dtype, int] = {}
    for program in reuse._reusing:
        for entry in program._entries:
            for tensor in entry.slots:
                found[tensor.dtype] = found.get(tensor.dtype, 0) + tensor.nbytes
    return found


def slots() -> list[Slot]:
    return [slot for program in reuse._reusing for slot in program._plan.slots]


@pytest.mark.parametrize(
    "make, rows, kv_dtype",
    [
        (llama, 1, "int8"),
        pytest.param(llama, 3, "fp8", marks=pytest.mark.slow),
        pytest.param(gpt2, 1, "int8", marks=pytest.mark.slow),
        pytest.param(gemma2, 2, "fp8", marks=pytest.mark.slow),
    ],
)
def test_what_is_kept_is_codes(make: Make, rows: int, kv_dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert kv_dtype in KV_DTYPES
    eager, compiled = pair(make, kv_dtype)
    reuse.reset()
    steps: list[str] = []
    run = reuse.ReusingProgram._run
    monkeypatch.setattr(
        reuse.ReusingProgram, "_run", lambda self, kind, *args: (steps.append(kind), run(self, kind, *args))[1]
    )
    ids = tokens(rows, BEFORE + STEPS)
    with torch.no_grad():
        for length in range(BEFORE, BEFORE + STEPS):
            found = compiled(ids[:, :length], use_cache=False).logits
            expected = eager(ids[:, :length], past_key_values=rounding(eager, kv_dtype)).logits
            exact = eager(ids[:, :length], use_cache=False).logits
            if length > BEFORE:  # the first call has sizes of its own: one graph that never grows
                torch.testing.assert_close(found, expected, rtol=0, atol=2e-4)
                assert not torch.allclose(found, exact, rtol=0, atol=1e-6), "nothing was rounded"
    assert steps.count("step") >= STEPS - 4
    codes = HELD[kv_dtype][0]
    attended = [value(slot) for slot in slots() if slot.attended]
    assert {t.dtype for t in attended} == {codes, torch.float32}
    assert all(t.shape[-1] == 1 for t in attended if t.dtype == torch.float32), "scales"
    assert len(slots()) == len(attended) + 1, "the logits"
    sizes = [t.shape[1] * t.shape[-1] for t in attended if t.dtype == codes]  # heads times channels
    assert kept()[codes] == rows * (BEFORE + STEPS - 1) * sum(sizes)


def value(slot: Slot) -> torch.Tensor:
    tensor: torch.Tensor = slot.node.meta["val"]
    return tensor
