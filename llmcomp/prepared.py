"""What a graph computes of weights alone is computed once: a program in two parts, and what it falls back to.

    pieces   weights -> smaller or compressed weights        when a weight has changed
    main     inputs, results of the pieces -> outputs        in every call
    dense    inputs -> outputs                               where weights no longer have the zeros that main relies on

Results of pieces belong to the weights that they are made of: all programs that want the same share one, which lives as
long as the weight. Changes are noticed by torch's version counters, as in llmcomp/reuse.py; a weight that changes from
call to call is left to the dense program.
"""

import copy
import logging
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, GraphModule, Node
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from llmcomp.formats import parse_format
from llmcomp.graph import text, val
from llmcomp.pairs import NotSparse
from llmcomp.passes.compress import share_of_coded_zeros
from llmcomp.passes.prune import FACTS
from llmcomp.passes.zero_structure import PREPARED, Zero, is_mask, share_of_zeros
from llmcomp.report import Program

log = logging.getLogger("llmcomp")

STORE = "_llmcomp_prepared"
RESTLESS = 3  # changes in a row, each after fewer than two calls: after them weights are taken to be trained
MODELS = 4  # whose results are remembered by a program at the same time
FEWEST_ZEROS, MANY_ZEROS = 0.01, 0.4


@dataclass(frozen=True)
class Piece:
    """Something computed of the inputs at `positions`; `key` is equal for pieces that compute the same."""

    gm: GraphModule
    positions: tuple[int, ...]
    key: str


@dataclass(frozen=True)
class Check:
    """A piece that has to be zero where `where` is true along `dim`; (E, size) says it for each matrix of experts."""

    piece: Piece
    dim: int
    where: Tensor


@dataclass(frozen=True)
class Split:
    """A graph in parts: `main` takes the inputs of the graph and the results of `pieces`, in order."""

    main: GraphModule
    pieces: tuple[Piece, ...]
    checks: tuple[Check, ...]


def weights_of(gm: GraphModule, inputs: Sequence[Any]) -> dict[str, Tensor]:
    """The real values of the parameters and buffers of a captured graph, by the names of their placeholders.

    `inputs` are those of the Dynamo graph. Empty where they can't be told apart, or hold hardly any zeros.
    """
    placeholders = gm.graph.find_nodes(op="placeholder")
    flat = [part for x in inputs for part in parts_of(x)]
    if len(flat) != len(placeholders) or gm.meta.get("kind") != "inference":
        return {}
    found = {}
    for node, value in zip(placeholders, flat, strict=True):
        if not node.meta.get("static") or not isinstance(value, Tensor):
            continue
        if value.shape != val(node).shape or value.dtype != val(node).dtype or not _readable(value):
            return {}
        found[node.name] = value
    return found if any(map(_holds_zeros, found.values())) or _has_coded_zeros(gm, found) else {}


def _holds_zeros(value: Tensor) -> bool:
    """Whether a tensor is a matrix with zeros, or those of experts, or a mask."""
    if value.is_floating_point():
        return 2 <= value.dim() <= 3 and share_of_zeros(value) > FEWEST_ZEROS
    return 1 <= value.dim() <= 2 and is_mask(value) and bool(value.any())


def _has_coded_zeros(gm: GraphModule, found: Mapping[str, Tensor]) -> bool:
    """Whether the codes of some quantized matrix are mostly those of zeros; a few are, whatever it was made of."""
    for node in gm.graph.find_nodes(op="call_function", target=torch.ops.llmcomp.dequantize.default):
        codes, scale, zero = (found.get(n.name) if isinstance(n, Node) else None for n in node.args[:3])
        form = parse_format(node.args[3])
        if codes is None or scale is None or codes.dim() != 2 or form.two_four:
            continue
        if share_of_coded_zeros(form, codes, scale, zero) > MANY_ZEROS:
            return True
    return False


def _readable(value: Tensor) -> bool:
    """Whether a tensor has values, and counts its changes."""
    return not (isinstance(value, FakeTensor) or value.is_meta or value.is_inference())


def parts_of(value: Any) -> list[Any]:
    """The plain tensors of a tensor, as AOTAutograd hands them to a graph."""
    if not isinstance(value, Tensor) or not is_traceable_wrapper_subclass(value):
        return [value]
    return [part for name in value.__tensor_flatten__()[0] for part in parts_of(getattr(value, name))]


def snapshot(gm: GraphModule) -> GraphModule:
    """A copy of a graph; constants are shared."""
    made = GraphModule(gm, copy.deepcopy(gm.graph))
    made.meta = dict(gm.meta)
    return made


# ---- parts ----------------------------------------------------------------------------------------------------------


def split(gm: GraphModule) -> Split:
    """Take what is marked as prepared out of a graph; `gm` itself becomes the main part."""
    graph = gm.graph
    facts: tuple[Zero, ...] = gm.meta.pop(FACTS, ())
    placeholders = graph.find_nodes(op="placeholder")
    positions = {node: i for i, node in enumerate(placeholders)}
    checks = tuple(Check(_piece(gm, fact.node, positions), fact.dim, fact.where) for fact in facts)
    pieces: list[Piece] = []
    given: dict[tuple[str, tuple[int, ...]], Node] = {}
    last = placeholders[-1]
    for node in list(graph.nodes):
        if not _is_prepared(node) or all(_is_prepared(user) for user in node.users):
            continue
        piece = _piece(gm, node, positions)
        if (key := (piece.key, piece.positions)) not in given:
            with graph.inserting_after(last):
                last = graph.placeholder(f"prepared_{len(pieces)}")
            last.meta |= {"val": val(node), "static": True}
            pieces.append(piece)
            given[key] = last
        node.replace_all_uses_with(given[key], delete_user_cb=lambda user: not _is_prepared(user))
    graph.eliminate_dead_code()
    gm.recompile()
    return Split(gm, tuple(pieces), checks)


def _is_prepared(node: Node) -> bool:
    return bool(node.meta.get(PREPARED)) or (node.op == "get_attr" and isinstance(node.meta.get("val"), Tensor))


def _piece(gm: GraphModule, node: Node, positions: Mapping[Node, int]) -> Piece:
    """The part of a graph that computes `node`."""
    wanted, stack = {node}, [node]
    while stack:
        for n in stack.pop().all_input_nodes:
            if n not in wanted:
                wanted.add(n)
                stack.append(n)
    part, made = Graph(), dict[Node, Node]()
    constants = []
    for n in gm.graph.nodes:
        if n in wanted:
            made[n] = part.node_copy(n, made.__getitem__)
            if n.op == "get_attr":
                constants.append(getattr(gm, str(n.target)))
    part.output(made[node])
    used = [n for n in positions if n in wanted]
    key = "\n".join([text(part), *(str(c.tolist()) for c in constants), *(str(tuple(val(n).shape)) for n in used)])
    return Piece(GraphModule(gm, part), tuple(positions[n] for n in used), key)


# ---- the program ----------------------------------------------------------------------------------------------------


@dataclass
class _Made:
    """What a piece made of tensors as they were."""

    others: tuple[weakref.ref[Tensor], ...]
    versions: tuple[int, ...]
    result: Tensor
    version: int


class _Store(dict[str, _Made]):
    """What pieces made of a weight: neither saved nor copied with it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, ()

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[str, _Made]:
        return {}


@dataclass
class _State:
    """Results for the weights of one model; None where they lack the zeros."""

    weights: tuple[weakref.ref[Tensor], ...]
    versions: tuple[int, ...]
    results: tuple[Tensor, ...] | None
    made: tuple[int, ...]
    """Versions of the results: graphs may return one (torch.nn.utils.prune does), and who gets it may write into it."""
    calls: int = 1

    def holds(self, weights: Sequence[Tensor]) -> bool:
        """Whether nothing has changed."""
        return self.versions == _versions(weights) and self.made == _versions(self.results or ())


@dataclass
class PreparedProgram:
    """A program in two parts. Safe to call from several threads."""

    main: Program
    parts: Split
    dense: Callable[[], Program]
    _states: list[_State] = field(default_factory=list)
    _lock: threading.RLock = field(default_factory=threading.RLock)
    _fallback: Program | None = None
    _restless: int = 0

    def __post_init__(self) -> None:
        self.report, self.source = self.main.report, self.main.source
        every = (*self.parts.pieces, *(check.piece for check in self.parts.checks))
        self._positions = tuple(sorted({i for piece in every for i in piece.positions}))

    def __call__(self, *inputs: Any) -> tuple[Any, ...]:
        results = self._results(inputs)
        return self._in_full(inputs) if results is None else self.main(*inputs, *results)

    def _results(self, inputs: Sequence[Any]) -> tuple[Tensor, ...] | None:
        weights = [inputs[i] for i in self._positions]
        for state in self._states:
            if all(ref() is w for ref, w in zip(state.weights, weights, strict=True)):
                if state.holds(weights):
                    state.calls += 1
                    return state.results
                break
        with self._lock:
            return self._made(inputs, weights)

    def _made(self, inputs: Sequence[Any], weights: Sequence[Tensor]) -> tuple[Tensor, ...] | None:
        known = [s for s in self._states if all(r() is w for r, w in zip(s.weights, weights, strict=True))]
        if known:
            self._restless = self._restless + 1 if known[0].calls < 2 else 0
        if self._restless >= RESTLESS:
            if self._restless == RESTLESS:
                log.info("weights with zeros change in every call: they are multiplied whole from now on")
            return None
        results = None
        if not any(w.is_inference() for w in weights) and all(_holds(check, inputs) for check in self.parts.checks):
            results = self._made_of(inputs)
        refs = tuple(weakref.ref(w) for w in weights)
        state = _State(refs, _versions(weights), results, _versions(results or ()))
        alive = [s for s in self._states if s not in known and all(r() is not None for r in s.weights)]
        self._states = [state, *alive[: MODELS - 1]]
        return results

    def _made_of(self, inputs: Sequence[Any]) -> tuple[Tensor, ...] | None:
        try:
            return tuple(_result(piece, inputs) for piece in self.parts.pieces)
        except NotSparse:
            return None

    def _in_full(self, inputs: Sequence[Any]) -> tuple[Any, ...]:
        with self._lock:
            if self._fallback is None:
                self._fallback = self.dense()
        return self._fallback(*inputs)


@torch.no_grad()
def _holds(check: Check, inputs: Sequence[Any]) -> bool:
    value = check.piece.gm(*(inputs[i] for i in check.piece.positions))
    if check.where.dim() == 2:
        return not bool(value.movedim(check.dim, 1)[check.where.to(value.device)].any())
    where = check.where.nonzero().flatten().to(value.device)
    return not bool(value.index_select(check.dim, where).any())


def _result(piece: Piece, inputs: Sequence[Any]) -> Tensor:
    """What a piece makes of weights, kept with the first of them."""
    given = [inputs[i] for i in piece.positions]
    if not given:
        constant: Tensor = piece.gm()
        return constant  # as it was registered
    store: dict[str, _Made] = given[0].__dict__.setdefault(STORE, _Store())
    versions = _versions(given)
    found = store.get(piece.key)
    if found is not None and found.versions == versions and found.result._version == found.version:
        if all(r() is w for r, w in zip(found.others, given[1:], strict=True)):
            return found.result
    with torch.inference_mode(False), torch.no_grad():  # tensors of inference mode count no changes
        result: Tensor = piece.gm(*given)
    for key in [key for key, made in list(store.items()) if made.versions[:1] != versions[:1]]:
        store.pop(key, None)  # made of what the weight was
    store[piece.key] = _Made(tuple(weakref.ref(w) for w in given[1:]), versions, result, result._version)
    return result


def _versions(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    return tuple([t._version for t in tensors])
