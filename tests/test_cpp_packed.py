"""Quantized weights in C++ Contracts: every format, few and many rows, odd sizes; few or no vectors; the sanitizers."""

import ctypes
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llmcomp.codegen.build import Compiler, find_compiler
from llmcomp.codegen.cache import Cache
from llmcomp.codegen.cpp_contract import render_contract
from llmcomp.formats import names, parse_format
from tests.cpp_kernels import Call, Library, sanitize, size
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


def unoptimized(folder: Path, flags: tuple[str, ...] = ()) -> Compiler:
    """The compiler, in a hurry: many texts are tested, not what it makes of them."""
    native = find_compiler(Cache(folder))
    assert native is not None
    return replace(native, flags=(*native.flags, *flags, "-O0"))


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    kernels = [replace(packed_linear(S0, k, n, parse_format(f), t), name=name_of(f, t, k, n)) for f, t, k, n in SHAPES]
    folder = tmp_path_factory.mktemp("packed")
    return Library([render_contract(kernel) for kernel in kernels], folder, unoptimized(folder))


def leave_nans_behind() -> None:
    """What the next allocations find in memory that nobody has set is not a number."""
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    pieces = [(libc.malloc(length), length) for length in (2**k for k in range(8, 17))]
    for piece, length in pieces:
        ctypes.memset(piece, 0xFF, length)
    for piece, _ in pieces:
        libc.free(piece)


def check(library: Library, symbol: str, shape: tuple[str, torch.dtype, int, int]) -> None:
    name, dtype, k, n = shape
    form = parse_format(name)
    for rows, threads in ((1, 1), (1, 2), (2, 1), (3, 2), (8, 1), (9, 2), (40, 2)):  # above 8 a tile is unpacked once
        buffers, exact = packed_buffers(rows, k, n, form, dtype)
        leave_nans_behind()
        assert library.call(symbol, buffers, [rows], threads) == 0
        if dtype == F32:
            assert_equal_float32(buffers[-1], exact.float())
        else:
            assert_no_worse(buffers[-1], exact.to(dtype), exact)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: name_of(*s))
def test_every_format(library: Library, shape: tuple[str, torch.dtype, int, int]) -> None:
    check(library, name_of(*shape), shape)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("shape", [("int8", BF16, 256, 45), ("int4_g32", F32, 256, 45)], ids=lambda s: name_of(*s))
def test_what_is_no_finite_number_does_not_become_one(
    library: Library, shape: tuple[str, torch.dtype, int, int], number: float
) -> None:
    name, dtype, k, n = shape
    buffers, _ = packed_buffers(2, k, n, parse_format(name), dtype)
    buffers[0][1, 200] = number
    assert library.call(name_of(*shape), buffers, [2], 1) == 0
    assert bool(buffers[-1][0].isfinite().all())
    assert not bool(buffers[-1][1].isfinite().any())


@pytest.mark.parametrize("name,dtype", [("int4", BF16), ("nf4_g32", F32), ("int8", BF16)])
def test_optimized(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    kernel = packed_linear(S0, 256, 45, parse_format(name), dtype)
    check(Library([render_contract(kernel)], tmp_path), kernel.name, (name, dtype, 256, 45))


@pytest.mark.parametrize("flags", [("-mno-avx",), ("-mno-avx512f",)], ids=["sse", "avx2"])
def test_narrower_vectors(tmp_path: Path, flags: tuple[str, ...]) -> None:
    """The twins of what AVX-512 does in one instruction."""
    forms = [parse_format(name) for name in ("int4_g32", "nf4", "fp8", "int8_g32")]
    kernels = [replace(packed_linear(S0, 192, 5, form, BF16), name=f"{form}_linear") for form in forms]
    library = Library([render_contract(kernel) for kernel in kernels], tmp_path, unoptimized(tmp_path, flags))
    for form, kernel in zip(forms, kernels, strict=True):
        for rows in (1, 2, 5):
            buffers, exact = packed_buffers(rows, 192, 5, form, BF16)
            assert library.call(kernel.name, buffers, [rows], 1) == 0
            assert_no_worse(buffers[-1], exact.to(BF16), exact)


def test_nothing_outside_of_the_buffers_is_read(tmp_path: Path) -> None:
    calls = []
    for name in ("int8", "int4_g32"):
        form = parse_format(name)
        kernel = replace(packed_linear(S0, 96, 7, form, F32), name=f"{name}_linear")
        calls += [Call(kernel, packed_buffers(rows, 96, 7, form, F32)[0], [rows]) for rows in (1, 11)]
    assert sanitize(calls, tmp_path) == ""
