"""Every Triton kernel of a model, checked against eager and assembled; the sweep does all models.

What needs transformers imports it where it runs: it takes seconds, and each process of a test run imports this file.
"""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llmcomp.codegen.kernel import Attend, Contract, Kernel
from llmcomp.codegen.triton import render
from tests.test_triton_contract import BF16, F32, linear
from tests.triton_regions import Regions, assembled_verdict, compare, load_bytes_wanted
from tests.triton_worker import assembled, interpreted

FAMILIES = {"Map", "Rows", "Contract", "Attend"}


@pytest.mark.sweep
def test_kernels_of_every_architecture() -> None:
    from tests.triton_sweep import main

    assert main([]) == 0


def seen_in_llama(regions: Regions) -> Regions:
    """The kernels of a prefill and of decode steps with a static cache."""
    from tests.models import case_named
    from tests.triton_sweep import run_case

    run_case(case_named("llama"), torch.bfloat16, regions, ["static"])
    return regions


def complaints(regions: Regions) -> str:
    return "\n".join(f"{key} {k.verdict}: {k.detail}" for key, k in regions.kernels.items() if k.verdict != "ok")


@interpreted
def test_kernels_of_llama_compute_what_eager_does() -> None:
    regions = seen_in_llama(Regions(calls=2))
    assert not complaints(regions), complaints(regions)
    assert {type(k.kernel).__name__ for k in regions.kernels.values()} == FAMILIES
    assert len(regions.kernels) >= 20


@interpreted
def test_kernels_of_a_dynamic_gpt2_compute_what_eager_does() -> None:
    from tests.models import case_named

    regions, case = Regions(calls=2), replace(case_named("gpt2"), settings=lambda: {"n_layer": 1})
    model = case.build()
    torch._dynamo.reset()
    model.compile(backend=regions.backend, dynamic=True)
    with torch.no_grad():
        for shape in ((2, 5), (3, 4)):
            model(**case.inputs(*shape))
    assert not complaints(regions), complaints(regions)
    assert len(regions.kernels) >= 6 and all(len(k.sizes) == 2 for k in regions.kernels.values() if k.sizes != [()])


class Broken(Regions):
    """Runs other kernels than those it was given: every addition is a subtraction."""

    def see(self, lowered, source, sizes, check):  # type: ignore[no-untyped-def]
        super().see(lowered, source, sizes, lambda s: check(replace(s, text=s.text.replace("mul + ", "mul - "))))


@interpreted
def test_a_wrong_kernel_is_seen() -> None:
    def seen(regions: Regions) -> Counter[str]:
        torch._dynamo.reset()
        with torch.no_grad():
            torch.compile(lambda x, y: (x * 2 + y, x.sum(-1)), backend=regions.backend)(
                torch.randn(3, 8), torch.randn(8)
            )
        return Counter(k.verdict for k in regions.kernels.values())

    assert seen(Regions(calls=1))["ok"] >= 2
    assert seen(Broken(calls=1))["wrong"] == 1


def is_decode(kernel: Kernel) -> bool:
    """Whether a kernel belongs to a decode step of two rows."""
    match kernel:
        case Contract():
            return bool(kernel.rows.size == 2)
        case Attend():
            return bool(kernel.queries.size == 1)
    return False


@assembled
def test_kernels_of_a_decode_step_assemble() -> None:
    regions = seen_in_llama(Regions(calls=1, interpret=False))
    names = {k.kernel.name: k for k in regions.kernels.values() if is_decode(k.kernel)}
    assert len(names) == 5, "q/k/v, attention, o and down, gate and up, the head"
    for found in (k for name, k in names.items() if "rope" in name or "gated" in name or "attention" in name):
        dtypes, wanted = [b.dtype for b in found.kernel.buffers], load_bytes_wanted(found.kernel)
        assert wanted == (16 if isinstance(found.kernel, Contract) else 0)
        assert assembled_verdict(found.source, dtypes, found.sizes, 90, wanted) == ("ok", ""), found.source.name


@assembled
def test_what_is_wrong_with_machine_code_is_seen() -> None:
    source, buffers = render(linear(1, 64, 32, BF16)), [BF16] * 5
    assert assembled_verdict(source, buffers, [()], 90, 16) == ("ok", "")
    assert assembled_verdict(source, buffers, [()], 90, 32)[0] == "narrow"
    broken = replace(source, text=source.text.replace("acc = tl.sum(acc", "acc = tl.nothing(acc"))
    assert assembled_verdict(broken, buffers, [()], 90, 16)[0] == "error"
    short = replace(source, text=source.text.replace("**config.options()", '**config.options() | {"maxnreg": 24}'))
    assert assembled_verdict(short, buffers, [()], 90, 16)[0] == "spills"


def test_loads_are_wanted_as_wide_as_weights_lie() -> None:
    assert load_bytes_wanted(linear(1, 64, 32, BF16)) == 16
    assert load_bytes_wanted(linear(1, 100, 37, BF16)) == 8
    assert load_bytes_wanted(linear(1, 100, 37, F32)) == 16
    assert load_bytes_wanted(linear(1, 100, 37, BF16, kn=True)) == 2


def test_results_are_compared_with_eager() -> None:
    exact = torch.randn(9, 50)
    eager = exact.bfloat16()
    compare("x", eager.clone(), eager, exact)
    compare("x", exact, eager.float(), exact)  # a float32 result may be nearer to the truth than eager's
    for wrong in (eager * 1.1, eager.where(exact < 2, float("nan")), eager[1:]):
        with pytest.raises(AssertionError, match="x: expected"):
            compare("x", wrong, eager, exact)
    masked = exact.masked_fill(exact > 1, float("-inf"))
    compare("x", masked * 1.000001, masked, masked)
    with pytest.raises(AssertionError):
        compare("x", exact, masked, masked)


def test_the_store_resumes_and_forgets(tmp_path: Path) -> None:
    from tests.triton_sweep import CaseRecord, KernelRecord, Store, main

    def kernel(key: str, case: str, verdict: str) -> KernelRecord:
        return KernelRecord(key, case, "float32", "Map", "k", "text", ["float32"], [[1]], 0, {"interpreted": verdict})

    path = tmp_path / "out.json"
    cases = [CaseRecord("llama", "float32", kernels=["a", "b"]), CaseRecord("gpt2", "float32", kernels=["b"])]
    Store(path).add(cases, [kernel("a", "llama", "ok"), kernel("b", "llama", "ok")])
    assert main(["--json", str(path), "--only", "llama,gpt2", "--dtypes", "float32"]) == 0
    Store(path).add([], [kernel("b", "llama", "wrong")])
    assert main(["--json", str(path), "--only", "gpt2", "--dtypes", "float32"]) == 1
    store = Store(path)
    store.forget("llama")
    assert list(store.kernels) == [] and list(store.cases) == [("gpt2", "float32")]
