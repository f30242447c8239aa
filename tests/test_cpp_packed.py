"""Quantized weights in C++ Contracts: every format, few and many rows, odd sizes; few or no vectors; the sanitizers."""

import ctypes
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llmcomp.codegen.build import HEADERS, Compiler, find_compiler
from llmcomp.codegen.cache import Cache
from llmcomp.codegen.cpp_contract import render_contract
from llmcomp.codegen.kernel import Contract
from llmcomp.formats import names, parse_format
from tests.cpp_kernels import Call, Library, sanitize, size
from tests.numerics import assert_equal_float32, assert_no_worse
from tests.other_machines import arm, run_on_arm
from tests.packed_kernels import packed_buffers, packed_linear

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
S0 = size("s0")
# Format, dtype of the operand, depth, columns: whole blocks, and depths and columns that are none.
SHAPES = [(name, dtype, 256, 45) for name in names() for dtype in (F32, BF16)]
SHAPES += [(name, dtype, 96, 7) for name in ("int8", "int8_g32", "int4_g32", "mxfp4") for dtype in (F32, F16)]
SHAPES += [("int8_dynamic", F32, 2304, 64), ("int8_dynamic", F16, 50, 33), ("fp8_dynamic", F16, 50, 33)]
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
    for rows, threads in ((1, 1), (1, 2), (2, 1), (3, 2), (8, 1), (9, 2), (47, 2)):  # above 8 a tile is unpacked once
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
@pytest.mark.parametrize("rows", [2, 20])
@pytest.mark.parametrize("name", ["int8", "int4_g32", "int8_dynamic", "fp8_dynamic"])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_what_is_no_finite_number_does_not_become_one(
    library: Library, name: str, dtype: torch.dtype, rows: int, number: float
) -> None:
    buffers, _ = packed_buffers(rows, 256, 45, parse_format(name), dtype)
    buffers[0][1, 200] = number
    assert library.call(name_of(name, dtype, 256, 45), buffers, [rows], 1) == 0
    assert bool(buffers[-1][[0, *range(2, rows)]].isfinite().all())
    assert not bool(buffers[-1][1].isfinite().any())
    assert not name.endswith("dynamic") or bool(buffers[-1][1].isnan().all())


@pytest.mark.parametrize("rows", [2, 20])
@pytest.mark.parametrize("name", ["int8_dynamic", "fp8_dynamic"])
def test_tokens_of_zeros_and_of_the_smallest_numbers(library: Library, name: str, rows: int) -> None:
    buffers, _ = packed_buffers(rows, 256, 45, parse_format(name), F32)
    buffers[0][0], buffers[0][1] = 0, 3e-45
    assert library.call(name_of(name, F32, 256, 45), buffers, [rows], 1) == 0
    assert torch.equal(buffers[-1][0], buffers[-2]) and torch.equal(buffers[-1][1], buffers[-2])  # the bias


@pytest.mark.parametrize("rows", [1, 20])
def test_sums_of_codes_are_exact(library: Library, rows: int) -> None:
    form = parse_format("int8_dynamic")
    (x, codes, scale, bias, out), _ = packed_buffers(rows, 2304, 64, form, F32)
    x.fill_(127), codes.fill_(127), scale.fill_(1), bias.zero_()
    x[0, 3], codes[5, 7] = 126, -127
    expected = x.long() @ codes.long().t()
    assert library.call(name_of("int8_dynamic", F32, 2304, 64), [x, codes, scale, bias, out], [rows], 1) == 0
    assert int(expected.max()) > 2**25 and torch.equal(out, expected.float())


def test_a_code_beyond_those_of_ours(library: Library) -> None:
    """-128, which checkpoints of others hold."""
    for name, dtype in (("int8_dynamic", F32), ("int8", F32), ("int8", BF16)):
        buffers, _ = packed_buffers(2, 256, 45, parse_format(name), dtype)
        buffers[1].fill_(-128), buffers[0].fill_(-1), buffers[2].fill_(1), buffers[3].zero_()
        assert library.call(name_of(name, dtype, 256, 45), buffers, [2], 1) == 0
        assert torch.equal(buffers[-1].float(), torch.full((2, 45), 128.0 * 256))


@pytest.mark.slow
@pytest.mark.parametrize("name,dtype", [("int4", BF16), ("nf4_g32", F32), ("int8", BF16), ("int8_dynamic", BF16)])
def test_optimized(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    kernel = packed_linear(S0, 256, 45, parse_format(name), dtype)
    check(Library([render_contract(kernel)], tmp_path), kernel.name, (name, dtype, 256, 45))


OTHERS = (
    "int4_g32",
    "int4_g64",
    "int4_symmetric",
    "mxfp4",
    "nf4",
    "fp8",
    "int8",
    "int8_g32",
    "int8_dynamic",
    "fp8_dynamic",
)


def others(dtype: torch.dtype) -> list[Contract]:
    """Kernels that are built for other machines; 200 is no whole number of blocks, but the groups fit some."""
    return [
        replace(packed_linear(S0, depth(name), 37, parse_format(name), dtype), name=f"{name}_{str(dtype)[-4:]}")
        for name in OTHERS
    ]


def depth(name: str) -> int:
    return 200 if name in ("int8", "int8_dynamic", "fp8", "fp8_dynamic") else 256 if name == "int4_symmetric" else 192


def assert_right(buffers: list[torch.Tensor], exact: torch.Tensor) -> None:
    if buffers[-1].dtype == F32:
        assert_equal_float32(buffers[-1], exact.float())
    else:
        assert_no_worse(buffers[-1], exact.to(buffers[-1].dtype), exact)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("flags", [("-mno-avx",), ("-mno-avx512f",)], ids=["sse", "avx2"])
def test_narrower_vectors(tmp_path: Path, flags: tuple[str, ...], dtype: torch.dtype) -> None:
    """The twins of what AVX-512 does in one instruction."""
    kernels = others(dtype)
    library = Library([render_contract(kernel) for kernel in kernels], tmp_path, unoptimized(tmp_path, flags))
    for name, kernel in zip(OTHERS, kernels, strict=True):
        for rows in (1, 2, 5, 21):
            buffers, exact = packed_buffers(rows, depth(name), 37, parse_format(name), dtype)
            assert library.call(kernel.name, buffers, [rows], 1) == 0
            assert_right(buffers, exact)


@pytest.mark.slow
@arm
@pytest.mark.parametrize("architecture", ["armv8-a", "armv8.2-a+dotprod"])
def test_arm(tmp_path: Path, architecture: str) -> None:
    calls, expected = [], []
    for dtype in (BF16, F32):
        for name, kernel in zip(OTHERS, others(dtype), strict=True):
            if name not in ("int4_g32", "mxfp4", "int8", "int8_dynamic") or (dtype == F32 and name == "mxfp4"):
                continue
            for rows in (1, 5, 21):
                buffers, exact = packed_buffers(rows, depth(name), 37, parse_format(name), dtype)
                calls.append(Call(kernel, buffers, [rows]))
                expected.append(exact)
    run_on_arm(calls, tmp_path, architecture)
    for call, exact in zip(calls, expected, strict=True):
        assert_right(list(call.buffers), exact)


@pytest.mark.parametrize(
    "flags,instruction",
    [
        ("-mno-avx512f -mavxvnni", "vpdpbusd.*ymm"),
        ("-mno-avx512f -mavx2", "vpmaddwd"),
        ("-mavx512vnni", "vpdpbusd.*zmm"),
    ],
)
@pytest.mark.parametrize("name", ["int8", "int4_g32", "mxfp4", "int8_dynamic"])
def test_the_instruction_of_the_machine(tmp_path: Path, name: str, flags: str, instruction: str) -> None:
    compiler = unoptimized(tmp_path)
    text = render_contract(packed_linear(S0, 256, 45, parse_format(name), BF16)).text
    source, assembly = tmp_path / "kernel.cpp", tmp_path / "kernel.s"
    source.write_text(text)
    command = [
        *compiler.command,
        *compiler.flags,
        *flags.split(),
        f"-I{HEADERS}",
        "-S",
        str(source),
        "-o",
        str(assembly),
    ]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("this compiler does not know the instruction")
    assert re.search(instruction, assembly.read_text())


@pytest.mark.slow
def test_nothing_outside_of_the_buffers_is_read(tmp_path: Path) -> None:
    calls = []
    for name in ("int8_dynamic", "int4_g32"):
        form = parse_format(name)
        kernel = replace(packed_linear(S0, 96, 7, form, F32), name=f"{name}_linear")
        calls += [Call(kernel, packed_buffers(rows, 96, 7, form, F32)[0], [rows]) for rows in (1, 11)]
    assert sanitize(calls, tmp_path) == ""
