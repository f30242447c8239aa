"""Units of a decoder that can be removed whole: heads of attention, channels of MLPs, layers; what each is worth.

    heads      key/value head j with the query heads that read it: rows of q, k, v, columns of o
    channels   channel c of an MLP: row c of what makes it (gate, up), column c of what reads it (down)
    layers     all matrices of a layer: it adds nothing to the hidden states

What is removed becomes zero, biases among it, so the masked model computes what the smaller one would.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmcomp.errors import FormatError, PruneError
from llmcomp.layerwise import decoder_layers, evaluating, run_model
from llmcomp.quantized import QuantizedTensor
from llmcomp.sites import is_conv, is_linear, matrix, why_computed
from llmcomp.sparsity import Structured
from llmcomp.token_batches import TokenBatch

# The names that decoders of transformers give: what makes the channels, and what reads them.
MLPS = (
    (("gate_proj", "up_proj"), "down_proj"),
    (("up_proj",), "down_proj"),
    (("w1", "w3"), "w2"),
    (("fc1",), "fc2"),
    (("c_fc",), "c_proj"),
    (("dense_h_to_4h",), "dense_4h_to_h"),
)
ATTENTIONS = tuple((("q_proj", "k_proj", "v_proj"), reader) for reader in ("o_proj", "out_proj", "dense"))


@dataclass(frozen=True)
class Block:
    """Matrices whose rows (of `makers`) and columns (of `reader`) come in `count` units."""

    name: str
    makers: tuple[nn.Module, ...]
    reader: nn.Module
    count: int


def unit_masks(model: nn.Module, by: Structured, batches: Sequence[TokenBatch]) -> dict[int, Tensor]:
    """The masks that remove units, by the id of the parameter that each is for.

    Raises:
        PruneError: the model has no such units that are known, or a layer would keep none of them.
    """
    layers = _layers(model)
    heads = list(attention_blocks(model)) if by.heads else []
    channels = list(mlp_blocks(model)) if by.channels else []
    for kind, wanted, found in (("heads", by.heads, heads), ("channels", by.channels, channels)):
        if wanted and not found:
            raise PruneError(
                f"expected {kind} to remove, found no block of these forms: {_forms(kind)}: prune by matrices instead"
            )
        for block in found:
            if _number(wanted, block.count) >= block.count:
                raise PruneError(f"expected some {kind} of {block.name} to stay, found {wanted} of {block.count} to go")
    if by.layers >= len(layers):
        raise PruneError(f"expected some layers to stay, found {by.layers} of {len(layers)} to go")
    _require_floats(model)
    _require_parameters(model, layers, [*heads, *channels])
    worth = _worth(model, layers, [*heads, *channels], by, batches)
    masks: dict[int, Tensor] = {}
    for blocks, wanted in ((heads, by.heads), (channels, by.channels)):
        for block in blocks:
            _drop_units(masks, block, _least(worth[block.name], _number(wanted, block.count)))
    for index in _least(worth["layers"], by.layers) if by.layers else ():
        _drop_layer(masks, layers[index])
    return masks


def too_few_units(model: nn.Module, by: Structured) -> dict[int, str]:
    """Why weights of blocks lose no unit, where the part that `by` asks for is less than one; by their id."""
    reasons: dict[int, str] = {}
    for kind, wanted, find in (("heads", by.heads, attention_blocks), ("channels", by.channels, mlp_blocks)):
        for block in find(model) if wanted else ():
            if not _number(wanted, block.count):
                reason = f"{wanted} of its {block.count} {kind} is less than one"
                reasons |= {id(weight_of(m)): reason for m in (*block.makers, block.reader)}
    return reasons


def _forms(kind: str) -> str:
    forms = ATTENTIONS if kind == "heads" else MLPS
    return "; ".join(", ".join((*makers, reader)) for makers, reader in forms)


def _number(wanted: float, count: int) -> int:
    return wanted if isinstance(wanted, int) else int(wanted * count)


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
    affected = {m for layer in layers for m in layer.modules() if is_linear(m)}
    affected.update(m for block in blocks for m in (*block.makers, block.reader))
    for name, module in model.named_modules():
        for key in ("weight", "bias") if module in affected else ():
            if (reason := why_computed(module, key)) is not None:
                raise PruneError(f"expected parameters to prune, found {name}.{key}, which is none: {reason}")
            value = module._parameters.get(key)
            if value is not None and not bool(torch.isfinite(value).all()):
                raise PruneError(
                    f"expected finite weights to prune, found NaN or infinity in {name}.{key}: repair the checkpoint"
                )


# ---- blocks ---------------------------------------------------------------------------------------------------------


def mlp_blocks(model: nn.Module) -> Iterator[Block]:
    """The MLPs of a model; a unit is one channel."""
    for name, makers, reader in _matching(model, MLPS):
        yield Block(name, makers, reader, columns(reader))


def attention_blocks(model: nn.Module) -> Iterator[Block]:
    """The attention layers of a model; a unit is one key/value head."""
    for name, makers, reader in _matching(model, ATTENTIONS):
        head_dim = getattr(model.get_submodule(name), "head_dim", None)
        if isinstance(head_dim, int) and rows(makers[1]) % head_dim == 0:
            yield Block(name, makers, reader, rows(makers[1]) // head_dim)


def _matching(
    model: nn.Module, forms: Sequence[tuple[Sequence[str], str]]
) -> Iterator[tuple[str, tuple[nn.Module, ...], nn.Module]]:
    for name, module in model.named_modules():
        children = dict(module.named_children())
        for makers, reader in forms:
            found = [children.get(child) for child in (*makers, reader)]
            if all(child is not None and is_linear(child) for child in found):
                linear = [child for child in found if child is not None]
                yield name, tuple(linear[:-1]), linear[-1]
                break


def weight_of(module: nn.Module) -> nn.Parameter:
    """The weight of a linear layer, as it keeps it."""
    weight = module._parameters["weight"]
    assert isinstance(weight, nn.Parameter)
    return weight


def rows(module: nn.Module) -> int:
    """The outputs of a linear layer."""
    return matrix(module).shape[0]


def columns(module: nn.Module) -> int:
    """The inputs of a linear layer."""
    return matrix(module).shape[1]


# ---- masks ----------------------------------------------------------------------------------------------------------


def _mask(masks: dict[int, Tensor], parameter: Tensor) -> Tensor:
    return masks.setdefault(id(parameter), torch.ones_like(parameter, dtype=torch.bool))


def _drop_units(masks: dict[int, Tensor], block: Block, units: Sequence[int]) -> None:
    for unit in units:
        for maker in block.makers:
            at = _slice(unit, rows(maker), block.count)
            _oriented(maker, _mask(masks, weight_of(maker)))[at] = False
            if (bias := maker._parameters.get("bias")) is not None:
                _mask(masks, bias)[at] = False
        reader = _oriented(block.reader, _mask(masks, weight_of(block.reader)))
        reader[:, _slice(unit, columns(block.reader), block.count)] = False


def _oriented(module: nn.Module, mask: Tensor) -> Tensor:
    return mask.t() if is_conv(module) else mask


def _slice(unit: int, size: int, count: int) -> slice:
    """Where a unit lies among `size` rows or columns."""
    return slice(unit * size // count, (unit + 1) * size // count)


def _drop_layer(masks: dict[int, Tensor], layer: nn.Module) -> None:
    for module in layer.modules():
        for parameter in module._parameters.values() if is_linear(module) else ():
            if parameter is not None:
                _mask(masks, parameter)[:] = False


# ---- what units are worth -------------------------------------------------------------------------------------------


def _worth(
    model: nn.Module,
    layers: Sequence[nn.Module],
    blocks: Sequence[Block],
    by: Structured,
    batches: Sequence[TokenBatch],
) -> Mapping[str, Tensor]:
    """The worth of every unit of every block, by the name of the block; of the layers as "layers"."""
    measure = {"magnitude": _by_magnitude, "activation": _by_activation, "taylor": _by_taylor}[by.criterion]
    return measure(model, layers, blocks, batches)


def _of_units(values: Tensor, count: int) -> Tensor:
    """Sums over each of `count` runs of equal length."""
    return values.view(count, -1).sum(1)


@torch.no_grad()
def _by_magnitude(
    model: nn.Module, layers: Sequence[nn.Module], blocks: Sequence[Block], batches: Sequence[TokenBatch]
) -> Mapping[str, Tensor]:
    """Sums of squares: of the rows and columns of a unit, of the matrices of a layer."""
    found = {}
    for block in blocks:
        made = [_of_units(matrix(m).float().square().sum(1), block.count) for m in block.makers]
        read = _of_units(matrix(block.reader).float().square().sum(0), block.count)
        found[block.name] = torch.stack([*made, read]).sum(0)
    sums = [sum(float(matrix(m).float().square().sum()) for m in layer.modules() if is_linear(m)) for layer in layers]
    return found | {"layers": torch.tensor(sums)}


@torch.no_grad()
def _by_activation(
    model: nn.Module, layers: Sequence[nn.Module], blocks: Sequence[Block], batches: Sequence[TokenBatch]
) -> Mapping[str, Tensor]:
    """Squares of what a unit adds to the output, without its signs; of a layer: 1 - cosine of its input and output."""
    squares: dict[str, Tensor] = {}
    turned = torch.zeros(len(layers))

    def watch(name: str) -> Callable[..., None]:
        def reached(module: nn.Module, args: tuple[Any, ...]) -> None:
            found = args[0].flatten(0, -2).float().square().sum(0)
            squares[name] = squares[name] + found if name in squares else found

        return reached

    def passed(index: int) -> Callable[..., None]:
        def made(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
            given = args[0] if args else kwargs["hidden_states"]
            after = result[0] if isinstance(result, tuple) else result
            turned[index] += float(1 - torch.cosine_similarity(given.float(), after.float(), dim=-1).mean())

        return made

    with evaluating(model), ExitStack() as hooks:
        for block in blocks:
            hooks.callback(block.reader.register_forward_pre_hook(watch(block.name)).remove)
        for index, layer in enumerate(layers):
            hooks.callback(layer.register_forward_hook(passed(index), with_kwargs=True).remove)
        for batch in batches:
            run_model(model, batch)
    found = {}
    for block in blocks:
        read = matrix(block.reader).float().square().sum(0)
        found[block.name] = _of_units(read * squares[block.name], block.count)
    return found | {"layers": turned}


def _by_taylor(
    model: nn.Module, layers: Sequence[nn.Module], blocks: Sequence[Block], batches: Sequence[TokenBatch]
) -> Mapping[str, Tensor]:
    """Sums over the batches of the square of what the loss would change by, to the first order."""
    found = {block.name: torch.zeros(block.count) for block in blocks} | {"layers": torch.zeros(len(layers))}
    readers = {id(block.reader): block for block in blocks}
    last = [[m for m in layer.modules() if is_linear(m)] for layer in layers]
    watched = {id(m): m for m in (*(b.reader for b in blocks), *(m for ms in last for m in ms))}
    weights = [weight_of(m) for m in watched.values()]
    wanted = [w.requires_grad for w in weights]
    try:
        with evaluating(model):
            for w in weights:
                w.requires_grad_(True)
            for batch in batches:
                gradients = torch.autograd.grad(_loss(model, batch), weights)
                by_module = dict(zip(watched, gradients, strict=True))
                for key, block in readers.items():
                    product = (weight_of(block.reader) * by_module[key]).detach().float()
                    along = (product.t() if is_conv(block.reader) else product).sum(0)
                    found[block.name] += _of_units(along, block.count).square().cpu()
                for index, modules in enumerate(last):
                    total = sum(float((weight_of(m) * by_module[id(m)]).detach().float().sum()) ** 2 for m in modules)
                    found["layers"][index] += total
    finally:
        for w, before in zip(weights, wanted, strict=True):
            w.requires_grad_(before)
    return found


def _loss(model: nn.Module, batch: TokenBatch) -> Tensor:
    logits = run_model(model, batch).logits
    ids = batch.ids.to(logits.device)
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
