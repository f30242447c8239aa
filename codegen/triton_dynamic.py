"""Activations that are quantized token by token (llmcomp/dynamic.py), in the Triton form of a Contract.

prologue      peak = max |x| along the row;  scale = peak / 127 (fp8: 448)      as statements of the operand's body
operand       x / scale, rounded to the codes of the weights
products      int8: of four codes at once (DP4A), or on tensor cores, in int32; fp8: in float32
accumulator   times the scale of the row
"""

from dataclasses import replace

import torch

from llmcomp.codegen.kernel import Compute, Contract, Reduce, Statement, packing_of
from llmcomp.codegen.triton_body import Writer, spell
from llmcomp.formats import Int8

F32 = torch.float32
SCALE = "token_scale"


def is_dynamic(kernel: Contract) -> bool:
    """Whether rows of the operand are quantized."""
    packing = packing_of(kernel)
    return packing is not None and packing.format.dynamic


def sums_integers(kernel: Contract) -> bool:
    """Whether products are of integers, and so are their sums."""
    packing = packing_of(kernel)
    return is_dynamic(kernel) and packing is not None and isinstance(packing.format, Int8)


def with_token_scale(kernel: Contract) -> Contract:
    """The kernel with the scale of each row as a value of its prologue, where rows are quantized."""
    if not is_dynamic(kernel):
        return kernel
    most = 127.0 if sums_integers(kernel) else 448.0
    scale: tuple[Statement, ...] = (
        Compute("token_size", "abs", (kernel.operand_value,), F32),
        Reduce("token_peak", "max", "token_size", F32),
        Compute("token_step", "div", ("token_peak", most), F32),
        Compute("token_is_zero", "eq", ("token_step", 0.0), torch.bool),
        Compute("token_some", "where", ("token_is_zero", 1.0, "token_step"), F32),
        Compute("token_is_infinite", "isinf", ("token_some",), torch.bool),
        Compute(SCALE, "where", ("token_is_infinite", float("nan"), "token_some"), F32),
        # Scales whose inverse is no number are multiplied first, and so is what they divide.
        Compute("token_is_tiny", "lt", (SCALE, 2.0**-60), torch.bool),
        Compute("token_factor", "where", ("token_is_tiny", 2.0**80, 1.0), F32),
        Compute("token_divisor", "mul", (SCALE, "token_factor"), F32),
        Compute("token_inverse", "reciprocal", ("token_divisor",), F32),
    )
    return replace(kernel, operand=(*kernel.operand, *scale))


def print_quantized(w: Writer, kernel: Contract, x: str, form: str, quads: bool) -> str:
    """Print the codes of the operand `x`, as what they are multiplied as; their name."""
    if form == "dot":
        function = "bytes_of" if sums_integers(kernel) else "float8_of"
    elif sums_integers(kernel):
        function = "low_bytes_of" if quads else "rounded_to_bytes"
    else:
        function = "rounded_to_float8"
    w.line(f"token_quotient = codes.quotient({x}, token_factor, token_divisor, token_inverse)")
    w.line(f"token_codes = codes.{function}(token_quotient{'' if sums_integers(kernel) else ', FLOAT8'})")
    return "token_codes"


def print_products(w: Writer, kernel: Contract, name: str, x: str) -> None:
    """The products of a tile with weights as they lie in memory."""
    if sums_integers(kernel):
        w.line(f"{name} = codes.dot_bytes({x}, {name}_weight, {name})")
    else:
        w.line(f"{name} = codes.dot_float8({x}, {name}_weight, {name}, FLOAT8)")


def print_scaled_rows(w: Writer, kernel: Contract, name: str) -> None:
    """Turn the sum of the products of codes into what the accumulator is, [M, N]."""
    if is_dynamic(kernel):
        w.line(f"{spell(name)} = {spell(name)}.to(tl.float32) * {SCALE}")
