"""A decoder, layer by layer on data: watch what its matrices are given, change them, go on with what it gives.

    with layerwise(model, batches, "pruning") as steps:
        for step in steps:
            step.watch({module: observer for module in step.linears})    # observer(rows): rows (tokens, K) of inputs
            ...                                                          # change the weights of step.layer

Each layer is given what the changed layers before it give. In memory are the inputs of one layer, and the masks and
positions of all batches. A layer runs when the inputs of a later one are wanted, so the last one only if it is watched.
"""

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn

from llmcomp.errors import FormatError
from llmcomp.sites import Site, experts, is_linear
from llmcomp.token_batches import Batches, TokenBatch, token_batches

Observer = Callable[[Tensor], None]


@dataclass(frozen=True)
class Call:
    """How a layer is called, all but its hidden states: those go first, or by the name `hidden`."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    hidden: str | None

    def run(self, layer: nn.Module, states: Tensor) -> Any:
        """What `layer` makes of hidden states."""
        if self.hidden is None:
            return layer(states, *self.args, **self.kwargs)
        return layer(*self.args, **{self.hidden: states}, **self.kwargs)


@dataclass(frozen=True)
class Step:
    """One layer of a walk, to be used while the walk stands at it."""

    walk: "Walk"
    index: int
    layer: nn.Module

    @cached_property
    def linears(self) -> dict[nn.Module, str]:
        """The linear modules of the layer with their names in the model."""
        return {m: name for m in self.layer.modules() if is_linear(m) and (name := self.walk.names.get(m)) is not None}

    @cached_property
    def experts(self) -> tuple[Site, ...]:
        """The matrices of experts of the layer, by the names of their parameters in the model."""
        found = [(self.walk.names.get(site.holders[0]), site) for site in experts(self.layer)]
        return tuple(replace(site, name=f"{name}.{site.key}") for name, site in found if name is not None)

    def inputs(self) -> Iterator[tuple[Call, Tensor]]:
        """How the layer is called for every batch, and the hidden states (batch, length, channels) it is given."""
        return self.walk.inputs(self.index)

    @torch.no_grad()
    def watch(self, observers: Mapping[nn.Module, Observer]) -> None:
        """Run the layer on all data. Observers get the inputs (tokens, K) of their modules, at each of their calls.

        Modules that no token reaches (experts) leave their observers uncalled. Padding is never among the rows.
        """
        with ExitStack() as hooks:
            for module, observer in observers.items():
                hooks.callback(module.register_forward_pre_hook(_watching(observer), with_kwargs=True).remove)
            for call, states in self.inputs():
                call.run(self.layer, states)


class Walk:
    """The steps of one walk. Made by `layerwise`."""

    def __init__(self, model: nn.Module, batches: Batches, title: str) -> None:
        self.model = model
        self.names = {module: name for name, module in model.named_modules()}
        self.layers = decoder_layers(model)
        self.title = title
        self.batches = token_batches(model, batches)
        self._at = 0
        self._calls, self._states = _captured(model, self.layers, self.batches)

    def __len__(self) -> int:
        return len(self.layers)

    def __iter__(self) -> Iterator[Step]:
        for index in track(range(len(self.layers)), self.title, disable=not sys.stderr.isatty()):
            yield Step(self, index, self.layers[index])

    def inputs(self, index: int) -> Iterator[tuple[Call, Tensor]]:
        """See `Step.inputs`; layers before `index` run as they are now, and can't be gone back to."""
        assert index >= self._at, "a walk goes forward"
        while self._at < index:
            self._advance()
        return zip(self._calls[index], self._states, strict=True)

    def close(self) -> None:
        """Let go of the data."""
        self._calls.clear()
        self._states.clear()

    @torch.no_grad()
    def _advance(self) -> None:
        layer, calls = self.layers[self._at], self._calls[self._at]
        for i, call in enumerate(calls):
            self._states[i] = _first(call.run(layer, self._states[i]))
        calls.clear()
        self._at += 1


@contextmanager
def layerwise(model: nn.Module, batches: Batches, title: str = "calibrating") -> Iterator[Walk]:
    """Walk through the layers of a decoder, in eval mode meanwhile, with a progress bar of this title.

    `batches` are token ids (batch, length), or mappings with input_ids and maybe attention_mask.

    Raises:
        FormatError: as `token_batches`; the model has no decoder layers, or does not run each once for a batch.
    """
    with evaluating(model):
        walk = Walk(getattr(model, "_orig_mod", model), batches, title)
        yield walk
        walk.close()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode meanwhile; each module is in its own mode again afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The list of layers that a decoder is made of: of its module lists the one with most parameters.

    Raises:
        FormatError: the model has none.
    """
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m)]
    if not lists:
        raise FormatError("expected a decoder of equal layers to calibrate, found no list of them: use quantize_")
    return max(lists, key=lambda found: sum(p.numel() for p in found.parameters()))


class _LastLayerReached(Exception):
    """Ends a run of the model that is made to see how its layers are called."""


@torch.no_grad()
def _captured(
    model: nn.Module, layers: nn.ModuleList, batches: list[TokenBatch]
) -> tuple[list[list[Call]], list[Tensor]]:
    """How each layer is called, for every batch, as layers may differ in masks and positions; inputs of the first.

    Raises:
        FormatError: a layer is not called once for each batch, in order.
    """
    calls: list[list[Call]] = [[] for _ in layers]
    first: list[Tensor] = []

    def hook(index: int) -> Callable[..., None]:
        def reached(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            states, call = _split(args, kwargs)
            calls[index].append(call)
            if index == 0:
                first.append(states)
            if index == len(layers) - 1:
                raise _LastLayerReached

        return reached

    with ExitStack() as hooks:
        for i, layer in enumerate(layers):
            hooks.callback(layer.register_forward_pre_hook(hook(i), with_kwargs=True).remove)
        for count, batch in enumerate(batches, 1):
            try:
                run_model(model, batch)
            except _LastLayerReached:
                pass
            if any(len(of_layer) != count for of_layer in calls):
                raise FormatError(
                    "expected every decoder layer to run once for a batch, found one that does not: use quantize_"
                )
    return calls, first


def run_model(model: nn.Module, batch: TokenBatch) -> Any:
    """What a model gives for a batch. Not by `model(...)`, which may be compiled: hooks would be compiled in."""
    device = next(model.parameters()).device
    kwargs: dict[str, Any] = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    if batch.positions is not None:
        kwargs["position_ids"] = batch.positions.to(device)
    return model.forward(batch.ids.to(device), **kwargs)


def _split(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, Call]:
    """The hidden states that a layer is called with, and the rest."""
    if args and isinstance(args[0], Tensor):
        return args[0], Call(args[1:], dict(kwargs), None)
    names = ["hidden_states", *kwargs]
    name = next((n for n in names if isinstance(kwargs.get(n), Tensor)), None)
    if name is None:
        raise FormatError("expected decoder layers that are given hidden states, found one that is not: use quantize_")
    return kwargs[name], Call(args, {n: v for n, v in kwargs.items() if n != name}, name)


def _watching(observer: Observer) -> Callable[..., None]:
    def watch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = args[0] if args else next(iter(kwargs.values()))
        observer(given.flatten(0, -2))

    return watch


def _first(result: Any) -> Tensor:
    """The hidden states among what a layer returns."""
    found = result[0] if isinstance(result, tuple) else result
    assert isinstance(found, Tensor)
    return found
