"""Attend -> C++: the algorithm is in attend.h; printed are the operands, the visible keys and the score body.

The exported function decides on a team; each thread takes its share of (batch, head of keys, tile of query rows,
part of the keys). What a kernel has of its own goes into small functions that attend.h calls in its loops.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property

import sympy
import torch

from llmcomp.codegen.build import Source
from llmcomp.codegen.cpp_body import Scope, Writer, checks, loop, make_scope, parameter
from llmcomp.codegen.cpp_expr import MEMORY_TYPES, constant, index
from llmcomp.codegen.cpp_parts import function_head, positive_sizes, print_span, unused
from llmcomp.codegen.kernel import Attend, Buffer, Compute, Index, Statement, Store, Strided, inputs, needed

OPERANDS = (torch.float32, torch.bfloat16, torch.float16)
CODES = (torch.int8, torch.float8_e4m3fn)


def render_attend(kernel: Attend, comment: Sequence[str] = ()) -> Source:
    """The C++ source of `kernel`; `comment` names the graph nodes that it computes.

    Raises ValueError where q, k and v have different dtypes, or one that is not float32, bfloat16 or float16, and k and
    v do not hold codes with scales either.
    """
    return Source(kernel.name, "cpp", _Printer(without_limits(kernel)).text(), tuple(comment))


@dataclass(frozen=True)
class Locals:
    """Names of the printer's own variables; one that the kernel uses too gets an underscore."""

    attention: str = "attention"
    memory: str = "memory"
    team: str = "team"
    scores: str = "scores"
    first: str = "first"
    stop: str = "stop"
    key_start: str = "key_start"
    key_end: str = "key_end"
    judge: str = "judge"
    mask: str = "mask"
    flags: str = "flags"
    sink: str = "sink"

    @staticmethod
    def avoiding(taken: frozenset[str]) -> "Locals":
        """The names, other than those taken."""
        return Locals(*(unused(f.name, taken) for f in fields(Locals)))


class _Printer:
    """Prints one kernel."""

    def __init__(self, kernel: Attend) -> None:
        self.kernel = kernel
        self.names = Locals.avoiding(names_of(kernel))
        self.dtypes = {b.name: b.dtype for b in kernel.buffers}
        self.failing = checks([kernel.score], self.scope)
        q, *kv = (self.dtypes[o.buffer] for o in (kernel.q, kernel.k, kernel.v))
        coded = None not in (kernel.k_scale, kernel.v_scale) and kv[0] in CODES
        if q not in OPERANDS or kv[0] != kv[1] or not (coded or kv[0] == q):
            raise ValueError(f"expected q, k and v of one dtype out of {OPERANDS}, found {[q, *kv]}")

    @cached_property
    def scope(self) -> Scope:
        scores = Buffer(self.names.scores, torch.float32, written=True)
        flags = Buffer(self.names.flags, torch.bool, written=True)
        return make_scope([*self.kernel.buffers, scores, flags], [self.kernel.score], {"score": torch.float32})

    @property
    def arguments(self) -> list[str]:
        return [*map(parameter, self.kernel.buffers), *(f"int64_t {s}" for s in self.kernel.sizes)]

    @property
    def type(self) -> str:
        """The instance of attend::Attention."""
        k = self.kernel
        direct = k.k.strides[3] == 1 and k.v.strides[3] == 1
        types = [MEMORY_TYPES[self.dtypes[o.buffer]] for o in (k.q, k.k, k.out)]
        numbers = [str(n) for n in (k.group, k.head_dim, k.value_dim)]
        return f"attend::Attention<{', '.join([*types, *numbers, 'true' if direct else 'false'])}>"

    def text(self) -> str:
        w = Writer()
        w.line('#include "attend.h"')
        w.line()
        self.print_part(w)
        w.line()
        self.print_entry(w)
        return w.text()

    def print_entry(self, w: Writer) -> None:
        """The exported function: describes the operands, decides on a team, and runs the part in its threads."""
        k, v = self.kernel, self.names
        head = [*self.arguments, "int64_t threads", "int64_t* status"]
        passed = [*(b.name for b in k.buffers), *map(str, k.sizes)]
        passed += [v.attention, f"{v.memory}.aligned()", v.team, "status"]
        part = f"{k.name}_part({', '.join(passed)});"
        with w.block(function_head(f'extern "C" void {k.name}', head)):
            sizes = (k.batch.size, k.heads.size, k.queries.size)
            w.line(f"if ({' || '.join(f'{index(s)} <= 0' for s in sizes if not s.is_positive)}) return;")
            if all(s.is_positive for s in sizes):
                w.printed.pop()
            for size in positive_sizes([k.score]):
                w.line(f"if ({index(size)} <= 0) return op::report(status, 1);  // nothing to index")
            heads = sympy.sympify(k.heads.size) / k.group
            with w.block(f"const {self.type} {v.attention} ="):
                w.line(f"{index(k.batch.size)}, {index(heads)}, {index(k.queries.size)}, {index(k.keys.size)},")
                w.lines(f"{self.operand(o)}," for o in (k.q, k.k, k.v, k.out))
                w.line(f"{constant(k.scale, torch.float32)},")
                w.lines(f"{self.operand(o)}," for o in (k.k_scale, k.v_scale) if o is not None)
            w.printed[-1] += ";"
            arguments = f"threads, {v.attention}.items(), {v.attention}.effort()"
            w.line(f"const int64_t {v.team} = op::team({arguments});")
            w.line(f"const work::Memory {v.memory}({v.attention}.bytes({v.team}));")
            w.line(f"if ({v.team} == 1) return {part}")
            w.line(f"#pragma omp parallel num_threads({v.team})")
            w.line(part)

    def operand(self, o: Strided) -> str:
        """The start of an operand and its strides."""
        start = o.buffer if o.offset == 0 else f"{o.buffer} + {index(o.offset)}"
        return f"{{{', '.join([start, *(index(s) for s in o.strides)])}}}"

    def print_part(self, w: Writer) -> None:
        """What one thread does."""
        k, v = self.kernel, self.names
        head = [*self.arguments, f"const {self.type}& {v.attention}"]
        head += [f"char* {v.memory}", f"int64_t {v.team}", "int64_t* status"]
        with w.block(function_head(f"static void {k.name}_part", head)):
            if self.failing:
                w.line("int64_t failed = 0;")
            query = f"int64_t {k.queries.symbol}"
            for name, key in ((v.key_start, k.key_start), (v.key_end, k.key_end)):
                w.line(f"const auto {name} = [&]({query}) -> int64_t {{ return {index(key)}; }};")
            passed = [v.memory, v.team, v.key_start, v.key_end, self.print_judge(w), self.print_sink(w)]
            passed.append(self.print_visible(w))
            w.line(f"{v.attention}.run({', '.join(passed)});")
            if self.failing:
                w.line("op::report(status, failed);")

    def print_judge(self, w: Writer) -> str:
        """The function of the score body over a run of keys; returns its name."""
        k, v = self.kernel, self.names
        if k.score_value == "score":
            return "attend::Plain()"
        j = k.keys.symbol
        at = [f"int64_t {a.symbol}" for a in (k.batch, k.heads, k.queries)]
        arguments = ", ".join([f"float* {v.scores}", *at, f"int64_t {v.first}", f"int64_t {v.stop}"])
        body = (*k.score, Store(v.scores, j - _symbol(v.first), k.score_value))
        with w.block(f"const auto {v.judge} = [&]({arguments})"):
            seeds = {"score": f"{v.scores}[{j} - {v.first}]"}
            print_span(w, body, k.keys, self.scope, seeds, loop(j, v.stop, v.first))
        w.printed[-1] += ";"
        return v.judge

    def print_visible(self, w: Writer) -> str:
        """The function that looks a run of keys up in the mask; returns what attend.h is given."""
        k, v = self.kernel, self.names
        if k.visible is None:
            return "attend::Plain()"
        j, body = k.keys.symbol, needed(k.score, k.visible)
        body = (*body, Store(v.flags, j - _symbol(v.first), k.visible))
        at = [f"int64_t {a.symbol}" for a in (k.batch, k.heads, k.queries)]
        arguments = ", ".join([f"uint8_t* {v.flags}", *at, f"int64_t {v.first}", f"int64_t {v.stop}"])
        with w.block(f"const auto {v.mask} = [&]({arguments})"):
            print_span(w, body, k.keys, self.scope, {}, loop(j, v.stop, v.first))
        w.printed[-1] += ";"
        by_head = any(str(k.heads.symbol) in inputs(s) for s in body)
        return f"attend::masked<{'true' if by_head else 'false'}>({v.mask})"

    def print_sink(self, w: Writer) -> str:
        """The function that gives the sink of a head; returns its name."""
        k, v = self.kernel, self.names
        if k.sinks is None:
            return "attend::Plain()"
        h = k.heads.symbol
        w.line(f"const auto {v.sink} = [&](int64_t {h}) -> float {{ return {k.sinks}[{h}]; }};")
        return v.sink


def names_of(kernel: Attend) -> frozenset[str]:
    """Every name that a kernel gives to something."""
    axes = (kernel.batch, kernel.heads, kernel.queries, kernel.keys)
    values = {s.out for s in kernel.score if not isinstance(s, Store)}
    others = {*(a.symbol for a in axes), *kernel.sizes, *(b.name for b in kernel.buffers)}
    return frozenset({"score"} | values | {str(name) for name in others})


def _symbol(name: str) -> sympy.Symbol:
    return sympy.Symbol(name, integer=True, nonnegative=True)


# ---- limits ----------------------------------------------------------------------------------------------------------


def without_limits(kernel: Attend) -> Attend:
    """where(j <= i + offset, score, -inf) -> score, where `key_start` and `key_end` say as much.

    attend.h visits the keys between them and no others, row by row.
    """
    conditions = {s.out: s for s in kernel.score if isinstance(s, Compute)}
    distances = {s.out: s.expr for s in kernel.score if isinstance(s, Index)}
    renamed: dict[str, str] = {}
    body: list[Statement] = []
    for s in kernel.score:
        given = _renamed(s, renamed)
        if isinstance(given, Compute) and given.op == "where" and given.args[2] == float("-inf"):
            condition, value = conditions.get(str(given.args[0])), given.args[1]
            if condition and isinstance(value, str) and _implied(kernel, condition, distances):
                renamed[given.out] = value
                continue
        body.append(given)
    result = renamed.get(kernel.score_value, kernel.score_value)
    kept = needed(body, result)
    visible = kernel.visible if kernel.visible in {s.out for s in kept if not isinstance(s, Store)} else None
    return replace(kernel, score=kept, score_value=result, visible=visible)


def _renamed(s: Statement, names: dict[str, str]) -> Statement:
    if isinstance(s, Compute):
        return replace(s, args=tuple(names.get(a, a) if isinstance(a, str) else a for a in s.args))
    return s


def _implied(kernel: Attend, condition: Compute, distances: dict[str, sympy.Expr]) -> bool:
    """Whether key_start <= j < key_end makes a condition on a distance from j true."""
    distance, bound = condition.args if len(condition.args) == 2 else (None, None)
    if distance not in distances or not isinstance(bound, int):
        return False
    rest = sympy.expand(distances[str(distance)] - kernel.keys.symbol)
    if kernel.keys.symbol in rest.free_symbols:
        return False
    ends = kernel.key_end.args if isinstance(kernel.key_end, sympy.Min) else (kernel.key_end,)
    starts = kernel.key_start.args if isinstance(kernel.key_start, sympy.Max) else (kernel.key_start,)
    match condition.op:
        case "le":
            return any(sympy.expand(end - 1 + rest - bound).is_nonpositive for end in ends)
        case "lt":
            return any(sympy.expand(end - 1 + rest - bound).is_negative for end in ends)
        case "gt":
            return any(sympy.expand(start + rest - bound).is_positive for start in starts)
        case "ge":
            return any(sympy.expand(start + rest - bound).is_nonnegative for start in starts)
    return False
