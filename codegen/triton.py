"""Kernel -> Triton source: one Python file with `@triton.jit` functions and `launch(buffers, sizes)`.

Map and Rows are printed here, Contract and Attend by triton_contract.py and triton_attend.py.
"""

from collections.abc import Sequence
from dataclasses import replace

from llmcomp.codegen.build import Source
from llmcomp.codegen.kernel import (
    Attend,
    Contract,
    Kernel,
    Map,
    Rows,
    Store,
    inputs,
    phases,
    vectors,
)
from llmcomp.codegen.triton_attend import render_attend
from llmcomp.codegen.triton_body import (
    Dim,
    Tile,
    Writer,
    chunks,
    indexed,
    make_buffers,
    own,
    spell,
    statements,
)
from llmcomp.codegen.triton_contract import render_contract
from llmcomp.codegen.triton_file import (
    config_functions,
    count,
    decode,
    extents_function,
    file_head,
    flatten,
    jit_function,
    launch_function,
)

# Rows up to this many elements are held on chip whole, longer ones are walked in chunks once for each phase.
WHOLE_ROW = 16384


def render(kernel: Kernel, comment: Sequence[str] = ()) -> Source:
    """The Triton source of `kernel`; `comment` names the graph nodes that it computes."""
    match kernel:
        case Map():
            text = render_map(kernel)
        case Rows():
            text = render_rows(kernel)
        case Contract():
            text = render_contract(kernel)
        case Attend():
            text = render_attend(kernel)
    return Source(kernel.name, "triton", text, tuple(comment))


# ---- Map ----------------------------------------------------------------------------------------------


def render_map(kernel: Map) -> str:
    """The text of a Map: the points of all axes in one line, a block of them for each program."""
    point = own("point")
    body = tuple(flatten(s, kernel.axes, point) for s in kernel.body)
    used = {name for s in body for name in inputs(s)}
    tile = Tile(
        make_buffers(kernel.buffers),
        (Dim("point", "BLOCK", "inside"),),
        {str(a.symbol): frozenset({"point"}) for a in kernel.axes} | {"@point": frozenset({"point"})},
    )
    w = Writer()
    file_head(w)
    with jit_function(w, kernel, [body], kernel.name, ["BLOCK"], ""):
        w.line("point = tl.program_id(0).to(INDEX) * BLOCK + tl.arange(0, BLOCK)")
        w.line(f"inside = point < {indexed(count(kernel.axes))}")
        w.lines(decode("point", kernel.axes, used))
        w.lines(statements(body, tile))
    extents_function(w, kernel.sizes, "Points", {"points": count(kernel.axes)})
    config_functions(w, ["map"])
    launch_function(w, kernel, [body], 'triton.cdiv(shape.points, config["BLOCK"])', "shape.points")
    return w.text()


# ---- Rows ---------------------------------------------------------------------------------------------


def render_rows(kernel: Rows) -> str:
    """The text of a Rows: a program owns ROWS rows, each whole or in chunks of COLS elements."""
    row = own("row")
    kernel = replace(kernel, body=tuple(flatten(s, kernel.axes, row) for s in kernel.body))
    size = kernel.inner.size
    whole = bool(size.is_Integer and int(size) <= WHOLE_ROW)
    w = Writer()
    file_head(w)
    blocks = ["ROWS"] if whole else ["ROWS", "COLS"]
    with jit_function(w, kernel, [kernel.body], kernel.name, blocks, ""):
        (_whole_rows if whole else _long_rows)(w, kernel)
    extents_function(w, kernel.sizes, "Table", {"rows": count(kernel.axes), "columns": size})
    config_functions(w, ["rows" if whole else "long_rows"])
    points = "shape.rows * shape.columns"
    launch_function(w, kernel, [kernel.body], 'triton.cdiv(shape.rows, config["ROWS"])', points)
    return w.text()


def _row_head(w: Writer, kernel: Rows) -> None:
    w.line("row = tl.program_id(0).to(INDEX) * ROWS + tl.arange(0, ROWS)[:, None]")
    w.line(f"row_inside = row < {indexed(count(kernel.axes))}")
    w.lines(decode("row", kernel.axes, {n for s in kernel.body for n in inputs(s)}))


def _row_tile(kernel: Rows, block: str, inside: str) -> Tile:
    col = str(kernel.inner.symbol)
    return Tile(
        make_buffers(kernel.buffers),
        (Dim("row", "ROWS", "row_inside"), Dim("col", block, inside)),
        {n: frozenset({"row"}) for n in ("@row", *(str(a.symbol) for a in kernel.axes))} | {col: frozenset({"col"})},
        inner="col",
        inner_at=spell(col),
    )


def _whole_rows(w: Writer, kernel: Rows) -> None:
    size, col = int(kernel.inner.size), spell(str(kernel.inner.symbol))
    width = 1 << (size - 1).bit_length()
    _row_head(w, kernel)
    w.line(f"{col} = tl.arange(0, {width})[None, :]")
    if width != size:
        w.line(f"col_inside = {col} < {size}")
    tile = _row_tile(kernel, str(width), "" if width == size else "col_inside")
    w.lines(statements(kernel.body, tile))


def _long_rows(w: Writer, kernel: Rows) -> None:
    tile = _row_tile(kernel, "COLS", "col_inside")
    _row_head(w, kernel)
    for phase in phases(kernel.body, kernel.inner.symbol):
        w.lines(statements(phase.scalars, tile))
        varying = vectors(phase.body, kernel.inner.symbol) | {str(kernel.inner.symbol)}
        once = [s for s in phase.body if isinstance(s, Store) and not varying.intersection(inputs(s))]
        w.lines(statements(once, tile))
        if len(once) < len(phase.body):
            chunks(w, [s for s in phase.body if s not in once], kernel.inner, tile)
