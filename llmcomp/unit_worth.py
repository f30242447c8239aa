"""What heads, channels and layers are worth: by their weights, by what they add on data, or by what the loss says."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from llmcomp.errors import PruneError
from llmcomp.layerwise import evaluating, run_model
from llmcomp.token_batches import TokenBatch
from llmcomp.unit_blocks import Block, parameters_of

Worth = Mapping[str, Tensor]
"""Of every unit of every block, by the name of the block; of the layers as "layers"."""


def worth_of(
    model: nn.Module,
    layers: Sequence[nn.Module],
    blocks: Sequence[Block],
    criterion: str,
    batches: Sequence[TokenBatch],
) -> Worth:
    """The worth of units by a criterion of llmcomp/sparsity.py.

    Raises:
        PruneError: it can't be measured.
    """
    if criterion == "magnitude":
        return _by_magnitude(layers, blocks)
    return (_by_activation if criterion == "activation" else _by_taylor)(model, layers, blocks, batches)


def _weights(layer: nn.Module) -> list[nn.Parameter]:
    """The matrices of a layer."""
    found = [module._parameters[key] for module, key in parameters_of(layer)]
    return [p for (_, key), p in zip(parameters_of(layer), found, strict=True) if p is not None and "bias" not in key]


@torch.no_grad()
def _by_magnitude(layers: Sequence[nn.Module], blocks: Sequence[Block]) -> Worth:
    """Sums of squares: of the rows and columns of a unit, of the matrices of a layer."""
    found = {block.name: _magnitude(block) for block in blocks}
    sums = [sum(float(weight.float().square().sum()) for weight in _weights(layer)) for layer in layers]
    return found | {"layers": torch.tensor(sums)}


@torch.no_grad()
def _magnitude(block: Block) -> Tensor:
    parts = (*block.makers, block.reader)
    return torch.stack([p.sums(_squares(p.of(p.parameter), 1 - p.dim)) for p in parts]).sum(0)


def _squares(matrix: Tensor, dim: int) -> Tensor:
    """Sums of squares over one axis."""
    return matrix.float().square().sum(dim)


@torch.no_grad()
def _by_activation(
    model: nn.Module, layers: Sequence[nn.Module], blocks: Sequence[Block], batches: Sequence[TokenBatch]
) -> Worth:
    """Squares of what a unit adds to the output, without its signs; of a layer: 1 - cosine of its input and output."""
    if experts := [block.name for block in blocks if block.reader.expert is not None]:
        raise PruneError(
            f"expected channels whose activations can be seen, found experts ({experts[0]}), whose inputs stay within: "
            'choose them by criterion="magnitude" or "taylor"'
        )
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
            hooks.callback(block.reader.module.register_forward_pre_hook(watch(block.name)).remove)
        for index, layer in enumerate(layers):
            hooks.callback(layer.register_forward_hook(passed(index), with_kwargs=True).remove)
        for batch in batches:
            run_model(model, batch)
    found = {}
    for block in blocks:
        read = _squares(block.reader.parameter, 1 - block.reader.dim)
        found[block.name] = block.reader.sums(read * squares[block.name])
    return found | {"layers": turned}


def _by_taylor(
    model: nn.Module, layers: Sequence[nn.Module], blocks: Sequence[Block], batches: Sequence[TokenBatch]
) -> Worth:
    """Sums over the batches of the square of what the loss would change by, to the first order.

    Experts that no token reaches are measured by magnitude.
    """
    found = {block.name: torch.zeros(block.count) for block in blocks} | {"layers": torch.zeros(len(layers))}
    of_layers = [_weights(layer) for layer in layers]
    watched = {id(w): w for w in (*(b.reader.parameter for b in blocks), *(w for ws in of_layers for w in ws))}
    wanted = [w.requires_grad for w in watched.values()]
    try:
        with evaluating(model), torch.enable_grad():
            for w in watched.values():
                w.requires_grad_(True)
            for batch in batches:
                every = list(watched.values())  # those that the loss does not see are worth nothing
                gradients = torch.autograd.grad(_loss(model, batch), every, allow_unused=True, materialize_grads=True)
                pairs = zip(watched.items(), gradients, strict=True)
                changes = {key: (w * gradient).detach().float() for (key, w), gradient in pairs}
                for block in blocks:
                    along = block.reader.along(changes[id(block.reader.parameter)])
                    found[block.name] += block.reader.sums(along).square().cpu()
                for index, weights in enumerate(of_layers):
                    found["layers"][index] += sum(float(changes[id(w)].sum()) ** 2 for w in weights)
    finally:
        for w, before in zip(watched.values(), wanted, strict=True):
            w.requires_grad_(before)
    unseen = [block for block in blocks if not bool(found[block.name].any())]
    return found | {block.name: _magnitude(block) for block in unseen}


def _loss(model: nn.Module, batch: TokenBatch) -> Tensor:
    logits = run_model(model, batch).logits
    ids = batch.ids.to(logits.device)
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
