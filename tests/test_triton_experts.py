"""Quantized weights of experts in Triton: rows pick their matrix, codes and scales, in both forms of a Contract."""

import pytest
import sympy
import torch

from llmcomp.formats import names, parse_format
from tests.numerics import assert_equal_float32, assert_no_worse
from tests.packed_kernels import expert_buffers, packed_experts
from tests.test_assemble import assemblies
from tests.triton_kernels import run
from tests.triton_worker import assembled, interpreted

BF16, F32 = torch.bfloat16, torch.float32
S0 = sympy.Symbol("s0", integer=True, nonnegative=True)
FORMATS = [name for name in names() if not parse_format(name).dynamic]


def check(name: str, ends: tuple[int, ...], rows: int, k: int, n: int, dtype: torch.dtype) -> None:
    form = parse_format(name)
    buffers, exact = expert_buffers(ends, rows, k, n, form, dtype)
    run(packed_experts(S0, len(ends), k, n, form, dtype), buffers, [rows])
    if dtype == F32:
        assert_equal_float32(buffers[-2], exact.float())
    else:
        assert_no_worse(buffers[-2], exact.to(dtype), exact)


@interpreted
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("ends, rows", [((0, 1, 1, 3), 4), ((20, 20, 41), 44)])
def test_every_format(name: str, ends: tuple[int, ...], rows: int) -> None:
    check(name, ends, rows, 256, 20, F32)


@interpreted
@pytest.mark.parametrize("name", ["int8", "int4_g32"])
@pytest.mark.parametrize("ends, rows", [((1, 2), 2), ((9, 30), 30)])
def test_odd_sizes_in_bfloat16(name: str, ends: tuple[int, ...], rows: int) -> None:
    check(name, ends, rows, 96, 33, BF16)


@assembled
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", ["int4", "int8", "mxfp4"])
def test_assembled(name: str, capability: int) -> None:
    kernel = packed_experts(S0, 8, 2048, 768, parse_format(name), BF16)
    (few,) = assemblies(kernel, (8,), capability)
    assert few.narrowest_streamed_load == 16 and few.tensor_core_instructions == 0
    (many,) = assemblies(kernel, (4096,), capability)
    assert many.tensor_core_instructions > 0 and many.widest_load == 16
