"""C++ text of index expressions and of every operation of a kernel body, one table row each.

The functions in the rows (`op::exp`, `op::floor_div`, ...) are those of prelude.h.
"""

import math
from collections.abc import Container

import numpy as np
import sympy
import torch
from sympy.printing.precedence import PRECEDENCE
from sympy.printing.str import StrPrinter
from torch.utils._sympy.functions import CeilDiv, CleanDiv, FloorDiv, Mod, ModularIndexing, PythonMod

from llmcomp.codegen.kernel import Compute, Constant

VALUE_TYPES: dict[torch.dtype, str] = {
    torch.float32: "float",
    torch.float64: "double",
    torch.int8: "int8_t",
    torch.int16: "int16_t",
    torch.int32: "int32_t",
    torch.int64: "int64_t",
    torch.uint8: "uint8_t",
    torch.uint16: "uint16_t",
    torch.uint32: "uint32_t",
    torch.uint64: "uint64_t",
    torch.bool: "bool",
}

# A bool is one byte in memory: any nonzero byte is true, as in torch.
MEMORY_TYPES: dict[torch.dtype, str] = {
    **VALUE_TYPES,
    torch.bool: "uint8_t",
    torch.bfloat16: "bf16",
    torch.float16: "f16",
    torch.float8_e4m3fn: "e4m3",
}

# One row per operation: a text for every class of operand, or a text by class ("float", "int", "bool").
# {0}, {1}, {2} are the operands, {T} is the C++ type of the result.
SAME = "{0}"
TABLE: dict[str, str | dict[str, str]] = {
    "neg": "-{0}",
    "abs": {"float": "op::abs({0})", "int": "op::abs({0})", "bool": SAME},
    "sign": {"float": "op::sign({0})", "int": "op::sign({0})", "bool": SAME},
    "sqrt": {"float": "op::sqrt({0})"},
    "rsqrt": {"float": "1 / op::sqrt({0})"},
    "reciprocal": {"float": "1 / {0}"},
    "exp": {"float": "op::exp({0})"},
    "exp2": {"float": "op::exp2({0})"},
    "expm1": {"float": "op::expm1({0})"},
    "log": {"float": "op::log({0})"},
    "log2": {"float": "op::log2({0})"},
    "log10": {"float": "op::log10({0})"},
    "log1p": {"float": "op::log1p({0})"},
    "sin": {"float": "op::sin({0})"},
    "cos": {"float": "op::cos({0})"},
    "tan": {"float": "op::tan({0})"},
    "asin": {"float": "op::asin({0})"},
    "acos": {"float": "op::acos({0})"},
    "atan": {"float": "op::atan({0})"},
    "sinh": {"float": "op::sinh({0})"},
    "cosh": {"float": "op::cosh({0})"},
    "tanh": {"float": "op::tanh({0})"},
    "asinh": {"float": "op::asinh({0})"},
    "acosh": {"float": "op::acosh({0})"},
    "atanh": {"float": "op::atanh({0})"},
    "erf": {"float": "op::erf({0})"},
    "erfc": {"float": "op::erfc({0})"},
    "sigmoid": {"float": "op::sigmoid({0})"},
    "floor": {"float": "op::floor({0})", "int": SAME, "bool": SAME},
    "ceil": {"float": "op::ceil({0})", "int": SAME, "bool": SAME},
    "trunc": {"float": "op::trunc({0})", "int": SAME, "bool": SAME},
    "round_even": {"float": "op::round_even({0})", "int": SAME, "bool": SAME},
    "logical_not": {"float": "{0} == 0", "int": "{0} == 0", "bool": "!{0}"},
    "bitwise_not": {"int": "~{0}", "bool": "!{0}"},
    "isnan": {"float": "{0} != {0}", "int": "false", "bool": "false"},
    "isinf": {"float": "op::isinf({0})", "int": "false", "bool": "false"},
    "add": {"float": "{0} + {1}", "int": "{0} + {1}", "bool": "{0} | {1}"},
    "sub": {"float": "{0} - {1}", "int": "{0} - {1}"},
    "mul": {"float": "{0} * {1}", "int": "{0} * {1}", "bool": "{0} & {1}"},
    "div": {"float": "{0} / {1}"},
    "floor_div": {"float": "op::floor_div({0}, {1})", "int": "op::floor_div({0}, {1})"},
    "trunc_div": {"float": "op::trunc({0} / {1})", "int": "op::trunc_div({0}, {1})"},
    "remainder": {"float": "op::remainder({0}, {1})", "int": "op::remainder({0}, {1})"},
    "fmod": {"float": "op::fmod({0}, {1})", "int": "op::fmod({0}, {1})"},
    "pow": {"float": "op::pow({0}, {1})", "int": "op::pow({0}, {1})"},
    "atan2": {"float": "op::atan2({0}, {1})"},
    "minimum": {"float": "op::minimum({0}, {1})", "int": "op::minimum<{T}>({0}, {1})", "bool": "{0} & {1}"},
    "maximum": {"float": "op::maximum({0}, {1})", "int": "op::maximum<{T}>({0}, {1})", "bool": "{0} | {1}"},
    "fmin": {"float": "op::fmin({0}, {1})", "int": "op::minimum<{T}>({0}, {1})", "bool": "{0} & {1}"},
    "fmax": {"float": "op::fmax({0}, {1})", "int": "op::maximum<{T}>({0}, {1})", "bool": "{0} | {1}"},
    "eq": "{0} == {1}",
    "ne": "{0} != {1}",
    "lt": "{0} < {1}",
    "le": "{0} <= {1}",
    "gt": "{0} > {1}",
    "ge": "{0} >= {1}",
    "logical_and": {"float": "{0} != 0 && {1} != 0", "int": "{0} != 0 && {1} != 0", "bool": "{0} & {1}"},
    "logical_or": {"float": "{0} != 0 || {1} != 0", "int": "{0} != 0 || {1} != 0", "bool": "{0} | {1}"},
    "logical_xor": {
        "float": "({0} != 0) != ({1} != 0)",
        "int": "({0} != 0) != ({1} != 0)",
        "bool": "{0} != {1}",
    },
    "bitwise_and": {"int": "{0} & {1}", "bool": "{0} & {1}"},
    "bitwise_or": {"int": "{0} | {1}", "bool": "{0} | {1}"},
    "bitwise_xor": {"int": "{0} ^ {1}", "bool": "{0} != {1}"},
    "shift_left": {"int": "op::shift_left<{T}>({0}, {1})"},
    "shift_right": {"int": "op::shift_right<{T}>({0}, {1})"},
    "copysign": {"float": "op::copysign({0}, {1})"},
    "hypot": {"float": "op::hypot({0}, {1})"},
    "where": "{0} ? {1} : {2}",
    "convert": "op::convert<{T}>({0})",
    "round_bfloat16": {"float": "op::round_bfloat16({0})"},
    "round_float16": {"float": "op::round_float16({0})"},
    "constant": SAME,
    "fma": {"float": "op::fma({0}, {1}, {2})"},
}

# pow by these exponents is what torch computes for them too.
POWERS: dict[float, str] = {
    0.5: "op::sqrt({0})",
    -0.5: "1 / op::sqrt({0})",
    -1.0: "1 / {0}",
    -2.0: "1 / ({0} * {0})",
    1.0: "{0}",
    2.0: "{0} * {0}",
    3.0: "{0} * {0} * {0}",
}

DIVISIONS = frozenset({"floor_div", "trunc_div", "remainder", "fmod"})

# The classes of sympy and torch that print as a division or a modulo.
DIVISION_CLASSES = (FloorDiv, CleanDiv, CeilDiv, Mod, PythonMod, ModularIndexing, sympy.Mod, sympy.floor)


def operand_class(dtype: torch.dtype) -> str:
    """The column of the operation table that values of `dtype` use."""
    if dtype == torch.bool:
        return "bool"
    return "float" if dtype.is_floating_point else "int"


def constant(value: Constant, dtype: torch.dtype) -> str:
    """A C++ literal that has exactly the value of the Python number converted to `dtype`.

    >>> constant(0.1, torch.float32), constant(-1, torch.uint8), constant(1, torch.bool)
    ('0.1f', '255', 'true')
    """
    if dtype == torch.bool:
        return "true" if value else "false"
    if dtype.is_floating_point:
        return _float_literal(float(value), dtype)
    return _integer_literal(int(value), dtype)


def _float_literal(value: float, dtype: torch.dtype) -> str:
    suffix = "" if dtype == torch.float64 else "f"
    with np.errstate(over="ignore"):
        # Rounded here, from the double: the compiler would round the decimal text, which can differ at a tie.
        rounded = float(value) if dtype == torch.float64 else np.float32(value)
    if math.isnan(rounded):
        return f"op::nan{suffix}"
    if math.isinf(rounded):
        return f"op::inf{suffix}" if rounded > 0 else f"-op::inf{suffix}"
    text = str(rounded)
    return text + ("" if set(text) & set(".e") else ".0") + suffix


def _integer_literal(value: int, dtype: torch.dtype) -> str:
    info = torch.iinfo(dtype)
    wrapped = (value - info.min) % (1 << info.bits) + info.min
    if dtype == torch.uint64:
        return f"{wrapped}u"
    if wrapped == -(1 << 63):
        return "INT64_MIN"
    if info.bits == 32 and wrapped == info.min and wrapped < 0:
        return "INT32_MIN"
    return f"{wrapped}"


def operand(argument: str | Constant, dtype: torch.dtype) -> str:
    """The text of one operand: the name of a value, or a literal of `dtype`."""
    return argument if isinstance(argument, str) else constant(argument, dtype)


def compute(statement: Compute, dtype: torch.dtype) -> str:
    """The C++ expression of `statement`, whose operands have the dtype `dtype`.

    Raises ValueError where the operation is not defined for the dtype.
    """
    row = TABLE[statement.op]
    if statement.op == "where":
        condition, *branches = statement.args
        texts = [operand(condition, torch.bool), *(operand(b, statement.dtype) for b in branches)]
    else:
        texts = [operand(a, dtype) for a in statement.args]
    text = row if isinstance(row, str) else row.get(operand_class(dtype))
    if statement.op == "pow" and dtype.is_floating_point and isinstance(statement.args[1], int | float):
        text = POWERS.get(float(statement.args[1]), text)
    if text is None:
        raise ValueError(f"operation {statement.op} is not defined for {dtype}: {statement}")
    return text.format(*texts, T=VALUE_TYPES[statement.dtype])


def divisor(statement: Compute, dtype: torch.dtype) -> str | None:
    """The integer divisor that has to be checked at run time, or None (eager raises where it is zero)."""
    if statement.op not in DIVISIONS or operand_class(dtype) != "int":
        return None
    by = statement.args[1]
    return operand(by, dtype) if isinstance(by, str) or int(by) == 0 else None


class IndexPrinter(StrPrinter):
    """sympy integer expressions as C++ over int64_t, with Python's floor semantics for division and modulo.

    A division or modulo prints in its own parentheses: C++ reads a product with one from left to right.
    """

    printmethod = "_cpp"  # torch's classes bring their own Python text under sympy's default name

    def __init__(self, narrow: Container[str]) -> None:
        super().__init__()
        self.narrow = narrow

    def _print_Symbol(self, expr: sympy.Symbol) -> str:
        return f"int64_t({expr.name})" if expr.name in self.narrow else str(expr.name)

    def parenthesize(self, item: sympy.Basic, level: int, strict: bool = False) -> str:
        if isinstance(item, DIVISION_CLASSES):
            return str(self._print(item))
        return str(super().parenthesize(item, level, strict))

    def _print_Integer(self, expr: sympy.Integer) -> str:
        return "INT64_MIN" if expr == -(1 << 63) else str(int(expr))

    def _print_Rational(self, expr: sympy.Rational) -> str:
        raise ValueError(f"index expressions are integers, found the fraction {expr}")

    def _print_Float(self, expr: sympy.Float) -> str:
        raise ValueError(f"index expressions are integers, found {expr}")

    def _print_Add(self, expr: sympy.Add, order: object = None) -> str:
        texts = [str(self._print(term)) for term in self._as_ordered_terms(expr)]
        signed = [f" - {t[1:]}" if t.startswith("-") else f" + {t}" for t in texts]
        return texts[0] + "".join(signed[1:])

    def _print_Mul(self, expr: sympy.Mul) -> str:
        factors = list(expr.as_ordered_factors())
        sign = "-" if factors[0] == -1 else ""
        texts = [self.parenthesize(f, PRECEDENCE["Mul"]) for f in factors[len(sign) :]]
        return sign + " * ".join(texts)

    def _print_Pow(self, expr: sympy.Pow) -> str:
        base, exponent = expr.args
        if not (exponent.is_Integer and 0 < int(exponent) <= 8):
            raise ValueError(f"index expressions take small positive powers only, found {expr}")
        return "(" + " * ".join([self.parenthesize(base, PRECEDENCE["Pow"])] * int(exponent)) + ")"

    def _print_PowByNatural(self, expr: sympy.Expr) -> str:
        base, exponent = expr.args
        return f"op::pow<int64_t>({self._print(base)}, {self._print(exponent)})"

    def _divide(self, a: sympy.Expr, b: sympy.Expr) -> str:
        if a.is_nonnegative and b.is_positive:
            return f"({self._atom(a)} / {self._atom(b)})"
        return f"op::floor_div<int64_t>({self._print(a)}, {self._print(b)})"

    def _modulo(self, a: sympy.Expr, b: sympy.Expr) -> str:
        if a.is_nonnegative and b.is_positive:
            return f"({self._atom(a)} % {self._atom(b)})"
        return f"op::remainder<int64_t>({self._print(a)}, {self._print(b)})"

    def _atom(self, expr: sympy.Expr) -> str:
        plain = expr.is_Symbol or isinstance(expr, DIVISION_CLASSES) or (expr.is_Integer and expr >= 0)
        return str(self._print(expr)) if plain else f"({self._print(expr)})"

    def _print_FloorDiv(self, expr: sympy.Expr) -> str:
        return self._divide(*expr.args)

    def _print_CleanDiv(self, expr: sympy.Expr) -> str:
        return self._divide(*expr.args)

    def _print_CeilDiv(self, expr: sympy.Expr) -> str:
        return self._divide(expr.args[0] + expr.args[1] - 1, expr.args[1])

    def _print_Mod(self, expr: sympy.Expr) -> str:
        return self._modulo(*expr.args)

    _print_PythonMod = _print_Mod

    def _print_ModularIndexing(self, expr: sympy.Expr) -> str:
        base, by, modulus = expr.args
        if by == 1:
            return self._modulo(base, modulus)
        quotient = self._divide(base, by)
        if base.is_nonnegative and by.is_positive and modulus.is_positive:
            return f"({quotient} % {self._atom(modulus)})"
        return f"op::remainder<int64_t>({quotient}, {self._print(modulus)})"

    def _print_floor(self, expr: sympy.Expr) -> str:
        numerator, denominator = expr.args[0].as_numer_denom()
        return self._divide(numerator, denominator)

    def _extremum(self, name: str, expr: sympy.Expr) -> str:
        text, *rest = (str(self._print(a)) for a in expr.args)
        for other in rest:
            text = f"op::{name}<int64_t>({text}, {other})"
        return text

    def _print_Min(self, expr: sympy.Expr) -> str:
        return self._extremum("minimum", expr)

    def _print_Max(self, expr: sympy.Expr) -> str:
        return self._extremum("maximum", expr)

    def _print_Piecewise(self, expr: sympy.Piecewise) -> str:
        *branches, (last, condition) = expr.args
        if condition != sympy.true:
            raise ValueError(f"a Piecewise index needs a last branch for everything else: {expr}")
        text = str(self._print(last))
        for value, test in reversed(branches):
            text = f"({self._print(test)} ? {self._print(value)} : {text})"
        return text

    def _print_Where(self, expr: sympy.Expr) -> str:
        test, yes, no = (self._print(a) for a in expr.args)
        return f"({test} ? {yes} : {no})"

    def _print_Identity(self, expr: sympy.Expr) -> str:
        return f"({self._print(expr.args[0])})"

    def _print_Relational(self, expr: sympy.core.relational.Relational) -> str:
        return f"{self._atom(expr.lhs)} {expr.rel_op} {self._atom(expr.rhs)}"

    def _print_And(self, expr: sympy.And) -> str:
        return " && ".join(f"({self._print(a)})" for a in expr.args)

    def _print_Or(self, expr: sympy.Or) -> str:
        return " || ".join(f"({self._print(a)})" for a in expr.args)

    def _print_Not(self, expr: sympy.Not) -> str:
        return f"!({self._print(expr.args[0])})"

    def _print_BooleanTrue(self, expr: object) -> str:
        return "true"

    def _print_BooleanFalse(self, expr: object) -> str:
        return "false"

    def _print_Function(self, expr: sympy.Function) -> str:
        return self.emptyPrinter(expr)

    def emptyPrinter(self, expr: object) -> str:
        raise ValueError(f"no C++ for the index expression {expr} ({type(expr).__name__})")


def index(expr: sympy.Expr, narrow: Container[str] = ()) -> str:
    """The C++ text of an integer expression of axes, sizes and integer values.

    `narrow` names the values whose C++ type is narrower than int64_t: they are widened before arithmetic.

    >>> n, i, j = (sympy.Symbol(name, integer=True, nonnegative=True) for name in "nij")
    >>> index(n * i + FloorDiv(j, 2))
    'i * n + (j / 2)'
    """
    text = str(IndexPrinter(narrow).doprint(sympy.sympify(expr)))
    return text[1:-1] if _one_group(text) else text


def _one_group(text: str) -> bool:
    """Whether the first parenthesis closes at the end."""
    depth = 0
    for at, character in enumerate(text):
        depth += {"(": 1, ")": -1}.get(character, 0)
        if depth == 0:
            return at > 0 and at == len(text) - 1 and text[0] == "("
    return False
