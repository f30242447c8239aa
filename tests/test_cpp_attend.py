"""Attend in C++: every kind of mask, grouping and head size against float64, and the text of one kernel."""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import sympy
import torch
from expecttest import assert_expected_inline

from llmcomp.codegen.build import Compiler, find_compiler
from llmcomp.codegen.cache import Cache
from llmcomp.codegen.cpp_attend import render_attend
from llmcomp.codegen.kernel import Attend, Axis, Body, Buffer, Compute, Index, Load, Strided
from tests.cpp_kernels import Library, axis, size
from tests.kernel_reference import attend

F32, BF16, F16, I64, BOOL = torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool
B, SQ, SK = size("n0"), size("n1"), size("n2")
b, h, i, j = axis("b"), axis("h"), axis("i"), axis("j")
POSITION = i + SK - SQ  # query i stands here among the keys
MINUS_INFINITY = float("-inf")


@dataclass(frozen=True)
class Case:
    """A kernel: its operands, and what happens to a score."""

    name: str
    dtype: torch.dtype
    group: int
    kv_heads: int
    head_dim: int
    body: Body = ()
    score: str = "score"
    key_start: sympy.Expr = sympy.Integer(0)
    key_end: sympy.Expr = SK
    value_dim: int | None = None
    mask: torch.dtype | None = None
    visible: str | None = None
    sinks: bool = False
    spread: bool = False
    """Channels are not neighbours in memory."""
    codes: torch.dtype | None = None
    """Of k and v, which have scales then."""

    @property
    def heads(self) -> int:
        return self.group * self.kv_heads


def limit(op: str, distance: sympy.Expr, bound: int, before: str, after: str) -> Body:
    """score -> -inf where a distance of the key is out of bounds."""
    return (
        Index(f"{after}_distance", distance, I64),
        Compute(f"{after}_visible", op, (f"{after}_distance", bound), BOOL),
        Compute(after, "where", (f"{after}_visible", before, MINUS_INFINITY), F32),
    )


CAUSAL = limit("le", j - POSITION, 0, "score", "causal")
WINDOW = (*CAUSAL, *limit("gt", j - POSITION, -20, "causal", "window"))
SOFT_CAP = (
    Compute("small", "div", ("score", 2.0), F32),
    Compute("bounded", "tanh", ("small",), F32),
    Compute("capped", "mul", ("bounded", 2.0), F32),
)
BOOL_MASK = (
    Load("visible", "mask", (b * SQ + i) * SK + j, BOOL),
    Compute("masked", "where", ("visible", "score", MINUS_INFINITY), F32),
)
HEAD_MASK = (
    Load("visible", "mask", (b * SQ + i) * SK + j, BOOL),
    Index("head", h, I64),
    Compute("even", "lt", ("head", 2), BOOL),
    Compute("seen", "logical_and", ("visible", "even"), BOOL),
    Compute("masked", "where", ("seen", "score", MINUS_INFINITY), F32),
)
FLOAT_MASK = (
    Load("bias", "mask", ((b * 8 + h) * SQ + i) * SK + j, F32),
    Compute("biased", "add", ("score", "bias"), F32),
)
ALIBI = (
    Load("slope", "mask", h, F32),
    Index("distance", j - POSITION, I64),
    Compute("far", "convert", ("distance",), F32),
    Compute("slant", "mul", ("slope", "far"), F32),
    Compute("slanted", "add", ("score", "slant"), F32),
)
AFTER = sympy.Min(SK, POSITION + 1)

CASES = [
    Case("full", F32, 2, 2, 16),
    Case("causal", BF16, 4, 2, 64, CAUSAL, "causal", key_end=AFTER),
    Case("window", F32, 2, 2, 64, WINDOW, "window", sympy.Max(0, POSITION - 19), AFTER),
    Case("bool_mask", BF16, 1, 3, 128, BOOL_MASK, "masked", mask=BOOL),
    Case("used", BF16, 4, 2, 64, BOOL_MASK, "masked", mask=BOOL, visible="visible"),
    Case("used_by_head", F32, 2, 2, 16, HEAD_MASK, "masked", mask=BOOL, visible="seen"),
    Case("float_mask", F16, 8, 1, 32, FLOAT_MASK, "biased", mask=F16),
    Case("soft_cap", F32, 1, 2, 80, SOFT_CAP, "capped", value_dim=48, sinks=True),
    Case("alibi", BF16, 3, 1, 256, ALIBI, "slanted", key_end=AFTER, mask=F32),
    Case("int8", BF16, 4, 2, 64, CAUSAL, "causal", key_end=AFTER, codes=torch.int8),
    Case("int8_mask", F32, 1, 3, 80, BOOL_MASK, "masked", value_dim=48, mask=BOOL, visible="visible", codes=torch.int8),
    Case("fp8", F16, 8, 1, 32, SOFT_CAP, "capped", sinks=True, codes=torch.float8_e4m3fn),
    Case("spread_int8", F32, 3, 2, 20, spread=True, codes=torch.int8),
    Case("spread", BF16, 9, 1, 20, spread=True, sinks=True, key_end=AFTER),
]
BY_NAME = {case.name: case for case in CASES}


def kernel(case: Case) -> Attend:
    def operand(name: str, heads: int, positions: sympy.Expr, width: int) -> Strided:
        step = 2 if case.spread else 1
        strides = (heads * positions * width, positions * width, sympy.Integer(width), sympy.Integer(1))
        return Strided(name, tuple(step * s for s in strides), sympy.Integer(step - 1))  # type: ignore[arg-type]

    values = case.value_dim or case.head_dim
    out = (SQ * case.heads * values, sympy.Integer(values), case.heads * sympy.Integer(values), sympy.Integer(1))
    buffers = [Buffer("q", case.dtype), *(Buffer(name, case.codes or case.dtype) for name in ("k", "v"))]
    buffers += [Buffer(name, F32) for name in ("k_scale", "v_scale") if case.codes]
    # The scales of one key after the other, as caches with headroom have them.
    rows = (sympy.Integer(case.kv_heads), sympy.Integer(1), B * case.kv_heads, sympy.Integer(0))
    scales = [Strided(name, rows) if case.codes else None for name in ("k_scale", "v_scale")]
    buffers += [Buffer("mask", case.mask)] if case.mask else []
    buffers += [Buffer("sinks", case.dtype)] if case.sinks else []
    return Attend(
        case.name,
        (*buffers, Buffer("out", F32, True)),
        (B, SQ, SK),
        Axis(b, B),
        Axis(h, sympy.Integer(case.heads)),
        Axis(i, SQ),
        Axis(j, SK),
        case.group,
        case.head_dim,
        values,
        operand("q", case.heads, SQ, case.head_dim),
        operand("k", case.kv_heads, SK, case.head_dim),
        operand("v", case.kv_heads, SK, values),
        Strided("out", out),
        case.head_dim**-0.5,
        case.body,
        case.score,
        case.key_start,
        case.key_end,
        "sinks" if case.sinks else None,
        case.visible,
        *scales,
    )


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    return Library([render_attend(kernel(case)) for case in CASES], tmp_path_factory.mktemp("attend"))


def tensors(case: Case, batch: int, queries: int, keys: int) -> list[torch.Tensor]:
    torch.manual_seed(queries * 1000 + keys)
    values, step = case.value_dim or case.head_dim, 2 if case.spread else 1
    sizes = [(case.heads, queries, case.head_dim), (case.kv_heads, keys, case.head_dim), (case.kv_heads, keys, values)]
    given = [torch.randn(batch, *s[:2], step * s[2]) for s in sizes]
    given = [given[0].to(case.dtype), *(t.mul(30 if case.codes else 1).to(case.codes or case.dtype) for t in given[1:])]
    given += [(torch.rand(keys, batch, case.kv_heads) + 0.5) / 40 for _ in range(2 if case.codes else 0)]
    if case.mask is BOOL:
        given.append(torch.rand(batch, queries, keys) < 0.7)
    elif case.name == "alibi":
        given.append(torch.rand(case.heads))
    elif case.mask:
        given.append(torch.randn(batch, case.heads, queries, keys).to(case.mask))
    if case.sinks:
        given.append(torch.randn(case.heads).to(case.dtype))
    return [*given, torch.full((batch, queries, case.heads, values), 77.0)]


def check(library: Library, case: Case, batch: int, queries: int, keys: int, threads: int) -> None:
    """The result against float64: for bfloat16 the weights of many rows are rounded, as in eager."""
    given = tensors(case, batch, queries, keys)
    expected = attend(kernel(case), given, (batch, queries, keys))[-1]
    result = given[-1].clone()
    assert library.call(case.name, [*given[:-1], result], (batch, queries, keys), threads) == 0
    error = (result.double() - expected).abs().max()
    assert error <= (1e-2 if case.dtype is BF16 else 2e-5), f"{case.name} {queries} {keys}: off by {error:.1e}"


@pytest.mark.parametrize("queries", [1, 2, 5, 64, 130])
@pytest.mark.parametrize("name", BY_NAME)
def test_attend(library: Library, name: str, queries: int) -> None:
    for keys in (1, 7, 64, 300):
        check(library, BY_NAME[name], 2, queries, keys, threads=1 + keys % 2)


@pytest.mark.parametrize("threads", [2, 3, 7])
@pytest.mark.parametrize("name", BY_NAME)
def test_long_context_is_split(library: Library, name: str, threads: int) -> None:
    check(library, BY_NAME[name], 1, 1, 2500, threads)


def test_rows_without_a_visible_key_are_zeros(library: Library) -> None:
    for name, queries in (("causal", 9), ("window", 9), ("spread", 9)):
        given = tensors(BY_NAME[name], 1, queries, 4)
        library.call(name, given, (1, queries, 4))
        assert (given[-1][:, :5] == 0).all() and (given[-1][:, 5:] != 0).all()
    case = BY_NAME["bool_mask"]
    for queries in (1, 20):
        given = tensors(case, 1, queries, 40)
        given[3][:, 0] = False
        library.call(case.name, given, (1, queries, 40))
        assert (given[-1][:, 0] == 0).all()


@pytest.mark.parametrize("queries", [1, 5, 40])
def test_keys_that_nobody_sees_are_not_read(library: Library, queries: int) -> None:
    """The unused end of a cache and the padding before a prompt may hold anything, a block further on."""
    case, keys = BY_NAME["used"], 900
    for threads in (1, 3):
        given = tensors(case, 2, queries, keys)
        mask = torch.zeros(2, queries, keys, dtype=torch.bool)
        mask[0, :, 200:330] = mask[1, :, :3] = True
        mask[0, 0] = False
        given[3], hostile = mask, torch.ones(keys, dtype=torch.bool)
        expected = attend(kernel(case), given, (2, queries, keys))[-1]
        for batch, (start, stop) in enumerate(((136, 394), (0, 67))):
            hostile[:], hostile[start:stop] = True, False
            for operand in given[1:3]:
                operand[batch, :, hostile] = torch.nan
        library.call(case.name, given, (2, queries, keys), threads)
        assert (given[-1].double() - expected).abs().max() < 1e-2 and (given[-1][0, 0] == 0).all()


def test_nan_reaches_the_rows_that_see_it(library: Library) -> None:
    for queries in (2, 40):
        given = tensors(BY_NAME["causal"], 1, queries, 40)
        given[1][:, :, 39] = torch.nan
        library.call("causal", given, (1, queries, 40))
        assert given[-1][:, -1].isnan().all() and not given[-1][:, :-1].isnan().any()


def test_nothing_to_attend(library: Library) -> None:
    given = tensors(BY_NAME["full"], 1, 0, 4)
    assert library.call("full", given, (1, 0, 4), threads=2) == 0


def test_limits_that_the_range_of_keys_implies_are_not_printed() -> None:
    for name in ("causal", "window"):
        assert "visible" not in render_attend(kernel(BY_NAME[name])).text
    causal = replace(kernel(BY_NAME["causal"]), visible="causal_visible")
    assert "masked" not in render_attend(causal).text  # a mask that is no more than such a limit
    unbounded = replace(kernel(BY_NAME["causal"]), key_end=SK)
    assert "causal_visible" in render_attend(unbounded).text


def test_operands_of_two_dtypes_are_refused() -> None:
    mixed = kernel(BY_NAME["full"])
    with pytest.raises(ValueError, match="of one dtype"):
        render_attend(replace(mixed, buffers=(replace(mixed.buffers[0], dtype=BF16), *mixed.buffers[1:])))


NARROWER = {"no_bf16": ["-mno-avx512bf16"], "avx2": ["-mno-avx512f"], "sse": ["-mno-avx"]}


@pytest.mark.parametrize("machine", NARROWER)
def test_portable_twins(tmp_path: Path, machine: str) -> None:
    """What other processors run in place of AVX-512 and its instruction for bfloat16."""
    native = find_compiler(Cache(tmp_path))
    assert native is not None
    if not any(flag == "-march=native" for flag in native.flags) or not torch.cpu._is_avx2_supported():
        pytest.skip("the flags are those of x86-64")
    # Another text is tested, not what the compiler makes of it.
    compiler = Compiler(native.command, native.version, (*native.flags, *NARROWER[machine], "-O0"))
    cases = [BY_NAME[name] for name in ("causal", "soft_cap", "int8", "fp8")]
    library = Library([render_attend(kernel(case)) for case in cases], tmp_path, compiler)
    for case in cases:
        for queries, keys in ((1, 300), (5, 70), (40, 70)):
            check(library, case, 1, queries, keys, threads=2)


def test_text_of_an_attend() -> None:
    assert_expected_inline(
        render_attend(kernel(BY_NAME["soft_cap"])).text,
        """\
#include "attend.h"

static void soft_cap_part(
    const float* q,
    const float* k,
    const float* v,
    const float* sinks,
    float* out,
    int64_t n0,
    int64_t n1,
    int64_t n2,
    const attend::Attention<float, float, float, 1, 80, 48, true>& attention,
    char* memory,
    int64_t team,
    int64_t* status
) {
    const auto key_start = [&](int64_t i) -> int64_t { return 0; };
    const auto key_end = [&](int64_t i) -> int64_t { return n2; };
    const auto judge = [&](float* scores, int64_t b, int64_t h, int64_t i, int64_t first, int64_t stop) {
        #pragma omp simd
        for (int64_t j = first; j < stop; ++j) {
            const float score = scores[j - first];
            const float small = score / 2.0f;
            const float bounded = op::tanh(small);
            const float capped = bounded * 2.0f;
            scores[-first + j] = capped;
        }
    };
    const auto sink = [&](int64_t h) -> float { return sinks[h]; };
    attention.run(memory, team, key_start, key_end, judge, sink, attend::Plain());
}

extern "C" void soft_cap(
    const float* q,
    const float* k,
    const float* v,
    const float* sinks,
    float* out,
    int64_t n0,
    int64_t n1,
    int64_t n2,
    int64_t threads,
    int64_t* status
) {
    const attend::Attention<float, float, float, 1, 80, 48, true> attention = {
        n0, 2, n1, n2,
        {q, 160 * n1, 80 * n1, 80, 1},
        {k, 160 * n2, 80 * n2, 80, 1},
        {v, 96 * n2, 48 * n2, 48, 1},
        {out, 96 * n1, 48, 96, 1},
        0.1118034f,
    };
    const int64_t team = op::team(threads, attention.items(), attention.effort());
    const work::Memory memory(attention.bytes(team));
    if (team == 1) return soft_cap_part(q, k, v, sinks, out, n0, n1, n2, attention, memory.aligned(), team, status);
    #pragma omp parallel num_threads(team)
    soft_cap_part(q, k, v, sinks, out, n0, n1, n2, attention, memory.aligned(), team, status);
}
""",
    )
