"""Matrices with zeros are stored without them, where kernels read that faster.

    linear(x, w), w 2:4 sparse, x of few rows        ->   two_four_linear(x, pack_two_four(w))
    linear(x, w), half of w zero, x of few rows      ->   masked_linear(x, pack_masked(w))
    linear(x, dequantize(codes, ..., "int8", K))     ->   packed_linear(x, pack_codes(codes, ...), ..., "int8_2:4")

A part of passes/prune.py, after which no rows or columns are left that count for nothing.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.fx import Graph, Node

from llmcomp.formats import Format, Int4, Int8, Packed, parse_format
from llmcomp.graph import insert, replace_by, source, val
from llmcomp.hints import volume
from llmcomp.masked import room
from llmcomp.passes.base import Report
from llmcomp.passes.zero_structure import PREPARED, Values, share_of_zeros
from llmcomp.products import LINEAR, MASKED, PACKED, TWO_FOUR, bias_of, operand_of
from llmcomp.two_four import is_two_four

MOST_ROWS = 4  # of the operand; measured on AVX-512: 1.8, 1.7, 1.7 and 1.0 times dense at 1, 2, 4 and 8
FEWEST = 0.495  # zeros, scattered; times dense, one to four rows: 1.0 to 1.3 at 50%, 1.3 to 1.8 at 70%, 0.9 at 48%
MOST_ROWS_OF_CODES = 1  # the same for int8: 1.3, 0.9 and 0.8 at 1, 2 and 4; int4: 0.8 at 1
FEW_ROWS = 8  # of codes, that tell whether a matrix holds many zeros
DEQUANTIZE = torch.ops.llmcomp.dequantize.default
PACK_CODES = torch.ops.llmcomp.pack_codes.default
PACK_MASKED = torch.ops.llmcomp.pack_masked.default
PACK = torch.ops.llmcomp.pack_two_four.default


def compress(graph: Graph, values: Values, packs: bool, report: Report) -> None:
    """Rewrite the linear layers of a graph whose weights have these values.

    `packs`: kernels read 2:4 sparse weights faster than dense ones.
    """
    _pack_two_four(graph, values, packs, report)
    _pack_masked(graph, values, packs, report)
    _pack_codes(graph, values, packs, report)
    _report_rest(graph, values, packs, report)


def _pack_two_four(graph: Graph, values: Values, packs: bool, report: Report) -> None:
    for node in list(graph.find_nodes(op="call_function", target=LINEAR)):
        weight, value = node.args[1], values.of(node.args[1])
        if value is None or not isinstance(weight, Node) or share_of_zeros(value) < 0.4:
            continue
        if node.args[3] or not is_two_four(value):
            continue
        if (reason := _stays_dense(node, packs)) is not None:
            report.miss(node, f"its weights are 2:4 sparse, and read whole: {reason}")
            continue
        with graph.inserting_before(node):
            codes = insert(graph, PACK, weight)
        codes.meta[PREPARED] = True
        replace_by(node, TWO_FOUR, operand_of(node), codes, bias_of(node))
        report.rewrites += 1


def _stays_dense(node: Node, packs: bool) -> str | None:
    """Why a layer does not read packed weights, or None."""
    dtypes = {val(operand_of(node)).dtype, val(source(node, 1)).dtype}
    if not packs:
        return "no kernel that is known to be faster without zeros"
    if dtypes != {torch.bfloat16}:
        return "they are packed in bfloat16 alone"
    if (rows := volume(val(operand_of(node)).shape[:-1])) > MOST_ROWS:
        return f"{rows} rows meet them, and above {MOST_ROWS} that is faster"
    return None


def _pack_masked(graph: Graph, values: Values, packs: bool, report: Report) -> None:
    for node in list(graph.find_nodes(op="call_function", target=LINEAR)):
        weight, value = node.args[1], values.of(node.args[1])
        if value is None or not isinstance(weight, Node) or value.dim() != 2 or share_of_zeros(value) < FEWEST:
            continue
        if node.args[3] or is_two_four(value) or _stays_dense(node, packs) is not None:
            continue
        with graph.inserting_before(node):
            codes = insert(graph, PACK_MASKED, weight, room(value))
        codes.meta[PREPARED] = True
        replace_by(node, MASKED, operand_of(node), codes, bias_of(node), value.shape[0])
        report.rewrites += 1


# ---- codes ----------------------------------------------------------------------------------------------------------


def _pack_codes(graph: Graph, values: Values, packs: bool, report: Report) -> None:
    for node in list(graph.find_nodes(op="call_function", target=LINEAR)):
        weight = node.args[1]
        if not isinstance(weight, Node) or weight.target is not DEQUANTIZE or node.args[3]:
            continue
        parts = [values.of(part) for part in weight.args[:3]]
        form = parse_format(str(weight.args[3]))
        if not is_two_four_codes(form, parts):
            continue
        if (reason := _codes_stay_dense(node, form, packs)) is not None:
            report.miss(node, f"its codes are 2:4 sparse, and read whole: {reason}")
            continue
        with graph.inserting_before(node):
            codes = insert(graph, PACK_CODES, *weight.args[:5])
        codes.meta[PREPARED] = True
        name = str(replace(form, two_four=True))
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
        return "no kernel of this target expands them"
    if form.bits == 4:
        return "to find out where codes of 4 bits belong takes as long as to read the others"
    if (rows := volume(val(operand_of(node)).shape[:-1])) > MOST_ROWS_OF_CODES:
        return f"{rows} rows meet them, and above {MOST_ROWS_OF_CODES} that is faster"
    return None


# ---- what is only reported ------------------------------------------------------------------------------------------


def _report_rest(graph: Graph, values: Values, packs: bool, report: Report) -> None:
    for node in graph.find_nodes(op="call_function", target=LINEAR):
        value = values.of(node.args[1])
        if value is None or value.dim() != 2 or (share := share_of_zeros(value)) < 0.25 or is_two_four(value):
            continue
        rows = (value == 0).all(0 if node.args[3] else 1)
        if float(rows.float().mean()) > share / 2:
            report.miss(node, f"{int(rows.sum())} of its {len(rows)} outputs are zero: they are read as a whole")
            continue
        reason = _stays_dense(node, packs)
        if reason is None:
            transposed = "stored the other way around" if node.args[3] else None
            reason = transposed or f"below {FEWEST:.0%} to skip them costs more than it saves"
        report.miss(node, f"{share:.0%} of its weights are zeros, scattered, and read whole: {reason}")
