"""Triton text of index expressions and of every operation of a kernel body, one table row each.

The functions in the rows (`prelude.exp`, `prelude.fmod`, ...) are those of triton_prelude.py.
"""

import math
from collections.abc import Callable, Mapping

import sympy
import torch
from sympy.printing.precedence import PRECEDENCE
from sympy.printing.str import StrPrinter
from torch.utils._sympy.functions import CeilDiv, CleanDiv, FloorDiv, Mod, ModularIndexing, PythonMod

from llmcomp.codegen.kernel import Argument, Compute, Constant

DTYPES: dict[torch.dtype, str] = {
    torch.float64: "tl.float64",
    torch.float32: "tl.float32",
    torch.bfloat16: "tl.bfloat16",
    torch.float16: "tl.float16",
    torch.int64: "tl.int64",
    torch.int32: "tl.int32",
    torch.int16: "tl.int16",
    torch.int8: "tl.int8",
    torch.uint8: "tl.uint8",
    torch.bool: "tl.int1",
    torch.float8_e4m3fn: "tl.float8e4nv",
}
NARROW_FLOATS = frozenset({torch.bfloat16, torch.float16})

# One row per operation: a text for every class of operand, or a text by class ("float", "int", "bool").
# {0}, {1}, {2} are the operands, {T} is the type of the result. Operands are atoms: names or literals.
TABLE: dict[str, str | dict[str, str]] = {
    "neg": {"float": "-1.0 * {0}", "int": "0 - {0}"},  # older Triton prints -x as 0 - x, which loses -0.0
    "abs": {"float": "tl.abs({0})", "int": "tl.abs({0})", "bool": "{0}"},
    "sign": {"float": "prelude.sign({0})", "int": "prelude.sign({0})", "bool": "{0}"},
    "sqrt": {"float": "prelude.sqrt({0})"},
    "rsqrt": {"float": "tl.rsqrt({0})"},
    "reciprocal": {"float": "prelude.reciprocal({0})"},
    "exp": {"float": "prelude.exp({0})"},
    "exp2": {"float": "tl.exp2({0})"},
    "expm1": {"float": "prelude.expm1({0})"},
    "log": {"float": "tl.log({0})"},
    "log2": {"float": "tl.log2({0})"},
    "log10": {"float": "prelude.log10({0})"},
    "log1p": {"float": "prelude.log1p({0})"},
    "sin": {"float": "prelude.sin({0})"},
    "cos": {"float": "prelude.cos({0})"},
    "tan": {"float": "prelude.tan({0})"},
    "asin": {"float": "prelude.asin({0})"},
    "acos": {"float": "prelude.acos({0})"},
    "atan": {"float": "prelude.atan({0})"},
    "sinh": {"float": "prelude.sinh({0})"},
    "cosh": {"float": "prelude.cosh({0})"},
    "tanh": {"float": "prelude.tanh({0})"},
    "asinh": {"float": "prelude.asinh({0})"},
    "acosh": {"float": "prelude.acosh({0})"},
    "atanh": {"float": "prelude.atanh({0})"},
    "erf": {"float": "tl.erf({0})"},
    "erfc": {"float": "prelude.erfc({0})"},
    "sigmoid": {"float": "prelude.sigmoid({0})"},
    "floor": {"float": "tl.floor({0})", "int": "{0}", "bool": "{0}"},
    "ceil": {"float": "tl.ceil({0})", "int": "{0}", "bool": "{0}"},
    "trunc": {"float": "prelude.trunc({0})", "int": "{0}", "bool": "{0}"},
    "round_even": {"float": "prelude.round_even({0})", "int": "{0}", "bool": "{0}"},
    "logical_not": "{0} == 0",
    "bitwise_not": {"int": "prelude.bitwise_not({0})", "bool": "{0} == 0"},
    "isnan": {"float": "{0} != {0}", "int": "{0} != {0}", "bool": "{0} != {0}"},
    "isinf": {"float": 'tl.abs({0}) == float("inf")', "int": "{0} != {0}", "bool": "{0} != {0}"},
    "add": {"float": "{0} + {1}", "int": "{0} + {1}", "bool": "{0} | {1}"},
    "sub": {"float": "{0} - {1}", "int": "{0} - {1}"},
    "mul": {"float": "{0} * {1}", "int": "{0} * {1}", "bool": "{0} & {1}"},
    "div": {"float": "prelude.div({0}, {1})"},
    "floor_div": {"float": "prelude.floor_div({0}, {1})", "int": "prelude.floor_div({0}, {1})"},
    "trunc_div": {"float": "prelude.trunc_div({0}, {1})", "int": "{0} // {1}"},
    "remainder": {"float": "prelude.remainder({0}, {1})", "int": "prelude.remainder({0}, {1})"},
    "fmod": {"float": "prelude.fmod({0}, {1})", "int": "{0} % {1}"},
    "pow": {"float": "prelude.pow({0}, {1})", "int": "prelude.power({0}, {1})"},
    "atan2": {"float": "prelude.atan2({0}, {1})"},
    "minimum": {"float": "prelude.minimum({0}, {1})", "int": "tl.minimum({0}, {1})", "bool": "{0} & {1}"},
    "maximum": {"float": "prelude.maximum({0}, {1})", "int": "tl.maximum({0}, {1})", "bool": "{0} | {1}"},
    "fmin": {"float": "tl.minimum({0}, {1})", "int": "tl.minimum({0}, {1})", "bool": "{0} & {1}"},
    "fmax": {"float": "tl.maximum({0}, {1})", "int": "tl.maximum({0}, {1})", "bool": "{0} | {1}"},
    "eq": "{0} == {1}",
    "ne": "{0} != {1}",
    "lt": "{0} < {1}",
    "le": "{0} <= {1}",
    "gt": "{0} > {1}",
    "ge": "{0} >= {1}",
    "logical_and": {
        "float": "({0} != 0) & ({1} != 0)",
        "int": "({0} != 0) & ({1} != 0)",
        "bool": "{0} & {1}",
    },
    "logical_or": {
        "float": "({0} != 0) | ({1} != 0)",
        "int": "({0} != 0) | ({1} != 0)",
        "bool": "{0} | {1}",
    },
    "logical_xor": {
        "float": "({0} != 0) ^ ({1} != 0)",
        "int": "({0} != 0) ^ ({1} != 0)",
        "bool": "{0} ^ {1}",
    },
    "bitwise_and": {"int": "{0} & {1}", "bool": "{0} & {1}"},
    "bitwise_or": {"int": "{0} | {1}", "bool": "{0} | {1}"},
    "bitwise_xor": {"int": "{0} ^ {1}", "bool": "{0} ^ {1}"},
    "shift_left": {"int": "prelude.shift_left({0}, {1})"},
    "shift_right": {"int": "prelude.shift_right({0}, {1})"},
    "copysign": {"float": "prelude.copysign({0}, {1})"},
    "hypot": {"float": "prelude.hypot({0}, {1})"},
    "where": "tl.where({0}, {1}, {2})",
    "convert": "{0}.to({T})",
    "round_bfloat16": {"float": "prelude.rounded({0}, tl.bfloat16)"},
    "round_float16": {"float": "prelude.rounded({0}, tl.float16)"},
    "constant": "{0}",
    "fma": {"float": "tl.fma({0}, {1}, {2})"},
}

# Functions that take a Python number as their second operand, as a float32.
LITERAL_SECOND = frozenset({"div", "minimum", "maximum", "fmin", "fmax"})


def operand_class(dtype: torch.dtype) -> str:
    """The column of the operation table that values of `dtype` use."""
    if dtype == torch.bool:
        return "bool"
    return "float" if dtype.is_floating_point else "int"


def literal(value: Constant, dtype: torch.dtype) -> str:
    """A Python literal for a Triton kernel.

    >>> literal(0.1, torch.float32), literal(1, torch.bool), literal(float("-inf"), torch.float32)
    ('0.1', 'True', 'float("-inf")')
    """
    if dtype == torch.bool:
        return str(bool(value))
    if not dtype.is_floating_point:
        info = torch.iinfo(dtype)
        return str((int(value) - info.min) % (1 << info.bits) + info.min)
    return repr(float(value)) if math.isfinite(value) else f'float("{float(value)}")'


def full(value: Constant, dtype: torch.dtype, shape: str) -> str:
    """A constant as a Triton value of `dtype`. `shape` is that of a tile with all sizes 1.

    (A scalar would do on a GPU; the interpreter spreads the result of comparing two scalars as a number.)

    >>> full(0.1, torch.float64, "[1]")
    'tl.full([1], 0.1, tl.float64)'
    """
    return f"tl.full({shape}, {literal(value, dtype)}, {DTYPES[dtype]})"


def compute(statement: Compute, dtype: torch.dtype, name: Callable[[str], str] = str, shape: str = "[1]") -> str:
    """The Triton expression of `statement`, whose operands have the dtype `dtype`.

    `name` spells values; `shape` is that of constants which need a type.

    Raises ValueError where the operation is not defined for the dtype.
    """
    row = TABLE[statement.op]
    text = row if isinstance(row, str) else row.get(operand_class(dtype))
    if text is None:
        raise ValueError(f"operation {statement.op} is not defined for {dtype}: {statement}")
    if statement.op == "convert":
        return _convert(statement, dtype, name, shape)
    if statement.op == "constant":
        return full(_constant(statement.args[0]), statement.dtype, shape)
    return text.format(*_operands(statement, dtype, text, name, shape), T=DTYPES[statement.dtype])


def _operands(statement: Compute, dtype: torch.dtype, text: str, name: Callable[[str], str], shape: str) -> list[str]:
    """The operands: literals where Triton takes the type from another operand, else typed constants."""
    if statement.op == "where":
        condition, *branches = statement.args
        literals = any(isinstance(b, str) for b in branches) and statement.dtype == torch.float32
        typed = [_operand(b, statement.dtype, literals, name, shape) for b in branches]
        return [_operand(condition, torch.bool, False, name, shape), *typed]
    plain = "prelude." not in text and "tl." not in text
    single = statement.op in LITERAL_SECOND and dtype == torch.float32 and isinstance(statement.args[0], str)
    literals = single or (plain and any(isinstance(a, str) for a in statement.args))
    return [_operand(a, dtype, literals, name, shape) for a in statement.args]


def _operand(argument: Argument, dtype: torch.dtype, literals: bool, name: Callable[[str], str], shape: str) -> str:
    if isinstance(argument, str):
        return name(argument)
    text = literal(argument, dtype)
    if literals:
        return f"({text})" if text.startswith("-") else text
    return full(argument, dtype, shape)


def _convert(statement: Compute, dtype: torch.dtype, name: Callable[[str], str], shape: str) -> str:
    """Conversion as torch does it: a bool is "not zero", narrow integers of floats go through int64."""
    text = _operand(statement.args[0], dtype, False, name, shape)
    if statement.dtype == dtype:
        return text
    if statement.dtype == torch.bool:
        return f"{text} != 0"
    narrow = statement.dtype in (torch.int8, torch.int16, torch.uint8)
    through = ".to(tl.int64)" if dtype.is_floating_point and narrow else ""
    return f"{text}{through}.to({DTYPES[statement.dtype]})"


def _constant(argument: Argument) -> Constant:
    assert not isinstance(argument, str), f"a constant is a number, found {argument!r}"
    return argument


# ---- index expressions --------------------------------------------------------------------------------


DIVISIONS = (FloorDiv, CleanDiv, CeilDiv, Mod, PythonMod, ModularIndexing, sympy.Mod, sympy.floor)


class IndexPrinter(StrPrinter):
    """sympy integer expressions as Triton, or as Python for a launcher.

    Triton divides and takes remainders as C does, Python rounds down: they agree where both operands are not
    negative, which holds for every position and size. Operands that sympy cannot prove to be so go through
    `prelude.floor_div` and `prelude.remainder` in Triton.
    """

    printmethod = "_triton"  # torch's classes bring their own Python text under sympy's default name

    def __init__(self, names: Mapping[str, str], host: bool) -> None:
        super().__init__()
        self.names = names
        self.host = host

    def _print_Symbol(self, expr: sympy.Symbol) -> str:
        return self.names.get(expr.name, expr.name)

    def parenthesize(self, item: sympy.Basic, level: int, strict: bool = False) -> str:
        if isinstance(item, DIVISIONS):
            return f"({self._print(item)})" if level > PRECEDENCE["Add"] else str(self._print(item))
        return str(super().parenthesize(item, level, strict))

    def _print_Rational(self, expr: sympy.Rational) -> str:
        raise ValueError(f"index expressions are integers, found the fraction {expr}")

    def _print_Float(self, expr: sympy.Float) -> str:
        raise ValueError(f"index expressions are integers, found {expr}")

    def _print_Add(self, expr: sympy.Add, order: object = None) -> str:
        texts = [str(self._print(term)) for term in sorted(expr.args, key=_weight)]
        signed = [f" - {t[1:]}" if t.startswith("-") else f" + {t}" for t in texts]
        return texts[0] + "".join(signed[1:])

    def _print_Mul(self, expr: sympy.Mul) -> str:
        numerator, denominator = expr.as_numer_denom()
        if denominator != 1:
            return self._divide(numerator, denominator)
        constants = [f for f in expr.args if f.is_Integer]
        factors = [f for f in expr.as_ordered_factors() if not f.is_Integer]
        number = int(sympy.Mul(*constants))
        texts = [self.parenthesize(f, PRECEDENCE["Mul"]) for f in factors]
        if abs(number) != 1:
            texts.append(str(abs(number)))
        return ("-" if number < 0 else "") + " * ".join(texts)

    def _print_Pow(self, expr: sympy.Pow) -> str:
        base, exponent = expr.args
        if not (exponent.is_Integer and 0 < int(exponent) <= 8):
            raise ValueError(f"index expressions take small positive powers only, found {expr}")
        return "(" + " * ".join([self.parenthesize(base, PRECEDENCE["Pow"])] * int(exponent)) + ")"

    def _print_PowByNatural(self, expr: sympy.Expr) -> str:
        return self._print_Pow(sympy.Pow(*expr.args, evaluate=False))

    def _plain(self, *exprs: sympy.Expr) -> bool:
        return self.host or all(e.is_nonnegative for e in exprs)

    def _divide(self, a: sympy.Expr, b: sympy.Expr) -> str:
        if self._plain(a, b):
            return f"{self._atom(a)} // {self._atom(b)}"
        return f"prelude.floor_div({self._print(a)}, {self._print(b)})"

    def _modulo(self, a: sympy.Expr, b: sympy.Expr) -> str:
        if self._plain(a, b):
            return f"{self._atom(a)} % {self._atom(b)}"
        return f"prelude.remainder({self._print(a)}, {self._print(b)})"

    def _atom(self, expr: sympy.Expr) -> str:
        plain = expr.is_Symbol or (expr.is_Integer and expr >= 0)
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
        return self._modulo(base if by == 1 else FloorDiv(base, by), modulus)

    def _print_floor(self, expr: sympy.Expr) -> str:
        return self._divide(*expr.args[0].as_numer_denom())

    def _extremum(self, name: str, expr: sympy.Expr) -> str:
        texts = sorted((str(self._print(a)) for a in expr.args), key=lambda t: (t.isdigit(), t))
        if self.host or all(a.is_Integer for a in expr.args):
            return f"{name[:3]}({', '.join(texts)})"
        text, *rest = texts
        for other in rest:
            text = f"tl.{name}({text}, {other})"
        return text

    def _print_Min(self, expr: sympy.Expr) -> str:
        return self._extremum("minimum", expr)

    def _print_Max(self, expr: sympy.Expr) -> str:
        return self._extremum("maximum", expr)

    def _print_Where(self, expr: sympy.Expr) -> str:
        test, yes, no = (self._print(a) for a in expr.args)
        return f"({yes} if {test} else {no})" if self.host else f"tl.where({test}, {yes}, {no})"

    def _print_Piecewise(self, expr: sympy.Piecewise) -> str:
        *branches, (last, condition) = expr.args
        if condition != sympy.true:
            raise ValueError(f"a Piecewise index needs a last branch for everything else: {expr}")
        text = str(self._print(last))
        for value, test in reversed(branches):
            yes, when = self._print(value), self._print(test)
            text = f"({yes} if {when} else {text})" if self.host else f"tl.where({when}, {yes}, {text})"
        return text


def _weight(term: sympy.Expr) -> tuple[bool, int, int, str]:
    """Orders the terms of a sum as people write an index: large strides first, the constant last."""
    coefficient, rest = term.as_coeff_Mul()
    return term.is_Integer, -len(sympy.Mul.make_args(rest)), -abs(int(coefficient)), str(rest)


def index(expr: sympy.Expr, names: Mapping[str, str] | None = None) -> str:
    """An integer expression as Triton text; `names` replaces symbols.

    >>> n = sympy.Symbol("n", integer=True, nonnegative=True)
    >>> index(128 * FloorDiv(n, 64) + Mod(n, 64) + 7)
    '(n // 64) * 128 + n % 64 + 7'
    """
    return str(IndexPrinter(names or {}, host=False).doprint(sympy.sympify(expr)))


def host(expr: sympy.Expr, names: Mapping[str, str] | None = None) -> str:
    """An integer expression as Python text, for a launcher."""
    return str(IndexPrinter(names or {}, host=True).doprint(sympy.sympify(expr)))
