"""The host code of a program: one Python function, printed, that binds sizes, allocates, launches and
returns.

def call(ids, past, weight):                                    # the inputs of the graph
    s0 = past.size(2)                                           # symbolic sizes
    arena = intermediates(4096 + s0 * 64)                       # what kernels hand to each other
    linear = empty_strided((1, 1, 32), (32, 32, 1), ...)        # what is returned or read by eager calls
    launch_0(array("Q", (ids.data_ptr(), ...)), ...)            # a run of kernels: one foreign call
    topk = extern[0](linear, 5)                                 # an Extern call
    return (linear, topk)
"""

import array
import ctypes
import linecache
import math
import os
from collections.abc import Callable, Sequence
from itertools import count
from typing import TYPE_CHECKING, Any

import sympy
import torch
from torch.fx import GraphModule, Node
from torch.utils._sympy.printers import PythonPrinter

from llmcomp import headroom
from llmcomp.allocation import empty_strided, intermediates
from llmcomp.codegen.build import Built, Source, build
from llmcomp.codegen.cache import Cache
from llmcomp.codegen.cpp_plan import Launch, Slot, render_plan
from llmcomp.codegen.index import size
from llmcomp.codegen.kernel import checks
from llmcomp.codegen.lowered import destination
from llmcomp.options import Options
from llmcomp.region import Partition, sources
from llmcomp.status import check_status, shared_status
from llmcomp.storage import Storage, assign_storage
from llmcomp.target import Target

if TYPE_CHECKING:
    from llmcomp.codegen.launcher import Launcher
    from llmcomp.program import Step

PROCESS = os.getpid()
# What the text calls its own variables; the helpers that it calls are the names of its namespace.
LOCALS = frozenset("arena threads pointers sizes kernels launch index_status".split())
_files = count()


def thread_count(asked: int | None) -> int:
    """Threads of a CPU kernel: 1 in a forked child, where OpenMP's pool of the parent is gone."""
    if os.getpid() != PROCESS:
        return 1
    return asked or torch.get_num_threads()


def host_program(
    gm: GraphModule,
    partition: Partition,
    steps: "Sequence[Step]",
    kernels: Sequence[int],
    built: Sequence[Built],
    options: Options,
    cache: Cache,
    target: Target,
) -> tuple[Callable[..., tuple[Any, ...]], str]:
    """Print and compile the host function of a program; returns it with its text."""
    storage = assign_storage(gm, partition, steps, target)
    writer = HostWriter(gm, partition, storage)
    writer.begin(steps, options, target)
    position = 0
    while position < len(steps):
        if steps[position].lowered is None:
            writer.extern(steps[position], position)
            position += 1
            continue
        end = position
        while end < len(steps) and steps[end].lowered is not None:
            end += 1
        run = list(zip(steps[position:end], kernels[position:end], strict=True))
        if target.name == "triton":
            writer.launches(run, built)
        else:
            writer.foreign_call(run, built)
        position = end
        writer.release(position - 1)
    writer.finish()
    writer.bind_plans(built, cache)
    if target.name == "triton":
        writer.namespace["launch"] = launchers(steps, kernels, built, options, cache)
    return writer.compiled()


class HostWriter:
    """Writes the host function line by line."""

    def __init__(self, gm: GraphModule, partition: Partition, storage: Storage) -> None:
        self.gm = gm
        self.partition = partition
        self.storage = storage
        self.lines: list[str] = []
        self.names: dict[Node, str] = {}
        self.bound: set[sympy.Symbol] = set()
        self.last_use: dict[Node, int] = {}
        self.plans: list[Source] = []
        self.returned = frozenset(sources(gm.graph.output_node(), partition.inlined))
        self.namespace: dict[str, Any] = {
            "torch": torch,
            "math": math,  # what sizes are computed with
            "array": array.array,
            "empty_strided": empty_strided,
            "intermediates": intermediates,
            "check_status": check_status,
            "thread_count": thread_count,
            "extern": [],
            "constant": [],
            "inf": float("inf"),
            "nan": float("nan"),
        }
        self._print = PythonPrinter().doprint

    def variable(self, node: Node) -> str:
        """The local variable of a node; names that the text uses for something else (aten.empty's) get a tail."""
        taken = node.name in self.namespace or node.name in LOCALS
        return f"{node.name}_" if taken else node.name

    def line(self, text: str) -> None:
        self.lines.append("    " + text)

    def expr(self, value: sympy.Expr) -> str:
        """An integer expression as Python."""
        unbound = value.free_symbols - self.bound
        assert not unbound, f"size symbols {unbound} are not known"
        return str(self._print(value))

    # Inputs ----------------------------------------------------------------------------------------------

    def begin(self, steps: "Sequence[Step]", options: Options, target: Target) -> None:
        """The signature, the sizes, the arena."""
        placeholders = [n for n in self.gm.graph.nodes if n.op == "placeholder"]
        for n in placeholders:
            self.names[n] = self.variable(n)
        self.lines.append(f"def call({', '.join(self.names[n] for n in placeholders)}):")
        for node in self.gm.graph.nodes:
            if node.op == "get_attr":
                self.names[node] = self._constant(_attribute(self.gm, str(node.target)))
        self._bind_sizes(placeholders)
        for position, step in enumerate(steps):
            for node in step.region.nodes:
                for source in sources(node, self.partition.inlined):
                    self.last_use[source] = position
        if self.storage.arena.offsets:
            self.line(f"arena = intermediates({self.expr(self.storage.arena.size)})")
        if target.name == "cpp" and any(s.lowered is not None for s in steps):
            self.line(f"threads = thread_count({options.threads})")
        if target.name == "triton":
            self.namespace["index_status"] = shared_status(target.device)
            self.line("index_status.check()")

    def _bind_sizes(self, placeholders: Sequence[Node]) -> None:
        for n in placeholders:
            value = n.meta.get("val")
            if isinstance(value, torch.SymInt) and isinstance(value.node.expr, sympy.Symbol):
                self._bind(value.node.expr, self.names[n])
        for n in placeholders:
            value = n.meta.get("val")
            if isinstance(value, torch.Tensor):
                self._bind_tensor(n, value)

    def _bind_tensor(self, node: Node, value: torch.Tensor) -> None:
        for method, extents in (("size", value.shape), ("stride", value.stride())):
            for d, n in enumerate(extents):
                expr = size(n)
                if isinstance(expr, sympy.Symbol) and expr not in self.bound:
                    self._bind(expr, f"{self.names[node]}.{method}({d})")

    def _bind(self, symbol: sympy.Symbol, text: str) -> None:
        if symbol not in self.bound:
            self.bound.add(symbol)
            if str(symbol) != text:
                self.line(f"{symbol} = {text}")

    # Eager calls -----------------------------------------------------------------------------------------

    def extern(self, step: "Step", position: int) -> None:
        """An eager call."""
        node = step.region.nodes[0]
        text = self._call(node)
        self.names[node] = self.variable(node)
        self.line(f"{self.names[node]} = {text}")
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor):
            self._bind_tensor(node, value)
        elif isinstance(value, torch.SymInt) and isinstance(value.node.expr, sympy.Symbol):
            self._bind(value.node.expr, self.names[node])
        self.release(position)

    def _call(self, node: Node) -> str:
        arguments = [self.argument(a) for a in node.args]
        arguments += [f"{k}={self.argument(v)}" for k, v in node.kwargs.items()]
        target = eager(node) or node.target
        name = f"extern[{len(self.namespace['extern'])}]"
        self.namespace["extern"].append(target)
        return f"{name}({', '.join(arguments)})"

    def argument(self, value: object) -> str:
        """An argument of an eager call as Python text."""
        match value:
            case Node():
                return self.tensor(value)
            case list() | tuple():
                inner = ", ".join(self.argument(v) for v in value)
                return f"[{inner}]" if isinstance(value, list) else f"({inner},)" if value else "()"
            case bool() | int() | float() | str() | None:
                return repr(value)
            case slice():
                return f"slice({self.argument(value.start)}, {self.argument(value.stop)}, {self.argument(value.step)})"
        return self._constant(value)

    def _constant(self, value: object) -> str:
        self.namespace["constant"].append(value)
        return f"constant[{len(self.namespace['constant']) - 1}]"

    def tensor(self, node: Node) -> str:
        """A node's value as Python text; an inlined node is computed by an eager call."""
        value = node.meta.get("val")
        unnamed = node not in self.names and node.op == "call_function"
        if unnamed and isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
            return self.expr(value.node.expr)
        if node in self.names:
            return self.names[node]
        target, _ = destination(node)
        if target is not node:
            return self.tensor(target)
        assert node in self.partition.inlined, f"{node.name} was never computed"
        return self._call(node)

    # Kernels ---------------------------------------------------------------------------------------------

    def allocate(self, run: "Sequence[tuple[Step, int]]") -> None:
        """Tensors of results that leave the kernels."""
        for step, _ in run:
            for node in step.region.outputs:
                if node in self.storage.tensors and node not in self.names:
                    self.names[node] = self.variable(node)
                    self.line(f"{self.names[node]} = {self._allocation(node)}")

    def _allocation(self, node: Node) -> str:
        value = node.meta["val"]
        shape, strides = self._tuple(value.shape), self._tuple(value.stride())
        dtype, device = self._constant(value.dtype), self._constant(value.device)
        what = ', what="a KV cache"' if _is_cache(node) else ""
        return f"empty_strided({shape}, {strides}, dtype={dtype}, device={device}{what})"

    def _tuple(self, values: Sequence[int | torch.SymInt]) -> str:
        inner = ", ".join(self.expr(size(v)) for v in values)
        return f"({inner},)" if values else "()"

    def foreign_call(self, run: "Sequence[tuple[Step, int]]", built: Sequence[Built]) -> None:
        """A run of C++ kernels as one call of a printed C function."""
        self.allocate(run)
        table: dict[Node, int] = {}
        launches = []
        for step, which in run:
            assert step.lowered is not None
            entries = tuple(table.setdefault(n, len(table)) for n in step.lowered.buffers)
            launches.append(Launch(built[which].source.name, which, entries, step.lowered.sizes))
        slots = [Slot(i, self.storage.arena.offsets[n]) for n, i in table.items() if n in self.storage.arena.offsets]
        used = {s for x in launches for e in x.sizes for s in e.free_symbols}
        used |= {s for x in slots for s in x.offset.free_symbols}
        symbols = tuple(sorted(used, key=str))
        number = len(self.plans)
        self.plans.append(render_plan(f"plan_{number}", launches, slots, symbols))
        pointers = ", ".join(
            "0" if n in self.storage.arena.offsets else f"{self._pointer(n)}.data_ptr()" for n in table
        )
        self.line(f'pointers = array("Q", ({pointers},))')
        values = ", ".join(str(s) for s in symbols)
        self.line(f'sizes = array("q", ({values}{"," if values else ""}))')
        arena = "arena.data_ptr()" if self.storage.arena.offsets else "0"
        self.line(
            f"check_status(plan_{number}(kernels, pointers.buffer_info()[0], sizes.buffer_info()[0], {arena}, threads))"
        )

    def bind_plans(self, built: Sequence[Built], cache: Cache) -> None:
        """Build all printed C functions as one library and make them callable by the host function."""
        if not self.plans:
            return
        head = self.plans[0].text.splitlines(keepends=True)[0]
        text = head + "".join(plan.text.removeprefix(head) for plan in self.plans)
        (library,) = build([Source(self.plans[0].name, "cpp", text)], cache)
        functions = ctypes.CDLL(str(library.path))
        for plan in self.plans:
            self.namespace[plan.name] = plan_function(functions, plan.name)
        addresses = (ctypes.c_void_p * len(built))(*(b.function() for b in built))
        self.namespace["addresses"] = addresses  # kept alive
        self.namespace["kernels"] = ctypes.addressof(addresses)

    def _pointer(self, node: Node) -> str:
        return self.names[node]

    def _bits(self, node: Node) -> str:
        """A tensor as Triton takes it: the bits of a float8, since not every GPU knows the type."""
        bits = ".view(torch.uint8)" if node.meta["val"].dtype == torch.float8_e4m3fn else ""
        return f"{self._pointer(node)}{bits}"

    def launches(self, run: "Sequence[tuple[Step, int]]", built: Sequence[Built]) -> None:
        """A run of Triton kernels, launched one by one."""
        self.allocate(run)
        for step, which in run:
            assert step.lowered is not None
            buffers = ", ".join(self._bits(n) for n in step.lowered.buffers)
            extents = ", ".join(self.expr(e) for e in step.lowered.sizes)
            status = ", index_status.word" if checks(step.lowered.kernel) else ""
            self.line(f"launch[{which}]([{buffers}], [{extents}]{status})  # {built[which].source.name}")

    # End -------------------------------------------------------------------------------------------------

    def release(self, position: int) -> None:
        """Drop tensors that nobody reads after step `position`."""
        dead = [
            n
            for n in self.names
            if n.op == "call_function" and self.last_use.get(n, position) <= position and n not in self.returned
            and self.names[n] == self.variable(n)
        ]  # fmt: skip
        if dead:
            self.line("del " + ", ".join(self.names[n] for n in dead))
        for n in dead:
            del self.names[n]

    def finish(self) -> None:
        """The return statement."""
        results = self.gm.graph.output_node().args[0]
        items = results if isinstance(results, list | tuple) else (results,)
        self.line(f"return ({''.join(self.argument(r) + ', ' for r in items)})")

    def compiled(self) -> tuple[Callable[..., tuple[Any, ...]], str]:
        """The host function and its text, which tracebacks and debuggers can show."""
        text = "\n".join(self.lines) + "\n"
        name = f"<llmcomp host program {next(_files)}>"
        exec(compile(text, name, "exec"), self.namespace)
        linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
        return self.namespace["call"], text


def _is_cache(node: Node) -> bool:
    """Whether a result is the memory of a cache of fixed size, which the same graph writes into."""
    write = torch.ops.llmcomp.cache_write_.default
    return any(user.target is write and user.args[0] is node for user in node.users)


def plan_function(library: ctypes.CDLL, name: str) -> Callable[..., int]:
    """A printed C function (`codegen/cpp_plan.py`) of a loaded library."""
    function = library[name]
    function.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_int64]
    function.restype = ctypes.c_int64
    return function


def launchers(
    steps: "Sequence[Step]", kernels: Sequence[int], built: Sequence[Built], options: Options, cache: Cache
) -> "dict[int, Launcher]":
    """The launcher of each Triton kernel, by its number."""
    from llmcomp.codegen.launcher import Launcher, Tuner

    tuner = Tuner(cache, options.tune_seconds)
    described = {which: s.lowered.kernel for s, which in zip(steps, kernels, strict=True) if s.lowered is not None}
    return {
        which: Launcher(
            built[which].source,
            built[which].module(),
            [i for i, b in enumerate(kernel.buffers) if b.written],
            tuner,
        )
        for which, kernel in described.items()
    }


def _attribute(gm: GraphModule, path: str) -> Any:
    value: Any = gm
    for part in path.split("."):
        value = getattr(value, part)
    return value


def eager(node: Node) -> Callable[..., Any] | None:
    """The function that a program calls for one of our operators in place of its reference, if there is one."""
    ops = torch.ops.llmcomp
    if node.target is ops.linear.default:
        return _library_matrix if node.args[3] else _library_linear
    return {ops.cache_grow.default: headroom.grow, ops.cache_room.default: headroom.room}.get(node.target)  # type: ignore[call-overload, no-any-return]


def _library_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, kn: bool) -> torch.Tensor:
    return torch.ops.aten.linear.default(x, weight, bias)  # type: ignore[no-any-return]


def _library_matrix(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, kn: bool) -> torch.Tensor:
    product = torch.matmul(x, weight)
    return product if bias is None else product.add_(bias)
