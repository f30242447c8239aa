"""Attend as Triton: flash attention with the score body between the two matrix products.

    prefill   a program owns BLOCK_M queries of one head
    decode    the queries of all heads that share k and v are the rows of one tile; the keys are split over
              programs, and a second function combines the parts

The keys that a tile visits come in up to three runs: those that every query of the tile sees need no mask, those
before (sliding window) and after (causal, end of the keys) do. Tiles without a visible key are not visited; where a
mask hides keys (the unused end of a cache, padding), a tile first looks up which ones it sees at all.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import sympy
import torch
from torch.utils._sympy.functions import FloorDiv, Mod

from llmcomp.codegen.kernel import Attend, Axis, Strided, needed
from llmcomp.codegen.triton_body import (
    NO_DIMS,
    Dim,
    Tile,
    Value,
    Writer,
    as_bits,
    call,
    indexed,
    make_buffers,
    narrowed,
    own,
    spell,
    statements,
)
from llmcomp.codegen.triton_expr import DTYPES, NARROW_FLOATS
from llmcomp.codegen.triton_file import (
    LAUNCH,
    arguments,
    config_functions,
    decode,
    extents_function,
    file_head,
    jit_function,
    launcher,
)

# Up to this many queries of a group of heads the decode form is used.
DECODE_ROWS = 32
MINIMUM_DOT = 16
M, N = frozenset({"m"}), frozenset({"n"})
# Keys that are looked up in a mask at a time, where it is the same for all rows of a tile.
LOOK = 1024


def render_attend(kernel: Attend) -> str:
    """The Triton text of an Attend."""
    forms = forms_of(kernel)
    w = Writer()
    file_head(w, ["import torch"] if "decode" in forms else [])
    if "prefill" in forms:
        _print_prefill(w, kernel)
    if "decode" in forms:
        _print_decode(w, kernel)
        _print_combine(w, kernel)
    _print_extents(w, kernel)
    _print_launch(w, kernel, forms)
    return w.text()


def forms_of(kernel: Attend) -> tuple[str, ...]:
    """The forms that some number of queries may want."""
    queries = kernel.queries.size
    if not queries.is_Integer:
        return "decode", "prefill"
    return ("decode",) if int(queries) * kernel.group <= DECODE_ROWS else ("prefill",)


# ---- what both forms share ----------------------------------------------------------------------------


def _tile(kernel: Attend, grouped: bool) -> Tile:
    """A tile of scores: the rows are queries, of several heads where `grouped`."""
    symbols = {
        str(kernel.batch.symbol): NO_DIMS,
        str(kernel.heads.symbol): M if grouped else NO_DIMS,
        str(kernel.queries.symbol): M,
        str(kernel.keys.symbol): N,
    }
    dims = (Dim("m", "BLOCK_M", "row_inside"), Dim("n", "BLOCK_N", "col_inside"))
    tile = Tile(make_buffers(kernel.buffers), dims, symbols)
    tile.values["score"] = Value(torch.float32, M | N)
    return tile


def _width(size: int) -> int:
    return max(MINIMUM_DOT, 1 << (size - 1).bit_length())


def _head(s: Strided, b: sympy.Expr, h: sympy.Expr) -> str:
    """The address of the first element of a head."""
    at = s.offset + b * s.strides[0] + h * s.strides[1]
    return f"{spell(s.buffer)} + {indexed(at)}" if at != 0 else spell(s.buffer)


def _element(s: Strided, position: str, channel: str) -> str:
    """The address of an element within a head."""
    return indexed(own(position) * s.strides[2] + own(channel) * s.strides[3])


def _masked(*masks: str) -> list[str]:
    found = " & ".join(m for m in masks if m)
    return [f"mask={found}", "other=0.0"] if found else []


def _print_channels(w: Writer, kernel: Attend) -> None:
    """The channels of a head and of a value, padded to powers of two."""
    for name, size in (("channel", kernel.head_dim), ("value_channel", kernel.value_dim)):
        if name == "value_channel" and kernel.value_dim == kernel.head_dim:
            return
        w.line(f"{name} = tl.arange(0, {_width(size)})")


def _value_channel(kernel: Attend) -> str:
    return "channel" if kernel.value_dim == kernel.head_dim else "value_channel"


def _channel_mask(name: str, size: int, suffix: str) -> str:
    return "" if _width(size) == size else f"({name} < {size}){suffix}"


def _print_query(w: Writer, kernel: Attend, b: sympy.Expr, h: sympy.Expr) -> None:
    i = spell(str(kernel.queries.symbol))
    at = f"{_head(kernel.q, b, h)} + {_element(kernel.q, i, 'channel[None, :]')}"
    mask = _channel_mask("channel", kernel.head_dim, "[None, :]")
    to = "" if kernel.k_scale else _to(kernel.q, kernel.k, kernel)
    w.line(call("q_block = tl.load", [at, *_masked("row_inside", mask)], to))


def _print_heads(w: Writer, kernel: Attend, b: sympy.Expr, h: sympy.Expr) -> None:
    """The addresses of the first key and the first value of a head, and of their scales."""
    for name, operand in (("k", kernel.k), ("v", kernel.v)):
        at = _head(operand, b, h)
        coded = make_buffers(kernel.buffers)[operand.buffer] == torch.float8_e4m3fn
        w.line(f"{name}_head = {as_bits(at) if coded else at}")
    for name, scale in (("k", kernel.k_scale), ("v", kernel.v_scale)):
        if scale is not None:
            w.line(f"{name}_scale_head = {_head(scale, b, h)}")


def _to(s: Strided, other: Strided, kernel: Attend) -> str:
    """The conversion of one operand of the first product: 16-bit operands stay, if they agree."""
    dtypes = make_buffers(kernel.buffers)
    have, want = dtypes[s.buffer], dtypes[other.buffer]
    return "" if have == want or have == torch.float32 else ".to(tl.float32)"


def _print_range(w: Writer, kernel: Attend, grouped: bool) -> None:
    """`first` and `last`: the keys that some query of the tile sees."""
    i, start, end = kernel.queries.symbol, kernel.key_start, kernel.key_end
    if start != 0:
        w.line(f"key_start = {indexed(start)}")
    w.line(f"key_end = {indexed(end)}")
    w.line(f"first = {'0' if start == 0 else 'tl.min(key_start)' if start.has(i) else 'key_start'}")
    last = f"tl.minimum(tl.max(key_end), {indexed(kernel.keys.size)})" if end.has(i) else "key_end"
    whole = start == 0 and end == kernel.keys.size
    w.line(f"last = {last if whole else f'tl.maximum({last}, first)'}")
    if kernel.visible is not None:
        _print_narrowing(w, kernel, kernel.visible, grouped)


def _print_narrowing(w: Writer, kernel: Attend, visible: str, grouped: bool) -> None:
    """Move `first` and `last` to the keys that the mask leaves to some query of the tile, from both ends at once."""
    tile = _tile(kernel, grouped)
    statements(needed(kernel.score, visible), tile)
    by_row = "m" in tile.values[visible].dims
    span = "BLOCK_N" if by_row else str(LOOK)
    rows = "row_inside & " if by_row else ""
    w.line("# keys before the first and behind the last that the mask shows are not visited")
    w.line("ahead, low = tl.full([], first, INDEX), tl.full([], last, INDEX)")
    w.line("behind, high = low, ahead")
    with w.block("while ((low >= last) | (high <= first)) & (ahead < last)"):
        for end, start in (("low", "ahead"), ("high", "tl.maximum(behind - SPAN, first)".replace("SPAN", span))):
            _print_look(w, kernel, visible, grouped, span, start)
            w.line(f"{end}_key = {spell(str(kernel.keys.symbol))}")
            w.line(f"{end}_seen = {rows}col_inside & {spell(visible)}")
        w.line("low = tl.minimum(low, tl.min(tl.where(low_seen, low_key, last)))")
        w.line("high = tl.maximum(high, tl.max(tl.where(high_seen, high_key + 1, first)))")
        w.line(f"ahead += {span}")
        w.line(f"behind -= {span}")
    w.line("first, last = low, tl.maximum(low, high)")


def _print_look(w: Writer, kernel: Attend, visible: str, grouped: bool, span: str, start: str) -> None:
    """What the mask says of `span` keys from `start` on."""
    tile, j = _tile(kernel, grouped), spell(str(kernel.keys.symbol))
    tile = replace(tile, dims=(tile.dim("m"), replace(tile.dim("n"), block=span)))
    w.line(f"{j} = {start} + tl.arange(0, {span})[None, :]")
    w.line(f"col_inside = {j} < last")
    w.lines(statements(needed(kernel.score, visible), tile))


def _print_state(w: Writer, kernel: Attend) -> None:
    """The running maximum, sum, and weighted sum of values; a sink is a logit that is there from the start."""
    if kernel.sinks:
        w.line("peak = tl.broadcast_to(sink, [BLOCK_M, 1])")
        w.line('total = (peak > float("-inf")).to(tl.float32)')
    else:
        w.line('peak = tl.full([BLOCK_M, 1], float("-inf"), tl.float32)')
        w.line("total = tl.zeros([BLOCK_M, 1], tl.float32)")
    w.line(f"output = tl.zeros([BLOCK_M, {_width(kernel.value_dim)}], tl.float32)")


def _print_keys(w: Writer, kernel: Attend, grouped: bool) -> None:
    """The loop over the keys [first, last): products, score body, online softmax."""
    i, start = kernel.queries.symbol, kernel.key_start
    before = start.has(i)
    if before:
        w.line("hidden = tl.minimum(tl.maximum(tl.max(key_start) - first, 0), last - first)")
        w.line("whole = first + tl.cdiv(hidden, BLOCK_N) * BLOCK_N")
    else:
        w.line("whole = first")
    seen = "tl.minimum(tl.min(key_end), last)" if kernel.key_end.has(i) else "last"
    w.line(f"part = whole + tl.maximum({seen} - whole, 0) // BLOCK_N * BLOCK_N")
    w.line("# run 1: keys that all queries see; before and after it, keys that take a mask")
    with w.block(f"for run in tl.static_range({0 if before else 1}, 3)"):
        w.line(f"begin = {'first if run == 0 else ' if before else ''}whole if run == 1 else part")
        w.line(f"end = {'whole if run == 0 else ' if before else ''}part if run == 1 else last")
        with w.block("for start in range(begin, end, BLOCK_N)"):
            _print_block(w, kernel, grouped)


def _print_block(w: Writer, kernel: Attend, grouped: bool) -> None:
    j, dtypes = spell(str(kernel.keys.symbol)), make_buffers(kernel.buffers)
    tile = _tile(kernel, grouped)
    w.line("key = start + tl.arange(0, BLOCK_N)")
    w.line(f"{j} = key[None, :]")
    w.line(f"col_inside = prelude.inside({j}, last, run == 1)")
    at = f"k_head + {_element(kernel.k, j, 'channel[:, None]')}"
    masks = _masked("col_inside", _channel_mask("channel", kernel.head_dim, "[:, None]"))
    if kernel.k_scale:
        _print_codes(w, kernel, kernel.k, [at, *masks], "k")
        _print_scales(w, kernel.k_scale, "k", j, "col_inside")
    else:
        w.line(call("k_block = tl.load", [at, *masks], _to(kernel.k, kernel.q, kernel)))
    product = "prelude.dot(q_block, k_block, tl.zeros([BLOCK_M, BLOCK_N], tl.float32))"
    factor = "" if kernel.scale == 1.0 else f" * {kernel.scale!r}"
    w.line(f"score = {product}{f' * (k_scale{factor})' if kernel.k_scale else factor}")
    w.lines(statements(kernel.score, tile))
    score = spell(kernel.score_value)
    if score != "score":
        w.line(f"score = {score}")
    with w.block("if run != 1"):
        bounds = [f"({j} < key_end)"] + ([f"({j} >= key_start)"] if kernel.key_start != 0 else [])
        w.line(f'score = tl.where({" & ".join(bounds)}, score, float("-inf"))')
    w.line("peak_before = peak")
    w.line("peak = tl.maximum(peak, tl.max(score, axis=1, keep_dims=True))")
    w.line('shift = tl.where(peak == float("-inf"), 0.0, peak)')
    w.line("probability = prelude.fast_exp(score - shift)")
    w.line("decay = prelude.fast_exp(peak_before - shift)")
    w.line("total = total * decay + tl.sum(probability, axis=1, keep_dims=True)")
    channel, dtype = _value_channel(kernel), dtypes[kernel.v.buffer]
    at = f"v_head + {_element(kernel.v, 'key[:, None]', f'{channel}[None, :]')}"
    rows = "prelude.inside(key[:, None], last, run == 1)"
    masks = _masked(rows, _channel_mask(channel, kernel.value_dim, "[None, :]"))
    if kernel.v_scale:
        dtype = dtypes[kernel.q.buffer]
        _print_codes(w, kernel, kernel.v, [at, *masks], "v")
        if dtype == torch.float16:  # which a probability times a scale may be too small for
            _print_scales(w, kernel.v_scale, "v", "key[:, None]", rows)
            w.line("v_block = prelude.narrow(v_block.to(tl.float32) * v_scale, tl.float16)")
        else:
            _print_scales(w, kernel.v_scale, "v", j, "col_inside")
            w.line("probability = probability * v_scale")
    else:
        w.line(call("v_block = tl.load", [at, *masks]))
    narrow = dtype if dtype in NARROW_FLOATS else torch.float32
    v = narrowed("v_block", dtype, narrow)
    w.line(f"output = prelude.dot({narrowed('probability', torch.float32, narrow)}, {v}, output * decay)")


def _print_codes(w: Writer, kernel: Attend, operand: Strided, load: Sequence[str], name: str) -> None:
    """A block of codes in the dtype of the queries, which holds them exactly."""
    arguments = ["other=0" if a.startswith("other=") else a for a in load]
    dtype = DTYPES[make_buffers(kernel.buffers)[kernel.q.buffer]]
    w.line(call(f"{name}_block = prelude.decoded(tl.load", arguments, f", {dtype})"))


def _print_scales(w: Writer, scale: Strided, name: str, position: str, mask: str) -> None:
    """The scales of a block of keys or values."""
    at = f"{name}_scale_head + {_element(scale, position, '0')}"
    w.line(call(f"{name}_scale = tl.load", [at, *_masked(mask)]))


def _store_output(w: Writer, kernel: Attend, b: sympy.Expr, h: sympy.Expr, i: str, rows: str) -> None:
    channel = _value_channel(kernel)
    at = f"{_head(kernel.out, b, h)} + {_element(kernel.out, i, f'{channel}[None, :]')}"
    dtype = make_buffers(kernel.buffers)[kernel.out.buffer]
    masks = " & ".join(m for m in (rows, _channel_mask(channel, kernel.value_dim, "[None, :]")) if m)
    stored = [at, narrowed("output", torch.float32, dtype), *([f"mask={masks}"] if masks else [])]
    w.line(call("tl.store", stored))


# ---- prefill ------------------------------------------------------------------------------------------


def _print_prefill(w: Writer, kernel: Attend) -> None:
    doc = "A program computes BLOCK_M queries of one head; the last queries, which see most keys, first."
    b, h = kernel.batch.symbol, kernel.heads.symbol
    name = f"{kernel.name}_prefill"
    with jit_function(w, kernel, [kernel.score], name, ["BLOCK_M", "BLOCK_N"], doc):
        w.line(f"tiles = tl.cdiv({indexed(kernel.queries.size)}, BLOCK_M)")
        w.line("pair = (tl.program_id(0) // tiles).to(INDEX)")
        w.lines(decode("pair", (kernel.batch, kernel.heads), {str(b), str(h)}))
        i = spell(str(kernel.queries.symbol))
        first = "(tiles - 1 - tl.program_id(0) % tiles).to(INDEX) * BLOCK_M"
        w.line(f"{i} = {first} + tl.arange(0, BLOCK_M)[:, None]")
        w.line(f"row_inside = {i} < {indexed(kernel.queries.size)}")
        _print_channels(w, kernel)
        _print_query(w, kernel, b, h)
        shared = FloorDiv(h, kernel.group) if kernel.group > 1 else h
        _print_heads(w, kernel, b, shared)
        _print_range(w, kernel, grouped=False)
        if kernel.sinks:
            w.line(f"sink = tl.load({spell(kernel.sinks)} + {spell(str(h))}).to(tl.float32)")
        _print_state(w, kernel)
        _print_keys(w, kernel, grouped=False)
        w.line("output = prelude.div(output, tl.where(total == 0, 1.0, total))")
        _store_output(w, kernel, b, h, i, "row_inside")


# ---- decode -------------------------------------------------------------------------------------------

SCRATCH = ("scratch", "peaks", "totals")


def _print_decode(w: Writer, kernel: Attend) -> None:
    doc = "A program computes all queries that share k and v, over one part of the keys."
    b, h, group = kernel.batch.symbol, kernel.heads.symbol, kernel.group
    i, queries = spell(str(kernel.queries.symbol)), kernel.queries.size
    shared = _shared_heads(kernel)
    name, blocks = f"{kernel.name}_decode", ["BLOCK_M", "BLOCK_N"]
    with jit_function(w, kernel, [kernel.score], name, blocks, doc, [*SCRATCH, "splits"]):
        w.line("split = tl.program_id(0) % splits")
        w.line("pair = (tl.program_id(0) // splits).to(INDEX)")
        w.lines(decode("pair", (kernel.batch, shared), {str(b), str(shared.symbol)}))
        w.line("row = tl.arange(0, BLOCK_M)[:, None]")
        w.line(f"row_inside = row < {indexed(group * queries)}")
        rows = own("row")
        kv = spell(str(shared.symbol))
        w.line(f"{spell(str(h))} = {indexed(own(kv) * group + FloorDiv(rows, queries))}")
        w.line(f"{i} = {indexed(Mod(rows, queries)) if queries != 1 else 'tl.zeros_like(row)'}")
        _print_channels(w, kernel)
        _print_query(w, kernel, b, h)
        _print_heads(w, kernel, b, shared.symbol)
        _print_range(w, kernel, grouped=True)
        w.line("part = tl.cdiv(tl.cdiv(last - first, splits), BLOCK_N) * BLOCK_N")
        w.line("first = first + split * part")
        w.line("last = tl.maximum(tl.minimum(first + part, last), first)")
        if kernel.sinks:
            at = f"{spell(kernel.sinks)} + {spell(str(h))}"
            w.line(f"sink = tl.load({at}, mask=row_inside, other=0.0).to(tl.float32)")
            w.line('sink = tl.where(split == 0, sink, float("-inf"))  # it joins one part')
        _print_state(w, kernel)
        _print_keys(w, kernel, grouped=True)
        with w.block("if scratch is None"):
            w.line("output = prelude.div(output, tl.where(total == 0, 1.0, total))")
            _store_output(w, kernel, b, h, i, "row_inside")
        with w.block("else"):
            _print_parts(w, kernel)


def _shared_heads(kernel: Attend) -> Axis:
    """The heads of k and v."""
    return Axis(own("shared"), FloorDiv(kernel.heads.size, kernel.group))


def _print_parts(w: Writer, kernel: Attend) -> None:
    """Write the state of a part: (pair, row, split) and, for the output, channel."""
    rows, channel = indexed(kernel.group * kernel.queries.size), _value_channel(kernel)
    w.line(f"at = (pair * ({rows}) + row) * splits + split")
    w.line("tl.store(peaks + at, peak, mask=row_inside)")
    w.line("tl.store(totals + at, total, mask=row_inside)")
    at = f"scratch + at * {_width(kernel.value_dim)} + {channel}[None, :]"
    w.line(call("tl.store", [at, "output", "mask=row_inside"]))


def _print_combine(w: Writer, kernel: Attend) -> None:
    doc = "A program combines the parts of one query of one head."
    b, h, i = kernel.batch.symbol, kernel.heads.symbol, spell(str(kernel.queries.symbol))
    queries, group, shared = kernel.queries.size, kernel.group, _shared_heads(kernel)
    name, width = f"{kernel.name}_combine", _width(kernel.value_dim)
    only_out = replace(kernel, buffers=(kernel.buffers[_out_position(kernel)],))
    with jit_function(w, only_out, [], name, ["SPLITS"], doc, [*SCRATCH, "splits"]):
        w.line("program = tl.program_id(0).to(INDEX)")
        w.line(f"pair = program // {_factor(group * queries)}")
        w.line(f"row = program % {_factor(group * queries)}")
        w.lines(decode("pair", (kernel.batch, shared), {str(b), str(shared.symbol)}))
        rows = own("row")
        w.line(f"{spell(str(h))} = {indexed(shared.symbol * group + FloorDiv(rows, queries))}")
        w.line(f"{i} = {indexed(Mod(rows, queries))}")
        w.line("split = tl.arange(0, SPLITS)[:, None]")
        w.line("inside = split < splits")
        channel = _value_channel(kernel)
        w.line(f"{channel} = tl.arange(0, {width})")
        w.line("at = program * splits + split")
        w.line('peak = tl.load(peaks + at, mask=inside, other=float("-inf"))')
        w.line("top = tl.max(peak, axis=0, keep_dims=True)")
        w.line('decay = prelude.fast_exp(peak - tl.where(top == float("-inf"), 0.0, top))')
        w.line("total = tl.load(totals + at, mask=inside, other=0.0)")
        w.line("total = tl.sum(total * decay, axis=0, keep_dims=True)")
        w.line(f"part = tl.load(scratch + at * {width} + {channel}[None, :], mask=inside, other=0.0)")
        w.line("output = tl.sum(part * decay, axis=0, keep_dims=True)")
        w.line("output = prelude.div(output, tl.where(total == 0, 1.0, total))")
        _store_output(w, kernel, b, h, i, "")


def _out_position(kernel: Attend) -> int:
    return [b.name for b in kernel.buffers].index(kernel.out.buffer)


def _factor(expr: sympy.Expr | int) -> str:
    text = indexed(sympy.sympify(expr))
    return text if sympy.sympify(expr).is_Integer else f"({text})"


# ---- the launchers ------------------------------------------------------------------------------------


def _print_extents(w: Writer, kernel: Attend) -> None:
    i, dtypes = kernel.queries.symbol, make_buffers(kernel.buffers)
    last = sympy.Min(kernel.key_end.subs(i, kernel.queries.size - 1), kernel.keys.size)
    multiplied = (kernel.k, kernel.v, *([kernel.q] if kernel.k_scale else []))
    fields = {
        "pairs": FloorDiv(kernel.batch.size * kernel.heads.size, kernel.group),
        "group": sympy.Integer(kernel.group),
        "queries": kernel.queries.size,
        "keys": sympy.Max(last - kernel.key_start.subs(i, 0), 0),
        "width": sympy.Integer(max(kernel.head_dim, kernel.value_dim)),
        "bytes": sympy.Integer(max(dtypes[s.buffer].itemsize for s in multiplied)),
        "window": bool(kernel.key_start.has(i)),
        "unpacks": dtypes[kernel.k.buffer] == torch.float8_e4m3fn,
    }
    extents_function(w, kernel.sizes, "Heads", fields)


def _print_launch(w: Writer, kernel: Attend, forms: Sequence[str]) -> None:
    """One launcher, or one for each form and one that chooses."""
    config_functions(w, forms, f"shape.group * shape.queries <= {DECODE_ROWS}")
    if len(forms) == 1:
        (_print_decode_launch if forms == ("decode",) else _print_prefill_launch)(w, kernel, "launch")
        return
    with launcher(w, LAUNCH):
        w.line('form = launch_decode if config.form == "decode" else launch_prefill')
        w.line("return form(buffers, sizes, shape, config, status)")
    _print_decode_launch(w, kernel, "launch_decode")
    _print_prefill_launch(w, kernel, "launch_prefill")


@contextmanager
def _form_launcher(w: Writer, name: str, doc: str) -> Iterator[None]:
    if name == "launch":
        with launcher(w, doc):
            yield
        return
    w.line()
    w.line()
    with w.block(f"def {name}(buffers, sizes, shape, config, status)"):
        w.line(f'"""{doc}"""')
        yield


INDEX = "INDEX=launches.index_type(buffers, 0)"


def _print_prefill_launch(w: Writer, kernel: Attend, name: str) -> None:
    with _form_launcher(w, name, "One launch on the current stream."):
        w.line('tiles = triton.cdiv(shape.queries, config["BLOCK_M"])')
        w.line("grid = (tiles * shape.pairs * shape.group,)")
        passed = [*arguments(kernel, [kernel.score]), INDEX, "**config.options()"]
        w.line(call(f"return [{kernel.name}_prefill[grid]", passed, "]"))


def _print_decode_launch(w: Writer, kernel: Attend, name: str) -> None:
    width = _width(kernel.value_dim)
    with _form_launcher(w, name, "One launch on the current stream, a second where the keys are split."):
        w.line("device = buffers[0].device")
        w.line('splits = launches.splits(shape, config["BLOCK_N"], device)')
        w.line("rows = shape.pairs * shape.group * shape.queries")
        w.line("scratch = peaks = totals = None")
        with w.block("if splits > 1"):
            w.line(f"scratch = torch.empty(rows * splits * {width}, dtype=torch.float32, device=device)")
            w.line("peaks, totals = torch.empty(2, rows * splits, dtype=torch.float32, device=device)")
        w.line(INDEX.replace("INDEX=", "index = "))
        parts = [*SCRATCH, "splits", "INDEX=index"]
        w.line("grid = (shape.pairs * splits,)")
        passed = [*arguments(kernel, [kernel.score]), *parts, "**config.options()"]
        w.line(call(f"compiled = [{kernel.name}_decode[grid]", passed, "]"))
        with w.block("if splits > 1"):
            w.line(f"options = launches.combine_config(splits, {width}).options()")
            out = [f"buffers[{_out_position(kernel)}]", *(["*sizes"] if kernel.sizes else [])]
            w.line(call(f"compiled += [{kernel.name}_combine[(rows,)]", [*out, *parts, "**options"], "]"))
        w.line("return compiled")
