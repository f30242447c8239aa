"""Map and Rows as C++: built by hand from their description, run, compared with torch; and their text."""

import re
import subprocess
from pathlib import Path

import pytest
import sympy
import torch
from expecttest import assert_expected_inline
from torch.nn import functional as F
from torch.utils._sympy.functions import FloorDiv, Mod

from llmcomp.codegen.build import compile_command, find_compiler
from llmcomp.codegen.cache import Cache
from llmcomp.codegen.cpp import render, symbol
from llmcomp.codegen.kernel import (
    Axis,
    Buffer,
    Check,
    Compute,
    Index,
    Load,
    Map,
    Reduce,
    Rows,
    Statement,
    Store,
)
from tests.cpp_kernels import Call, Library, axis, sanitize, size

F32, F64, BF16, F16, I32, I64, U8, BOOL = (
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.int32,
    torch.int64,
    torch.uint8,
    torch.bool,
)
A, B, C = axis("i0"), axis("i1"), axis("i2")
N, M = size("n"), size("m")
FLOATS = (F32, BF16, F16, F64)


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def computing(dtype: torch.dtype) -> torch.dtype:
    return F64 if dtype == F64 else F32


def number(value: int) -> sympy.Integer:
    return sympy.Integer(value)


# ---- kernels ---------------------------------------------------------------------------------------------


def silu_mul(dtype: torch.dtype) -> Map:
    """z = x * sigmoid(x) * y over (n, m), contiguous: one flat loop."""
    c, at = computing(dtype), A * M + B
    buffers = (Buffer("x", dtype), Buffer("y", dtype), Buffer("z", dtype, True))
    body: tuple[Statement, ...] = (
        Load("v0", "x", at, c),
        Load("v1", "y", at, c),
        Compute("v2", "sigmoid", ("v0",), c),
        Compute("v3", "mul", ("v0", "v2"), c),
        Compute("v4", "mul", ("v3", "v1"), c),
        Store("z", at, "v4"),
    )
    return Map(f"silu_mul_{short(dtype)}", buffers, (N, M), (Axis(A, N), Axis(B, M)), body)


def transpose_add(dtype: torch.dtype) -> Map:
    """z[i, j, k] = x[i, j, k] + y[j, i, k]: three axes, none of which can be merged with the last."""
    c, n, k = computing(dtype), N, number(5)
    axes = (Axis(A, n), Axis(B, M), Axis(C, k))
    body = (
        Load("v0", "x", (A * M + B) * k + C, c),
        Load("v1", "y", (B * n + A) * k + C, c),
        Compute("v2", "add", ("v0", "v1"), c),
        Store("z", (A * M + B) * k + C, "v2"),
    )
    buffers = (Buffer("x", dtype), Buffer("y", dtype), Buffer("z", dtype, True))
    return Map(f"transpose_add_{short(dtype)}", buffers, (N, M), axes, body)


def embedding(dtype: torch.dtype, wrap: bool) -> Map:
    """z[i, :] = w[ids[i], :], with rows checked."""
    c, width = computing(dtype), 48
    body = (
        Load("v0", "ids", A, I64),
        Check("v1", "v0", M, wrap),
        Load("v2", "w", axis("v1") * width + B, c),
        Store("z", A * width + B, "v2"),
    )
    buffers = (Buffer("ids", I64), Buffer("w", dtype), Buffer("z", dtype, True))
    name = f"embedding_{short(dtype)}{'_wrap' if wrap else ''}"
    return Map(name, buffers, (N, M), (Axis(A, N), Axis(B, number(width))), body)


def masked_gather() -> Map:
    """z[i] = keep[i] ? x[index[i]] : -1 and, only where kept, w[i] = index: nothing is read where masked."""
    body = (
        Load("v0", "keep", A, BOOL),
        Load("v1", "index", A, I32),
        Check("v2", "v1", M, False, "v0"),
        Load("v3", "x", axis("v2"), F32, "v0", -1.0),
        Store("z", A, "v3"),
        Store("w", A, "v1", "v0"),
    )
    buffers = (Buffer("keep", BOOL), Buffer("index", I32), Buffer("x", F32))
    buffers += (Buffer("z", F32, True), Buffer("w", I32, True))
    return Map("masked_gather", buffers, (N, M), (Axis(A, N),), body)


def cache_write(dtype: torch.dtype) -> Map:
    """cache[:, position[j], :] = value[:, j, :], the form of a static cache."""
    c, width = computing(dtype), 16
    body = (
        Load("v0", "position", B, I64),
        Check("v1", "v0", M, False),
        Load("v2", "value", (A * N + B) * width + C, c),
        Store("cache", (A * M + axis("v1")) * width + C, "v2"),
    )
    buffers = (Buffer("position", I64), Buffer("value", dtype), Buffer("cache", dtype, True))
    axes = (Axis(A, number(3)), Axis(B, N), Axis(C, number(width)))
    return Map(f"cache_write_{short(dtype)}", buffers, (N, M), axes, body)


def rope(dtype: torch.dtype) -> Map:
    """Rotary halves: z[i, c] = x[i, c] cos[i, c] + (c < 8 ? -x[i, c + 8] : x[i, c - 8]) sin[i, c]."""
    c, width = computing(dtype), 16
    body = (
        Load("v0", "x", A * width + B, c),
        Load("v1", "x", A * width + Mod(B + 8, width), c),
        Index("v2", FloorDiv(B, 8), I64),
        Compute("v3", "eq", ("v2", 0), BOOL),
        Compute("v4", "neg", ("v1",), c),
        Compute("v5", "where", ("v3", "v4", "v1"), c),
        Load("v6", "cos", A * width + B, c),
        Load("v7", "sin", A * width + B, c),
        Compute("v8", "mul", ("v0", "v6"), c),
        Compute("v9", "fma", ("v5", "v7", "v8"), c),
        Store("z", A * width + B, "v9"),
    )
    buffers = tuple(Buffer(b, dtype, b == "z") for b in ("x", "cos", "sin", "z"))
    return Map(f"rope_{short(dtype)}", buffers, (N,), (Axis(A, N), Axis(B, number(width))), body)


def in_place() -> Map:
    """x[i] = 2 * x[i]."""
    body = (Load("v0", "x", A, F32), Compute("v1", "mul", ("v0", 2), F32), Store("x", A, "v1"))
    return Map("in_place", (Buffer("x", F32, True),), (N,), (Axis(A, N),), body)


def scalar() -> Map:
    """A Map without axes."""
    body = (
        Load("v0", "x", number(0), F32),
        Compute("v1", "add", ("v0", 1), F32),
        Store("z", number(0), "v1"),
    )
    return Map("scalar", (Buffer("x", F32), Buffer("z", F32, True)), (), (), body)


def rms_norm(dtype: torch.dtype, width: sympy.Expr) -> Rows:
    c, at = computing(dtype), A * width + B
    body = (
        Load("v0", "x", at, c),
        Compute("v1", "mul", ("v0", "v0"), c),
        Reduce("v2", "sum", "v1", c),
        Index("v3", width, I64),
        Compute("v4", "convert", ("v3",), c),
        Compute("v5", "div", ("v2", "v4"), c),
        Compute("v6", "add", ("v5", 1e-6), c),
        Compute("v7", "rsqrt", ("v6",), c),
        Compute("v8", "mul", ("v0", "v7"), c),
        Load("v9", "w", B, c),
        Compute("v10", "mul", ("v8", "v9"), c),
        Store("z", at, "v10"),
    )
    buffers = (Buffer("x", dtype), Buffer("w", dtype), Buffer("z", dtype, True))
    dynamic = bool(width.free_symbols)
    name = f"rms_norm_{short(dtype)}{'_dynamic' if dynamic else ''}"
    return Rows(name, buffers, (N, M) if dynamic else (N,), (Axis(A, N),), Axis(B, width), body)


def softmax(dtype: torch.dtype) -> Rows:
    """Over the last axis of (3, n, m): maximum, sum, quotient; the row is read three times."""
    c, at = computing(dtype), (A * N + B) * M + C
    body = (
        Load("v0", "x", at, c),
        Reduce("v1", "max", "v0", c),
        Compute("v2", "sub", ("v0", "v1"), c),
        Compute("v3", "exp", ("v2",), c),
        Reduce("v4", "sum", "v3", c),
        Compute("v5", "div", ("v3", "v4"), c),
        Store("z", at, "v5"),
    )
    buffers = (Buffer("x", dtype), Buffer("z", dtype, True))
    return Rows(f"softmax_{short(dtype)}", buffers, (N, M), (Axis(A, number(3)), Axis(B, N)), Axis(C, M), body)


REDUCTIONS = ("sum", "prod", "max", "min", "any", "all", "argmax", "argmin")


def result_dtype(op: str, dtype: torch.dtype) -> torch.dtype:
    if op in ("any", "all"):
        return BOOL
    if op.startswith("arg") or (op in ("sum", "prod") and not dtype.is_floating_point):
        return I64
    return computing(dtype) if dtype.is_floating_point else dtype


def reductions(dtype: torch.dtype) -> Rows:
    """Every reduction of the same row, side by side."""
    c = computing(dtype) if dtype.is_floating_point else dtype
    body: list[Statement] = [Load("v", "x", A * M + B, c)]
    buffers = [Buffer("x", dtype)]
    for op in REDUCTIONS:
        body += [Reduce(f"r_{op}", op, "v", result_dtype(op, dtype)), Store(f"z_{op}", A, f"r_{op}")]
        buffers.append(Buffer(f"z_{op}", result_dtype(op, dtype), True))
    return Rows(f"reductions_{short(dtype)}", tuple(buffers), (N, M), (Axis(A, N),), Axis(B, M), tuple(body))


REDUCED = (F32, BF16, F64, I32, I64, U8, BOOL)
KERNELS = [
    *(f(d) for d in FLOATS for f in (silu_mul, transpose_add, cache_write, rope, softmax)),
    *(embedding(d, wrap) for d in (F32, BF16) for wrap in (False, True)),
    *(rms_norm(d, width) for d in FLOATS for width in (number(96), M)),
    *(reductions(d) for d in REDUCED),
    masked_gather(),
    in_place(),
    scalar(),
]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    return Library(KERNELS, tmp_path_factory.mktemp("cache"))


# ---- numbers -----------------------------------------------------------------------------------------------


def close(result: torch.Tensor, exact: torch.Tensor) -> None:
    """Within two roundings of the result's dtype."""
    info = torch.finfo(result.dtype)
    torch.testing.assert_close(
        result.double(), exact.double(), rtol=4 * info.eps, atol=2 * info.tiny * info.eps, equal_nan=True
    )


SHAPES = [(1, 1), (2, 3), (5, 16), (3, 1000), (1, 20000), (300, 64)]


@pytest.mark.parametrize("dtype", FLOATS, ids=short)
@pytest.mark.parametrize("threads", [1, 2])
def test_pointwise_over_many_shapes(library: Library, dtype: torch.dtype, threads: int) -> None:
    for n, m in SHAPES:
        x, y = torch.randn(n, m).to(dtype), torch.randn(n, m).to(dtype)
        z = torch.empty_like(x)
        assert library.call(silu_mul(dtype).name, [x, y, z], [n, m], threads) == 0
        close(z, F.silu(x.double()) * y.double())


@pytest.mark.parametrize("dtype", FLOATS, ids=short)
@pytest.mark.parametrize("threads", [1, 3])
def test_axes_that_stay_apart(library: Library, dtype: torch.dtype, threads: int) -> None:
    for n, m in [(1, 1), (2, 3), (70, 90)]:
        x, y = torch.randn(n, m, 5).to(dtype), torch.randn(m, n, 5).to(dtype)
        z = torch.empty_like(x)
        library.call(transpose_add(dtype).name, [x, y, z], [n, m], threads)
        assert torch.equal(z, (x.to(computing(dtype)) + y.transpose(0, 1).to(computing(dtype))).to(dtype))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=short)
def test_embedding(library: Library, dtype: torch.dtype) -> None:
    w, ids = torch.randn(50, 48).to(dtype), torch.randint(0, 50, (700,))
    z = torch.empty(700, 48, dtype=dtype)
    for threads in (1, 2):
        assert library.call(embedding(dtype, False).name, [ids, w, z], [700, 50], threads) == 0
        assert torch.equal(z, F.embedding(ids, w))
    negative = ids - 50
    assert library.call(embedding(dtype, True).name, [negative, w, z], [700, 50]) == 0
    assert torch.equal(z, w[negative])


@pytest.mark.parametrize(("bad", "wrap"), [(50, False), (-1, False), (50, True), (-51, True), (2**62, False)])
def test_index_out_of_range_is_reported(library: Library, bad: int, wrap: bool) -> None:
    w, ids = torch.randn(50, 48), torch.zeros(700, dtype=I64)
    ids[699] = bad
    z = torch.empty(700, 48)
    for threads in (1, 2):
        assert library.call(embedding(F32, wrap).name, [ids, w, z], [700, 50], threads) == 1


def test_index_into_nothing_is_reported(library: Library) -> None:
    nothing, z = torch.empty(0, 48), torch.empty(3, 48)
    assert library.call("embedding_float32", [torch.zeros(3, dtype=I64), nothing, z], [3, 0]) == 1
    assert library.call("embedding_float32", [torch.zeros(0, dtype=I64), nothing, z], [0, 0]) == 0


def test_masked_access_and_masked_check(library: Library) -> None:
    keep = torch.rand(100) < 0.5
    index = torch.where(keep, torch.randint(0, 20, (100,)), torch.full((100,), 10**9)).int()
    x, z, w = torch.randn(20), torch.empty(100), torch.full((100,), -7, dtype=I32)
    assert library.call("masked_gather", [keep, index, x, z, w], [100, 20]) == 0
    assert torch.equal(z, torch.where(keep, x[index.clamp(max=19).long()], -1.0))
    assert torch.equal(w, torch.where(keep, index, -7))
    index[keep.nonzero()[0]] = 20
    assert library.call("masked_gather", [keep, index, x, z, w], [100, 20]) == 1


@pytest.mark.parametrize("dtype", FLOATS, ids=short)
def test_cache_write(library: Library, dtype: torch.dtype) -> None:
    cache, value = torch.randn(3, 40, 16).to(dtype), torch.randn(3, 4, 16).to(dtype)
    position = torch.tensor([7, 8, 39, 0])
    expected = cache.index_copy(1, position, value)
    assert library.call(cache_write(dtype).name, [position, value, cache], [4, 40]) == 0
    assert torch.equal(cache, expected)


@pytest.mark.parametrize("dtype", FLOATS, ids=short)
def test_rope(library: Library, dtype: torch.dtype) -> None:
    x, cos, sin = (torch.randn(9, 16).to(dtype) for _ in range(3))
    z = torch.empty_like(x)
    library.call(rope(dtype).name, [x, cos, sin, z], [9])
    wide = x.double()
    exact = wide * cos.double() + torch.cat([-wide[:, 8:], wide[:, :8]], 1) * sin.double()
    torch.testing.assert_close(z.double(), exact, rtol=1e-2 if dtype in (BF16, F16) else 1e-5, atol=1e-6)


def test_in_place_every_element_once(library: Library) -> None:
    for n in (0, 1, 4097, 100_000):
        for threads in (1, 2, 3):
            x = torch.randn(n)
            expected = 2 * x
            library.call("in_place", [x], [n], threads)
            assert torch.equal(x, expected)


def test_no_axes(library: Library) -> None:
    z = torch.empty(())
    library.call("scalar", [torch.tensor(2.5), z])
    assert z == 3.5


@pytest.mark.parametrize("dtype", FLOATS, ids=short)
def test_rms_norm(library: Library, dtype: torch.dtype) -> None:
    shapes = [(1, 96, ""), (400, 96, ""), (3, 1, "_dynamic"), (2, 1500, "_dynamic"), (40, 2048, "_dynamic")]
    for n, m, name in shapes:
        x, w = torch.randn(n, m).to(dtype), torch.randn(m).to(dtype)
        z = torch.empty_like(x)
        for threads in (1, 2):
            library.call(f"rms_norm_{short(dtype)}{name}", [x, w, z], [n, m] if name else [n], threads)
            close(z, F.rms_norm(x.double(), (m,), w.double(), 1e-6))


@pytest.mark.parametrize("dtype", FLOATS, ids=short)
def test_softmax(library: Library, dtype: torch.dtype) -> None:
    for n, m in SHAPES:
        x = torch.randn(3, n, m).to(dtype) * 5
        z = torch.empty_like(x)
        for threads in (1, 2):
            library.call(softmax(dtype).name, [x, z], [n, m], threads)
            exact = x.double().softmax(-1)
            torch.testing.assert_close(z.double(), exact, rtol=8 * torch.finfo(dtype).eps, atol=1e-7)


def reduce_reference(op: str, x: torch.Tensor) -> torch.Tensor:
    if op in ("max", "min"):
        return getattr(torch, f"a{op}")(x, dim=1)
    return getattr(torch, op)(x, dim=1)


@pytest.mark.parametrize("dtype", REDUCED, ids=short)
@pytest.mark.parametrize("m", [1, 7, 40, 3000])
def test_every_reduction(library: Library, dtype: torch.dtype, m: int) -> None:
    n = 9
    if dtype == BOOL:
        x = torch.rand(n, m) < 0.7
    elif dtype.is_floating_point:
        x = (1 + 0.1 * torch.randn(n, m)).to(dtype)
        x[3, m // 2] = float("nan")
        x[4, m // 3] = float("inf")
        x[5] = -float("inf")
        x[6] = 2.0  # ties
    else:
        x = torch.randint(0 if dtype == U8 else -9, 9, (n, m)).to(dtype)
    outs = [torch.empty(n, dtype=result_dtype(op, dtype)) for op in REDUCTIONS]
    library.call(f"reductions_{short(dtype)}", [x, *outs], [n, m], 2)
    for op, out in zip(REDUCTIONS, outs, strict=True):
        wide = x.double() if dtype.is_floating_point and op in ("sum", "prod") else x
        wide = x.byte() if dtype == BOOL and op.startswith(("arg", "m")) else wide
        expected = reduce_reference(op, wide).to(out.dtype)
        tolerance = 1e-5 * m**0.5 if op in ("sum", "prod") and dtype.is_floating_point else 0
        torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance, equal_nan=True, msg=op)


def test_long_sums_are_as_good_as_eager(library: Library) -> None:
    """Root mean square error of float32 sums of a row, against float64, beside torch's own."""
    for m in (4096, 100_000, 1_000_000):
        x = torch.rand(16, m)
        outs = [torch.empty(16, dtype=result_dtype(op, F32)) for op in REDUCTIONS]
        library.call("reductions_float32", [x, *outs], [16, m])
        exact = x.double().sum(1)
        ours, eager = ((s.double() - exact).square().mean().sqrt() for s in (outs[0], x.sum(1)))
        rounding = exact.mean() * torch.finfo(F32).eps / 2
        assert ours <= max(1.5 * eager, rounding), (m, ours, eager)


# ---- text ------------------------------------------------------------------------------------------------


def test_map_text() -> None:
    assert_expected_inline(
        render(embedding(BF16, False), ["%embedding"]).text,
        """\
#include "prelude.h"

static void embedding_bfloat16_part(
    const int64_t* ids,
    const bf16* w,
    bf16* z,
    int64_t n,
    int64_t m,
    int64_t first,
    int64_t last,
    int64_t* status) {
    int64_t failed = 0;
    for (int64_t i0 = first; i0 < last; ++i0) {
        const int64_t v0 = ids[i0];
        failed |= op::outside_index(v0, m);
        const int64_t v1 = op::clamp_index(v0, m);
        #pragma omp simd
        for (int64_t i1 = 0; i1 < 48; ++i1) {
            const float v2 = w[i1 + 48 * v1];
            z[48 * i0 + i1] = v2;
        }
    }
    op::report(status, failed);
}

extern "C" void embedding_bfloat16(
    const int64_t* ids,
    const bf16* w,
    bf16* z,
    int64_t n,
    int64_t m,
    int64_t threads,
    int64_t* status) {
    const int64_t items = n;
    if (items <= 0) return;
    if (m <= 0) return op::report(status, 1);  // nothing to index
    const int64_t team = op::team(threads, items, 48 * n);
    if (team == 1) return embedding_bfloat16_part(ids, w, z, n, m, 0, items, status);
    #pragma omp parallel num_threads(team)
    {
        const op::Share share = op::share(items);
        embedding_bfloat16_part(ids, w, z, n, m, share.first, share.last, status);
    }
}
""",
    )


def test_rows_text() -> None:
    assert_expected_inline(
        render(softmax(BF16)).text,
        """\
#include "prelude.h"

static void softmax_bfloat16_part(const bf16* x, bf16* z, int64_t n, int64_t m, int64_t first, int64_t last) {
    for (int64_t i1 = first; i1 < last; ++i1) {
        float v1 = op::lowest<float>();
        #pragma omp simd reduction(maximum : v1)
        for (int64_t i2 = 0; i2 < m; ++i2) {
            const float v0 = x[i1 * m + i2];
            v1 = op::maximum(v1, v0);
        }
        double v4_total = 0;
        for (int64_t start = 0; start < m; start += 256) {
            const int64_t stop = op::minimum<int64_t>(start + 256, m);
            float v4_part = 0;
            #pragma omp simd reduction(+ : v4_part)
            for (int64_t i2 = start; i2 < stop; ++i2) {
                const float v0 = x[i1 * m + i2];
                const float v2 = v0 - v1;
                const float v3 = op::exp(v2);
                v4_part += v3;
            }
            v4_total += v4_part;
        }
        const float v4 = float(v4_total);
        #pragma omp simd
        for (int64_t i2 = 0; i2 < m; ++i2) {
            const float v0 = x[i1 * m + i2];
            const float v2 = v0 - v1;
            const float v3 = op::exp(v2);
            const float v5 = v3 / v4;
            z[i1 * m + i2] = v5;
        }
    }
}

extern "C" void softmax_bfloat16(
    const bf16* x,
    bf16* z,
    int64_t n,
    int64_t m,
    int64_t threads,
    int64_t* status) {
    const int64_t items = 3 * n;
    if (items <= 0) return;
    const int64_t team = op::team(threads, items, 3 * m * n);
    if (team == 1) return softmax_bfloat16_part(x, z, n, m, 0, items);
    #pragma omp parallel num_threads(team)
    {
        const op::Share share = op::share(items);
        softmax_bfloat16_part(x, z, n, m, share.first, share.last);
    }
}
""",
    )


def test_names_that_mean_something_in_cpp() -> None:
    assert [symbol(n) for n in ("cos", "new", "mul")] == ["cos_kernel", "new_kernel", "mul"]


def test_comment_is_not_part_of_the_text() -> None:
    assert render(scalar(), ["%a"]).text == render(scalar(), ["%b"]).text
    assert render(scalar(), ["%a"]).comment == ("%a",)


def test_vector_loops_vectorize(tmp_path: Path) -> None:
    """The compiler's own report: the loops of silu * up, norm, softmax and conversions use vectors."""
    kernels = [silu_mul(F32), silu_mul(BF16), silu_mul(F16), rms_norm(BF16, number(2048)), softmax(F32)]
    for kernel in kernels:
        source = tmp_path / "kernel.cpp"
        source.write_text(render(kernel).text)
        loops = vector_loops(render(kernel).text.splitlines())
        vectorized = vectorized_lines(source)
        assert loops and all(vectorized.intersection(loop) for loop in loops), (
            kernel.name,
            loops,
            vectorized,
        )


def vector_loops(lines: list[str]) -> list[range]:
    """The line numbers of every loop that is marked to be a vector loop."""
    result = []
    for k, line in enumerate(lines):
        if "#pragma omp simd" in line:
            close = line[: line.index("#")] + "}"
            result.append(range(k + 1, k + 2 + lines[k:].index(close)))
    return result


def vectorized_lines(source: Path) -> set[int]:
    """The line numbers at which gcc says that it vectorized a loop."""
    compiler = find_compiler(Cache(source.parent / "cache"))
    assert compiler is not None
    if "clang" in compiler.version:
        pytest.skip("reads gcc's report")
    flags = [*compiler.flags, "-fopt-info-vec-optimized"]
    command = compile_command(compiler.command, flags, source, source.with_suffix(".so"))
    report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return {int(n) for n in re.findall(rf"{source.name}:(\d+):\d+: optimized: loop vectorized", report)}


def extents(name: str, n: int, m: int) -> list[int]:
    """The number of elements of each buffer of a kernel of this file."""
    for start, counts in {
        "silu_mul": [n * m] * 3,
        "transpose_add": [n * m * 5] * 3,
        "embedding": [n, m * 48, n * 48],
        "masked_gather": [n, n, m, n, n],
        "cache_write": [n, 3 * n * 16, 3 * m * 16],
        "rope": [n * 16] * 4,
        "in_place": [n],
        "scalar": [1, 1],
        "rms_norm": [n * m, m, n * m],
        "softmax": [3 * n * m] * 2,
        "reductions": [n * m] + [n] * len(REDUCTIONS),
    }.items():
        if name.startswith(start):
            return counts
    raise AssertionError(name)


def test_sanitizers(tmp_path: Path) -> None:
    """Every kernel of this file on buffers of exactly its size; indices are in range, below and above it."""
    calls = []
    for kernel in KERNELS:
        n, m = 7, 96 if kernel.name.startswith("rms_norm") else 33
        counts = extents(kernel.name, n, m)
        buffers = [filled(b.dtype, count, m) for b, count in zip(kernel.buffers, counts, strict=True)]
        calls.append(Call(kernel, buffers, [{N: n, M: m}[s] for s in kernel.sizes]))
    assert sanitize(calls, tmp_path) == ""


def test_sanitizers_notice(tmp_path: Path) -> None:
    """The check above can fail: a buffer that is one element short is reported."""
    kernel = silu_mul(F32)
    buffers = [filled(F32, 12, 1), filled(F32, 12, 1), filled(F32, 11, 1)]
    assert "heap-buffer-overflow" in sanitize([Call(kernel, buffers, [3, 4])], tmp_path)


def filled(dtype: torch.dtype, count: int, m: int) -> torch.Tensor:
    if dtype == BOOL:
        return torch.rand(count) < 0.5
    return torch.randn(count).to(dtype) if dtype.is_floating_point else torch.randint(-2 * m, 2 * m, (count,)).to(dtype)
