"""Contract in C++: every form of weights, operand and epilogue against float64, and the text of one kernel."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import sympy
import torch
from expecttest import assert_expected_inline
from torch.utils._sympy.functions import FloorDiv, Mod

from llmcomp.codegen.build import Compiler, find_compiler
from llmcomp.codegen.cache import Cache
from llmcomp.codegen.cpp_contract import render_contract
from llmcomp.codegen.kernel import (
    Accumulator,
    Axis,
    Body,
    Buffer,
    Check,
    Compute,
    Contract,
    Load,
    Reduce,
    Section,
    Store,
    Weight,
)
from tests.cpp_kernels import Library, axis, size
from tests.kernel_reference import contract

F32, BF16, F16, I64 = torch.float32, torch.bfloat16, torch.float16, torch.int64
SHORT = {F32: "f32", BF16: "bf16", F16: "f16"}
M, N, K = size("n0"), size("n1"), size("n2")
m, k, n, h = axis("m"), axis("k"), axis("n"), axis("h")
ONE = sympy.Integer(1)


def op(out: str, name: str, *args: str | float) -> Compute:
    return Compute(out, name, args, F32)


def integer(value: int) -> sympy.Expr:
    return sympy.Integer(value)


# ---- kernels -------------------------------------------------------------------------------------------------------


def plain(dtype: torch.dtype, operand: torch.dtype, form: str) -> Contract:
    """x w^T + bias + residual; weights (N, K), (K, N), or with a stride along both axes."""
    strides = {"nk": (K, ONE), "kn": (ONE, N), "gather": (2 * K, integer(2))}[form]
    buffers = (
        Buffer("x", operand),
        Buffer("weight", dtype),
        Buffer("bias", dtype),
        Buffer("residual", operand),
        Buffer("out", F32, True),
    )
    epilogue = (
        Load("b", "bias", n, F32),
        op("biased", "add", "acc", "b"),
        Load("r", "residual", m * N + n, F32),
        op("sum", "add", "biased", "r"),
        Store("out", m * N + n, "sum"),
    )
    return Contract(
        f"linear_{form}_{SHORT[dtype]}_{SHORT[operand]}",
        buffers,
        (M, N, K),
        Axis(m, M),
        Axis(k, K),
        (Load("x0", "x", m * K + k, F32),),
        "x0",
        operand,
        (Section((Axis(n, N),), (Accumulator("acc", Weight("weight", *strides), n),), epilogue),),
    )


def norm(x: str, width: sympy.Expr, count: int, at: sympy.Expr, prefix: str = "") -> Body:
    """The root mean square norm of the value `x` along an axis, as `<prefix>normed`."""
    return (
        op(prefix + "square", "mul", x, x),
        Reduce(prefix + "squares", "sum", prefix + "square", F32),
        op(prefix + "mean", "div", prefix + "squares", float(count)),
        op(prefix + "shifted", "add", prefix + "mean", 1e-5),
        op(prefix + "scale", "rsqrt", prefix + "shifted"),
        op(prefix + "scaled", "mul", x, prefix + "scale"),
        Load(prefix + "weight_of", "gain", at, F32),
        op(prefix + "normed", "mul", prefix + "scaled", prefix + "weight_of"),
    )


DEPTH, HEADS, HEAD, KV_HEADS, CACHE = 96, 5, 48, 2, 40


def attention_inputs(dtype: torch.dtype) -> Contract:
    """Norm, then q with a rotary embedding, k the same into a cache at `position`, v into a cache."""
    names = ("x", "gain", "wq", "wk", "wv", "cos", "sin")
    buffers = (
        *(Buffer(name, dtype) for name in names),
        Buffer("position", I64),
        *(Buffer(name, F32, True) for name in ("q", "k_cache", "v_cache")),
    )
    half = HEAD // 2

    def rotary(weight: str, heads: int, store: str, prologue: Body, at: sympy.Expr) -> Section:
        matrix = Weight(weight, integer(DEPTH), ONE)
        epilogue = (
            *prologue,
            Load("c", "cos", m * half + n, F32),
            Load("s", "sin", m * half + n, F32),
            *(op("lc", "mul", "lo", "c"), op("hs", "mul", "hi", "s"), op("first", "sub", "lc", "hs")),
            Store(store, at, "first"),
            *(op("hc", "mul", "hi", "c"), op("ls", "mul", "lo", "s"), op("second", "add", "hc", "ls")),
            Store(store, at + half, "second"),
        )
        accumulators = (
            Accumulator("lo", matrix, h * HEAD + n),
            Accumulator("hi", matrix, h * HEAD + n + half),
        )
        return Section((Axis(h, integer(heads)), Axis(n, integer(half))), accumulators, epilogue)

    position = (Load("p", "position", m, I64), Check("at", "p", integer(CACHE), False))
    slot = axis("at") * KV_HEADS * HEAD
    column = FloorDiv(n, HEAD) * HEAD + Mod(n, HEAD)
    values = Section(
        (Axis(n, integer(KV_HEADS * HEAD)),),
        (Accumulator("acc", Weight("wv", integer(DEPTH), ONE), n),),
        (*position, Store("v_cache", slot + column, "acc")),
    )
    return Contract(
        f"attention_inputs_{SHORT[dtype]}",
        buffers,
        (M,),
        Axis(m, M),
        Axis(k, integer(DEPTH)),
        (Load("x0", "x", m * DEPTH + k, F32), *norm("x0", k, DEPTH, k)),
        "normed",
        dtype,
        (
            rotary("wq", HEADS, "q", (), m * HEADS * HEAD + h * HEAD + n),
            rotary("wk", KV_HEADS, "k_cache", position, slot + h * HEAD + n),
            values,
        ),
    )


def gated(dtype: torch.dtype, kn: bool) -> Contract:
    """silu(x gate^T) * (x up^T), both halves of one matrix."""
    strides = (ONE, 2 * N) if kn else (K, ONE)
    matrix = Weight("weight", *strides)
    epilogue = (
        op("sigma", "sigmoid", "gate"),
        op("silu", "mul", "gate", "sigma"),
        op("product", "mul", "silu", "up"),
        Store("out", m * N + n, "product"),
    )
    accumulators = (Accumulator("gate", matrix, n), Accumulator("up", matrix, n + N))
    return Contract(
        f"gated_{'kn' if kn else 'nk'}_{SHORT[dtype]}",
        (Buffer("x", dtype), Buffer("weight", dtype), Buffer("out", F32, True)),
        (M, N, K),
        Axis(m, M),
        Axis(k, K),
        (Load("x0", "x", m * K + k, F32),),
        "x0",
        dtype,
        (Section((Axis(n, N),), accumulators, epilogue),),
    )


def head_norm(dtype: torch.dtype, kn: bool) -> Contract:
    """A norm within each head of the result."""
    strides = (ONE, integer(3 * HEAD)) if kn else (integer(DEPTH), ONE)
    epilogue = (*norm("acc", n, HEAD, n), Store("out", (m * 3 + h) * HEAD + n, "normed"))
    accumulator = Accumulator("acc", Weight("weight", *strides), h * HEAD + n)
    return Contract(
        f"head_norm_{'kn' if kn else 'nk'}_{SHORT[dtype]}",
        (Buffer("x", dtype), Buffer("weight", dtype), Buffer("gain", dtype), Buffer("out", F32, True)),
        (M,),
        Axis(m, M),
        Axis(k, integer(DEPTH)),
        (Load("x0", "x", m * DEPTH + k, F32),),
        "x0",
        dtype,
        (Section((Axis(h, integer(3)), Axis(n, integer(HEAD))), (accumulator,), epilogue),),
    )


def experts(dtype: torch.dtype, kn: bool) -> Contract:
    """Rows sorted by expert, each expert with its own matrix."""
    base = plain(dtype, dtype, "kn" if kn else "nk")
    (section,) = base.sections
    (accumulator,) = section.accumulators
    weight = replace(accumulator.weight, expert_stride=N * K)
    section = replace(
        section,
        accumulators=(replace(accumulator, weight=weight),),
        epilogue=(Store("out", m * N + n, "acc"),),
    )
    return replace(
        base,
        name=f"experts_{'kn' if kn else 'nk'}_{SHORT[dtype]}",
        buffers=(*base.buffers[:2], Buffer("ends", torch.int32), base.buffers[4]),
        sections=(section,),
        experts="ends",
        expert_count=integer(4),
    )


def interleaved(dtype: torch.dtype) -> Contract:
    """Even and odd rows as two accumulators (an interleaved rotary embedding)."""
    matrix = Weight("weight", K, ONE)
    accumulators = (Accumulator("even", matrix, 2 * n), Accumulator("odd", matrix, 2 * n + 1))
    epilogue = (
        op("sum", "add", "even", "odd"),
        op("difference", "sub", "even", "odd"),
        Store("out", m * 2 * N + 2 * n, "sum"),
        Store("out", m * 2 * N + 2 * n + 1, "difference"),
    )
    return Contract(
        f"interleaved_{SHORT[dtype]}",
        (Buffer("x", dtype), Buffer("weight", dtype), Buffer("out", F32, True)),
        (M, N, K),
        Axis(m, M),
        Axis(k, K),
        (Load("x0", "x", m * K + k, F32),),
        "x0",
        dtype,
        (Section((Axis(n, N),), accumulators, epilogue),),
    )


PLAIN = [
    *(plain(d, d, form) for d in (F32, BF16, F16) for form in ("nk", "kn")),
    plain(BF16, F32, "nk"),
    plain(BF16, BF16, "gather"),
]
FUSED = [
    *(attention_inputs(d) for d in (F32, BF16)),
    *(gated(d, kn) for d in (F32, BF16) for kn in (False, True)),
    *(head_norm(BF16, kn) for kn in (False, True)),
    *(experts(BF16, kn) for kn in (False, True)),
    interleaved(BF16),
]
BY_NAME = {kernel.name: kernel for kernel in (*PLAIN, *FUSED)}


# ---- running them --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    return Library([render_contract(kernel) for kernel in BY_NAME.values()], tmp_path_factory.mktemp("contract"))


def tensors(kernel: Contract, shapes: Sequence[tuple[int, ...]], seed: int = 0) -> list[torch.Tensor]:
    """Random values for the buffers of floating point; results start as a value that no test expects."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for buffer, shape in zip(kernel.buffers, shapes, strict=True):
        values = torch.randn(shape, generator=generator)
        made.append((torch.full(shape, 77.0) if buffer.written else values).to(buffer.dtype))
    return made


def check(
    library: Library,
    kernel: Contract,
    given: Sequence[torch.Tensor],
    sizes: Sequence[int],
    threads: int = 1,
    tolerance: float = 2e-5,
) -> None:
    """The kernel's results against float64, by the largest error next to the largest value."""
    expected = contract(kernel, given, sizes)
    results = [t.clone() for t in given]
    assert library.call(kernel.name, results, sizes, threads) == 0
    for buffer, result, exact in zip(kernel.buffers, results, expected, strict=True):
        if buffer.written:
            error = (result.double() - exact).abs().max() / exact.abs().max()
            assert error <= tolerance, f"{kernel.name} {sizes}: {buffer.name} off by {error:.1e}"


ROWS = [1, 2, 3, 7, 16, 33]


@pytest.mark.parametrize("rows", [*ROWS, 300])
@pytest.mark.parametrize("name", [kernel.name for kernel in PLAIN])
def test_plain(library: Library, name: str, rows: int) -> None:
    kernel = BY_NAME[name]
    for columns, depth in [(37, 77), (128, 64), (1, 1), (3, 130), (70, 9)]:
        scale = 2 if "gather" in name else 1
        shapes = [
            (rows, depth),
            (scale * columns, scale * depth),
            (columns,),
            (rows, columns),
            (rows, columns),
        ]
        check(library, kernel, tensors(kernel, shapes), (rows, columns, depth), threads=1 + rows % 2)


@pytest.mark.parametrize("name", [kernel.name for kernel in PLAIN])
def test_depth_in_blocks(library: Library, name: str) -> None:
    kernel, columns, depth = BY_NAME[name], 40, 4500
    scale = 2 if "gather" in name else 1
    for rows in (1, 20):
        shapes = [
            (rows, depth),
            (scale * columns, scale * depth),
            (columns,),
            (rows, columns),
            (rows, columns),
        ]
        check(library, kernel, tensors(kernel, shapes), (rows, columns, depth), threads=2)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_norm_rotary_and_cache(library: Library, dtype: torch.dtype, rows: int) -> None:
    kernel = BY_NAME[f"attention_inputs_{SHORT[dtype]}"]
    wide = [HEADS * HEAD, KV_HEADS * HEAD, KV_HEADS * HEAD]
    shapes = [
        *[(rows, DEPTH), (DEPTH,), *((w, DEPTH) for w in wide)],
        *[(rows, HEAD // 2), (rows, HEAD // 2), (rows,)],
        *[(rows, HEADS * HEAD), (CACHE, wide[1]), (CACHE, wide[2])],
    ]
    given = tensors(kernel, shapes)
    given[7] = torch.randperm(CACHE)[:rows]
    # The operand is held in bfloat16: the reference multiplies it before it is rounded.
    check(library, kernel, given, (rows,), threads=2, tolerance=2e-5 if dtype is F32 else 4e-3)


def test_index_out_of_range_is_reported(library: Library) -> None:
    kernel = BY_NAME["attention_inputs_f32"]
    wide = [HEADS * HEAD, KV_HEADS * HEAD, KV_HEADS * HEAD]
    shapes = [
        *[(1, DEPTH), (DEPTH,), *((w, DEPTH) for w in wide), (1, HEAD // 2), (1, HEAD // 2), (1,)],
        *[(1, HEADS * HEAD), (CACHE, wide[1]), (CACHE, wide[2])],
    ]
    given = tensors(kernel, shapes)
    given[7] = torch.tensor([CACHE])
    assert library.call(kernel.name, given, (1,)) == 1


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("name", [kernel.name for kernel in FUSED if kernel.name.startswith("gated")])
def test_gated(library: Library, name: str, rows: int) -> None:
    kernel = BY_NAME[name]
    for columns, depth in [(37, 77), (64, 32)]:
        shapes = [(rows, depth), (2 * columns, depth), (rows, columns)]
        check(library, kernel, tensors(kernel, shapes), (rows, columns, depth), threads=2)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("form", ["nk", "kn"])
def test_norm_within_a_head(library: Library, form: str, rows: int) -> None:
    kernel = BY_NAME[f"head_norm_{form}_bf16"]
    shapes = [(rows, DEPTH), (3 * HEAD, DEPTH), (HEAD,), (rows, 3 * HEAD)]
    check(library, kernel, tensors(kernel, shapes), (rows,), threads=2)


@pytest.mark.parametrize("ends", [(3, 3, 9, 40), (0, 0, 0, 5), (1, 2, 3, 4), (0, 0, 0, 0), (2, 300, 301, 310)])
@pytest.mark.parametrize("form", ["nk", "kn"])
def test_experts(library: Library, form: str, ends: tuple[int, ...]) -> None:
    kernel, columns, depth, rows = BY_NAME[f"experts_{form}_bf16"], 45, 70, max(ends[-1], 1)
    given = tensors(kernel, [(rows, depth), (4, columns, depth), (4,), (rows, columns)])
    given[2] = torch.tensor(ends, dtype=torch.int32)
    if ends[-1]:
        check(library, kernel, given, (rows, columns, depth), threads=2)
    else:
        assert library.call(kernel.name, given, (rows, columns, depth)) == 0
        assert (given[3] == 0).all()


@pytest.mark.parametrize("rows", ROWS)
def test_even_and_odd_rows(library: Library, rows: int) -> None:
    kernel, columns, depth = BY_NAME["interleaved_bf16"], 19, 66
    shapes = [(rows, depth), (2 * columns, depth), (rows, 2 * columns)]
    check(library, kernel, tensors(kernel, shapes), (rows, columns, depth))


def test_no_rows(library: Library) -> None:
    kernel = BY_NAME["linear_nk_f32_f32"]
    given = tensors(kernel, [(0, 8), (4, 8), (4,), (0, 4), (0, 4)])
    assert library.call(kernel.name, given, (0, 4, 8), threads=2) == 0


def test_weights_of_two_dtypes_are_refused() -> None:
    kernel = plain(F32, F32, "nk")
    (section,) = kernel.sections
    other = Accumulator("other", Weight("half", K, ONE), n)
    mixed = replace(
        kernel,
        buffers=(*kernel.buffers, Buffer("half", F16)),
        sections=(replace(section, accumulators=(*section.accumulators, other)),),
    )
    with pytest.raises(ValueError, match="weights of one dtype"):
        render_contract(mixed)


NARROWER = {
    "no_bf16": ["-mno-avx512bf16"],
    "avx2": ["-mno-avx512f"],
    "sse": ["-mno-avx"],
}


@pytest.mark.parametrize("machine", NARROWER)
def test_portable_twins(tmp_path: Path, machine: str) -> None:
    """What other processors run in place of AVX-512 and its instruction for bfloat16."""
    native = find_compiler(Cache(tmp_path))
    assert native is not None
    if not any(flag == "-march=native" for flag in native.flags) or not torch.cpu._is_avx2_supported():
        pytest.skip("the flags are those of x86-64")
    # Another text is tested, not what the compiler makes of it.
    compiler = Compiler(native.command, native.version, (*native.flags, *NARROWER[machine], "-O0"))
    kernels = [k for k in PLAIN if k.name in ("linear_nk_bf16_bf16", "linear_nk_f16_f16", "linear_kn_bf16_bf16")]
    library = Library([render_contract(kernel) for kernel in kernels], tmp_path, compiler)
    for kernel in kernels:
        for rows in (1, 2, 4, 9, 40):
            shapes = [(rows, 77), (37, 77), (37,), (rows, 37), (rows, 37)]
            check(library, kernel, tensors(kernel, shapes), (rows, 37, 77))


def test_text_of_a_contract() -> None:
    assert_expected_inline(
        render_contract(gated(BF16, False)).text,
        """\
#include "contract.h"

static void gated_nk_bf16_part(
    const bf16* x,
    const bf16* weight,
    float* out,
    int64_t n0,
    int64_t n1,
    int64_t n2,
    char* memory,
    int64_t team,
    int64_t* status
) {
    const int64_t rows = n0, depth = n2;
    contract::Operand<bf16, bf16> operand(memory, rows, depth, team);
    for (int64_t block = 0; block < rows; block += contract::BLOCK) {
        const int64_t stop_row = op::minimum(block + contract::BLOCK, rows);
        const op::Share packing = operand.start(stop_row - block);
        float* const line = operand.line;
        for (int64_t row = packing.first; row < packing.last; ++row) {
            const int64_t m = block + row;
            #pragma omp simd
            for (int64_t k = 0; k < n2; ++k) {
                const float x0 = x[k + m * n2];
                line[k] = x0;
            }
            operand.pack(row);
        }
        operand.finish();
        contract::Tiles tiles = {operand.member.share(64 * ((n1 + 31) / 32))};
        {
            const op::Share share = tiles.next((n1 + 31) / 32, 64);
            for (int64_t piece = share.first; piece < share.last; ++piece) {
                const int64_t first = 32 * piece;
                const int64_t stop = op::minimum<int64_t>(n1, first + 32);
                const bf16* const gate_weight = weight + first * n2;
                const bf16* const up_weight = weight + first * n2 + n1 * n2;
                for (int64_t panel = 0; panel < operand.count; panel += operand.PANEL) {
                    alignas(64) float gate_tile[operand.PANEL * 32];
                    alignas(64) float up_tile[operand.PANEL * 32];
                    operand.multiply(panel, gate_tile, 32, gate_weight, n2, stop - first, up_weight);
                    operand.multiply(panel, up_tile, 32, up_weight, n2, stop - first, gate_weight + 32 * n2);
                    for (int64_t row = 0; row < op::minimum(operand.PANEL, operand.count - panel); ++row) {
                        const int64_t m = block + panel + row;
                        const float* const gate_row = gate_tile + row * 32;
                        const float* const up_row = up_tile + row * 32;
                        #pragma omp simd
                        for (int64_t n = first; n < stop; ++n) {
                            const float gate = gate_row[n - first];
                            const float up = up_row[n - first];
                            const float sigma = op::sigmoid(gate);
                            const float silu = gate * sigma;
                            const float product = silu * up;
                            out[m * n1 + n] = product;
                        }
                    }
                }
            }
        }
    }
}

extern "C" void gated_nk_bf16(
    const bf16* x,
    const bf16* weight,
    float* out,
    int64_t n0,
    int64_t n1,
    int64_t n2,
    int64_t threads,
    int64_t* status
) {
    const int64_t rows = n0, depth = n2;
    const int64_t columns = 2 * n1;  // of all weights
    if (rows <= 0 || columns <= 0) return;
    const int64_t team = op::team(threads, (columns + 31) / 32, rows * depth * columns);
    const work::Memory memory(contract::Operand<bf16, bf16>::bytes(rows, depth, team));
    if (team == 1) return gated_nk_bf16_part(x, weight, out, n0, n1, n2, memory.aligned(), team, status);
    #pragma omp parallel num_threads(team)
    gated_nk_bf16_part(x, weight, out, n0, n1, n2, memory.aligned(), team, status);
}
""",
    )
