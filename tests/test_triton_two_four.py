"""2:4 sparse weights in Triton Contracts: both forms, odd sizes; and what the assembler makes of them."""

import pytest
import sympy
import torch

from llmcomp.codegen.triton import render
from llmcomp.formats import parse_format
from tests.numerics import assert_no_worse
from tests.packed_kernels import packed_linear
from tests.test_assemble import assemblies
from tests.test_triton_packed import check
from tests.triton_kernels import load, run
from tests.triton_worker import assembled, interpreted
from tests.two_four_kernels import BF16, F32, sparse_buffers, sparse_linear

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


@interpreted
@pytest.mark.parametrize(
    "name,dtype",
    [
        ("int8_2:4", BF16),
        ("int8_2:4", F32),
        ("int8_g32_2:4", F32),
        ("int8_g128_2:4", BF16),
        ("int4_2:4", F32),
        ("int4_g32_2:4", F32),
        ("int4_g64_symmetric_2:4", F32),
        ("int4_2:4", BF16),
    ],
)
@pytest.mark.parametrize("rows,k,n", [(1, 256, 20), (3, 256, 33), (9, 1024, 7)])
def test_codes(name: str, dtype: torch.dtype, rows: int, k: int, n: int) -> None:
    check(rows, k, n, name, dtype)


@interpreted
@pytest.mark.parametrize("rows,k", [(1, 52), (2, 192), (20, 52)])
def test_codes_of_depths_that_are_no_whole_block(rows: int, k: int) -> None:
    check(rows, k, 9, "int8_2:4", F32)


@interpreted
@pytest.mark.parametrize("name", ["int8_g32_2:4", "int4_g32_2:4"])
@pytest.mark.parametrize("rows", [1, 20])
def test_scales_end_with_the_depth(name: str, rows: int) -> None:
    check(rows, 160, 9, name, F32)


@assembled
@pytest.mark.parametrize("rows,capability,most", [(1, 80, 5.5), (1, 90, 6), (4, 80, 9), (4, 90, 9)])
def test_decode_of_codes(rows: int, capability: int, most: float) -> None:
    """At the memory's pace a H200 has time for 4.8 of a thread: a weight takes 0.625 bytes. Dense int8 takes 4.5."""
    for name in ("int8_2:4", "int8_g64_2:4"):
        kernel = packed_linear(rows, DEEP, 2048, parse_format(name), BF16)
        (one,) = assemblies(kernel, (), capability)
        config = load(render(kernel)).default(())
        weights = config["BLOCK_N"] * config["BLOCK_K"] * 8 / (32 * config.warps)
        assert one.loop.total() / weights <= most
        assert one.narrowest_streamed_load == 16 and one.tensor_core_instructions == 0


@assembled
@pytest.mark.parametrize("rows,most", [(1, 6.5), (4, 10)])
@pytest.mark.parametrize("capability", [80, 90])
def test_decode_of_codes_of_4_bits(rows: int, capability: int, most: float) -> None:
    """At the memory's pace a H200 has time for 3 of a thread: it is the choosing of operands that takes longer."""
    for name in ("int4_2:4", "int4_g32_2:4"):
        kernel = packed_linear(rows, DEEP, 2048, parse_format(name), BF16)
        (one,) = assemblies(kernel, (), capability)
        config = load(render(kernel)).default(())
        weights = config["BLOCK_N"] * config["BLOCK_K"] * 16 / (32 * config.warps)
        assert one.loop.total() / weights <= most
        assert one.narrowest_streamed_load == 16 and one.tensor_core_instructions == 0


@assembled
@pytest.mark.parametrize("capability,instruction", [(80, "HMMA"), (90, "HGMMA")])
def test_prefill_of_codes(capability: int, instruction: str) -> None:
    for name in ("int8_2:4", "int8_g64_2:4", "int4_2:4", "int4_g32_2:4"):
        kernel = packed_linear(S0, 2048, 2048, parse_format(name), BF16)
        (one,) = assemblies(kernel, (512,), capability)
        assert any(op.startswith(instruction) for op in one.instructions)


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
