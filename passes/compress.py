"""Matrices with zeros are stored without them, where kernels read that faster.

    linear(x, w), w 2:4 sparse, x of few rows        ->   two_four_linear(x, pack_two_four(w))
    linear(x, w), blocks of w zero                   ->   block_linear(x, pack_blocks(w))
    linear(x, w), half of w zero, x of few rows      ->   masked_linear(x, pack_masked(w))
    linear(x, dequantize(codes, ..., "int8", K))     ->   packed_linear(x, pack_codes(codes, ...), ..., "int8_2:4")

A part of passes/prune.py, after which no rows or columns are left that count for nothing.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Graph, Node
from torch.fx.node import Argument

from llmcomp import blocks
from llmcomp.blocks import Blocks
from llmcomp.formats import Format, Int4, Int8, Packed, parse_format
from llmcomp.graph import insert, replace_by, source, val
from llmcomp.hints import volume
from llmcomp.masked import room
from llmcomp.pairs import BLOCK
from llmcomp.passes.base import Report
from llmcomp.passes.zero_blocks import DTYPES, Found, find_blocks
from llmcomp.passes.zero_structure import PREPARED, Values, share_of_zeros
from llmcomp.products import BLOCKS, LINEAR, MASKED, PACKED, TWO_FOUR, bias_of, operand_of
from llmcomp.two_four import BYTES, is_two_four

MOST_ROWS = 4  # of the operand; measured on AVX-512: 1.8, 1.7, 1.7 and 1.0 times dense at 1, 2, 4 and 8
FEWEST = 0.495  # zeros, scattered; times dense, one to four rows: 1.0 to 1.3 at 50%, 1.3 to 1.8 at 70%, 0.9 at 48%
MOST_ROWS_OF_CODES = 1  # the same for int8: 1.3, 0.9 and 0.8 at 1, 2 and 4; int4: 0.8 at 1
NOTABLE = 0.25  # zeros: below, nothing is said of them
UNKNOWN = "no kernel that is known to be faster without zeros"
FEW_ROWS = 8  # of codes, that tell whether a matrix holds many zeros
DEQUANTIZE = torch.ops.llmcomp.dequantize.default
PACK_CODES = torch.ops.llmcomp.pack_codes.default
PACK_MASKED = torch.ops.llmcomp.pack_masked.default
PACK_BLOCKS = torch.ops.llmcomp.pack_blocks.default
PACK = torch.ops.llmcomp.pack_two_four.default


def compress(graph: Graph, values: Values, packs: bool, skips: int, report: Report) -> None:
    """Rewrite the linear layers of a graph whose weights have these values.

    `packs`: kernels read 2:4 sparse weights faster than dense ones; `skips`: they skip blocks of zeros, faster too,
    for up to so many rows.
    """
    for node in list(graph.find_nodes(op="call_function", target=LINEAR)):
        weight = node.args[1]
        assert isinstance(weight, Node)
        if weight.target is DEQUANTIZE:
            _decide_codes(node, weight, values, packs, report)
        elif (value := values.of(weight)) is not None and value.dim() == 2:
            _decide(node, weight, value, packs, skips, report)


def _prepared(node: Node, packing: OpOverload, *args: Argument) -> Node:
    """What a layer reads instead of its weight: computed once."""
    with node.graph.inserting_before(node):
        packed = insert(node.graph, packing, *args)
    packed.meta[PREPARED] = True
    return packed


# ---- numbers --------------------------------------------------------------------------------------------------------


def _decide(node: Node, weight: Node, value: Tensor, packs: bool, skips: int, report: Report) -> None:
    """Store the weight of a layer, which has this value, without its zeros; or say why it is read whole."""
    if (share := share_of_zeros(value)) < NOTABLE:
        return
    transposed, reason = bool(node.args[3]), _stays_dense(node, packs)
    many = share >= FEWEST
    two_four = many and is_two_four(value)
    if many and reason is None and not transposed:
        reason = _no_smaller(_bytes(value, two_four), value.nbytes)
    found = None if transposed else find_blocks(value)
    blocks_reason = None if found is None else _blocks_stay_dense(node, found, value, skips)
    otherwise = (1.125 if two_four else 0.125 + 2 * (1 - share)) if many and reason is None else math.inf
    if found is not None and blocks_reason is None and found.bytes_of_weight(value.itemsize) < otherwise:
        _keep_blocks(node, weight, value, found.form)
        report.rewrites += 1
    elif many and not transposed and reason is None:
        if two_four:
            replace_by(node, TWO_FOUR, operand_of(node), _prepared(node, PACK, weight), bias_of(node))
        else:
            codes = _prepared(node, PACK_MASKED, weight, room(value))
            replace_by(node, MASKED, operand_of(node), codes, bias_of(node), value.shape[0])
        report.rewrites += 1
    elif found is not None and blocks_reason is not None:
        report.miss(node, f"{found}, and read whole: {blocks_reason}")
    elif not two_four:
        report.miss(node, _why_whole(value, share, transposed, reason))
    elif not transposed:
        report.miss(node, f"its weights are 2:4 sparse, and read whole: {reason}")


def _keep_blocks(node: Node, weight: Node, value: Tensor, form: Blocks) -> None:
    size = (form.height, form.width)
    codes = _prepared(node, PACK_BLOCKS, weight, *size, blocks.room(value, *size))
    replace_by(node, BLOCKS, operand_of(node), codes, bias_of(node), value.shape[0], *size)


def _bytes(value: Tensor, two_four: bool) -> int:
    """What a matrix takes without its zeros."""
    return value.shape[0] * -(-value.shape[1] // BLOCK) * BYTES if two_four else room(value)


def _no_smaller(packed: int, dense: int) -> str | None:
    """Why a matrix that would take so many bytes stays as it is, or None: small ones are rounded up."""
    return f"without zeros it takes {packed} bytes, and {dense} as it is" if packed >= dense else None


def _blocks_stay_dense(node: Node, found: Found, value: Tensor, skips: int) -> str | None:
    """Why a layer reads all blocks of its weight, or None."""
    dtypes = {val(operand_of(node)).dtype, val(source(node, 1)).dtype}
    rows = volume(val(operand_of(node)).shape[:-1])
    if not skips:
        return UNKNOWN
    if rows > skips:
        return f"{rows} rows meet them, and above {skips} the library may be faster"
    if len(dtypes) > 1 or not dtypes <= set(DTYPES):
        return "they are left out in bfloat16 and float32, where the operand has the same"
    if (slower := found.stays_dense(rows)) is not None:
        return slower
    return _no_smaller(blocks.room(value, found.form.height, found.form.width), value.nbytes)


def _stays_dense(node: Node, packs: bool) -> str | None:
    """Why a layer does not read packed weights, or None."""
    dtypes = {val(operand_of(node)).dtype, val(source(node, 1)).dtype}
    if not packs:
        return UNKNOWN
    if dtypes != {torch.bfloat16}:
        return "they are packed in bfloat16 alone"
    if (rows := volume(val(operand_of(node)).shape[:-1])) > MOST_ROWS:
        return f"{rows} rows meet them, and above {MOST_ROWS} that is faster"
    return None


def _why_whole(value: Tensor, share: float, transposed: bool, reason: str | None) -> str:
    """What is said of zeros that are read: `share` of the weights, of a layer that stays dense for a `reason`."""
    rows = (value == 0).all(0 if transposed else 1)
    if float(rows.float().mean()) > share / 2:
        return f"{int(rows.sum())} of its {len(rows)} outputs are zero: they are read as a whole"
    if reason is None and transposed:
        reason = "stored the other way around"
    elif reason is None:
        reason = f"below {FEWEST:.0%} to skip them costs more than it saves"
    return f"{share:.0%} of its weights are zeros, scattered, and read whole: {reason}"


# ---- codes ----------------------------------------------------------------------------------------------------------


def _decide_codes(node: Node, weight: Node, values: Values, packs: bool, report: Report) -> None:
    """Store the codes of a layer without those of zeros; or say why all are read."""
    form = parse_format(str(weight.args[3]))
    if node.args[3] or not is_two_four_codes(form, [values.of(part) for part in weight.args[:3]]):
        return
    if (reason := _codes_stay_dense(node, form, packs)) is not None:
        report.miss(node, f"its codes are 2:4 sparse, and read whole: {reason}")
        return
    codes, name = _prepared(node, PACK_CODES, *weight.args[:5]), str(replace(form, two_four=True))
    if (reason := _no_smaller(val(codes).nbytes, val(source(weight)).nbytes)) is not None:
        node.graph.erase_node(codes)
        report.miss(node, f"its codes are 2:4 sparse, and read whole: {reason}")
        return
    replace_by(node, PACKED, operand_of(node), codes, *weight.args[1:3], bias_of(node), name)
    report.rewrites += 1


def is_two_four_codes(form: Format, parts: Sequence[Tensor | None]) -> bool:
    """Whether codes, scales and zero points (those that there are) stand for a matrix that is 2:4 sparse."""
    codes, scale, zero = parts
    if not isinstance(form, Int8 | Int4) or form.two_four or form.dynamic or codes is None or codes.dim() != 2:
        return False
    if scale is None or share_of_coded_zeros(form, codes, scale, zero) < 0.4:
        return False
    columns = scale.shape[1] * form.group if form.group else codes.shape[1]
    numbers = form.dequantize(Packed(codes, scale, zero), columns, torch.float32)
    return is_two_four(numbers)


def share_of_coded_zeros(form: Format, codes: Tensor, scale: Tensor, zero: Tensor | None) -> float:
    """The part of a matrix that is zero, by some of its rows, where it is stored as codes."""
    step = max(1, codes.shape[0] // FEW_ROWS)  # every compilation asks this of every matrix
    rows = Packed(codes[::step], scale[::step], None if zero is None else zero[::step])
    columns = scale.shape[1] * form.group if form.group else codes.shape[1]
    return share_of_zeros(form.dequantize(rows, columns, torch.float32))


def _codes_stay_dense(node: Node, form: Format, packs: bool) -> str | None:
    """Why a layer reads all of its codes, or None."""
    if not packs:
        return UNKNOWN
    if form.bits == 4:
        return "to find out where codes of 4 bits belong takes as long as to read the others"
    if (rows := volume(val(operand_of(node)).shape[:-1])) > MOST_ROWS_OF_CODES:
        return f"{rows} rows meet them, and above {MOST_ROWS_OF_CODES} that is faster"
    return None
