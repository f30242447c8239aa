"""Sequences behind the Triton target: a loop without a cache, which keeps one, and convolutions along a sequence."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llmcomp import reuse
from llmcomp.options import read_options
from llmcomp.reuse import ReusingProgram
from tests import sequence_models
from tests.test_triton_program import compiled
from tests.triton_regions import Regions, assembled_verdict
from tests.triton_worker import assembled, interpreted

BF16, F32 = torch.bfloat16, torch.float32


def kinds_of_calls() -> list[str]:
    """From now on, which programs of a loop run."""
    seen: list[str] = []
    run = ReusingProgram._run

    def spy(self: ReusingProgram, kind: str, *args: object) -> object:
        seen.append(kind)
        return run(self, kind, *args)  # type: ignore[arg-type]

    ReusingProgram._run = spy  # type: ignore[assignment, method-assign]
    return seen


@interpreted
@pytest.mark.parametrize("attention", ["sdpa", "windowed"])
def test_a_loop_computes_what_is_new(attention: str) -> None:
    design = sequence_models.Design(getattr(sequence_models, attention), keys_too=True)
    model = sequence_models.Decoder(design).requires_grad_(False)
    assert read_options({"target": "triton"}).kv_cache == "auto"
    run = ReusingProgram._run
    seen = kinds_of_calls()
    try:
        fast, tokens = compiled(model, []), torch.randint(sequence_models.VOCAB, (1, 9))
        chunks = [torch.cat([tokens[:, :6], (tokens[:, 6:] + n) % sequence_models.VOCAB], 1) for n in (1, 2)]
        for given in (*(tokens[:, :n] for n in range(4, 9)), *chunks):
            given = given.clone(memory_format=torch.contiguous_format)
            for found, eager in zip(fast(given), model(given), strict=True):
                torch.testing.assert_close(found, eager, rtol=1e-4, atol=1e-5)
    finally:
        ReusingProgram._run = run  # type: ignore[method-assign]
        reuse.reset()
    assert seen == ["fill", "step", "step", "chunk"], seen


def depthwise(x: Tensor, weight: Tensor) -> Tensor:
    """Mamba's: each channel by itself, the past alone."""
    return F.silu(F.conv1d(F.pad(x, (weight.shape[1] - 1, 0)), weight[:, None], groups=weight.shape[0]))


def of_all_channels(x: Tensor, weight: Tensor) -> Tensor:
    """Whisper's: windows times a matrix."""
    return F.gelu(F.conv1d(x, weight, weight[:, 0, 0], stride=2, padding=1))


CONVOLUTIONS: dict[str, tuple[Callable[..., Tensor], tuple[int, ...]]] = {
    "depthwise": (depthwise, (24, 4)),
    "of_all_channels": (of_all_channels, (32, 24, 3)),
}


def seen_in(name: str, dtype: torch.dtype, interpret: bool) -> Regions:
    """The kernels of a convolution of sequences of two lengths."""
    function, shape = CONVOLUTIONS[name]
    regions, weight = Regions(calls=2, interpret=interpret), torch.randn(shape).to(dtype)
    torch._dynamo.reset()
    run = torch.compile(function, backend=regions.backend, dynamic=True)
    with torch.no_grad():
        for length in (9, 14):
            run(torch.randn(2, 24, length).to(dtype), weight)
    return regions


@interpreted
@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_convolutions(name: str, dtype: torch.dtype) -> None:
    regions = seen_in(name, dtype, interpret=True)
    assert regions.kernels and all(k.verdict == "ok" for k in regions.kernels.values()), regions.kernels


@assembled
@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("capability", [80, 90])
def test_convolutions_assemble(name: str, capability: int) -> None:
    for key, found in seen_in(name, BF16, interpret=False).kernels.items():
        dtypes = [b.dtype for b in found.kernel.buffers]
        verdict = assembled_verdict(found.source, dtypes, found.sizes, capability, 0)
        assert verdict == ("ok", ""), f"{key}: {verdict}"
