"""A program that keeps a KV cache of its own: a loop of model(ids) with growing ids computes only what is new.

    call 1    model(ids[:, :5])     in full; the tokens are remembered
    call 2    model(ids[:, :6])     in full: extends call 1
    call 3    model(ids[:, :7])     in full, and what the proof says can be kept is kept (the fill program)
    call 4    model(ids[:, :8])     one position (the step program)
    other     model(other)          what follows the longest known prefix (the chunk program), or in full

Each call returns what the full computation returns, all positions of it. Results that grow show the memory of
the cache (llmcomp/headroom.py), so that nothing is copied but the logits of several rows: they are contiguous in eager,
and rows that grow move apart. The option `strided_results` has them not copied either. Where a caller
writes into a result, the next call notices by torch's version counters, computes in full, and from then on results are
copies.

What is kept belongs to the weights of the call: other weights, or weights that torch operators changed since,
do not match. Writes that torch does not count (through .data or numpy) go unseen: call llmcomp.reset then.
"""

import logging
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from llmcomp.errors import LlmcompError, MemoryFullError
from llmcomp.headroom import reserved
from llmcomp.passes.cached_graph import insert_cache
from llmcomp.passes.insert_kv_cache import Plan, lent, returned
from llmcomp.prefix import common_prefix
from llmcomp.prepared import parts_of
from llmcomp.report import Program
from llmcomp.verify import verify_results

log = logging.getLogger("llmcomp")

# A call after so many that each extended the one before by a few tokens is taken for a turn of a loop, worth a
# program. Prompts that extend each other, as in a chat, do so by more.
TURNS, FEW = 2, 4
# Sequences of which only the tokens are remembered, to notice a loop.
REMEMBERED = 8

FILL, STEP, CHUNK = "fill", "step", "chunk"
# (positions kept, positions computed) that each program is made for; None: any number from 2 on.
SHAPES: dict[str, tuple[int | None, int | None]] = {FILL: (0, None), STEP: (None, 1), CHUNK: (None, None)}


@dataclass(frozen=True)
class Owner:
    """What a cache belongs to: the tensors that are no sequence, as they were, and the other inputs."""

    tensors: tuple[weakref.ref[Tensor], ...]
    versions: tuple[int, ...]
    addresses: tuple[int, ...]
    numbers: tuple[object, ...]


@dataclass(frozen=True)
class Call:
    """The inputs of one call, sorted."""

    tensors: tuple[Tensor, ...]
    versions: tuple[int, ...]
    addresses: tuple[int, ...]
    numbers: tuple[object, ...]
    sequences: tuple[Tensor, ...]
    length: int


@dataclass(frozen=True)
class Entry:
    """A sequence that was computed: its tokens, how often in a row it was extended, what was kept of it."""

    owner: Owner
    sequences: tuple[Tensor, ...]
    length: int
    turns: int = 0
    slots: tuple[Tensor, ...] = ()
    versions: tuple[int, ...] = ()

    @property
    def bytes(self) -> int:
        """Memory that the slots keep, the room behind them included."""
        return sum(map(reserved, self.slots))


class ReusingProgram:
    """A compiled graph that keeps caches between calls. Safe to call from several threads."""

    def __init__(
        self,
        full: Program,
        plan: Plan,
        compile_cached: Callable[[GraphModule], Program],
        most_bytes: int,
        verifies: bool = False,
    ) -> None:
        """`full` computes the graph of `plan` in full; `compile_cached` compiles the cached graphs made of it.

        With `verifies`, the first call of each of them is checked against the whole graph.
        """
        self.report, self.source = full.report, full.source
        self._full, self._plan, self._compile, self._most = full, plan, compile_cached, most_bytes
        self._lock, self._building = threading.RLock(), threading.RLock()
        self._entries: list[Entry] = []  # the most recently used last
        self._programs: dict[str, Program] = {}
        self._wanted: Counter[str] = Counter()
        self._unverified = set(SHAPES) if verifies else set()
        self._copies = False  # whether results are copies, since callers write into them
        self._results = [isinstance(n, Node) and lent(plan, n) is not None for n in returned(plan.gm.graph)]
        self._layout = _Layout(plan)
        _reusing.add(self)

    def __call__(self, *inputs: Any) -> tuple[Any, ...]:
        call = self._layout.read(inputs)
        if call is None:
            return self._full(*inputs)
        entry, prefix = self._longest(call)
        if entry is not None and entry.versions != _versions(entry.slots):
            self._forget(entry)
            self._copies = True
            entry = Entry(entry.owner, entry.sequences, entry.length, TURNS)
        past = min(prefix, call.length - 1)
        extends = entry is not None and prefix == entry.length and call.length > prefix
        turns = entry.turns + 1 if entry is not None and extends and call.length - past <= FEW else 0
        kind = self._kind(entry, past, call.length - past, turns)
        outputs, slots = self._outputs(kind, inputs, entry, past, call.length - past)
        # An entry of which all but the last position lives on in the new one is not kept beside it.
        outlived = entry is not None and entry.length - 1 <= past and entry.length <= call.length
        owner = _owner(call, weakref.WeakMethod(self._bury)) if entry is None else entry.owner
        kept = Entry(owner, _copied(call), call.length, turns, slots, _versions(slots))
        self._remember(kept, entry if outlived else None)
        return outputs

    def reset(self, owners: frozenset[int] | None = None) -> None:
        """Drop what is kept: all of it, or what belongs to tensors of which one has its id in `owners`."""
        with self._lock:
            self._entries = [e for e in self._entries if owners is not None and not _owned(e.owner, owners)]

    @property
    def bytes(self) -> int:
        """Memory that all caches keep."""
        with self._lock:
            return sum(e.bytes for e in self._entries)

    # ---- which program

    def _longest(self, call: Call) -> tuple[Entry | None, int]:
        """The entry with the longest common prefix, and its length; a cache of half the call counts for more."""
        with self._lock:
            entries = [e for e in reversed(self._entries) if _is_owner(e.owner, call)]
        best, longest, served = None, 0, False
        for entry in entries:
            prefix = common_prefix(entry.sequences, call.sequences, self._layout.axes)
            serves = bool(entry.slots) and 2 * prefix >= call.length
            if (serves, prefix) > (served, longest):
                best, longest, served = entry, prefix, serves
            if serves and prefix == min(entry.length, call.length):
                break
        return best, longest

    def _kind(self, entry: Entry | None, past: int, new: int, turns: int) -> str | None:
        """The program for a call, None for the full one."""
        if entry is not None and entry.slots and past >= 2 and (new == 1 or past >= new // 4):
            return STEP if new == 1 else CHUNK
        return FILL if turns >= TURNS and not (entry is not None and entry.slots) and past + new >= 2 else None

    def _ready(self, kind: str) -> bool:
        """Whether there is the program `kind`, compiling it where that is worth it; chunks are when wanted twice."""
        with self._building:
            self._wanted[kind] += 1
            if kind in self._programs:
                return True
            if self._wanted[kind] < (2 if kind == CHUNK else 1):
                return False
            try:
                self._programs[kind] = self._compile(insert_cache(self._plan, *SHAPES[kind]))
            except LlmcompError:
                raise
            except Exception as error:  # the proof held, so this is a defect; the full program is right
                log.warning("llmcomp: the %s program of a KV cache failed to compile: %r", kind, error)
                self._wanted[kind] = -(1 << 30)
                return False
            return True

    # ---- running

    def _outputs(
        self, kind: str | None, inputs: Sequence[Any], entry: Entry | None, past: int, new: int
    ) -> tuple[tuple[Any, ...], tuple[Tensor, ...]]:
        """What a call returns, and what is kept of it."""
        if kind is not None and self._ready(kind):
            try:
                return self._run(kind, inputs, entry, past, new)
            except MemoryFullError as error:  # a call that fits without a cache must not fail for one
                log.warning("llmcomp: computed in full: %s", error)
                self.reset()
        return self._full(*inputs), ()

    def _run(
        self, kind: str, inputs: Sequence[Any], entry: Entry | None, past: int, new: int
    ) -> tuple[tuple[Any, ...], tuple[Tensor, ...]]:
        extra: list[Any] = []
        if kind != FILL:
            assert entry is not None
            extra.append(past)
            extra += [new] if kind == CHUNK else []
            pasts = zip(entry.slots, self._plan.slots, strict=True)
            extra += [t.narrow(s.axis, 0, past + s.extra) for t, s in pasts]
        # Outside of inference mode, tensors count the writes into them.
        with torch.inference_mode(False), torch.no_grad():
            outputs = self._programs[kind](*inputs, *extra)
            count = len(self._plan.slots)
            found, slots = outputs[: len(outputs) - count], outputs[len(outputs) - count :]
            if kind in self._unverified:
                verify_results(self._plan.gm, inputs, found, f"the {kind} program of insert_kv_cache")
                self._unverified.remove(kind)
            if self._copies:
                found = tuple(t.clone() if shows else t for t, shows in zip(found, self._results, strict=True))
        return found, slots

    # ---- what is kept

    def _remember(self, entry: Entry, old: Entry | None) -> None:
        """Keep an entry, in place of `old` unless that has a cache and this has none."""
        with self._lock:
            if old is not None and (entry.slots or not old.slots):
                self._entries = [e for e in self._entries if e is not old]
            self._entries.append(entry)
            self._evict()

    def _evict(self) -> None:
        """Keep within the bounds; the least recently used go first."""
        short = [e for e in self._entries if not e.slots][:-REMEMBERED]
        self._entries = [e for e in self._entries if all(e is not s for s in short)]
        total = sum(e.bytes for e in self._entries)
        for entry in [e for e in self._entries if e.slots]:
            if total <= self._most:
                return
            total -= entry.bytes
            self._entries = [e for e in self._entries if e is not entry]
            if total == 0:
                _warn_too_large(entry.bytes, self._most)

    def _bury(self) -> None:
        """Free the caches of weights that are gone."""
        with self._lock:
            self._entries = [e for e in self._entries if all(r() is not None for r in e.owner.tensors)]

    def _forget(self, entry: Entry) -> None:
        with self._lock:
            self._entries = [e for e in self._entries if e is not entry]


class _Layout:
    """Where in the inputs of a graph is what."""

    def __init__(self, plan: Plan) -> None:
        self.sequences = plan.sequences
        self.axes = tuple(s.axis for s in plan.sequences)
        placeholders = plan.gm.graph.find_nodes(op="placeholder")
        along = {s.position for s in plan.sequences}
        lengths = {i for i, n in enumerate(placeholders) if _varies(n.meta.get("val"), plan.length)}
        self.others = [i for i in range(len(placeholders)) if i not in along | lengths]

    def read(self, inputs: Sequence[Any]) -> Call | None:
        """The inputs, sorted; None where one of them does not count the writes into it, or nothing can be read now."""
        if any(inputs[s.position].is_cuda for s in self.sequences) and torch.cuda.is_current_stream_capturing():
            return None
        others = [inputs[i] for i in self.others]
        tensors = tuple(t for t in others if isinstance(t, Tensor))
        if any(t.is_inference() for t in tensors):
            return None
        sequences = tuple(inputs[s.position] for s in self.sequences)
        numbers = tuple(n for n in others if not isinstance(n, Tensor))
        length = sequences[0].shape[self.axes[0]]
        return Call(tensors, _versions(tensors), _addresses(tensors), numbers, sequences, length)


def _varies(value: object, length: Any) -> bool:
    return isinstance(value, torch.SymInt) and length in value.node.expr.free_symbols


def _owner(call: Call, bury: weakref.WeakMethod[Callable[[], None]]) -> Owner:
    """The owner that `call` names; `bury` is called when the first of its tensors is gone."""

    def gone(ref: object) -> None:
        if (method := bury()) is not None:
            method()

    first = [weakref.ref(t, gone) for t in call.tensors[:1]]
    refs = (*first, *map(weakref.ref, call.tensors[1:]))
    return Owner(refs, call.versions, call.addresses, call.numbers)


def _is_owner(owner: Owner, call: Call) -> bool:
    return (
        owner.numbers == call.numbers
        and owner.versions == call.versions
        and owner.addresses == call.addresses
        and all(r() is t for r, t in zip(owner.tensors, call.tensors, strict=True))
    )


def _copied(call: Call) -> tuple[Tensor, ...]:
    """The tokens of a call, which the caller may write into."""
    return tuple(t.detach().clone() for t in call.sequences)


def _versions(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    return tuple(t._version for t in tensors)


def _addresses(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    return tuple(t.data_ptr() for t in tensors)


def _owned(owner: Owner, ids: frozenset[int]) -> bool:
    return any((t := ref()) is not None and id(t) in ids for ref in owner.tensors)


def _warn_too_large(bytes: int, most: int) -> None:
    log.warning(
        "llmcomp: a KV cache of %.1f MiB is more than kv_cache_bytes allows (%.1f MiB), so a growing sequence is "
        "computed in full at each call: raise options={'kv_cache_bytes': ...}, or set kv_cache='off'",
        bytes / 2**20,
        most / 2**20,
    )


# torch keeps compiled programs where nobody can ask for them; reset() has to find them.
_reusing: "weakref.WeakSet[ReusingProgram]" = weakref.WeakSet()


def reset(model: nn.Module | None = None) -> None:
    """Free the KV caches that compiled programs keep between calls: those of `model`, or all.

    To be called after weights were written in a way that torch does not count (through `.data` or numpy): those of
    `model` count as written.
    """
    owners = None
    if model is not None:
        tensors = [t for whole in (*model.parameters(), *model.buffers()) for t in (whole, *parts_of(whole))]
        owners = frozenset(id(t) for t in tensors)
        for tensor in tensors:
            if not tensor.is_inference():
                torch.autograd.graph.increment_version(tensor)
    for program in list(_reusing):
        program.reset(owners)
