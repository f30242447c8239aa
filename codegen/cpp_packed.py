"""Weights in a storage format, as the C++ of a Contract spells them: types of packed.h and what they are made of."""

import sympy
import torch

from llmcomp.blocks import Blocks
from llmcomp.codegen.build import cpu_features
from llmcomp.codegen.cpp_expr import MEMORY_TYPES, index
from llmcomp.codegen.kernel import MATRIX, Accumulator, Contract, Packing, Section
from llmcomp.formats import Format, Int4, Mxfp4
from llmcomp.masked import Masked
from llmcomp.two_four import TwoFour

LIBRARY_ROWS = 16  # from more on the library multiplies, where it has units for matrices many times as fast
MANY = 2**31


def header(packing: Packing | None) -> str:
    """The header that a kernel of such weights builds on."""
    if packing is None:
        return "contract"
    if isinstance(packing.format, Blocks):
        return "blocks"
    if isinstance(packing.format, TwoFour | Masked) or packing.format.two_four:
        return "sparse"
    return "dynamic" if packing.format.dynamic else "packed"


def expands() -> bool:
    """Whether this machine expands 2:4 sparse weights in one instruction, and multiplies them in another."""
    features = cpu_features().split()
    return "avx512_vbmi2" in features and "avx512_bf16" in features


def skipping() -> int:
    """Up to how many rows of an operand kernels skip blocks of zeros faster than matrices are multiplied whole."""
    features = cpu_features().split()
    if "avx2" not in features:
        return 0  # not measured
    return LIBRARY_ROWS if "amx_bf16" in features else MANY


def operand_type(kernel: Contract, packing: Packing) -> str:
    """The type that packs the operand for such weights."""
    if isinstance(packing.format, Blocks):
        return f"blocks::Operand<{weights_type(kernel, packing)}, {MEMORY_TYPES[kernel.operand_dtype]}>"
    sparse = isinstance(packing.format, TwoFour | Masked)
    kind = "Dynamic" if packing.format.dynamic else "Sparse" if sparse else "Operand"
    return f"packed::{kind}<{weights_type(kernel, packing)}, {MEMORY_TYPES[kernel.operand_dtype]}>"


def numbers_name(kernel: Contract) -> str:
    """The array that holds what 4-bit codes stand for."""
    return f"{kernel.name}_numbers"


def weights_type(kernel: Contract, packing: Packing) -> str:
    """The type of packed.h that holds a tile of weights."""
    dtypes = {b.name: b.dtype for b in kernel.buffers}
    scale = MEMORY_TYPES[torch.bfloat16 if packing.scale is None else dtypes[packing.scale]]
    form = packing.format
    if isinstance(form, Blocks):
        return f"blocks::Tile<{MEMORY_TYPES[kernel.operand_dtype]}, {form.width}>"
    if isinstance(form, TwoFour):
        return f"packed::TwoFour<{MEMORY_TYPES[kernel.operand_dtype]}>"
    if isinstance(form, Masked):
        return f"packed::Masked<{MEMORY_TYPES[kernel.operand_dtype]}>"
    if form.bits == 4:
        zeros = "false" if packing.zero is None else "true"
        kind = "SparseNibbles" if form.two_four else "Nibbles"
        return f"packed::{kind}<{scale}, {form.group}, {zeros}, packed::{_kind(form)}>"
    if form.two_four:
        return f"packed::SparseBytes<{scale}, {form.group}>"
    codes = dtypes[kernel.sections[0].accumulators[0].weight.buffer]
    return f"packed::Bytes<{MEMORY_TYPES[codes]}, {scale}, {form.group}>"


def _kind(form: Format) -> str:
    """How the codes of a 4-bit format become numbers."""
    match form:
        case Int4(symmetric=True):
            return "Centred"
        case Int4():
            return "Plain"
        case Mxfp4():
            return "Halves"
    return "Looked"


def tile(kernel: Contract, section: Section, a: Accumulator, first: sympy.Expr) -> str:
    """The initializer of a tile of weights whose first column is `first`."""
    weight, last = a.weight, section.axes[-1].symbol
    packing = weight.packing
    assert packing is not None
    row = a.row.subs(last, first)
    if kernel.experts is not None:
        row += MATRIX * (weight.expert_stride / weight.row_stride)
    step = sympy.expand(a.row.subs(last, last + 1) - a.row)
    starts = [_at(weight.buffer, weight.offset + row * weight.row_stride)]
    starts.append("nullptr" if packing.scale is None else _at(packing.scale, row * packing.groups))
    strides = [index(step * weight.row_stride), index(step * packing.groups), index(packing.groups)]
    if packing.format.bits == 8:
        return f"{{{', '.join([*starts, *strides])}}}"
    starts.append("nullptr" if packing.zero is None else _at(packing.zero, row * packing.groups))
    return f"{{{', '.join([*starts, *strides, numbers_name(kernel)])}}}"


def _at(buffer: str, offset: sympy.Expr) -> str:
    offset = sympy.expand(offset)
    return buffer if offset == 0 else f"{buffer} + {index(offset)}"


def numbers(kernel: Contract, form: Format) -> str:
    """The definition of the table of a 4-bit format."""
    assert form.table is not None
    values = ", ".join(f"{value!r}f" for value in form.table)
    return f"static const float {numbers_name(kernel)}[16] = {{{values}}};"
