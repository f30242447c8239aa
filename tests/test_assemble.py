"""Every family as machine code for two generations of GPUs, and what the assembler reports of it."""

import pytest
import sympy
import torch

from llmcomp.codegen.assemble import Assembly, assemble, assemble_launch, load_bytes, record
from llmcomp.codegen.build import Source
from llmcomp.codegen.kernel import Kernel
from llmcomp.codegen.triton import render
from llmcomp.errors import BuildError
from tests import test_triton, test_triton_attend, test_triton_contract
from tests.triton_kernels import load
from tests.triton_worker import assembled

BF16, F32 = torch.bfloat16, torch.float32
S0 = sympy.Symbol("s0", integer=True, nonnegative=True)


def assemblies(kernel: Kernel, sizes: tuple[int, ...], capability: int) -> list[Assembly]:
    """What the launcher of a kernel launches for these sizes, compiled."""
    buffers = [torch.empty(64, dtype=b.dtype, device="meta") for b in kernel.buffers]
    launches = record(load(render(kernel)), buffers, sizes)
    found = [assemble_launch(one, capability) for one in launches]
    for one in found:
        assert one.spills == 0, f"{one} at {launches}"
        assert 0 < one.registers <= 255
        assert one.shared <= (163 if capability == 80 else 227) * 1024
    return found


@assembled
def test_map_and_rows() -> None:
    (one,) = assemblies(test_triton.gather(True), (4096,), 90)
    assert one.name == "embedding"
    (one,) = assemblies(test_triton.layer_norm(2048, BF16), (64,), 80)
    assert one.widest_load == 16


@assembled
@pytest.mark.parametrize("capability,normed", [(80, True), (90, False)])
def test_decode_contract_streams_weights_in_loads_of_16_bytes(capability: int, normed: bool) -> None:
    kernel = test_triton_contract.qkv(1, 2048, 32, 8, 64, BF16, normed)
    (one,) = assemblies(kernel, (), capability)
    assert one.narrowest_streamed_load == 16
    assert one.tensor_core_instructions == 0


@assembled
def test_decode_contract_of_four_rows_and_of_experts() -> None:
    (one,) = assemblies(test_triton_contract.gated(S0, 2048, 8192, BF16), (4,), 80)
    assert one.narrowest_streamed_load == 16
    (one,) = assemblies(test_triton_contract.experts(S0, 8, 1024, 512, BF16, True), (8,), 90)
    assert one.narrowest_streamed_load == 16


@assembled
@pytest.mark.parametrize("capability,rows", [(80, 16), (90, 512)])
def test_prefill_contract_uses_tensor_cores(capability: int, rows: int) -> None:
    (one,) = assemblies(test_triton_contract.gated(S0, 2048, 8192, BF16), (rows,), capability)
    assert one.tensor_core_instructions > 0
    assert ("HGMMA" in one.sass) == (capability == 90 and rows == 512)
    assert one.widest_load == 16


@assembled
def test_float32_contract_stays_exact() -> None:
    (one,) = assemblies(test_triton_contract.linear(256, 512, 512, F32), (), 80)
    assert one.tensor_core_instructions == 0  # tf32 would lose 13 bits


@assembled
@pytest.mark.parametrize("capability,dim", [(80, 128), (90, 64)])
def test_attend(capability: int, dim: int) -> None:
    case = test_triton_attend.Case(1, 1, heads=32, kv_heads=8, dim=dim, dtype=BF16, window=dim * 8)
    kernel = test_triton_attend.attend(case)
    sizes = (512, 512) if capability == 90 else (1, 4096)
    found = assemblies(kernel, sizes, capability)
    forms = ("prefill",) if capability == 90 else ("decode", "combine")
    assert [one.name for one in found] == [f"attention_{form}" for form in forms]
    assert found[0].tensor_core_instructions > 0
    assert found[0].widest_load == 16


@assembled
@pytest.mark.parametrize("capability,sizes", [(80, (1, 4096)), (90, (1, 4096)), (90, (512, 512))])
def test_attend_that_looks_its_keys_up(capability: int, sizes: tuple[int, ...]) -> None:
    case = test_triton_attend.Case(1, 1, heads=32, kv_heads=8, dim=64, dtype=BF16, mask="bool")
    kernel = test_triton_attend.attend(case)
    assert kernel.visible is not None
    assert assemblies(kernel, sizes, capability)[0].widest_load == 16


FP8 = torch.float8_e4m3fn
CODED = [(80, torch.int8, (1, 4096)), (80, torch.int8, (512, 512)), (90, torch.int8, (1, 4096)),
         (90, torch.int8, (512, 512)), (80, FP8, (1, 4096)), (90, FP8, (1, 4096)), (90, FP8, (512, 512))]  # fmt: skip


@assembled
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("capability,codes,sizes", CODED)
def test_attend_over_codes(capability: int, codes: torch.dtype, sizes: tuple[int, ...], dim: int) -> None:
    case = test_triton_attend.Case(1, 1, heads=32, kv_heads=8, dim=dim, dtype=BF16, codes=codes)
    found = assemblies(test_triton_attend.attend(case), sizes, capability)
    assert found[0].tensor_core_instructions > 0
    assert found[0].widest_load == 16


SPILLING = """\
import triton
import triton.language as tl


@triton.jit
def greedy(x_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(x_ptr + i[:, None] * N + i[None, :])
    tl.store(out_ptr + i[:, None] * N + i[None, :], x + tl.sum(x * x) + tl.sum(tl.exp(x)))
"""


@assembled
def test_spills_are_counted() -> None:
    function = load(Source("greedy", "triton", SPILLING)).greedy
    signature = {"x_ptr": "*fp32", "out_ptr": "*fp32", "N": "constexpr"}
    spilling = assemble(function, signature, {"N": 64}, 90, {"num_warps": 1, "maxnreg": 64})
    assert spilling.spills > 0
    assert "spills" in str(spilling)
    clean = assemble(function, signature, {"N": 16}, 90, {"num_warps": 4})
    assert clean.spills == 0
    assert clean.cubin.startswith(b"\x7fELF") and ".target sm_90" in clean.ptx


BROKEN = """\
import triton
import triton.language as tl


@triton.jit
def broken(x_ptr, N: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, N))
    tl.store(x_ptr, x + undefined)
"""


@assembled
def test_errors_show_the_line() -> None:
    function = load(Source("broken", "triton", BROKEN)).broken
    with pytest.raises(BuildError, match="expected broken to compile for sm_80.*(?s:.*)undefined"):
        assemble(function, {"x_ptr": "*fp32", "N": "constexpr"}, {"N": 16}, 80)


@pytest.mark.parametrize("opcode,width", [("LDG.E.EF.128", 16), ("LDG.E.U16", 2), ("LDGSTS.E.64", 8), ("LDG.E", 4)])
def test_load_bytes(opcode: str, width: int) -> None:
    assert load_bytes(opcode) == width
