"""Attend kernels as Triton against torch: causal, full, masks, GQA, windows, soft cap, sinks, head sizes."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import sympy
import torch
from expecttest import assert_expected_inline

from llmcomp.codegen.kernel import (
    Attend,
    Body,
    Buffer,
    Compute,
    Index,
    Load,
    Statement,
    Store,
    Strided,
)
from llmcomp.codegen.triton import render
from llmcomp.codegen.triton_attend import forms_of
from tests.numerics import assert_equal_float32, assert_no_worse
from tests.triton_kernels import axis, every_config, load, run, symbol
from tests.triton_worker import interpreted

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
S0, S1 = symbol("s0"), symbol("s1")
NEGATIVE_INFINITY = float("-inf")


@dataclass(frozen=True)
class Case:
    """What attention to compute."""

    queries: int
    keys: int
    heads: int = 2
    kv_heads: int = 2
    dim: int = 16
    value_dim: int = 0
    batch: int = 1
    dtype: torch.dtype = F32
    causal: bool = True
    window: int = 0
    softcap: float = 0.0
    mask: str = ""  # "bool" or "float"
    alibi: bool = False
    sinks: bool = False
    offset: int | None = None  # of the first query; by default the last query is at the last key
    symbolic: bool = True
    codes: torch.dtype | None = None  # of k and v, which have scales then

    @property
    def values(self) -> int:
        return self.value_dim or self.dim

    @property
    def start(self) -> int:
        return self.keys - self.queries if self.offset is None else self.offset


def row_major(buffer: str, *shape: sympy.Expr) -> Strided:
    """A contiguous (batch, head, position, channel) operand."""
    strides = [sympy.Mul(*shape[d + 1 :]) for d in range(4)]
    return Strided(buffer, tuple(strides))  # type: ignore[arg-type]


def score_body(case: Case, scores: list[Buffer], i: sympy.Symbol, j: sympy.Symbol, keys: sympy.Expr) -> Body:
    """Soft cap, alibi and mask; limits of position are in the key range."""
    body: list[Statement] = []
    value = "score"
    h, b = symbol("h"), symbol("b")
    if case.softcap:
        body += [
            Compute("scaled", "div", (value, case.softcap), F32),
            Compute("bent", "tanh", ("scaled",), F32),
            Compute("capped", "mul", ("bent", case.softcap), F32),
        ]
        value = "capped"
    if case.alibi:
        scores.append(Buffer("slopes_ptr", F32))
        body += [
            Load("slope", "slopes_ptr", h, F32),
            Index("distance", j - i, torch.int64),
            Compute("far", "convert", ("distance",), F32),
            Compute("bias", "mul", ("slope", "far"), F32),
            Compute("biased", "add", (value, "bias"), F32),
        ]
        value = "biased"
    if case.mask:
        dtype = torch.bool if case.mask == "bool" else case.dtype
        scores.append(Buffer("mask_ptr", dtype))
        queries = S0 if case.symbolic else case.queries
        at = b * queries * keys + i * keys + j
        body.append(Load("mask", "mask_ptr", at, torch.bool if case.mask == "bool" else F32))
        args = ("mask", value, NEGATIVE_INFINITY) if case.mask == "bool" else (value, "mask")
        body.append(Compute("masked", "where" if case.mask == "bool" else "add", args, F32))
    return tuple(body)


def attend(case: Case) -> Attend:
    queries, keys = (S0, S1) if case.symbolic else map(sympy.Integer, (case.queries, case.keys))
    b, h, i, j = axis("b", case.batch), axis("h", case.heads), axis("i", queries), axis("j", keys)
    offset = keys - queries if case.offset is None else sympy.Integer(case.offset)
    position = i.symbol + offset
    scores: list[Buffer] = []
    body = score_body(case, scores, i.symbol, j.symbol, keys)
    start = sympy.Max(0, position - case.window + 1) if case.window else sympy.Integer(0)
    end = sympy.Min(keys, position + 1) if case.causal else keys
    if case.window and not case.causal:
        end = sympy.Min(keys, position + case.window)
    if not case.symbolic and case.queries == 1:
        start, end = start.subs(i.symbol, 0), end.subs(i.symbol, 0)
    d, dv = sympy.Integer(case.dim), sympy.Integer(case.values)
    heads, kv_heads = sympy.Integer(case.heads), sympy.Integer(case.kv_heads)
    seen = [Buffer("sinks_ptr", F32)] if case.sinks else []
    buffers = [Buffer("q_ptr", case.dtype), *(Buffer(n, case.codes or case.dtype) for n in ("k_ptr", "v_ptr"))]
    buffers += [Buffer(n, F32) for n in ("k_scale_ptr", "v_scale_ptr") if case.codes]
    # The scales of one key after the other, as caches with headroom have them.
    scaled = (kv_heads, sympy.Integer(1), case.batch * kv_heads, sympy.Integer(0))
    out = Strided("out_ptr", (queries * heads * dv, dv, heads * dv, sympy.Integer(1)))
    return Attend(
        "attention",
        (*buffers, *scores, *seen, Buffer("out_ptr", case.dtype, True)),
        (S0, S1) if case.symbolic else (),
        b,
        h,
        i,
        j,
        case.heads // case.kv_heads,
        case.dim,
        case.values,
        row_major("q_ptr", sympy.Integer(1), heads, queries, d),
        row_major("k_ptr", sympy.Integer(1), kv_heads, keys, d),
        row_major("v_ptr", sympy.Integer(1), kv_heads, keys, dv),
        out,
        case.dim**-0.5,
        body,
        body[-1].out if body and not isinstance(body[-1], Store) else "score",
        start,
        end,
        "sinks_ptr" if case.sinks else None,
        "mask" if case.mask == "bool" else None,
        *(Strided(n, scaled) if case.codes else None for n in ("k_scale_ptr", "v_scale_ptr")),
    )


def operands(case: Case) -> list[torch.Tensor]:
    """q, k, v, then slopes, mask and sinks where the case has them."""
    q = torch.randn(case.batch, case.heads, case.queries, case.dim)
    k = torch.randn(case.batch, case.kv_heads, case.keys, case.dim)
    v = torch.randn(case.batch, case.kv_heads, case.keys, case.values)
    found = [q.to(case.dtype), *(t.mul(40 if case.codes else 1).to(case.codes or case.dtype) for t in (k, v))]
    found += [torch.rand(case.keys, case.batch, case.kv_heads) / 20 for _ in range(2 if case.codes else 0)]
    if case.alibi:
        found.append(torch.tensor([0.5**n for n in range(1, case.heads + 1)]))
    if case.mask:
        mask = torch.rand(case.batch, case.queries, case.keys) < 0.7
        mask[:, -1] = case.mask != "bool"  # a query that sees nothing
        found.append(mask if case.mask == "bool" else torch.randn(mask.shape).to(case.dtype))
    if case.sinks:
        found.append(torch.randn(case.heads))
    return found


def decoded(case: Case, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The operands with keys and values in place of codes and scales."""
    if case.codes is None:
        return list(tensors)
    q, *parts = tensors
    plain = [
        codes.float() * scale.permute(1, 2, 0)[..., None] for codes, scale in zip(parts[:2], parts[2:4], strict=True)
    ]
    return [q, *plain, *parts[4:]]


def reference(case: Case, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """softmax(q . k) . v, (batch, position, head, channel), in double precision."""
    q, k, v, *rest = (t if t.dtype == torch.bool else t.double() for t in decoded(case, tensors))
    group = case.heads // case.kv_heads
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    score = q @ k.transpose(-1, -2) * case.dim**-0.5
    i, j = torch.arange(case.queries)[:, None], torch.arange(case.keys)[None, :]
    if case.softcap:
        score = case.softcap * torch.tanh(score / case.softcap)
    if case.alibi:
        score = score + rest.pop(0)[:, None, None] * (j - i)
    visible = torch.ones(case.queries, case.keys, dtype=torch.bool)
    if case.causal:
        visible &= j <= i + case.start
    if case.window:
        visible &= j > i + case.start - case.window
        if not case.causal:
            visible &= j < i + case.start + case.window
    if case.mask:
        mask = rest.pop(0)[:, None]
        score = score.masked_fill(~mask, NEGATIVE_INFINITY) if case.mask == "bool" else score + mask
    score = score.masked_fill(~visible, NEGATIVE_INFINITY)
    if case.sinks:
        sink = rest.pop(0).view(1, -1, 1, 1).expand(case.batch, -1, case.queries, 1)
        score = torch.cat([score, sink], -1)
    weights = score.softmax(-1).nan_to_num(0.0)[..., : case.keys]
    return (weights @ v).transpose(1, 2)


def check(case: Case, config: object = None) -> None:
    tensors = operands(case)
    out = torch.full((case.batch, case.queries, case.heads, case.values), 9.0).to(case.dtype)
    sizes = [case.queries, case.keys] if case.symbolic else []
    run(attend(case), [*tensors, out], sizes, config=config)
    exact = reference(case, tensors)
    if case.dtype == F32:
        assert_equal_float32(out, exact.float())
        return
    group = case.heads // case.kv_heads
    q, k, v = (t.float() for t in decoded(case, tensors)[:3])
    visible = torch.ones(case.queries, case.keys, dtype=torch.bool)
    if case.causal:
        visible = visible.tril(case.start)
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    score = (q @ k.transpose(-1, -2) * case.dim**-0.5).masked_fill(~visible, NEGATIVE_INFINITY)
    rounded = score.softmax(-1).to(case.dtype).float()  # as eager attention does it
    assert_no_worse(out, (rounded @ v).to(case.dtype).transpose(1, 2), exact)


PREFILL = Case(45, 45)
DECODE = Case(1, 140)  # in two parts


@interpreted
@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize("case", [PREFILL, DECODE, replace(PREFILL, kv_heads=1, queries=20)])
def test_dtypes(dtype: torch.dtype, case: Case) -> None:
    check(replace(case, dtype=dtype))


CODES = [torch.int8, torch.float8_e4m3fn]


@interpreted
@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize("case", [PREFILL, DECODE, replace(PREFILL, queries=20, heads=4, dim=24)])
def test_codes_with_scales(case: Case, dtype: torch.dtype, codes: torch.dtype) -> None:
    check(replace(case, dtype=dtype, codes=codes))


@interpreted
@pytest.mark.parametrize("change", [{"mask": "bool", "window": 9}, {"sinks": True, "batch": 2}, {"softcap": 2.0}])
@pytest.mark.parametrize("case", [replace(PREFILL, kv_heads=1), DECODE])
def test_codes_under_masks(case: Case, change: dict[str, object]) -> None:
    check(replace(case, codes=torch.int8, **change))  # type: ignore[arg-type]


VARIANTS = [
    {"causal": False},
    {"window": 7},
    {"window": 100},
    {"window": 7, "causal": False},
    {"softcap": 3.0},
    {"mask": "bool"},
    {"mask": "float", "causal": False},
    {"alibi": True},
    {"sinks": True},
    {"sinks": True, "window": 9, "softcap": 5.0, "mask": "bool", "heads": 4},
    {"batch": 2, "heads": 6, "kv_heads": 2},
    {"dim": 24, "value_dim": 20},
    {"dim": 16, "value_dim": 40},
    {"offset": 3},
    {"offset": -10},
]


@interpreted
@pytest.mark.parametrize("change", VARIANTS)
@pytest.mark.parametrize("case", [PREFILL, DECODE])
def test_variants(change: dict[str, object], case: Case) -> None:
    check(replace(case, **change))  # type: ignore[arg-type]


@interpreted
@pytest.mark.parametrize("change", VARIANTS[2:11:2])
def test_variants_of_several_queries_of_a_group(change: dict[str, object]) -> None:
    check(replace(Case(3, 70, heads=4, kv_heads=2), **change))  # type: ignore[arg-type]


@interpreted
@pytest.mark.parametrize("dim", [16, 40, 64, 96, 256])
def test_head_sizes(dim: int) -> None:
    check(replace(PREFILL, dim=dim, queries=33, keys=40, symbolic=False))
    check(replace(DECODE, dim=dim, keys=70, symbolic=False))


@interpreted
@pytest.mark.parametrize("keys", [1, 17, 64, 65, 270])
@pytest.mark.parametrize("queries", [1, 40])
def test_numbers_of_keys(keys: int, queries: int) -> None:
    check(Case(queries, keys, heads=4, kv_heads=2, offset=max(keys - queries, 0)))


@interpreted
@pytest.mark.parametrize("case", [replace(PREFILL, window=20), replace(DECODE, window=90, heads=4)])
def test_every_configuration_gives_the_same(case: Case) -> None:
    configs = every_config(attend(case), [case.queries, case.keys])
    assert len(configs) >= 12
    for config in configs[:: len(configs) // 4]:
        check(case, config)


@dataclass(frozen=True)
class Seen:
    """Which keys a mask shows: [first, last), to some queries fewer."""

    case: Case
    first: int
    last: int


@interpreted
@pytest.mark.parametrize(
    "seen",
    [
        Seen(Case(1, 700, causal=False), 0, 1),
        Seen(Case(1, 700, heads=4), 500, 640),
        Seen(Case(1, 300, kv_heads=1, symbolic=False), 150, 200),
        Seen(Case(3, 400, heads=4), 130, 390),
        Seen(Case(40, 300, causal=False), 10, 70),
        Seen(Case(40, 300, window=30), 0, 290),
        Seen(Case(1, 200, sinks=True), 100, 100),
    ],
)
def test_keys_that_a_mask_hides_are_not_read(seen: Seen) -> None:
    case = replace(seen.case, mask="bool")
    q, k, v, mask, *sinks = operands(case)
    i, j = torch.arange(case.queries)[:, None], torch.arange(case.keys)
    mask[:] = (j >= seen.first) & (j < seen.last) & ((i + j) % 7 != 3)
    mask[:, 0, seen.first : seen.last] = mask[:, -1, max(seen.last - 1, seen.first) : seen.last] = True
    clean = [q, k, v, mask, *sinks]
    hidden = ~mask.any(1)[0]
    exact = reference(case, clean)
    k, v = (t.masked_fill((hidden & ((j < seen.first) | (j >= seen.last)))[:, None], float("nan")) for t in (k, v))
    out = torch.full((case.batch, case.queries, case.heads, case.values), 9.0)
    run(attend(case), [q, k, v, mask, *sinks, out], [case.queries, case.keys] if case.symbolic else [])
    assert_equal_float32(out, exact.float())


@interpreted
def test_the_context_is_split() -> None:
    """Many parts for a long context and few heads; the empty parts of a window do no harm."""
    module = load(render(attend(DECODE)))
    assert module.extents([1, 5000]).keys == 5000
    parts = module.launches.splits(module.extents([1, 5000]), 64, torch.device("cpu"))
    assert parts == 39
    check(replace(DECODE, keys=1100, kv_heads=1))
    check(replace(DECODE, keys=500, window=300))


def test_forms() -> None:
    assert forms_of(attend(PREFILL)) == ("decode", "prefill")
    assert forms_of(attend(replace(PREFILL, symbolic=False))) == ("prefill",)
    assert forms_of(attend(replace(DECODE, symbolic=False))) == ("decode",)


def test_attend_text() -> None:
    case = Case(1, 1, heads=8, kv_heads=2, dim=64, dtype=BF16, mask="bool")
    assert_expected_inline(
        render(attend(case)).text,
        """\
import torch
import triton
import triton.language as tl

import llmcomp.codegen.launch as launches
import llmcomp.codegen.triton_prelude as prelude


@triton.jit(do_not_specialize=["s0", "s1"])
def attention_prefill(
    q_ptr,
    k_ptr,
    v_ptr,
    mask_ptr,
    out_ptr,
    s0,
    s1,
    INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    \"\"\"A program computes BLOCK_M queries of one head; the last queries, which see most keys, first.\"\"\"
    s0 = s0.to(INDEX)
    s1 = s1.to(INDEX)
    tiles = tl.cdiv(s0, BLOCK_M)
    pair = (tl.program_id(0) // tiles).to(INDEX)
    b = pair // 8
    h = pair % 8
    i = (tiles - 1 - tl.program_id(0) % tiles).to(INDEX) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    row_inside = i < s0
    channel = tl.arange(0, 64)
    q_block = tl.load(
        q_ptr + b * s0 * 512 + h * s0 * 64 + i * 64 + channel[None, :], mask=row_inside, other=0.0
    )
    k_head = k_ptr + b * s1 * 128 + s1 * (h // 4) * 64
    v_head = v_ptr + b * s1 * 128 + s1 * (h // 4) * 64
    key_end = tl.minimum(i - s0 + s1 + 1, s1)
    first = 0
    last = tl.maximum(tl.minimum(tl.max(key_end), s1), first)
    # keys before the first and behind the last that the mask shows are not visited
    ahead, low = tl.full([], first, INDEX), tl.full([], last, INDEX)
    behind, high = low, ahead
    while ((low >= last) | (high <= first)) & (ahead < last):
        j = ahead + tl.arange(0, BLOCK_N)[None, :]
        col_inside = j < last
        mask = tl.load(mask_ptr + b * s0 * s1 + i * s1 + j, mask=row_inside & col_inside)
        low_key = j
        low_seen = row_inside & col_inside & mask
        j = tl.maximum(behind - BLOCK_N, first) + tl.arange(0, BLOCK_N)[None, :]
        col_inside = j < last
        mask = tl.load(mask_ptr + b * s0 * s1 + i * s1 + j, mask=row_inside & col_inside)
        high_key = j
        high_seen = row_inside & col_inside & mask
        low = tl.minimum(low, tl.min(tl.where(low_seen, low_key, last)))
        high = tl.maximum(high, tl.max(tl.where(high_seen, high_key + 1, first)))
        ahead += BLOCK_N
        behind -= BLOCK_N
    first, last = low, tl.maximum(low, high)
    peak = tl.full([BLOCK_M, 1], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M, 1], tl.float32)
    output = tl.zeros([BLOCK_M, 64], tl.float32)
    whole = first
    part = whole + tl.maximum(tl.minimum(tl.min(key_end), last) - whole, 0) // BLOCK_N * BLOCK_N
    # run 1: keys that all queries see; before and after it, keys that take a mask
    for run in tl.static_range(1, 3):
        begin = whole if run == 1 else part
        end = part if run == 1 else last
        for start in range(begin, end, BLOCK_N):
            key = start + tl.arange(0, BLOCK_N)
            j = key[None, :]
            col_inside = prelude.inside(j, last, run == 1)
            k_block = tl.load(k_head + j * 64 + channel[:, None], mask=col_inside, other=0.0)
            score = prelude.dot(q_block, k_block, tl.zeros([BLOCK_M, BLOCK_N], tl.float32)) * 0.125
            mask = tl.load(mask_ptr + b * s0 * s1 + i * s1 + j, mask=row_inside & col_inside)
            masked = tl.where(mask, score, float("-inf"))
            score = masked
            if run != 1:
                score = tl.where((j < key_end), score, float("-inf"))
            peak_before = peak
            peak = tl.maximum(peak, tl.max(score, axis=1, keep_dims=True))
            shift = tl.where(peak == float("-inf"), 0.0, peak)
            probability = prelude.fast_exp(score - shift)
            decay = prelude.fast_exp(peak_before - shift)
            total = total * decay + tl.sum(probability, axis=1, keep_dims=True)
            v_block = tl.load(
                v_head + key[:, None] * 64 + channel[None, :],
                mask=prelude.inside(key[:, None], last, run == 1),
                other=0.0,
            )
            output = prelude.dot(prelude.narrow(probability, tl.bfloat16), v_block, output * decay)
    output = prelude.div(output, tl.where(total == 0, 1.0, total))
    tl.store(
        out_ptr + b * s0 * 512 + h * 64 + i * 512 + channel[None, :],
        prelude.narrow(output, tl.bfloat16),
        mask=row_inside,
    )


@triton.jit(do_not_specialize=["s0", "s1", "splits"])
def attention_decode(
    q_ptr,
    k_ptr,
    v_ptr,
    mask_ptr,
    out_ptr,
    s0,
    s1,
    scratch,
    peaks,
    totals,
    splits,
    INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    \"\"\"A program computes all queries that share k and v, over one part of the keys.\"\"\"
    s0 = s0.to(INDEX)
    s1 = s1.to(INDEX)
    split = tl.program_id(0) % splits
    pair = (tl.program_id(0) // splits).to(INDEX)
    b = pair // 2
    shared = pair % 2
    row = tl.arange(0, BLOCK_M)[:, None]
    row_inside = row < s0 * 4
    h = shared * 4 + row // s0
    i = row % s0
    channel = tl.arange(0, 64)
    q_block = tl.load(
        q_ptr + b * s0 * 512 + h * s0 * 64 + i * 64 + channel[None, :], mask=row_inside, other=0.0
    )
    k_head = k_ptr + b * s1 * 128 + shared * s1 * 64
    v_head = v_ptr + b * s1 * 128 + shared * s1 * 64
    key_end = tl.minimum(i - s0 + s1 + 1, s1)
    first = 0
    last = tl.maximum(tl.minimum(tl.max(key_end), s1), first)
    # keys before the first and behind the last that the mask shows are not visited
    ahead, low = tl.full([], first, INDEX), tl.full([], last, INDEX)
    behind, high = low, ahead
    while ((low >= last) | (high <= first)) & (ahead < last):
        j = ahead + tl.arange(0, BLOCK_N)[None, :]
        col_inside = j < last
        mask = tl.load(mask_ptr + b * s0 * s1 + i * s1 + j, mask=row_inside & col_inside)
        low_key = j
        low_seen = row_inside & col_inside & mask
        j = tl.maximum(behind - BLOCK_N, first) + tl.arange(0, BLOCK_N)[None, :]
        col_inside = j < last
        mask = tl.load(mask_ptr + b * s0 * s1 + i * s1 + j, mask=row_inside & col_inside)
        high_key = j
        high_seen = row_inside & col_inside & mask
        low = tl.minimum(low, tl.min(tl.where(low_seen, low_key, last)))
        high = tl.maximum(high, tl.max(tl.where(high_seen, high_key + 1, first)))
        ahead += BLOCK_N
        behind -= BLOCK_N
    first, last = low, tl.maximum(low, high)
    part = tl.cdiv(tl.cdiv(last - first, splits), BLOCK_N) * BLOCK_N
    first = first + split * part
    last = tl.maximum(tl.minimum(first + part, last), first)
    peak = tl.full([BLOCK_M, 1], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M, 1], tl.float32)
    output = tl.zeros([BLOCK_M, 64], tl.float32)
    whole = first
    part = whole + tl.maximum(tl.minimum(tl.min(key_end), last) - whole, 0) // BLOCK_N * BLOCK_N
    # run 1: keys that all queries see; before and after it, keys that take a mask
    for run in tl.static_range(1, 3):
        begin = whole if run == 1 else part
        end = part if run == 1 else last
        for start in range(begin, end, BLOCK_N):
            key = start + tl.arange(0, BLOCK_N)
            j = key[None, :]
            col_inside = prelude.inside(j, last, run == 1)
            k_block = tl.load(k_head + j * 64 + channel[:, None], mask=col_inside, other=0.0)
            score = prelude.dot(q_block, k_block, tl.zeros([BLOCK_M, BLOCK_N], tl.float32)) * 0.125
            mask = tl.load(mask_ptr + b * s0 * s1 + i * s1 + j, mask=row_inside & col_inside)
            masked = tl.where(mask, score, float("-inf"))
            score = masked
            if run != 1:
                score = tl.where((j < key_end), score, float("-inf"))
            peak_before = peak
            peak = tl.maximum(peak, tl.max(score, axis=1, keep_dims=True))
            shift = tl.where(peak == float("-inf"), 0.0, peak)
            probability = prelude.fast_exp(score - shift)
            decay = prelude.fast_exp(peak_before - shift)
            total = total * decay + tl.sum(probability, axis=1, keep_dims=True)
            v_block = tl.load(
                v_head + key[:, None] * 64 + channel[None, :],
                mask=prelude.inside(key[:, None], last, run == 1),
                other=0.0,
            )
            output = prelude.dot(prelude.narrow(probability, tl.bfloat16), v_block, output * decay)
    if scratch is None:
        output = prelude.div(output, tl.where(total == 0, 1.0, total))
        tl.store(
            out_ptr + b * s0 * 512 + h * 64 + i * 512 + channel[None, :],
            prelude.narrow(output, tl.bfloat16),
            mask=row_inside,
        )
    else:
        at = (pair * (s0 * 4) + row) * splits + split
        tl.store(peaks + at, peak, mask=row_inside)
        tl.store(totals + at, total, mask=row_inside)
        tl.store(scratch + at * 64 + channel[None, :], output, mask=row_inside)


@triton.jit(do_not_specialize=["s0", "s1", "splits"])
def attention_combine(
    out_ptr, s0, s1, scratch, peaks, totals, splits, INDEX: tl.constexpr, SPLITS: tl.constexpr
):
    \"\"\"A program combines the parts of one query of one head.\"\"\"
    s0 = s0.to(INDEX)
    s1 = s1.to(INDEX)
    program = tl.program_id(0).to(INDEX)
    pair = program // (s0 * 4)
    row = program % (s0 * 4)
    b = pair // 2
    shared = pair % 2
    h = shared * 4 + row // s0
    i = row % s0
    split = tl.arange(0, SPLITS)[:, None]
    inside = split < splits
    channel = tl.arange(0, 64)
    at = program * splits + split
    peak = tl.load(peaks + at, mask=inside, other=float("-inf"))
    top = tl.max(peak, axis=0, keep_dims=True)
    decay = prelude.fast_exp(peak - tl.where(top == float("-inf"), 0.0, top))
    total = tl.load(totals + at, mask=inside, other=0.0)
    total = tl.sum(total * decay, axis=0, keep_dims=True)
    part = tl.load(scratch + at * 64 + channel[None, :], mask=inside, other=0.0)
    output = tl.sum(part * decay, axis=0, keep_dims=True)
    output = prelude.div(output, tl.where(total == 0, 1.0, total))
    tl.store(
        out_ptr + b * s0 * 512 + h * 64 + i * 512 + channel[None, :],
        prelude.narrow(output, tl.bfloat16),
    )


def extents(sizes):
    \"\"\"The sizes of the loops.\"\"\"
    s0, s1 = sizes
    return launches.Heads(
        pairs=2, group=4, queries=s0, keys=s1, width=64, bytes=2, window=False, unpacks=False
    )


def default(sizes):
    \"\"\"The launch configuration for the class of these sizes.\"\"\"
    shape = extents(sizes)
    if shape.group * shape.queries <= 32:
        return launches.decode_config(shape)
    return launches.prefill_config(shape)


def configs(sizes):
    \"\"\"Launch configurations worth a try.\"\"\"
    shape = extents(sizes)
    if shape.group * shape.queries <= 32:
        return launches.decode_configs(shape)
    return launches.prefill_configs(shape)


def launch(buffers, sizes, config=None, status=None):
    \"\"\"Launch on the current stream; a failed index check sets `status`.\"\"\"
    shape = extents(sizes)
    config = config or default(sizes)
    form = launch_decode if config.form == "decode" else launch_prefill
    return form(buffers, sizes, shape, config, status)


def launch_decode(buffers, sizes, shape, config, status):
    \"\"\"One launch on the current stream, a second where the keys are split.\"\"\"
    device = buffers[0].device
    splits = launches.splits(shape, config["BLOCK_N"], device)
    rows = shape.pairs * shape.group * shape.queries
    scratch = peaks = totals = None
    if splits > 1:
        scratch = torch.empty(rows * splits * 64, dtype=torch.float32, device=device)
        peaks, totals = torch.empty(2, rows * splits, dtype=torch.float32, device=device)
    index = launches.index_type(buffers, 0)
    grid = (shape.pairs * splits,)
    compiled = [attention_decode[grid](
        *buffers, *sizes, scratch, peaks, totals, splits, INDEX=index, **config.options()
    )]
    if splits > 1:
        options = launches.combine_config(splits, 64).options()
        compiled += [attention_combine[(rows,)](
            buffers[4], *sizes, scratch, peaks, totals, splits, INDEX=index, **options
        )]
    return compiled


def launch_prefill(buffers, sizes, shape, config, status):
    \"\"\"One launch on the current stream.\"\"\"
    tiles = triton.cdiv(shape.queries, config["BLOCK_M"])
    grid = (tiles * shape.pairs * shape.group,)
    return [attention_prefill[grid](
        *buffers, *sizes, INDEX=launches.index_type(buffers, 0), **config.options()
    )]
""",
    )
