"""Quantized weights in Triton Contracts: every format, both forms, odd sizes; and what the assembler makes of them."""

import pytest
import sympy
import torch

from llmcomp.formats import names, parse_format
from tests.numerics import assert_equal_float32, assert_no_worse
from tests.packed_kernels import packed_buffers, packed_linear
from tests.test_assemble import assemblies
from tests.triton_kernels import run
from tests.triton_worker import assembled, interpreted

BF16, F32 = torch.bfloat16, torch.float32
S0 = sympy.Symbol("s0", integer=True, nonnegative=True)


def check(rows: int, k: int, n: int, name: str, dtype: torch.dtype) -> None:
    form = parse_format(name)
    buffers, exact = packed_buffers(rows, k, n, form, dtype)
    run(packed_linear(rows, k, n, form, dtype), buffers)
    if dtype == F32:
        assert_equal_float32(buffers[-1], exact.float())
    else:
        assert_no_worse(buffers[-1], exact.to(dtype), exact)


@interpreted
@pytest.mark.parametrize("name", [name for name in names() if not parse_format(name).dynamic])
@pytest.mark.parametrize("rows", [1, 9])
def test_every_format(name: str, rows: int) -> None:
    check(rows, 256, 20, name, F32)


@interpreted
@pytest.mark.parametrize("name", ["int8", "int8_g32", "int4_g32", "nf4"])
@pytest.mark.parametrize("rows,k,n", [(3, 64, 7), (20, 192, 40), (2, 1024, 33)])
def test_depths_that_are_no_whole_block(name: str, rows: int, k: int, n: int) -> None:
    check(rows, k, n, name, F32)


@interpreted
@pytest.mark.parametrize("name", ["int8", "fp8", "int4", "int4_g32_symmetric", "mxfp4"])
@pytest.mark.parametrize("rows", [2, 17])
def test_bfloat16(name: str, rows: int) -> None:
    check(rows, 512, 24, name, BF16)


@assembled
@pytest.mark.parametrize(
    "name,capability",  # sm_80 has no float8
    [("int8", 80), ("int4", 80), ("fp8", 90), ("int4_g32_symmetric", 90), ("nf4", 90), ("mxfp4", 90)],
)
def test_decode_streams_codes_in_loads_of_16_bytes(name: str, capability: int) -> None:
    form = parse_format(name)
    (one,) = assemblies(packed_linear(1, 2048, 2048, form, BF16), (), capability)
    assert one.widest_load == 16
    assert one.tensor_core_instructions == 0


@assembled
@pytest.mark.parametrize("name,capability", [("int8", 80), ("fp8", 90), ("int4", 90)])
def test_prefill_multiplies_on_tensor_cores(name: str, capability: int) -> None:
    (one,) = assemblies(packed_linear(S0, 2048, 2048, parse_format(name), BF16), (512,), capability)
    assert one.tensor_core_instructions > 0
