"""2:4 sparse weights in Triton Contracts: both forms, odd sizes; and what the assembler makes of them."""

import pytest
import sympy
import torch

from llmcomp.codegen.triton import render
from tests.numerics import assert_no_worse
from tests.test_assemble import assemblies
from tests.triton_kernels import load, run
from tests.triton_worker import assembled, interpreted
from tests.two_four_kernels import BF16, sparse_buffers, sparse_linear

S0 = sympy.Symbol("s0", integer=True, nonnegative=True)
DEEP = 16384  # so that the depth is walked in a loop


@interpreted
@pytest.mark.parametrize("rows", [1, 3, 9])
@pytest.mark.parametrize("k,n", [(256, 20), (192, 33), (52, 3), (1024, 40)])
def test_products(rows: int, k: int, n: int) -> None:
    torch.manual_seed(0)
    buffers, exact = sparse_buffers(rows, k, n)
    run(sparse_linear(rows, k, n), buffers)
    assert_no_worse(buffers[-1], exact.to(BF16), exact)


@assembled
@pytest.mark.parametrize("capability", [80, 90])
def test_decode_takes_few_instructions_for_a_weight(capability: int) -> None:
    """At the memory's pace a H200 has time for 8.7 of a thread: a weight takes 1.125 bytes."""
    kernel = sparse_linear(1, DEEP, 2048)
    (one,) = assemblies(kernel, (), capability)
    config = load(render(kernel)).default(())
    weights = config["BLOCK_N"] * config["BLOCK_K"] * 4 / (32 * config.warps)
    assert one.loop.total() / weights <= (4.5 if capability == 80 else 6.2) and one.spills == 0
    assert one.narrowest_streamed_load == 16 and one.spills == 0
    assert one.tensor_core_instructions == 0


@assembled
@pytest.mark.parametrize("rows,k,n,capability", [(4, 4096, 4096, 90), (2, 896, 128, 80), (1, 2048, 8192, 90)])
def test_decode_streams_what_is_kept_in_loads_of_16_bytes(rows: int, k: int, n: int, capability: int) -> None:
    (one,) = assemblies(sparse_linear(rows, k, n), (), capability)
    assert one.narrowest_streamed_load == 16 and one.spills == 0


@assembled
@pytest.mark.parametrize("capability,instruction", [(80, "HMMA"), (90, "HGMMA")])
def test_prefill_multiplies_on_tensor_cores(capability: int, instruction: str) -> None:
    (one,) = assemblies(sparse_linear(S0, 2048, 2048), (512,), capability)
    assert any(op.startswith(instruction) for op in one.instructions)
