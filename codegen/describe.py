"""A kernel description as text: what reports, dumps and tests show."""

from collections.abc import Iterator, Sequence

from llmcomp.codegen import kernel as K


def describe(kernel: K.Kernel) -> str:
    """A kernel as indented text, one statement per line."""
    return "\n".join(_lines(kernel)) + "\n"


def _lines(kernel: K.Kernel) -> Iterator[str]:
    yield f"{type(kernel).__name__.lower()} {kernel.name}({', '.join(map(_buffer, kernel.buffers))})"
    match kernel:
        case K.Map():
            yield f"  for {_axes(kernel.axes)}"
            yield from _body(kernel.body, "    ")
        case K.Rows():
            yield f"  for {_axes(kernel.axes)}; along {_axes([kernel.inner])}"
            yield from _body(kernel.body, "    ")
        case K.Contract():
            yield f"  operand {_axes([kernel.rows, kernel.depth])} = {kernel.operand_value}"
            yield from _body(kernel.operand, "    ")
            for section in kernel.sections:
                yield f"  section {_axes(section.axes)}"
                for a in section.accumulators:
                    yield f"    {a.name} = operand . {a.weight.buffer}[row {a.row}]"
                yield from _body(section.epilogue, "    ")
        case K.Attend():
            axes = _axes([kernel.batch, kernel.heads, kernel.queries, kernel.keys])
            yield f"  for {axes}; {kernel.group} query heads a key head; head {kernel.head_dim}, {kernel.value_dim}"
            yield f"  keys from {kernel.key_start} to {kernel.key_end}; scale {kernel.scale:.6g}"
            yield from _body(kernel.score, "    ")
            hidden = "" if kernel.visible is None else f", hidden where not {kernel.visible}"
            yield f"  score = {kernel.score_value}{hidden}"


def _buffer(buffer: K.Buffer) -> str:
    return f"{buffer.name}: {str(buffer.dtype).split('.')[-1]}{' out' if buffer.written else ''}"


def _axes(axes: Sequence[K.Axis]) -> str:
    return ", ".join(f"{a.symbol} < {a.size}" for a in axes)


def _body(body: K.Body, indent: str) -> Iterator[str]:
    for statement in body:
        yield indent + _statement(statement)


def _statement(s: K.Statement) -> str:
    where = f" if {s.mask}" if isinstance(s, K.Load | K.Store | K.Check) and s.mask else ""
    match s:
        case K.Load():
            return f"{s.out} = {s.buffer}[{s.index}]{where}"
        case K.Store():
            return f"{s.buffer}[{s.index}] = {s.value}{where}"
        case K.Index():
            return f"{s.out} = {s.expr}"
        case K.Check():
            return f"{s.out} = {s.value} checked below {s.size}{where}"
        case K.Reduce():
            return f"{s.out} = {s.op} of {s.value}"
        case K.Compute():
            return f"{s.out} = {s.op}({', '.join(map(str, s.args))})"
