"""Units of a decoder that can be removed whole: heads of attention, channels of MLPs, layers.

What is removed becomes zero, biases among it, so the masked model computes what the smaller one would. Where units lie
is in llmcomp/unit_blocks.py, what they are worth in llmcomp/unit_worth.py.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmcomp.errors import FormatError, PruneError
from llmcomp.layerwise import decoder_layers
from llmcomp.quantized import QuantizedTensor
from llmcomp.sites import why_computed
from llmcomp.sparsity import Structured
from llmcomp.token_batches import TokenBatch
from llmcomp.unit_blocks import Block, attention_blocks, forms, mlp_blocks, parameters_of
from llmcomp.unit_worth import Worth, worth_of


@dataclass(frozen=True)
class UnitMasks:
    """What becomes of parameters, by their id: `masks` that remove units, or the reason why they lose none (`left`)."""

    masks: dict[int, Tensor]
    left: dict[int, str]


Due = Callable[[int, int], int]
"""How many units go now, where so many of so many are to go in the end."""


def _all(number: int, count: int) -> int:
    return number


def unit_masks(model: nn.Module, by: Structured, batches: Sequence[TokenBatch]) -> UnitMasks:
    """The masks that remove units.

    Raises:
        PruneError: the model has no such units that are known, or a layer would keep none of them.
    """
    found = Units(model, by)
    worth = worth_of(model, found.layers, found.blocks, by.criterion, batches)
    return found.masks(worth)


class Units:
    """The units of a model that a value asks for."""

    def __init__(self, model: nn.Module, by: Structured) -> None:
        """
        Raises:
            PruneError: see `unit_masks`.
        """
        self.by, self.layers = by, _layers(model)
        _require_floats(model)
        self.heads = _some("heads", by.heads, model)
        self.channels = _some("channels", by.channels, model)
        if by.layers >= len(self.layers):
            raise PruneError(f"expected some layers to stay, found {by.layers} of {len(self.layers)} to go")
        _require_parameters(model, self.layers, self.blocks)

    @property
    def blocks(self) -> list[Block]:
        """All of them."""
        return [*self.heads, *self.channels]

    @property
    def wanted(self) -> int:
        """How many of them go."""
        heads = sum(_number(self.by.heads, block.count) for block in self.heads)
        return heads + sum(_number(self.by.channels, block.count) for block in self.channels) + self.by.layers

    def parameters(self, model: nn.Module) -> list[tuple[str, nn.Module, str]]:
        """The parameters that may lose units: their names, their modules, and what they are called there."""
        names = {module: name for name, module in model.named_modules()}
        found = [(part.module, part.key) for block in self.blocks for part in block.parts]
        found += [pair for layer in self.layers if self.by.layers for pair in parameters_of(layer)]
        return [(f"{names[module]}.{key}".lstrip("."), module, key) for module, key in dict.fromkeys(found)]

    def masks(self, worth: Worth, due: Due = _all) -> UnitMasks:
        """The masks that remove the units that are worth least: as many as are due."""
        masks: dict[int, Tensor] = {}
        left: dict[int, str] = {}
        for kind, blocks, wanted in (
            ("heads", self.heads, self.by.heads),
            ("channels", self.channels, self.by.channels),
        ):
            for block in blocks:
                number = _number(wanted, block.count)
                for unit in _least(worth[block.name], due(number, block.count)):
                    for part in block.parts:
                        part.drop(_mask(masks, part.parameter), unit)
                if not number:
                    reason = f"{wanted} of its {block.count} {kind} is less than one"
                    left |= {id(part.parameter): reason for part in (*block.makers, block.reader)}
        for index in _least(worth["layers"], due(self.by.layers, len(self.layers))):
            _drop_layer(masks, self.layers[index])
        return UnitMasks(masks, left)


def _some(kind: str, wanted: float, model: nn.Module) -> list[Block]:
    """The blocks of a kind, where some of its units are to go.

    Raises:
        PruneError: there are none, or one would keep nothing.
    """
    if not wanted:
        return []
    found = attention_blocks(model) if kind == "heads" else mlp_blocks(model)
    if not found:
        raise PruneError(
            f"expected {kind} to remove, found no block of these forms: {forms(kind)}: prune by matrices instead"
        )
    for block in found:
        if _number(wanted, block.count) >= block.count:
            raise PruneError(f"expected some {kind} of {block.name} to stay, found {wanted} of {block.count} to go")
    return found


def _number(wanted: float, count: int) -> int:
    return wanted if isinstance(wanted, int) else int(wanted * count + 1e-9)  # 0.29 * 100 is a little less than 29


def _least(worth: Tensor, number: int) -> list[int]:
    return [int(i) for i in worth.topk(number, largest=False).indices]


def _layers(model: nn.Module) -> list[nn.Module]:
    try:
        return list(decoder_layers(model))
    except FormatError as problem:
        raise PruneError(
            "expected a decoder of equal layers, found no list of them: prune by matrices instead"
        ) from problem


def _require_floats(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if isinstance(parameter, QuantizedTensor):
            raise PruneError(f"expected float weights, found {name} in {parameter.format}: prune before quantizing")


def _require_parameters(model: nn.Module, layers: Sequence[nn.Module], blocks: Sequence[Block]) -> None:
    """Refuse weights and biases that are not finite, or that something else computes: they would not stay zero."""
    names = {module: name for name, module in model.named_modules()}
    affected = [pair for layer in layers for pair in parameters_of(layer)]
    affected += [(part.module, part.key) for block in blocks for part in block.parts]
    for module, key in dict.fromkeys(affected):
        name = f"{names[module]}.{key}"
        if (reason := why_computed(module, key)) is not None:
            raise PruneError(f"expected parameters to prune, found {name}, which is none: {reason}")
        value = module._parameters.get(key)
        if value is not None and not bool(torch.isfinite(value).all()):
            raise PruneError(
                f"expected finite weights to prune, found NaN or infinity in {name}: repair the checkpoint"
            )


def _mask(masks: dict[int, Tensor], parameter: Tensor) -> Tensor:
    return masks.setdefault(id(parameter), torch.ones_like(parameter, dtype=torch.bool))


def _drop_layer(masks: dict[int, Tensor], layer: nn.Module) -> None:
    for module, key in parameters_of(layer):
        parameter = module._parameters[key]
        assert parameter is not None
        _mask(masks, parameter)[:] = False
