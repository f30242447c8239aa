"""The elementwise ATen operators that generated kernels compute, each as a formula over scalar operations.

A row is the promotion rule of the operator (as `torch._prims_common.elementwise_dtypes` names it) and a
function that builds its value from scalar operations (`codegen/kernel.py` lists them). Operators with
behaviour that a scalar formula cannot give (integer division by zero raises in eager) are left out or
refused by `Unfit`.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import torch
from torch._ops import OpOverload
from torch._prims_common import ELEMENTWISE_TYPE_PROMOTION_KIND as Promotion

from llmcomp.region import Unfit

Scalar = str | float | int | bool


class Builder(Protocol):
    """Appends scalar operations to a body; `dtype` is the dtype that the current operator computes in."""

    dtype: torch.dtype

    def op(self, name: str, *args: Scalar) -> Scalar:
        """The value of an operation that returns the computation dtype."""
        ...

    def test(self, name: str, *args: Scalar) -> Scalar:
        """The value of an operation that returns a bool."""
        ...


Formula = Callable[..., Scalar]


@dataclass(frozen=True)
class Pointwise:
    """How an operator promotes its tensor arguments, and its formula over them (keywords are attributes)."""

    promotion: Promotion
    formula: Formula


def _op(name: str) -> Formula:
    return lambda b, *args: b.op(name, *args)


def _test(name: str) -> Formula:
    return lambda b, *args: b.test(name, *args)


def _add(b: Builder, x: Scalar, y: Scalar, alpha: Scalar = 1) -> Scalar:
    return b.op("add", x, y if alpha == 1 else b.op("mul", y, alpha))


def _sub(b: Builder, x: Scalar, y: Scalar, alpha: Scalar = 1) -> Scalar:
    return b.op("sub", x, y if alpha == 1 else b.op("mul", y, alpha))


def _rsub(b: Builder, x: Scalar, y: Scalar, alpha: Scalar = 1) -> Scalar:
    return b.op("sub", y, x if alpha == 1 else b.op("mul", x, alpha))


def _pow_scalar(b: Builder, x: Scalar, exponent: Scalar) -> Scalar:
    if isinstance(exponent, str):
        raise Unfit("pow with a symbolic exponent")
    powers = {0.5: "sqrt", -0.5: "rsqrt", -1: "reciprocal"}
    if b.dtype.is_floating_point and exponent in powers:
        return b.op(powers[exponent], x)
    if exponent == int(exponent) and 0 < exponent <= 8:
        return _repeated(b, x, int(exponent))
    if not b.dtype.is_floating_point:
        raise Unfit("pow of integers")
    return b.op("pow", x, exponent)


def _repeated(b: Builder, x: Scalar, exponent: int) -> Scalar:
    if exponent == 1:
        return x
    half = _repeated(b, x, exponent // 2)
    square = b.op("mul", half, half)
    return b.op("mul", square, x) if exponent % 2 else square


def _float_only(name: str) -> Formula:
    def formula(b: Builder, *args: Scalar) -> Scalar:
        if not b.dtype.is_floating_point:
            raise Unfit(f"{name} of integers")
        return b.op(name, *args)

    return formula


def _rounding(name: str) -> Formula:
    """floor, ceil, trunc and round give integers back unchanged."""
    return lambda b, x: b.op(name, x) if b.dtype.is_floating_point else x


def _gelu(b: Builder, x: Scalar, approximate: str = "none") -> Scalar:
    if approximate == "tanh":
        cube = b.op("mul", b.op("mul", x, x), x)
        inner = b.op("mul", b.op("add", x, b.op("mul", cube, 0.044715)), math.sqrt(2 / math.pi))
        return b.op("mul", b.op("mul", x, 0.5), b.op("add", b.op("tanh", inner), 1.0))
    erf = b.op("erf", b.op("mul", x, math.sqrt(0.5)))
    return b.op("mul", b.op("mul", x, 0.5), b.op("add", erf, 1.0))


def _silu(b: Builder, x: Scalar) -> Scalar:
    return b.op("mul", x, b.op("sigmoid", x))


def _clamp(b: Builder, x: Scalar, low: Scalar | None = None, high: Scalar | None = None) -> Scalar:
    x = x if low is None else b.op("maximum", x, low)
    return x if high is None else b.op("minimum", x, high)


def _leaky_relu(b: Builder, x: Scalar, slope: Scalar = 0.01) -> Scalar:
    return b.op("where", b.test("gt", x, 0.0), x, b.op("mul", x, slope))


def _softplus(b: Builder, x: Scalar, beta: Scalar = 1, threshold: Scalar = 20) -> Scalar:
    scaled = b.op("mul", x, beta)
    soft = b.op("div", b.op("log1p", b.op("exp", scaled)), beta)
    return b.op("where", b.test("gt", scaled, threshold), x, soft)


def _elu(b: Builder, x: Scalar, alpha: Scalar = 1, scale: Scalar = 1, input_scale: Scalar = 1) -> Scalar:
    negative = b.op("mul", b.op("expm1", b.op("mul", x, input_scale)), alpha)
    return b.op("mul", b.op("where", b.test("gt", x, 0.0), x, negative), scale)


def _hardsigmoid(b: Builder, x: Scalar) -> Scalar:
    return b.op("div", _clamp(b, b.op("add", x, 3.0), 0.0, 6.0), 6.0)


def _mish(b: Builder, x: Scalar) -> Scalar:
    return b.op("mul", x, b.op("tanh", _softplus(b, x)))


def _log_sigmoid(b: Builder, x: Scalar) -> Scalar:
    tail = b.op("log1p", b.op("exp", b.op("neg", b.op("abs", x))))
    return b.op("sub", b.op("minimum", x, 0.0), tail)


def _addcmul(b: Builder, x: Scalar, y: Scalar, z: Scalar, value: Scalar = 1) -> Scalar:
    return b.op("add", x, b.op("mul", b.op("mul", y, value) if value != 1 else y, z))


def _addcdiv(b: Builder, x: Scalar, y: Scalar, z: Scalar, value: Scalar = 1) -> Scalar:
    return b.op("add", x, b.op("mul", b.op("div", y, z), value))


def _lerp(b: Builder, x: Scalar, y: Scalar, weight: Scalar) -> Scalar:
    return b.op("add", x, b.op("mul", weight, b.op("sub", y, x)))


def _where(b: Builder, condition: Scalar, x: Scalar, y: Scalar) -> Scalar:
    return b.op("where", condition, x, y)


def _masked_fill(b: Builder, x: Scalar, mask: Scalar, value: Scalar) -> Scalar:
    return b.op("where", mask, value, x)


def _logical(name: str) -> Formula:
    """Logical operators work on truth values of any dtype."""
    return lambda b, *args: b.test(name, *(b.test("ne", a, 0) for a in args))


def activation(b: Builder, name: str, x: Scalar) -> Scalar:
    """The activation of a gated unit by the name that `llmcomp::gated` gives it.

    Raises:
        Unfit: the name is not known here.
    """
    formulas: Mapping[str, Callable[[], Scalar]] = {
        "silu": lambda: _silu(b, x),
        "gelu": lambda: _gelu(b, x),
        "gelu_tanh": lambda: _gelu(b, x, "tanh"),
        "relu": lambda: b.op("maximum", x, 0.0),
        "relu2": lambda: _repeated(b, b.op("maximum", x, 0.0), 2),
        "sigmoid": lambda: b.op("sigmoid", x),
        "tanh": lambda: b.op("tanh", x),
        "quick_gelu": lambda: b.op("mul", x, b.op("sigmoid", b.op("mul", x, 1.702))),
        "identity": lambda: x,
    }
    if name not in formulas:
        raise Unfit(f"activation {name}")
    return formulas[name]()


@cache
def table() -> Mapping[OpOverload, Pointwise]:
    """Every elementwise operator that kernels can compute."""
    aten = torch.ops.aten
    default, to_float, to_bool = Promotion.DEFAULT, Promotion.INT_TO_FLOAT, Promotion.ALWAYS_BOOL
    rows: dict[OpOverload, Pointwise] = {}

    def add(promotion: Promotion, formula: Formula, *overloads: OpOverload) -> None:
        rows.update({o: Pointwise(promotion, formula) for o in overloads})

    for name in "sin cos tan asin acos atan sinh cosh tanh asinh acosh atanh".split():
        add(to_float, _op(name), getattr(aten, name).default)
    for name in "exp exp2 expm1 log log2 log10 log1p sqrt rsqrt reciprocal sigmoid erf erfc".split():
        add(to_float, _op(name), getattr(aten, name).default)
    for name in "eq ne lt le gt ge".split():
        packet = getattr(aten, name)
        add(to_bool, _test(name), packet.Tensor, packet.Scalar)
    for name in "and or xor".split():
        packet = getattr(aten, f"bitwise_{name}")
        add(default, _op(f"bitwise_{name}"), packet.Tensor, packet.Scalar, packet.Scalar_Tensor)
        add(to_bool, _logical(f"logical_{name}"), getattr(aten, f"logical_{name}").default)
    for side in ("left", "right"):
        packet, operator = getattr(aten, f"bitwise_{side}_shift"), getattr(aten, f"__{side[0]}shift__")
        add(default, _op(f"shift_{side}"), packet.Tensor, packet.Tensor_Scalar, packet.Scalar_Tensor)
        add(default, _op(f"shift_{side}"), operator.Tensor, operator.Scalar)
    add(to_bool, _logical("logical_not"), aten.logical_not.default)
    add(default, _op("bitwise_not"), aten.bitwise_not.default)
    add(to_bool, _test("isnan"), aten.isnan.default)
    add(to_bool, _test("isinf"), aten.isinf.default)
    for name, op in {"floor": "floor", "ceil": "ceil", "trunc": "trunc", "round": "round_even"}.items():
        add(default, _rounding(op), getattr(aten, name).default)
    add(default, _add, aten.add.Tensor, aten.add.Scalar)
    add(default, _sub, aten.sub.Tensor, aten.sub.Scalar)
    add(default, _rsub, aten.rsub.Tensor, aten.rsub.Scalar)
    add(default, _op("mul"), aten.mul.Tensor, aten.mul.Scalar)
    add(to_float, _op("div"), aten.div.Tensor, aten.div.Scalar)
    add(default, _op("neg"), aten.neg.default)
    add(default, _op("abs"), aten.abs.default)
    add(default, _op("sign"), aten.sign.default, aten.sgn.default)
    add(default, lambda b, x: b.op("maximum", x, 0), aten.relu.default)
    add(default, _silu, aten.silu.default)
    add(default, _gelu, aten.gelu.default)
    add(default, _clamp, aten.clamp.default, aten.clamp.Tensor, aten.hardtanh.default)
    add(default, lambda b, x, low: _clamp(b, x, low), aten.clamp_min.default, aten.clamp_min.Tensor)
    add(default, lambda b, x, high: _clamp(b, x, None, high), aten.clamp_max.default, aten.clamp_max.Tensor)
    add(default, _op("maximum"), aten.maximum.default)
    add(default, _op("minimum"), aten.minimum.default)
    add(default, _float_only("fmax"), aten.fmax.default)
    add(default, _float_only("fmin"), aten.fmin.default)
    add(to_float, _op("atan2"), aten.atan2.default)
    add(to_float, _op("copysign"), aten.copysign.Tensor)
    add(default, _float_only("hypot"), aten.hypot.default)
    add(default, _float_only("remainder"), aten.remainder.Tensor, aten.remainder.Scalar)
    add(default, _float_only("fmod"), aten.fmod.Tensor, aten.fmod.Scalar)
    add(default, _pow_scalar, aten.pow.Tensor_Scalar)
    add(default, _float_only("pow"), aten.pow.Tensor_Tensor, aten.pow.Scalar)
    add(default, _where, aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf)
    add(default, _masked_fill, aten.masked_fill.Scalar, aten.masked_fill.Tensor)
    add(default, _leaky_relu, aten.leaky_relu.default)
    add(default, _softplus, aten.softplus.default)
    add(default, _elu, aten.elu.default)
    add(default, _hardsigmoid, aten.hardsigmoid.default)
    add(default, lambda b, x: b.op("mul", x, _hardsigmoid(b, x)), aten.hardswish.default)
    add(default, _mish, aten.mish.default)
    add(default, _addcmul, aten.addcmul.default)
    add(default, _addcdiv, aten.addcdiv.default)
    add(default, _lerp, aten.lerp.Tensor, aten.lerp.Scalar)
    return rows
