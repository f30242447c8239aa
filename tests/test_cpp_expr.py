"""Every operation of a kernel body as C++, against torch; index expressions against sympy."""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import sympy
import torch
from torch.utils._sympy.functions import CeilDiv, FloorDiv, Mod, ModularIndexing, PythonMod

from llmcomp.codegen.cpp_expr import TABLE, compute, constant, index
from llmcomp.codegen.kernel import OPERATIONS, Axis, Buffer, Compute, Index, Load, Map, Statement, Store
from tests.cpp_kernels import Call, Library, axis, sanitize, size

F32, F64, I64, BOOL = torch.float32, torch.float64, torch.int64, torch.bool
FLOATS = (F32, F64)
INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8)
N = size("n")
AT = axis("i")

Reference = Callable[..., torch.Tensor]


def divide(mode: str) -> Reference:
    return lambda a, b: torch.div(a, b, rounding_mode=mode)


# What torch calls an operation, where the name differs.
TORCH: dict[str, Reference] = {
    "round_even": torch.round,
    "floor_div": divide("floor"),
    "trunc_div": divide("trunc"),
    "shift_left": torch.bitwise_left_shift,
    "shift_right": torch.bitwise_right_shift,
    "sigmoid": lambda x: torch.where(x < 0, x.exp() / (1 + x.exp()), torch.sigmoid(x)),
    "round_bfloat16": lambda x: x.bfloat16().to(x.dtype),
    "round_float16": lambda x: x.half().to(x.dtype),
}
COMPARISONS = {"eq", "ne", "lt", "le", "gt", "ge"}
TO_BOOL = COMPARISONS | {"logical_not", "logical_and", "logical_or", "logical_xor", "isnan", "isinf"}
# Held to some units in the last place. The others round once, or not at all: equal to torch bit by bit.
APPROXIMATE = """sqrt rsqrt exp exp2 expm1 log log2 log10 log1p sin cos tan asin acos atan sinh cosh tanh
asinh acosh atanh erf erfc sigmoid pow atan2 hypot""".split()
C_LIBRARY = """log10 sin cos tan asin acos atan sinh cosh asinh acosh atanh erfc pow atan2 hypot fmod
remainder floor_div""".split()
SAME_ON_BOOL = {"abs", "sign", "floor", "ceil", "trunc", "round_even"}  # torch has no kernel for some
DIVIDES = {"floor_div", "trunc_div", "remainder", "fmod"}
SPECIAL = """0 -0 1 -1 0.5 -0.5 1.5 2.5 -2.5 3 1e-40 -1e-40 1.2e-38 1e-8 -1e-8 0.3 0.69 0.72 1.42 4.1
-4.1 17 -17 88.7 -87.5 89 -104 127.99 -150 1e4 -1e5 16777217 1e19 3e38 -3e38 inf -inf nan""".split()


def samples(dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Special values and random ones of many magnitudes."""
    generator = torch.Generator().manual_seed(seed)
    if dtype == BOOL:
        return torch.rand(64, generator=generator) < 0.5
    if dtype.is_floating_point:
        exponent = torch.rand(3000, generator=generator, dtype=F64) * 60 - 40
        random = torch.randn(3000, generator=generator, dtype=F64) * torch.exp2(exponent)
        near = torch.randn(3000, generator=generator, dtype=F64)
        return torch.cat([torch.tensor([float(s) for s in SPECIAL], dtype=F64), random, near]).to(dtype)
    info = torch.iinfo(dtype)
    random = torch.randint(info.min, info.max, (500,), generator=generator, dtype=I64)
    small = torch.arange(max(-9, info.min), 10)
    return torch.cat([torch.tensor([info.min, info.max, 0, 1, info.max // 2]), small, random]).to(dtype)


def pairs(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """All pairs of the first values (the special ones), then random pairs."""
    a, b = samples(dtype, 1), samples(dtype, 2)
    some = a[: len(SPECIAL)] if dtype.is_floating_point else a[:24]
    grid = torch.cartesian_prod(some, some)
    return torch.cat([grid[:, 0], a]).contiguous(), torch.cat([grid[:, 1], b]).contiguous()


def arity(op: str) -> int:
    row = TABLE[op]
    text = row if isinstance(row, str) else next(iter(row.values()))
    return 1 + max(k for k in range(3) if f"{{{k}}}" in text)


def dtypes(op: str) -> list[torch.dtype]:
    """The dtypes that the table has a row for (one name of each class; all integers)."""
    row = TABLE[op]
    classes = {"float": FLOATS, "int": INTEGERS, "bool": (BOOL,)}
    if op.startswith("round_") and op != "round_even":
        return [F32]
    found = [d for name, ds in classes.items() if isinstance(row, str) or name in row for d in ds]
    return [d for d in found if not (op == "neg" and d == BOOL)]


SKIPPED = {"where", "convert", "constant", "fma"}  # tested below
CASES = [(op, dtype) for op in OPERATIONS if op not in SKIPPED for dtype in dtypes(op)]


def kernel_name(op: str, dtype: torch.dtype) -> str:
    return f"k_{op}_{str(dtype).removeprefix('torch.')}"


def operation_kernel(name: str, compute: Compute, operand_dtypes: list[torch.dtype]) -> Map:
    loads = [Load(f"v{k}", f"x{k}", AT, d) for k, d in enumerate(operand_dtypes)]
    buffers = [*(Buffer(f"x{k}", d) for k, d in enumerate(operand_dtypes)), Buffer("y", compute.dtype, True)]
    return Map(name, tuple(buffers), (N,), (Axis(AT, N),), (*loads, compute, Store("y", AT, compute.out)))


def case_kernel(op: str, dtype: torch.dtype) -> Map:
    """A kernel of one operation."""
    return group_kernel(kernel_name(op, dtype), [op], dtype)


def group_kernel(name: str, ops: Sequence[str], dtype: torch.dtype) -> Map:
    """A kernel of several operations of the same operands, with an output for each."""
    operands = range(arity(ops[0]))
    buffers = [Buffer(f"x{k}", dtype) for k in operands]
    body: list[Statement] = [Load(f"v{k}", f"x{k}", AT, dtype) for k in operands]
    for op in ops:
        result = BOOL if op in TO_BOOL else dtype
        buffers.append(Buffer(f"y_{op}", result, True))
        body.append(Compute(f"r_{op}", op, tuple(f"v{k}" for k in operands), result))
        body.append(Store(f"y_{op}", AT, f"r_{op}"))
    return Map(name, tuple(buffers), (N,), (Axis(AT, N),), tuple(body))


def group_of(case: tuple[str, torch.dtype]) -> tuple[torch.dtype, int, bool]:
    """Cases that share a kernel; one call of the C library keeps a whole loop from vectorizing."""
    op, dtype = case
    return dtype, arity(op), op in C_LIBRARY


def cases_of(group: tuple[torch.dtype, int, bool]) -> list[str]:
    return [op for op, dtype in CASES if group_of((op, dtype)) == group]


GROUPS = list(dict.fromkeys(map(group_of, CASES)))


def group_name(group: tuple[torch.dtype, int, bool]) -> str:
    dtype, count, library = group
    return f"{str(dtype).removeprefix('torch.')}_{count}{'_library' if library else ''}"


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, torch.dtype], torch.Tensor]:
    """The result of every case, computed by one library."""
    kernels = [group_kernel(group_name(g), cases_of(g), g[0]) for g in GROUPS]
    library = Library(kernels, tmp_path_factory.mktemp("cache"))
    found = {}
    for group in GROUPS:
        ops, dtype = cases_of(group), group[0]
        operands = operands_of(ops[0], dtype)
        outs = [torch.empty(len(operands[0]), dtype=BOOL if op in TO_BOOL else dtype) for op in ops]
        status = library.call(group_name(group), [*operands, *outs], [len(operands[0])])
        assert status in (0, 2)
        found.update({(op, dtype): out for op, out in zip(ops, outs, strict=True)})
    return found


def operands_of(op: str, dtype: torch.dtype) -> list[torch.Tensor]:
    return list(pairs(dtype)) if arity(op) == 2 else [samples(dtype, 0)]


def ulps(result: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """Distance in units in the last place of the result's dtype; `exact` is float64."""
    rounded = exact.to(result.dtype).abs()
    tiny = torch.finfo(result.dtype).tiny
    unit = np.spacing(rounded.clamp(min=tiny).numpy()).astype(np.float64)
    return (result.double() - exact).abs() / torch.from_numpy(unit)


def assert_close(result: torch.Tensor, exact: torch.Tensor) -> None:
    """Equal where the exact value (float64) is not finite in the result's dtype, else within some units."""
    expected = exact.to(result.dtype)
    finite = expected.isfinite()
    torch.testing.assert_close(result[~finite], expected[~finite], rtol=0, atol=0, equal_nan=True)
    distance = ulps(result[finite], exact[finite])
    limit = 2.5 if result.dtype == F32 else 4  # torch's own float64 functions are good to a unit
    assert distance.max() <= limit, (distance.max(), result[finite][distance.argmax()])


def test_every_operation_has_a_row() -> None:
    assert set(TABLE) == set(OPERATIONS)


@pytest.mark.parametrize(("op", "dtype"), CASES, ids=[kernel_name(*c) for c in CASES])
def test_operation(results: dict[tuple[str, torch.dtype], torch.Tensor], op: str, dtype: torch.dtype) -> None:
    operands, out = operands_of(op, dtype), results[op, dtype]
    if op in DIVIDES and not dtype.is_floating_point:
        overflow = (operands[0] == torch.iinfo(dtype).min) & (operands[1] == -1)  # torch crashes on it
        defined = (operands[1] != 0) & ~overflow
        operands, out = [a[defined] for a in operands], out[defined]
    if op in ("fmod", "remainder") and dtype.is_floating_point:
        overflow = (operands[0] / operands[1]).isinf() & operands[0].isfinite() & (operands[1] != 0)
        operands, out = [a[~overflow] for a in operands], out[~overflow]  # torch gives NaN there
    reference = TORCH.get(op) or getattr(torch, op)
    if dtype == BOOL and op in SAME_ON_BOOL:
        reference = torch.clone
    if op in APPROXIMATE and dtype.is_floating_point:
        assert_close(out, reference(*(a.double() for a in operands)))
        return
    expected = reference(*operands)
    torch.testing.assert_close(out, expected.to(out.dtype), rtol=0, atol=0, equal_nan=True)
    if out.dtype.is_floating_point and op not in ("minimum", "maximum", "fmin", "fmax"):
        known = ~expected.isnan()
        assert torch.equal(out[known].signbit(), expected[known].signbit())


def test_vector_functions_over_every_exponent(tmp_path: Path) -> None:
    """The functions that prelude.h writes out itself, on a million floats of every sign and exponent."""
    names = ["exp", "exp2", "expm1", "log", "log2", "log1p", "tanh", "sigmoid", "erf"]
    kernels = Library([case_kernel(op, F32) for op in names], tmp_path)
    bits = np.arange(0, 2**32, 4099, dtype=np.uint64).astype(np.uint32)
    x = torch.from_numpy(bits.view(np.float32).copy())
    for op in names:
        out = torch.empty_like(x)
        kernels.call(kernel_name(op, F32), [x, out], [len(x)])
        exact = (TORCH.get(op) or getattr(torch, op))(x.double())
        assert_close(out, exact)
        assert torch.equal(out.signbit()[~out.isnan()], exact.float().signbit()[~out.isnan()]), op


def test_rounding_to_16_bits(tmp_path: Path) -> None:
    """Every value of the narrow types, and what lies half way to the next one and just beside that."""
    library = Library([case_kernel(op, F32) for op in ("round_bfloat16", "round_float16")], tmp_path)
    patterns = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    for op, dtype in [("round_bfloat16", torch.bfloat16), ("round_float16", torch.float16)]:
        exact = patterns.view(dtype).float()
        following = (patterns + 1).view(dtype).float()
        middle = (exact + following) / 2
        x = torch.cat([exact, middle, middle.nextafter(exact), middle.nextafter(following)])
        out = torch.empty_like(x)
        library.call(kernel_name(op, F32), [x, out], [len(x)])
        torch.testing.assert_close(out, x.to(dtype).float(), rtol=0, atol=0, equal_nan=True)


def test_convert(tmp_path: Path) -> None:
    """Of values that the target can hold: others have no defined result in C++, nor in torch."""
    dtypes = (*FLOATS, *INTEGERS, BOOL)

    def kernel(source: torch.dtype) -> Map:
        buffers, body = [Buffer("x", source)], [Load("v", "x", AT, source)]
        for k, target in enumerate(dtypes):
            buffers.append(Buffer(f"y{k}", target, True))
            body += [Compute(f"r{k}", "convert", ("v",), target), Store(f"y{k}", AT, f"r{k}")]
        return Map(f"from_{source}".replace("torch.", ""), tuple(buffers), (N,), (Axis(AT, N),), tuple(body))

    library = Library([kernel(d) for d in dtypes], tmp_path)
    for source in dtypes:
        x = samples(source, 3)
        outs = [torch.empty(len(x), dtype=d) for d in dtypes]
        library.call(f"from_{source}".replace("torch.", ""), [x, *outs], [len(x)])
        for target, out in zip(dtypes, outs, strict=True):
            held = torch.ones_like(x, dtype=BOOL)
            if source.is_floating_point and not target.is_floating_point and target != BOOL:
                held = (x.abs() < 127) & ((x >= 0) | (target != torch.uint8))
            expected = x[held].to(target)
            torch.testing.assert_close(out[held], expected, rtol=0, atol=0, equal_nan=True)


def test_sanitizers(tmp_path: Path) -> None:
    """Every operation on its samples under the address and undefined behaviour sanitizers."""
    calls = []
    for group in GROUPS:
        ops, dtype = cases_of(group), group[0]
        operands = operands_of(ops[0], dtype)
        outs = [torch.empty(len(operands[0]), dtype=BOOL if op in TO_BOOL else dtype) for op in ops]
        kernel = group_kernel(group_name(group), ops, dtype)
        calls.append(Call(kernel, [*operands, *outs], [len(operands[0])]))
    assert sanitize(calls, tmp_path) == ""


def test_where_constant_fma_and_constant_powers(tmp_path: Path) -> None:
    exponents = [0.5, -0.5, -1, -2, 1, 2, 3, 1.7]
    kernels = [
        operation_kernel("k_where", Compute("out", "where", ("v0", "v1", -0.5), F32), [BOOL, F32]),
        operation_kernel("k_fma", Compute("out", "fma", ("v0", "v1", "v2"), F32), [F32] * 3),
        operation_kernel("k_constant", Compute("out", "constant", (0.1,), F32), [F32]),
        *(operation_kernel(f"k_pow{k}", Compute("out", "pow", ("v0", e), F32), [F32]) for k, e in enumerate(exponents)),
    ]
    library = Library(kernels, tmp_path)
    a, b = pairs(F32)
    c = b.flip(0).contiguous()
    mask = a < b
    out = torch.empty_like(a)
    library.call("k_where", [mask, a, out], [len(a)])
    torch.testing.assert_close(out, torch.where(mask, a, -0.5), rtol=0, atol=0, equal_nan=True)
    library.call("k_fma", [a, b, c, out], [len(a)])
    torch.testing.assert_close(out, (a.double() * b.double() + c.double()).float(), rtol=1e-6, atol=0, equal_nan=True)
    library.call("k_constant", [a, out], [len(a)])
    assert torch.equal(out, torch.full_like(a, 0.1))
    for k, exponent in enumerate(exponents):
        library.call(f"k_pow{k}", [a, out], [len(a)])
        assert_close(out, a.double() ** float(np.float32(exponent)))


def test_integer_division_by_zero_is_reported(tmp_path: Path) -> None:
    kernels = [operation_kernel(f"k_{op}", Compute("out", op, ("v0", "v1"), I64), [I64, I64]) for op in sorted(DIVIDES)]
    library = Library(kernels, tmp_path)
    a, b, out = torch.tensor([7, 8]), torch.tensor([2, 0]), torch.empty(2, dtype=I64)
    for op in DIVIDES:
        assert library.call(f"k_{op}", [a, b, out], [2]) == 2
        assert library.call(f"k_{op}", [a, b + 1, out], [2]) == 0
    floats = compute(Compute("out", "floor_div", ("v0", 2), F32), F32)
    assert floats == "op::floor_div(v0, 2.0f)"


@pytest.mark.parametrize(
    ("value", "dtype", "text"),
    [
        (0.1, F32, "0.1f"),
        (1, F32, "1.0f"),
        (1e-45, F32, "1e-45f"),
        (1e39, F32, "op::inff"),
        (1 + 2**-24, F32, "1.0f"),
        (float("-inf"), F64, "-op::inf"),
        (float("nan"), F32, "op::nanf"),
        (-1, torch.uint8, "255"),
        (2**63 - 1, I64, "9223372036854775807"),
        (-(2**63), I64, "INT64_MIN"),
        (2, BOOL, "true"),
    ],
)
def test_constant(value: float, dtype: torch.dtype, text: str) -> None:
    assert constant(value, dtype) == text


def test_undefined_operation_names_the_dtype() -> None:
    with pytest.raises(ValueError, match=r"bitwise_and is not defined for torch.float32"):
        compute(Compute("out", "bitwise_and", ("a", "b"), F32), F32)


X, Y, Z = axis("x"), size("y"), sympy.Symbol("z", integer=True)
EXPRESSIONS = [
    X * Y + 3 * Z - 7,
    -X * Y * (Z - 1),
    FloorDiv(X, 4) * 3 + Mod(X, 4),
    (X + Z) * FloorDiv(X, Y) * 2,
    FloorDiv(Z - 1, 2) * 3,
    FloorDiv(Z - 5, Y),
    FloorDiv(X * Y, FloorDiv(X, 3) + 1),
    ModularIndexing(X, 3, 5) + 10 * ModularIndexing(X, 1, Y),
    ModularIndexing(Z, 2, 3),
    PythonMod(Z, 5),
    sympy.Mod(Z, Y),
    CeilDiv(X + 1, Y),
    sympy.floor(Z / 3),
    sympy.Min(X, Y, 4) - sympy.Max(Z, 0, X),
    X**2 * Y - (X + Y) ** 3,
    sympy.Piecewise((X, X < Z), (Y - 1, sympy.Or(sympy.Eq(X, 3), Z >= 2)), (-1, True)),
    sympy.Integer(-3),
]


def test_index_expressions_against_sympy(tmp_path: Path) -> None:
    """Each expression as an output of a kernel over a grid of values, including negative ones for z."""
    values = list(itertools.product(range(0, 14, 3), range(1, 8, 2), range(-7, 8, 3)))
    buffers = [Buffer(f"b{name}", I64) for name in "xyz"]
    body: list[Statement] = [Load(name, f"b{name}", AT, I64) for name in "xyz"]
    for k, expression in enumerate(EXPRESSIONS):
        buffers.append(Buffer(f"out{k}", I64, True))
        body += [Index(f"v{k}", expression, I64), Store(f"out{k}", AT, f"v{k}")]
    library = Library([Map("indices", tuple(buffers), (N,), (Axis(AT, N),), tuple(body))], tmp_path)
    columns = [torch.tensor(c) for c in zip(*values, strict=True)]
    outs = [torch.empty(len(values), dtype=I64) for _ in EXPRESSIONS]
    library.call("indices", [*columns, *outs], [len(values)])
    for expression, out in zip(EXPRESSIONS, outs, strict=True):
        expected = [int(expression.subs(dict(zip((X, Y, Z), v, strict=True)))) for v in values]
        assert out.tolist() == expected, index(expression)


def test_index_text() -> None:
    assert index(FloorDiv(X, 4) * 3 + Mod(X, 4)) == "3 * (x / 4) + (x % 4)"
    assert index(FloorDiv(Z, 4)) == "op::floor_div<int64_t>(z, 4)"
    assert index(X * Y - 1, narrow={"x"}) == "int64_t(x) * y - 1"
    for bad in (X / 2, sympy.sqrt(X), sympy.Float(0.5), sympy.sin(X)):
        with pytest.raises(ValueError, match="index expression"):
            index(bad)
