"""Which outputs of a fused layer belong to which inputs of the layer that reads them, found by running what is between.

    qkv = qkv_proj(x); q, k, v = ... of qkv; o_proj(attention(q, k, v))

One output at a time is made NaN: the inputs of the reader that become NaN are those that it counts in. Outputs and
inputs that are connected so are one unit (a key/value head with the query heads that read it; a channel of a gated
MLP), whatever order they lie in. In the end whole units are made NaN, which proves that each keeps to itself.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from llmcomp.errors import PruneError
from llmcomp.layerwise import evaluating, run_model
from llmcomp.token_batches import TokenBatch

AT_ONCE = 64  # outputs that are made NaN in one run, each in a sample of its own
LENGTH = 2  # tokens
CACHES = ("past_key_values", "past_key_value", "layer_past")  # what attention layers of transformers call theirs
Reach = Callable[[Tensor], Tensor]
"""From what a layer gives for samples (AT_ONCE, rows) to whether inputs of the reader are NaN (AT_ONCE, columns)."""


@dataclass(frozen=True)
class Layout:
    """The units: row i of `rows` (count, each) are the outputs of unit i, of `columns` the inputs that it reaches."""

    rows: Tensor
    columns: Tensor


@torch.no_grad()
def layout(reach: Reach, rows: int, columns: int) -> Layout:
    """How outputs and inputs belong together.

    Raises:
        PruneError: some belong to no unit, or units differ in size.
    """
    pairs = _pairs(reach, rows, columns)
    if pairs is None:
        return Layout(torch.arange(rows).unsqueeze(0), torch.arange(columns).unsqueeze(0))
    of_rows, of_columns = _components(pairs, rows, columns)
    if bool((of_rows == columns).any()) or len(pairs[:, 1].unique()) < columns:
        raise PruneError("some of its outputs count in nothing, or some of the inputs are made of none")
    (names, inputs), (_, outputs) = (x.unique(return_counts=True) for x in (of_columns, of_rows))
    if len(inputs.unique()) > 1 or len(outputs.unique()) > 1:
        raise PruneError("its units differ in size")
    found = Layout(*(x.argsort(stable=True).view(len(names), -1) for x in (of_rows, of_columns)))
    if not proves(reach, found, rows, columns):
        raise PruneError("its units are not apart")
    return found


@torch.no_grad()
def proves(reach: Reach, found: Layout, rows: int, columns: int) -> bool:
    """Whether the outputs of each unit reach inputs of that unit alone.

    Those of every other unit at once, of every other two, and so on, reach none of the rest: any two units are told
    apart by one of these runs. All samples are alike in them.
    """
    if found.rows.numel() != rows or found.columns.numel() != columns:
        return False
    units = torch.arange(len(found.rows))
    for bit in range(len(units).bit_length()):
        for chosen in ((units >> bit & 1).bool(), ~(units >> bit & 1).bool()):
            values = _values(rows)
            values[:, found.rows[chosen].flatten()] = float("nan")
            if bool(reach(values)[:, found.columns[~chosen].flatten()].any()):
                return False
    return True


def _values(rows: int) -> Tensor:
    return torch.randn(AT_ONCE, rows, generator=torch.Generator().manual_seed(0))


def _one_at_a_time(start: int, rows: int) -> Tensor:
    values = _values(rows)
    at = torch.arange(start, min(start + AT_ONCE, rows))
    values[at - start, at] = float("nan")
    return values


def _pairs(reach: Reach, rows: int, columns: int) -> Tensor | None:
    """All pairs (output, input) of which the first counts in the second; None where one output counts in all."""
    found = []
    for start in range(0, rows, AT_ONCE):
        reached = reach(_one_at_a_time(start, rows))[: rows - start]
        if columns > 1 and bool(reached.all(1).any()):
            return None
        found.append(reached.nonzero() + torch.tensor([start, 0]))
    return torch.cat(found)


def _components(pairs: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """The least column of the component of every row, and of every column; a row that reaches none has their number."""
    row, column = pairs.unbind(1)
    of_columns = torch.arange(columns)
    while True:
        of_rows = torch.full((rows,), columns).scatter_reduce(0, row, of_columns[column], "amin")
        least = of_columns.scatter_reduce(0, column, of_rows[row], "amin")
        if torch.equal(least, of_columns):
            return of_rows, of_columns
        of_columns = least


# ---- of a module ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Between:
    """Two linear layers, with so many outputs and inputs, and the module that holds them both."""

    name: str
    module: nn.Module
    maker: nn.Module
    reader: nn.Module
    rows: int
    columns: int


@dataclass(frozen=True)
class _Call:
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


def layouts(model: nn.Module, found: Sequence[Between]) -> list[Layout]:
    """The layout of each, by running its module as the model runs it.

    Raises:
        PruneError: names the module whose layout can't be known, and says why.
    """
    if not found:
        return []
    known: dict[tuple[type, int, int], Layout] = {}
    with evaluating(model):
        calls = _calls(model, found)
        return [_layout_of(between, calls, known) for between in found]


def _layout_of(
    between: Between, calls: Mapping[nn.Module, _Call], known: dict[tuple[type, int, int], Layout]
) -> Layout:
    """The layout of one, which is often that of one before it."""
    sizes = between.rows, between.columns
    key = (type(between.module), *sizes)
    try:
        if between.module not in calls:
            raise PruneError("it does not run for token ids")
        reach = _reach(between, calls[between.module])
        if key not in known or not proves(reach, known[key], *sizes):
            known[key] = layout(reach, *sizes)
    except PruneError as problem:
        raise PruneError(
            f"expected a layer of {between.name} whose outputs can be told apart by what reads them, found that "
            f"{problem}: prune by matrices instead"
        ) from problem
    return known[key]


@torch.no_grad()
def _calls(model: nn.Module, found: Sequence[Between]) -> dict[nn.Module, _Call]:
    """How each of the modules is called for AT_ONCE samples."""
    calls: dict[nn.Module, _Call] = {}

    def reached(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # A cache would keep what earlier runs wrote into it.
        calls.setdefault(module, _Call(args, {k: None if k in CACHES else v for k, v in kwargs.items()}))

    with ExitStack() as hooks:
        for between in found:
            hooks.callback(between.module.register_forward_pre_hook(reached, with_kwargs=True).remove)
        try:
            run_model(getattr(model, "_orig_mod", model), TokenBatch(torch.arange(LENGTH).repeat(AT_ONCE, 1)))
        except Exception as problem:  # whatever a model needs besides tokens
            raise PruneError(
                f"expected a model that runs for token ids, to see how its fused layers are read, found {problem!r}: "
                "prune by matrices instead"
            ) from problem
    return calls


class _ReaderReached(Exception):
    """Ends a run of a module."""


def _reach(between: Between, call: _Call) -> Reach:
    """What its outputs reach, of a module that is called so."""

    def reach(values: Tensor) -> Tensor:
        seen: list[Tensor] = []

        def look(module: nn.Module, args: tuple[Any, ...]) -> None:
            seen.append(args[0])
            raise _ReaderReached

        hook = between.reader.register_forward_pre_hook(look)
        try:
            with _gives(between.maker, values), sdpa_kernel(SDPBackend.MATH):  # others lose NaN of queries and keys
                between.module.forward(*call.args, **call.kwargs)
        except _ReaderReached:
            pass
        except Exception as problem:  # of a module that can't be run by itself
            raise PruneError(f"it can't be run by itself ({problem!r})") from problem
        finally:
            hook.remove()
        if not seen or seen[0].numel() != AT_ONCE * LENGTH * between.columns:
            raise PruneError("what reads it is not called once for every token")
        return seen[0].reshape(AT_ONCE, LENGTH, between.columns).isnan().any(1).cpu()

    return reach


@contextmanager
def _gives(maker: nn.Module, values: Tensor) -> Iterator[None]:
    """Meanwhile a layer gives these values (AT_ONCE, rows) for every token, at no cost."""
    weight, before = maker.weight, maker.__dict__.get("forward")
    assert isinstance(weight, Tensor)
    given = values.to(weight).unsqueeze(1)

    def forward(x: Tensor) -> Tensor:
        return given.expand(AT_ONCE, LENGTH, -1).reshape(*x.shape[:-1], -1)

    maker.__dict__["forward"] = forward
    try:
        yield
    finally:
        del maker.__dict__["forward"]
        if before is not None:
            maker.__dict__["forward"] = before
