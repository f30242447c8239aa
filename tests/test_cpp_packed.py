"""Quantized weights in C++ Contracts: every format, few and many rows, odd sizes; few or no vectors; the sanitizers."""

from dataclasses import replace

import pytest
import torch

from llmcomp.codegen.cpp_contract import render_contract
from llmcomp.formats import names, parse_format
from tests.cpp_kernels import Library, size
from tests.numerics import assert_equal_float32, assert_no_worse
from tests.packed_kernels import packed_buffers, packed_linear

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
S0 = size("s0")
# Format, dtype of the operand, depth, columns: whole blocks, and depths and columns that are none.
SHAPES = [(name, dtype, 256, 45) for name in names() for dtype in (F32, BF16)]
SHAPES += [(name, dtype, 96, 7) for name in ("int8", "int8_g32", "int4_g32", "mxfp4") for dtype in (F32, F16)]
SHAPES += [("int8", F32, 50, 33), ("fp8", BF16, 50, 3), ("int4", BF16, 2304, 64), ("nf4", F32, 64, 130)]


def name_of(name: str, dtype: torch.dtype, k: int, n: int) -> str:
    return f"{name}_{str(dtype).split('.')[1]}_{k}_{n}"


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Library]:
    """One library a kernel: the table of a format is a constant of its file."""
    folder = tmp_path_factory.mktemp("packed")
    kernels = {name_of(*s): packed_linear(S0, s[2], s[3], parse_format(s[0]), s[1]) for s in SHAPES}
    return {name: Library([render_contract(replace(k, name=name))], folder) for name, k in kernels.items()}


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: name_of(*s))
@pytest.mark.parametrize("threads", [1, 2])
def test_every_format(library: dict[str, Library], shape: tuple[str, torch.dtype, int, int], threads: int) -> None:
    name, dtype, k, n = shape
    form = parse_format(name)
    for rows in (1, 2, 3, 8, 9, 40):  # registers, and a tile that is unpacked once
        buffers, exact = packed_buffers(rows, k, n, form, dtype)
        assert library[name_of(*shape)].call(name_of(*shape), buffers, [rows], threads) == 0
        if dtype == F32:
            assert_equal_float32(buffers[-1], exact.float())
        else:
            assert_no_worse(buffers[-1], exact.to(dtype), exact)
