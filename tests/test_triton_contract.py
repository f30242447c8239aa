"""Contract kernels as Triton against torch: sections, prologues, epilogues, layouts, experts, odd sizes."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import sympy
import torch
from expecttest import assert_expected_inline

from llmcomp.codegen.kernel import (
    Accumulator,
    Axis,
    Buffer,
    Check,
    Compute,
    Contract,
    Load,
    Reduce,
    Section,
    Statement,
    Store,
    Weight,
)
from llmcomp.codegen.triton import render
from llmcomp.codegen.triton_contract import distinct, forms_of
from tests.numerics import assert_equal_float32, assert_no_worse
from tests.triton_kernels import axis, every_config, run, symbol
from tests.triton_worker import interpreted

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
S0 = symbol("s0")
ROUND = {BF16: "round_bfloat16", F16: "round_float16"}
Size = int | sympy.Expr


def close(ours: torch.Tensor, exact: torch.Tensor) -> None:
    """`exact` is the float64 result: nearly that in float32, within two roundings in 16 bits."""
    if ours.dtype == F32:
        assert_equal_float32(ours, exact.float())
    else:
        eager = exact.float().to(ours.dtype)
        assert_no_worse(ours, eager, exact)


def dense(buffer: str, k: int) -> Weight:
    """An nn.Linear weight: (N, K)."""
    return Weight(buffer, sympy.Integer(k), sympy.Integer(1))


def transposed(buffer: str, n: int) -> Weight:
    """A Conv1D weight: (K, N)."""
    return Weight(buffer, sympy.Integer(1), sympy.Integer(n))


def plain_operand(m: Axis, k: Axis) -> tuple[Statement, ...]:
    return (Load("x", "x_ptr", m.symbol * k.size + k.symbol, F32),)


def norm_operand(m: Axis, k: Axis, dtype: torch.dtype) -> tuple[Statement, ...]:
    """An RMS norm of the rows of x, with weights, ending in `operand`."""
    rounding = ROUND.get(dtype)
    return (
        Load("x", "x_ptr", m.symbol * k.size + k.symbol, F32),
        Compute("square", "mul", ("x", "x"), F32),
        Reduce("sum_square", "sum", "square", F32),
        Compute("mean", "mul", ("sum_square", 1.0 / int(k.size)), F32),
        Compute("shifted", "add", ("mean", 1e-6), F32),
        Compute("rsqrt", "rsqrt", ("shifted",), F32),
        Compute("normal", "mul", ("x", "rsqrt"), F32),
        Load("norm_weight", "norm_ptr", k.symbol, F32),
        Compute("scaled", "mul", ("normal", "norm_weight"), F32),
        *([Compute("narrow", rounding, ("scaled",), F32)] if rounding else []),
    )


def rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """What `norm_operand` computes, rounded as it is."""
    wide = x.double()
    normal = wide * (wide.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight.double()
    return normal.to(x.dtype).double()


# ---- one section ------------------------------------------------------------------------------------------


def linear(rows: Size, k: int, n: int, dtype: torch.dtype, kn: bool = False) -> Contract:
    """x @ w.T + bias + residual"""
    m, depth, column = axis("m", rows), axis("k", k), axis("n", n)
    weight = transposed("weight_ptr", n) if kn else dense("weight_ptr", k)
    at = m.symbol * n + column.symbol
    epilogue = (
        Load("bias", "bias_ptr", column.symbol, F32),
        Compute("biased", "add", ("acc", "bias"), F32),
        Load("residual", "residual_ptr", at, F32),
        Compute("sum", "add", ("biased", "residual"), F32),
        Store("out_ptr", at, "sum"),
    )
    section = Section((column,), (Accumulator("acc", weight, column.symbol),), epilogue)
    names = ("x_ptr", "weight_ptr", "bias_ptr", "residual_ptr")
    buffers = (*(Buffer(b, dtype) for b in names), Buffer("out_ptr", dtype, True))
    sizes = (S0,) if isinstance(rows, sympy.Symbol) else ()
    return Contract("linear", buffers, sizes, m, depth, plain_operand(m, depth), "x", dtype, (section,))


def linear_buffers(rows: int, k: int, n: int, dtype: torch.dtype, kn: bool) -> list[torch.Tensor]:
    shapes = ((rows, k), (k, n) if kn else (n, k), (n,), (rows, n))
    x, weight, bias, residual = (torch.randn(s).to(dtype) for s in shapes)
    return [x, weight / k**0.5, bias, residual, torch.zeros(rows, n, dtype=dtype)]


def linear_exact(buffers: Sequence[torch.Tensor], kn: bool) -> torch.Tensor:
    x, weight, bias, residual = (b.double() for b in buffers[:4])
    return x @ (weight if kn else weight.t()) + bias + residual


@interpreted
@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize("kn", [False, True])
@pytest.mark.parametrize(
    "rows,k,n",
    [(1, 100, 37), (3, 192, 50), (4, 64, 1), (7, 100, 50), (70, 128, 33)],
)
def test_linear(dtype: torch.dtype, kn: bool, rows: int, k: int, n: int) -> None:
    buffers = linear_buffers(rows, k, n, dtype, kn)
    run(linear(rows, k, n, dtype, kn), buffers)
    close(buffers[-1], linear_exact(buffers, kn))


@interpreted
@pytest.mark.parametrize("rows", [1, 2, 5, 70])
def test_symbolic_rows_choose_their_form(rows: int) -> None:
    buffers = linear_buffers(rows, 64, 40, BF16, False)
    run(linear(S0, 64, 40, BF16), buffers, [rows])
    close(buffers[-1], linear_exact(buffers, False))


@interpreted
@pytest.mark.parametrize("rows", [2, 40])
def test_every_configuration_gives_the_same(rows: int) -> None:
    kernel = linear(S0, 320, 40, F32)
    configs = every_config(kernel, [rows])
    assert len(configs) >= 8
    for config in configs[:: len(configs) // 4]:
        buffers = linear_buffers(rows, 320, 40, F32, False)
        run(kernel, buffers, [rows], config=config)
        assert_equal_float32(buffers[-1], linear_exact(buffers, False).float())


@interpreted
def test_weights_of_another_dtype() -> None:
    """A float32 operand with bfloat16 weights is multiplied in float32."""
    for rows in (2, 20):
        kernel = linear(rows, 64, 48, F32)
        buffers = tuple(replace(b, dtype=BF16) if b.name == "weight_ptr" else b for b in kernel.buffers)
        tensors = linear_buffers(rows, 64, 48, F32, False)
        tensors[1] = tensors[1].bfloat16()
        run(replace(kernel, buffers=buffers), tensors)
        assert_equal_float32(tensors[-1], linear_exact(tensors, False).float())


def gated(rows: Size, k: int, n: int, dtype: torch.dtype) -> Contract:
    """norm, then silu(gate) * up with two accumulators."""
    m, depth, column = axis("m", rows), axis("k", k), axis("n", n)
    epilogue = (
        Compute("sigmoid", "sigmoid", ("gate",), F32),
        Compute("silu", "mul", ("gate", "sigmoid"), F32),
        Compute("product", "mul", ("silu", "up"), F32),
        Store("out_ptr", m.symbol * n + column.symbol, "product"),
    )
    both = tuple(Accumulator(a, dense(f"{a}_ptr", k), column.symbol) for a in ("gate", "up"))
    names = ("x_ptr", "norm_ptr", "gate_ptr", "up_ptr")
    buffers = (*(Buffer(b, dtype) for b in names), Buffer("out_ptr", dtype, True))
    operand = norm_operand(m, depth, dtype)
    sizes = (S0,) if isinstance(rows, sympy.Symbol) else ()
    value = operand[-1].out  # type: ignore[union-attr]
    section = Section((column,), both, epilogue)
    return Contract("norm_gated", buffers, sizes, m, depth, operand, value, dtype, (section,))


@interpreted
@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize("rows,k,n", [(1, 128, 80), (3, 72, 33), (33, 128, 96)])
def test_norm_and_gated_unit(dtype: torch.dtype, rows: int, k: int, n: int) -> None:
    shapes = ((rows, k), (k,), (n, k), (n, k))
    x, norm, gate, up = (torch.randn(s).to(dtype) for s in shapes)
    gate, up, out = gate / k**0.5, up / k**0.5, torch.zeros(rows, n, dtype=dtype)
    run(gated(rows, k, n, dtype), [x, norm, gate, up, out])
    operand = rms_norm(x, norm)
    close(out, torch.nn.functional.silu(operand @ gate.double().t()) * (operand @ up.double().t()))


# ---- q, k and v with rotary embedding, norms within heads, and the cache ----------------------------------


def head_section(name: str, heads: int, m: Axis, k: int, dim: int, normed: bool) -> Section:
    """Two accumulators, the rotary halves of a head; `normed`: an RMS norm within the head before."""
    h, c = axis("h", heads), axis("c", dim // 2)
    low, high = f"{name}_low", f"{name}_high"
    weight = dense(f"{name}_ptr", k)
    row = h.symbol * dim + c.symbol
    body: list[Statement] = []
    if normed:
        body += [
            Compute(f"{name}_a2", "mul", (low, low), F32),
            Compute(f"{name}_b2", "mul", (high, high), F32),
            Compute(f"{name}_ab2", "add", (f"{name}_a2", f"{name}_b2"), F32),
            Reduce(f"{name}_sum", "sum", f"{name}_ab2", F32),
            Compute(f"{name}_mean", "mul", (f"{name}_sum", 1.0 / dim), F32),
            Compute(f"{name}_eps", "add", (f"{name}_mean", 1e-6), F32),
            Compute(f"{name}_rsqrt", "rsqrt", (f"{name}_eps",), F32),
            Compute(f"{name}_low_n", "mul", (low, f"{name}_rsqrt"), F32),
            Compute(f"{name}_high_n", "mul", (high, f"{name}_rsqrt"), F32),
        ]
    a, b = (f"{low}_n", f"{high}_n") if normed else (low, high)
    out = m.symbol * heads * dim + row
    body += [
        Load(f"{name}_cos", "cos_ptr", m.symbol * (dim // 2) + c.symbol, F32),
        Load(f"{name}_sin", "sin_ptr", m.symbol * (dim // 2) + c.symbol, F32),
        Compute(f"{name}_ac", "mul", (a, f"{name}_cos"), F32),
        Compute(f"{name}_bs", "mul", (b, f"{name}_sin"), F32),
        Compute(f"{name}_first", "sub", (f"{name}_ac", f"{name}_bs"), F32),
        Compute(f"{name}_bc", "mul", (b, f"{name}_cos"), F32),
        Compute(f"{name}_as", "mul", (a, f"{name}_sin"), F32),
        Compute(f"{name}_second", "add", (f"{name}_bc", f"{name}_as"), F32),
        Store(f"{name}_out_ptr", out, f"{name}_first"),
        Store(f"{name}_out_ptr", out + dim // 2, f"{name}_second"),
    ]
    halves = (Accumulator(low, weight, row), Accumulator(high, weight, row + dim // 2))
    return Section((h, c), halves, tuple(body))


def cache_section(m: Axis, k: int, columns: int) -> Section:
    """v, written into a cache of 16 positions at the position of the row."""
    n = axis("n", columns)
    at = sympy.Symbol("at", integer=True)
    body = (
        Load("position", "position_ptr", m.symbol, torch.int64),
        Check("at", "position", sympy.Integer(16), False),
        Store("v_out_ptr", at * columns + n.symbol, "v"),
    )
    return Section((n,), (Accumulator("v", dense("v_ptr", k), n.symbol),), body)


def qkv(rows: Size, k: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype, normed: bool) -> Contract:
    m, depth = axis("m", rows), axis("k", k)
    operand = norm_operand(m, depth, dtype)
    sections = (
        head_section("q", heads, m, k, dim, normed),
        head_section("k", kv_heads, m, k, dim, normed),
        cache_section(m, k, kv_heads * dim),
    )
    names = "x_ptr norm_ptr q_ptr k_ptr v_ptr cos_ptr sin_ptr".split()
    outs = "q_out_ptr k_out_ptr v_out_ptr".split()
    buffers = (
        *(Buffer(b, dtype) for b in names),
        Buffer("position_ptr", torch.int64),
        *(Buffer(b, dtype, True) for b in outs),
    )
    sizes = (S0,) if isinstance(rows, sympy.Symbol) else ()
    value = operand[-1].out  # type: ignore[union-attr]
    return Contract("norm_qkv_rope", buffers, sizes, m, depth, operand, value, dtype, sections)


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, heads: int, normed: bool) -> torch.Tensor:
    x = x.view(x.shape[0], heads, -1)
    if normed:
        x = x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    a, b = x.chunk(2, -1)
    cos, sin = cos.double()[:, None], sin.double()[:, None]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).flatten(1)


@interpreted
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("rows,k,dim", [(3, 48, 24), (20, 64, 32)])
def test_qkv_with_rotary_halves(normed: bool, dtype: torch.dtype, rows: int, k: int, dim: int) -> None:
    heads, kv_heads = 4, 2
    shapes = ((rows, k), (k,), (heads * dim, k), (kv_heads * dim, k), (kv_heads * dim, k))
    x, norm, wq, wk, wv = (torch.randn(s).to(dtype) for s in shapes)
    wq, wk, wv = (w / k**0.5 for w in (wq, wk, wv))
    cos, sin = torch.randn(2, rows, dim // 2).to(dtype)
    position = torch.randperm(16)[:rows] if rows <= 16 else torch.arange(rows) % 16
    q, key = torch.zeros(rows, heads * dim, dtype=dtype), torch.zeros(rows, kv_heads * dim, dtype=dtype)
    cache, status = torch.zeros(16, kv_heads * dim, dtype=dtype), torch.zeros(1, dtype=torch.int64)
    buffers = [x, norm, wq, wk, wv, cos, sin, position, q, key, cache]
    run(qkv(rows, k, heads, kv_heads, dim, dtype, normed), buffers, (), status)
    operand = rms_norm(x, norm)
    close(q, rotated(operand @ wq.double().t(), cos, sin, heads, normed))
    close(key, rotated(operand @ wk.double().t(), cos, sin, kv_heads, normed))
    assert int(status) == 0
    if rows <= 16:
        close(cache, torch.zeros(16, kv_heads * dim).double().index_copy(0, position, operand @ wv.double().t()))


@interpreted
def test_position_outside_the_cache_is_reported() -> None:
    kernel = qkv(1, 64, 2, 1, 32, F32, False)
    shapes = [(1, 64), (64,), (64, 64), (32, 64), (32, 64), (1, 16), (1, 16)]
    outs = [torch.zeros(1, 64), torch.zeros(1, 32), torch.zeros(16, 32)]
    status = torch.zeros(1, dtype=torch.int64)
    run(kernel, [*(torch.randn(s) for s in shapes), torch.tensor([16]), *outs], (), status)
    assert int(status) == 1


# ---- experts ----------------------------------------------------------------------------------------------


def experts(rows: Size, count: int, k: int, n: int, dtype: torch.dtype, kn: bool) -> Contract:
    """Rows sorted by expert, each times the weight of its expert."""
    m, depth, column = axis("m", rows), axis("k", k), axis("n", n)
    strides = (1, n) if kn else (k, 1)
    weight = Weight("weight_ptr", *map(sympy.Integer, strides), expert_stride=sympy.Integer(k * n))
    epilogue = (Store("out_ptr", m.symbol * n + column.symbol, "acc"),)
    section = Section((column,), (Accumulator("acc", weight, column.symbol),), epilogue)
    buffers = (
        Buffer("x_ptr", dtype),
        Buffer("weight_ptr", dtype),
        Buffer("ends_ptr", torch.int32),
        Buffer("out_ptr", dtype, True),
    )
    operand = plain_operand(m, depth)
    sizes = (S0,) if isinstance(rows, sympy.Symbol) else ()
    return Contract(
        "experts", buffers, sizes, m, depth, operand, "x", dtype, (section,), "ends_ptr", sympy.Integer(count)
    )


@interpreted
@pytest.mark.parametrize("kn", [False, True])
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("counts", [(1, 0, 1, 0, 0), (0, 9, 30, 2, 1), (0, 0, 0, 0, 0), (5, 5, 5, 5, 5)])
def test_experts(kn: bool, dtype: torch.dtype, counts: tuple[int, ...]) -> None:
    k, n, rows = 64, 40, sum(counts)
    beyond = 3  # rows of no expert
    x = torch.randn(rows + beyond, k).to(dtype)
    weight = (torch.randn(5, *((k, n) if kn else (n, k))) / k**0.5).to(dtype)
    ends = torch.tensor(counts).cumsum(0).int()
    out = torch.full((rows + beyond, n), 9.0, dtype=dtype)
    run(experts(S0, 5, k, n, dtype, kn), [x, weight, ends, out], [rows + beyond])
    given = zip(x[:rows].split(counts), weight, strict=True)
    parts = [part.double() @ (w.double() if kn else w.double().t()) for part, w in given]
    assert not out[rows:].any()
    if rows:
        close(out[:rows], torch.cat(parts))


# ---- text -------------------------------------------------------------------------------------------------


def test_static_rows_give_one_form() -> None:
    assert forms_of(linear(1, 64, 64, BF16)) == ("gemv",)
    assert forms_of(linear(64, 64, 64, BF16)) == ("dot",)
    assert forms_of(linear(S0, 64, 64, BF16)) == ("gemv", "dot")


def test_sections_never_share_a_name() -> None:
    kernel = qkv(1, 64, 4, 2, 32, BF16, True)
    names = [
        {str(a.symbol) for a in s.axes} | {v.out for v in s.epilogue if not isinstance(v, Store)}
        for s in distinct(kernel)
    ]
    assert not (names[0] & names[1] or names[0] & names[2] or names[1] & names[2])


def test_gemv_text() -> None:
    kernel = linear(1, 64, 1000, BF16)
    assert_expected_inline(
        render(kernel).text,
        """\
import triton
import triton.language as tl

import llmcomp.codegen.launch as launches
import llmcomp.codegen.triton_prelude as prelude


@triton.jit
def linear(
    x_ptr,
    weight_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    \"\"\"Few rows: a program streams the weights of BLOCK_N columns through registers.\"\"\"
    tl.static_assert(64 % BLOCK_K == 0)
    program = tl.program_id(0)
    m = tl.arange(0, BLOCK_M)[:, None]
    row_inside = m < 1
    column = (program * BLOCK_N).to(INDEX) + tl.arange(0, BLOCK_N)[None, :]
    col_inside = prelude.below(column, 1000, BLOCK_N)
    acc_rows = weight_ptr + column * 64
    acc = tl.zeros([BLOCK_M, BLOCK_N, BLOCK_K], tl.float32)
    for start in range(0, 64, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)[None, :]
        acc_weight = tl.load(
            acc_rows[:, :, None] + k[:, None, :],
            mask=col_inside[:, :, None],
            other=0.0,
            eviction_policy="evict_first",
        )
        x = tl.load(x_ptr + m * 64 + k, mask=row_inside).to(tl.float32)
        acc += x[:, None, :] * acc_weight.to(tl.float32)
    acc = tl.sum(acc, axis=2)
    bias = tl.load(bias_ptr + column, mask=col_inside).to(tl.float32)
    biased = acc + bias
    residual = tl.load(residual_ptr + m * 1000 + column, mask=row_inside & col_inside).to(tl.float32)
    sum = biased + residual
    tl.store(
        out_ptr + m * 1000 + column, prelude.narrow(sum, tl.bfloat16), mask=row_inside & col_inside
    )


def extents(sizes):
    \"\"\"The sizes of the loops.\"\"\"
    return launches.Product(
        rows=1, columns=1000, depth=64, parts=1, width=0, bytes=2, experts=1, across=False
    )


def default(sizes):
    \"\"\"The launch configuration for the class of these sizes.\"\"\"
    shape = extents(sizes)
    return launches.gemv_config(shape)


def configs(sizes):
    \"\"\"Launch configurations worth a try.\"\"\"
    shape = extents(sizes)
    return launches.gemv_configs(shape)


def launch(buffers, sizes, config=None, status=None):
    \"\"\"Launch on the current stream; a failed index check sets `status`.\"\"\"
    shape = extents(sizes)
    config = config or default(sizes)
    BLOCK_N = config["BLOCK_N"]
    programs = (1000 + BLOCK_N - 1) // BLOCK_N
    grid = (programs,)
    return [linear[grid](*buffers, INDEX=launches.index_type(buffers, shape.rows), **config.options())]
""",
    )


def test_gated_text() -> None:
    assert_expected_inline(
        render(gated(S0, 128, 256, BF16)).text,
        """\
import triton
import triton.language as tl

import llmcomp.codegen.launch as launches
import llmcomp.codegen.triton_prelude as prelude


@triton.jit(do_not_specialize=["s0"])
def norm_gated_gemv(
    x_ptr,
    norm_ptr,
    gate_ptr,
    up_ptr,
    out_ptr,
    s0,
    INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    \"\"\"Few rows: a program streams the weights of BLOCK_N columns through registers.\"\"\"
    s0 = s0.to(INDEX)
    tl.static_assert(128 % BLOCK_K == 0)
    tiles = tl.cdiv(s0, BLOCK_M)
    program = tl.program_id(0) // tiles
    m = (tl.program_id(0) % tiles).to(INDEX) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    row_inside = m < s0
    sum_square_acc = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    for start in range(0, 128, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)[None, :]
        x = tl.load(x_ptr + m * 128 + k, mask=row_inside).to(tl.float32)
        square = x * x
        sum_square_acc += square
    sum_square = prelude.total(sum_square_acc, 1)
    mean = sum_square * 0.0078125
    shifted = mean + 1e-06
    rsqrt = tl.rsqrt(shifted)
    column = (program * BLOCK_N).to(INDEX) + tl.arange(0, BLOCK_N)[None, :]
    gate_rows = gate_ptr + column * 128
    up_rows = up_ptr + column * 128
    gate = tl.zeros([BLOCK_M, BLOCK_N, BLOCK_K], tl.float32)
    up = tl.zeros([BLOCK_M, BLOCK_N, BLOCK_K], tl.float32)
    for start in range(0, 128, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)[None, :]
        gate_weight = tl.load(gate_rows[:, :, None] + k[:, None, :], eviction_policy="evict_first")
        up_weight = tl.load(up_rows[:, :, None] + k[:, None, :], eviction_policy="evict_first")
        x = tl.load(x_ptr + m * 128 + k, mask=row_inside).to(tl.float32)
        normal = x * rsqrt
        norm_weight = tl.load(norm_ptr + k).to(tl.float32)
        scaled = normal * norm_weight
        narrow = prelude.rounded(scaled, tl.bfloat16)
        gate += narrow[:, None, :] * gate_weight.to(tl.float32)
        up += narrow[:, None, :] * up_weight.to(tl.float32)
    gate = tl.sum(gate, axis=2)
    up = tl.sum(up, axis=2)
    sigmoid = prelude.sigmoid(gate)
    silu = gate * sigmoid
    product = silu * up
    tl.store(out_ptr + m * 256 + column, prelude.narrow(product, tl.bfloat16), mask=row_inside)


@triton.jit(do_not_specialize=["s0"])
def norm_gated_dot(
    x_ptr,
    norm_ptr,
    gate_ptr,
    up_ptr,
    out_ptr,
    s0,
    INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    \"\"\"A program computes BLOCK_M rows of BLOCK_N columns on tensor cores.\"\"\"
    s0 = s0.to(INDEX)
    tl.static_assert(128 % BLOCK_K == 0)
    tiles = tl.cdiv(s0, BLOCK_M)
    program = tl.program_id(0) // tiles
    m = (tl.program_id(0) % tiles).to(INDEX) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    row_inside = m < s0
    sum_square_acc = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    for start in range(0, 128, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)[None, :]
        x = tl.load(x_ptr + m * 128 + k, mask=row_inside).to(tl.float32)
        square = x * x
        sum_square_acc += square
    sum_square = prelude.total(sum_square_acc, 1)
    mean = sum_square * 0.0078125
    shifted = mean + 1e-06
    rsqrt = tl.rsqrt(shifted)
    column = (program * BLOCK_N).to(INDEX) + tl.arange(0, BLOCK_N)[None, :]
    gate_rows = gate_ptr + column * 128
    up_rows = up_ptr + column * 128
    gate = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, 128, BLOCK_K):
        depth = start + tl.arange(0, BLOCK_K)
        k = depth[None, :]
        x = tl.load(x_ptr + m * 128 + k, mask=row_inside).to(tl.float32)
        normal = x * rsqrt
        norm_weight = tl.load(norm_ptr + k).to(tl.float32)
        scaled = normal * norm_weight
        narrow = prelude.rounded(scaled, tl.bfloat16)
        operand = prelude.narrow(narrow, tl.bfloat16)
        gate_weight = tl.load(gate_rows + depth[:, None])
        gate = prelude.dot(operand, gate_weight, gate)
        up_weight = tl.load(up_rows + depth[:, None])
        up = prelude.dot(operand, up_weight, up)
    sigmoid = prelude.sigmoid(gate)
    silu = gate * sigmoid
    product = silu * up
    tl.store(out_ptr + m * 256 + column, prelude.narrow(product, tl.bfloat16), mask=row_inside)


def extents(sizes):
    \"\"\"The sizes of the loops.\"\"\"
    (s0,) = sizes
    return launches.Product(
        rows=s0, columns=512, depth=128, parts=2, width=0, bytes=2, experts=1, across=False
    )


def default(sizes):
    \"\"\"The launch configuration for the class of these sizes.\"\"\"
    shape = extents(sizes)
    if shape.rows <= 4 * shape.experts:
        return launches.gemv_config(shape)
    return launches.dot_config(shape)


def configs(sizes):
    \"\"\"Launch configurations worth a try.\"\"\"
    shape = extents(sizes)
    if shape.rows <= 4 * shape.experts:
        return launches.gemv_configs(shape)
    return launches.dot_configs(shape)


def launch(buffers, sizes, config=None, status=None):
    \"\"\"Launch on the current stream; a failed index check sets `status`.\"\"\"
    shape = extents(sizes)
    config = config or default(sizes)
    BLOCK_N = config["BLOCK_N"]
    programs = (256 + BLOCK_N - 1) // BLOCK_N
    grid = (programs * triton.cdiv(shape.rows, config["BLOCK_M"]),)
    kernel = norm_gated_gemv if config.form == "gemv" else norm_gated_dot
    return [kernel[grid](
        *buffers, *sizes, INDEX=launches.index_type(buffers, shape.rows), **config.options()
    )]
""",
    )


def test_experts_text() -> None:
    assert_expected_inline(
        render(experts(S0, 8, 128, 256, BF16, True)).text,
        """\
import triton
import triton.language as tl

import llmcomp.codegen.launch as launches
import llmcomp.codegen.triton_prelude as prelude


@triton.jit(do_not_specialize=["s0"])
def experts_gemv(
    x_ptr,
    weight_ptr,
    ends_ptr,
    out_ptr,
    s0,
    INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    \"\"\"Few rows: a program streams the weights of BLOCK_N columns through registers.\"\"\"
    s0 = s0.to(INDEX)
    tl.static_assert(128 % BLOCK_K == 0)
    program = tl.program_id(0)
    expert = tl.program_id(1)
    first_row = tl.load(ends_ptr + expert - 1, mask=expert > 0, other=0)
    own_matrix = tl.minimum(expert, 8 - 1).to(tl.int64)
    end_row = tl.load(ends_ptr + expert, mask=expert < 8, other=s0)
    depth_end = tl.where(expert < 8, 128, 0)  # nobody's rows give zeros
    for start_row in range(first_row, end_row, BLOCK_M):
        m = (start_row + tl.arange(0, BLOCK_M)[:, None]).to(INDEX)
        row_inside = m < end_row
        column = (program * BLOCK_N).to(INDEX) + tl.arange(0, BLOCK_N)[None, :]
        acc_rows = weight_ptr + own_matrix * 32768 + column
        acc = tl.zeros([BLOCK_M, BLOCK_N, BLOCK_K], tl.float32)
        for start in range(0, depth_end, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)[None, :]
            acc_weight = tl.load(acc_rows[:, :, None] + k[:, None, :] * 256, eviction_policy="evict_first")
            x = tl.load(x_ptr + m * 128 + k, mask=row_inside).to(tl.float32)
            acc += x[:, None, :] * acc_weight.to(tl.float32)
        acc = tl.sum(acc, axis=2)
        tl.store(out_ptr + m * 256 + column, prelude.narrow(acc, tl.bfloat16), mask=row_inside)


@triton.jit(do_not_specialize=["s0"])
def experts_dot(
    x_ptr,
    weight_ptr,
    ends_ptr,
    out_ptr,
    s0,
    INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    \"\"\"A program computes BLOCK_M rows of BLOCK_N columns on tensor cores.\"\"\"
    s0 = s0.to(INDEX)
    tl.static_assert(128 % BLOCK_K == 0)
    program = tl.program_id(0)
    expert = tl.program_id(1)
    first_row = tl.load(ends_ptr + expert - 1, mask=expert > 0, other=0)
    own_matrix = tl.minimum(expert, 8 - 1).to(tl.int64)
    end_row = tl.load(ends_ptr + expert, mask=expert < 8, other=s0)
    depth_end = tl.where(expert < 8, 128, 0)  # nobody's rows give zeros
    for start_row in range(first_row, end_row, BLOCK_M):
        m = (start_row + tl.arange(0, BLOCK_M)[:, None]).to(INDEX)
        row_inside = m < end_row
        column = (program * BLOCK_N).to(INDEX) + tl.arange(0, BLOCK_N)[None, :]
        acc_rows = weight_ptr + own_matrix * 32768 + column
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start in range(0, depth_end, BLOCK_K):
            depth = start + tl.arange(0, BLOCK_K)
            k = depth[None, :]
            x = tl.load(x_ptr + m * 128 + k, mask=row_inside)
            acc_weight = tl.load(acc_rows + depth[:, None] * 256)
            acc = prelude.dot(x, acc_weight, acc)
        tl.store(out_ptr + m * 256 + column, prelude.narrow(acc, tl.bfloat16), mask=row_inside)


def extents(sizes):
    \"\"\"The sizes of the loops.\"\"\"
    (s0,) = sizes
    return launches.Product(
        rows=s0, columns=256, depth=128, parts=1, width=0, bytes=2, experts=8, across=True
    )


def default(sizes):
    \"\"\"The launch configuration for the class of these sizes.\"\"\"
    shape = extents(sizes)
    if shape.rows <= 4 * shape.experts:
        return launches.gemv_config(shape)
    return launches.dot_config(shape)


def configs(sizes):
    \"\"\"Launch configurations worth a try.\"\"\"
    shape = extents(sizes)
    if shape.rows <= 4 * shape.experts:
        return launches.gemv_configs(shape)
    return launches.dot_configs(shape)


def launch(buffers, sizes, config=None, status=None):
    \"\"\"Launch on the current stream; a failed index check sets `status`.\"\"\"
    shape = extents(sizes)
    config = config or default(sizes)
    BLOCK_N = config["BLOCK_N"]
    programs = (256 + BLOCK_N - 1) // BLOCK_N
    grid = (programs, shape.experts + 1)
    kernel = experts_gemv if config.form == "gemv" else experts_dot
    return [kernel[grid](
        *buffers, *sizes, INDEX=launches.index_type(buffers, shape.rows), **config.options()
    )]
""",
    )
