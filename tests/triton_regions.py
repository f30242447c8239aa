"""Every region of a model's graphs computed twice: by eager operators, and by its Triton kernel.

    regions = Regions(calls=3)
    model.compile(backend=regions.backend)
    model(**inputs)                        gives eager numbers; regions.kernels: each distinct kernel, and complaints

The graphs are those of the Triton target on an H100: they are captured on the CPU and no GPU is asked. A graph runs
region by region, in the order of its program. Where `interpret` is set, the kernel of a region gets copies of what the
region reads, under Triton's interpreter, and has to write what the eager nodes of the region give.
"""

import hashlib
import math
import traceback
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.fx import GraphModule, Node, map_arg
from torch.utils._pytree import tree_map

from llmcomp import compat
from llmcomp.capture import capture_graph
from llmcomp.codegen.assemble import Assembly, Launch, assemble_launch, record
from llmcomp.codegen.build import Source
from llmcomp.codegen.fit import Lowerer
from llmcomp.codegen.index import size
from llmcomp.codegen.kernel import Contract, Kernel, Weight
from llmcomp.codegen.launch import REGISTERS
from llmcomp.codegen.lowered import Lowered, destination
from llmcomp.errors import BuildError
from llmcomp.passes import pipeline
from llmcomp.passes.base import run_passes
from llmcomp.passes.facts import SHAPES
from llmcomp.passes.partition import read_partition
from llmcomp.program import Step, lower_steps, render_all
from llmcomp.region import Partition
from llmcomp.target import H100
from llmcomp.verify import difference
from tests.numerics import assert_equal_float32
from tests.triton_kernels import load

NARROW = (torch.bfloat16, torch.float16)
WIDEST = 16  # bytes of the widest load of a GPU thread


@dataclass
class Distinct:
    """A kernel that occurs in some graph: its source, the sizes of the calls seen, and the first complaint."""

    kernel: Kernel
    source: Source
    sizes: list[tuple[int, ...]] = field(default_factory=list)
    verdict: str = "ok"  # or wrong (another result than eager's), or error (it did not run)
    detail: str = ""

    def complain(self, verdict: str, detail: str) -> None:
        """Note the first complaint."""
        if self.verdict == "ok":
            self.verdict, self.detail = verdict, " ".join(detail.split())[-600:]


def key_of(source: Source) -> str:
    """The name of a kernel among those of all models: equal text, equal kernel."""
    return f"{source.name}_{hashlib.sha256(source.text.encode()).hexdigest()[:12]}"


class Regions:
    """A backend that executes regions and collects their kernels; `known` names those that are not looked at again."""

    def __init__(self, calls: int, interpret: bool = True, known: Set[str] = frozenset()) -> None:
        self.calls = calls
        self.interpret = interpret
        self.known = known
        self.kernels: dict[str, Distinct] = {}
        self.met: set[str] = set()

    def backend(self, gm: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        """What Dynamo calls."""
        return capture_graph(gm, inputs, self.compile)

    def compile(self, gm: GraphModule, fake_inputs: Sequence[Any]) -> Callable[..., tuple[Any, ...]]:
        """Passes, partition and lowering as the backend does them; eager execution."""
        with compat.real_tensors():
            lowerer = Lowerer()
            run_passes(gm, pipeline(H100, lowerer.fits), frozenset({SHAPES}))
            partition = read_partition(gm.graph)
            steps = lower_steps(partition, lowerer)
            sources, which = render_all(steps, H100)
        found = [sources[w] if w >= 0 else None for w in which]
        return lambda *flat: _Run(gm, partition, flat).run(steps, found, self.see)

    def see(self, lowered: Lowered, source: Source, sizes: tuple[int, ...], check: Callable[[Source], None]) -> None:
        """A kernel is called: check it, unless it has been seen often enough."""
        key = key_of(source)
        self.met.add(key)
        if key in self.known:
            return
        kernel = self.kernels.setdefault(key, Distinct(lowered.kernel, source))
        if sizes in kernel.sizes or len(kernel.sizes) >= self.calls:
            return
        kernel.sizes.append(sizes)
        if not self.interpret:
            return
        try:
            check(source)
        except AssertionError as error:
            kernel.complain("wrong", f"sizes {sizes}: {error}")
        except Exception:
            kernel.complain("error", f"sizes {sizes}: {traceback.format_exc()}")


See = Callable[[Lowered, Source, tuple[int, ...], Callable[[Source], None]], None]
Values = dict[Node, Any]


class _Run:
    """One call of a graph, region by region."""

    def __init__(self, gm: GraphModule, partition: Partition, inputs: Sequence[Any]) -> None:
        self.gm, self.partition = gm, partition
        self.values: Values = {}
        self.symbols: dict[sympy.Symbol, int] = {}
        for node, value in zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=True):
            self.bind(node, value)
        for node in gm.graph.find_nodes(op="get_attr"):
            self.bind(node, _attribute(gm, str(node.target)))

    def run(self, steps: Sequence[Step], sources: Sequence[Source | None], see: See) -> tuple[Any, ...]:
        """The results; `see` is called for every kernel, before its region is executed."""
        for step, source in zip(steps, sources, strict=True):
            if step.lowered is not None and source is not None:
                sizes = tuple(self.number(e) for e in step.lowered.sizes)
                see(step.lowered, source, sizes, lambda text, s=step, n=sizes: self.check(s, text, n))
            computed = self.compute(step, self.values)
            for node in step.region.outputs or step.region.nodes:
                self.bind(node, self.stored(node, computed) if step.lowered is not None else computed[node])
        results = self.gm.graph.output_node().args[0]
        return tuple(map_arg(results, lambda n: self.read(n, self.values, {})))

    def bind(self, node: Node, value: Any) -> None:
        """A value, and the sizes that are known from it."""
        self.values[node] = value
        expected = node.meta.get("val")
        if isinstance(expected, torch.SymInt):
            self._learn(expected, value)
        elif isinstance(expected, Tensor):
            for n, found in zip((*expected.shape, *expected.stride()), (*value.shape, *value.stride()), strict=True):
                self._learn(n, found)

    def _learn(self, n: int | torch.SymInt, found: int) -> None:
        if isinstance(size(n), sympy.Symbol):
            self.symbols.setdefault(size(n), int(found))

    def number(self, expr: sympy.Expr | int | torch.SymInt) -> int:
        """A size in this call."""
        return int((expr if isinstance(expr, sympy.Expr) else size(expr)).xreplace(self.symbols))

    def read(self, node: Node, boundary: Values, local: Values, change: Callable[[Any], Any] = lambda v: v) -> Any:
        """The value of a node: stored, or computed here (`local`), or inlined."""
        if node in local:
            return local[node]
        if node in boundary:
            return boundary[node]
        target, _ = destination(node)
        if target is not node:
            return self.read(target, boundary, local, change)
        assert node in self.partition.inlined or isinstance(node.meta.get("val"), torch.SymInt), f"{node} not computed"
        local[node] = self.call(node, boundary, local, change)
        return local[node]

    def call(self, node: Node, boundary: Values, local: Values, change: Callable[[Any], Any] = lambda v: v) -> Any:
        """Execute a node; `change` is applied to its arguments and to its result."""
        args, kwargs = map_arg((node.args, node.kwargs), lambda n: self.read(n, boundary, local, change))
        args, kwargs = tree_map(change, (list(args), dict(kwargs)))
        assert callable(node.target)
        return tree_map(change, node.target(*args, **kwargs))

    def compute(self, step: Step, boundary: Values, change: Callable[[Any], Any] = lambda v: v) -> Values:
        """The values of the nodes of a region."""
        local: Values = {}
        for node in step.region.nodes:
            local[node] = self.call(node, boundary, local, change)
        return local

    def stored(self, node: Node, computed: Values) -> Any:
        """A result as its kernel leaves it: in the layout that the graph promises."""
        target, _ = destination(node)
        if target is not node:
            return self.values[target]
        return self.fresh(node).copy_(computed[node])

    def fresh(self, node: Node) -> Tensor:
        """Memory for a result, full of what no kernel should leave there."""
        value = node.meta["val"]
        shape, strides = ([self.number(n) for n in v] for v in (value.shape, value.stride()))
        out = torch.empty_strided(shape, strides, dtype=value.dtype)
        return out.fill_(float("nan") if value.dtype.is_floating_point else 77)

    def check(self, step: Step, source: Source, sizes: tuple[int, ...]) -> None:
        """Run the kernel of a region on copies, and compare what it writes."""
        assert step.lowered is not None
        nodes, kernel = step.lowered.buffers, step.lowered.kernel
        outputs = {o for o in step.region.outputs if destination(o)[0] is o}
        buffers = [self.fresh(n) if n in outputs else copied(self.values[n]) for n in nodes]
        status = torch.zeros(1, dtype=torch.int32)
        load(source).launch(buffers, sizes, status=status)
        assert not status.item(), "an index was found to be out of range"
        eager, exact = self.measure(step, lambda v: v), self.measure(step, _single)
        for node, buffer, found in zip(nodes, kernel.buffers, buffers, strict=True):
            if buffer.written:
                compare(f"{buffer.name} ({node.name})", found, eager[node], exact[node])

    def measure(self, step: Step, change: Callable[[Any], Any]) -> Values:
        """What the nodes of a region give, and what they leave in memory that they write, on copies."""
        effects = [destination(o)[0] for o in step.region.outputs if destination(o)[0] is not o]
        boundary = {n: change(copied(v)) if n in effects else v for n, v in self.values.items()}
        local = self.compute(step, boundary, change)
        return {**local, **{n: boundary[n] for n in effects}}


def _attribute(gm: GraphModule, path: str) -> Any:
    value: Any = gm
    for part in path.split("."):
        value = getattr(value, part)
    return value


def copied(value: Tensor) -> Tensor:
    """A copy with the same strides."""
    elements = 1 + sum((n - 1) * s for n, s in zip(value.shape, value.stride(), strict=True)) if value.numel() else 0
    flat = value.as_strided((elements,), (1,), value.storage_offset()).clone()
    return flat.as_strided(value.shape, value.stride(), 0)


def _single(value: Any) -> Any:
    """Narrow floats in single precision, where the error of a result in 16 bits is easily seen."""
    if isinstance(value, Tensor):
        return value.float() if value.dtype in NARROW else value
    return torch.float32 if value in NARROW else value


def compare(name: str, found: Tensor, eager: Tensor, exact: Tensor) -> None:
    """Fail unless a result is as right as eager's."""
    complaint = difference(found, eager, exact)
    if complaint is not None and found.dtype == torch.float32:
        finite = eager.isfinite()
        assert torch.equal(found[~finite].nan_to_num(), eager[~finite].nan_to_num()), f"{name}: {complaint}"
        assert_equal_float32(found[finite], eager[finite])
    else:
        assert complaint is None, f"{name}: {complaint}"


# ---- what the assembler makes of a kernel ---------------------------------------------------------------


def assembled_verdict(
    source: Source, dtypes: Sequence[torch.dtype], sizes: Sequence[Sequence[int]], capability: int, wanted: int
) -> tuple[str, str]:
    """The verdict on the launches of a kernel for all `sizes`, and what is wrong: ok, error, spills or narrow.

    `wanted` is the bytes of the narrowest load of a weight in a launch of few rows.
    """
    module = load(source)
    try:
        found = [one for n in sizes for one in assemblies(module, dtypes, n, capability)]
    except BuildError as error:
        return "error", str(error)[:600]
    for one in found:
        if one.spills:
            return "spills", str(one)
        if 0 < one.narrowest_streamed_load < wanted:
            return "narrow", f"{one}; weights in pieces of {one.narrowest_streamed_load} bytes, not {wanted}"
    return "ok", ""


def assemblies(
    module: ModuleType, dtypes: Sequence[torch.dtype], sizes: Sequence[int], capability: int
) -> list[Assembly]:
    """The launches of a kernel for `sizes`, compiled as a launcher has them compiled; nothing runs."""
    buffers = [torch.empty(64, dtype=d, device="meta") for d in dtypes]
    status = torch.empty(1, dtype=torch.int32, device="meta")
    found: list[Assembly] = []
    for registers in REGISTERS:
        config = replace(module.default(sizes), registers=registers)
        found = [_assembled(one, capability) for one in record(module, buffers, sizes, config, status)]
        if not any(one.spills for one in found):
            break
    return found


def _assembled(launch: Launch, capability: int) -> Assembly:
    """As `assemble_launch`, with memory."""
    key = repr((launch.function.__name__, launch.signature, launch.constants, launch.options, capability))
    memory: dict[str, Assembly] = launch.function.__dict__.setdefault("assemblies", {})
    if key not in memory:
        memory[key] = assemble_launch(launch, capability)
    return memory[key]


def load_bytes_wanted(kernel: Kernel) -> int:
    """Bytes of the narrowest load of a weight in a launch of few rows: 16 where the weights lie so, else less.

    0 for kernels without weights.
    """
    if not isinstance(kernel, Contract):
        return 0
    sizes = {b.name: b.dtype.itemsize for b in kernel.buffers}
    weights = [a.weight for s in kernel.sections for a in s.accumulators]
    return min(min(WIDEST, _aligned(w, kernel) * sizes[w.buffer]) for w in weights)


def _aligned(weight: Weight, kernel: Contract) -> int:
    """The largest power of two, up to 16, that divides where runs of a weight start and how long they are."""
    run = list(_runs(weight, kernel))
    if not all(e.is_Integer for e in run):
        return 1
    together = math.gcd(*(int(e) for e in run), WIDEST)
    return together & -together


def _runs(weight: Weight, kernel: Contract) -> Iterator[sympy.Expr]:
    along = weight.k_stride == 1
    yield from (weight.offset, weight.expert_stride, weight.row_stride if along else weight.k_stride)
    if along:
        yield kernel.depth.size
    else:
        yield from (a.size for s in kernel.sections for a in s.axes[-1:])
