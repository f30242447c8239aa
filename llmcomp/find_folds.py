"""Which scales of channels can be folded away in a decoder layer, whatever its architecture: found by trying them.

    one run of the layer      which linear layers, routers and experts read what a norm gives, and which run first
    candidates                norm -> its readers; linear -> the reader behind it, by the layouts that fused and grouped
                              projections have
    one run for each          with its scales, powers of two: do the readers read what they should, and is what the
                              layer gives the same?

With powers of two every product is the same number, so a right fold leaves no rounding to tell from a wrong one.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from llmcomp.folding import Fold, Form, fold, restored
from llmcomp.layerwise import Step
from llmcomp.quantized import QuantizedTensor
from llmcomp.sites import has_experts, is_linear, matrix, reading_key

TOLERANCE = 1e-4  # of the norm of what the layer adds: kernels that give other roundings from run to run
UNSCALED = "what it reads does not scale with"

Key = tuple[int, int, int]


@dataclass(frozen=True)
class Folds:
    """The folds of a layer, and why modules that were asked about are in none."""

    found: tuple[Fold, ...]
    reasons: Mapping[nn.Module, str]


@dataclass
class _Run:
    """What one run of a layer showed. Tensors are kept, so that no two share an address."""

    result: Tensor
    inputs: dict[nn.Module, Tensor] = field(default_factory=dict)  # of what multiplies them, as it ran
    outputs: dict[Key, nn.Module] = field(default_factory=dict)  # of modules with one weight for each channel
    kept: list[Tensor] = field(default_factory=list)


@torch.no_grad()
def find_folds(step: Step, wanted: Sequence[nn.Module]) -> Folds:
    """Folds whose readers are among `wanted`, linear modules and experts of the step's layer, and other modules that
    read the same.

    Runs the layer on its smallest batch a few times.
    """
    run = _run(step)
    found: list[Fold] = []
    reasons: dict[nn.Module, str] = {}
    for norm, readers in _norms(run).items():
        if not any(r in wanted for r in readers):
            continue
        channels = torch.arange(run.inputs[readers[0]].shape[-1], device=run.result.device)
        candidates = [Fold(norm, form, channels, channels, readers) for form in (Form.SCALE, Form.ONE_PLUS)]
        _settle(step, run, candidates, readers, found, reasons)
    for reader in wanted:
        if reader in run.inputs and reader not in reasons and not any(reader in f.readers for f in found):
            _settle(step, run, list(_linear_candidates(step, run, reader)), (reader,), found, reasons)
    unreached = {m: "no token of the smallest batch reaches it" for m in wanted if m not in run.inputs}
    return Folds(tuple(found), {m: why for m, why in (reasons | unreached).items() if m in wanted})


def _settle(
    step: Step,
    run: _Run,
    candidates: Sequence[Fold],
    readers: Sequence[nn.Module],
    found: list[Fold],
    reasons: dict[nn.Module, str],
) -> None:
    """Note the first of the candidates that is right, or why none is."""
    problems: list[str] = []
    for candidate in candidates:
        problems.append(_problem(step, run, candidate))
        if not problems[-1]:
            found.append(candidate)
            return
    telling = [why for why in problems if not why.startswith(UNSCALED)]
    reasons.update(dict.fromkeys(readers, (*telling, *problems, "nothing before it gives its channels one by one")[0]))


def _run(step: Step) -> _Run:
    call, states = min(step.inputs(), key=lambda pair: pair[1].shape[:-1].numel())
    run = _Run(torch.empty(0))
    hooks = []

    def product(module: nn.Module, args: tuple[Tensor, ...], kwargs: Mapping[str, Tensor], _: object) -> None:
        given = args[0] if args else next(iter(kwargs.values()))
        if given.shape[-1] != matrix(module).shape[-1]:
            return
        run.inputs[module] = torch.cat([run.inputs[module], given]) if module in run.inputs else given

    def norm(module: nn.Module, args: object, output: object) -> None:
        if isinstance(output, Tensor):
            run.outputs[_key(output)] = module
            run.kept.append(output)

    for module in step.layer.modules():
        if _multiplies(module):
            hooks.append(module.register_forward_hook(product, with_kwargs=True))
        elif isinstance(weight := module._parameters.get("weight"), Tensor) and weight.dim() == 1:
            hooks.append(module.register_forward_hook(norm))
    try:
        result = call.run(step.layer, states)
    finally:
        for hook in hooks:
            hook.remove()
    run.result = (result[0] if isinstance(result, tuple) else result) - states
    return run


def _multiplies(module: nn.Module) -> bool:
    """Whether a module multiplies what it is given by a matrix, or seems to: experts and routers among them."""
    weight = module._parameters.get("weight")
    is_matrix = isinstance(weight, Tensor) and weight.dim() == 2 and not isinstance(module, nn.Embedding)
    return is_matrix or is_linear(module) or has_experts(module)


def _key(values: Tensor) -> Key:
    return values.data_ptr(), values.numel(), values.shape[-1]


def _norms(run: _Run) -> dict[nn.Module, tuple[nn.Module, ...]]:
    """The norms whose outputs are multiplied, and what does it."""
    readers: dict[nn.Module, tuple[nn.Module, ...]] = {}
    for module, given in run.inputs.items():
        if (norm := run.outputs.get(_key(given))) is not None:
            readers[norm] = (*readers.get(norm, ()), module)
    return readers


def _linear_candidates(step: Step, run: _Run, reader: nn.Module) -> Iterator[Fold]:
    """The linear layers that ran just before `reader` on one input, the last first, with every layout that fits."""
    ran = list(run.inputs)
    before = [module for module in ran[: ran.index(reader)] if is_linear(module)]
    others = [m for m in reversed(before) if _key(run.inputs[m]) != _key(run.inputs[reader])]
    siblings = [m for m in others if _key(run.inputs[m]) == _key(run.inputs[others[0]])]
    columns = run.inputs[reader].shape[-1]
    for source in siblings:
        for rows, channels in _layouts(matrix(source).shape[0], columns, _head_size(step, columns)):
            place = run.result.device
            yield Fold(source, Form.ROWS, rows.to(place), channels.to(place), (reader,))


def _layouts(outputs: int, columns: int, head: int | None) -> Iterator[tuple[Tensor, Tensor]]:
    """How `columns` channels may lie among the outputs of a linear layer: (rows of channels, channel of each column).

    One for one; the second or first half of a fused gate and up; values of grouped heads; values fused with queries
    and keys, behind them or with the queries and the key of each group.
    """
    each = torch.arange(columns)
    if outputs == columns:
        yield each, each
    if outputs == 2 * columns:
        yield each + columns, each
        yield each, each
    if head is None or columns % head:
        return
    heads = columns // head
    groups = [g for g in range(1, heads + 1) if heads % g == 0]
    for g in groups:
        within = torch.arange(head)
        channels = ((torch.arange(heads) // (heads // g)) * head)[:, None] + within
        if outputs == g * head and g < heads:
            yield torch.arange(g * head), channels.flatten()
        if outputs == (heads + 2 * g) * head:
            yield torch.arange(g * head) + (heads + g) * head, channels.flatten()
            first = (torch.arange(g) * (heads // g + 2) + heads // g + 1) * head
            yield (first[:, None] + within).flatten(), channels.flatten()


def _head_size(step: Step, columns: int) -> int | None:
    """The channels of a head of attention, where the model's configuration says it."""
    config = getattr(step.walk.model, "config", None)
    config = getattr(config, "get_text_config", lambda: config)()
    size, heads = getattr(config, "head_dim", None), getattr(config, "num_attention_heads", None)
    if isinstance(size, int):
        return size
    return columns // heads if isinstance(heads, int) and heads else None


def _problem(step: Step, run: _Run, candidate: Fold) -> str:
    """What is wrong with a fold, or nothing."""
    names = step.walk.names
    owned = {id(p) for m in candidate.modules for p in m._parameters.values() if p is not None}
    for module, name in names.items():
        if module in candidate.modules:
            weight = module._parameters.get(reading_key(module))
            if isinstance(weight, QuantizedTensor):
                return f"{name} is quantized already"
            if weight is None:
                return f"{name} has a weight that is computed"
        elif any(id(p) in owned for p in module._parameters.values()):
            return f"{name} shares a weight with it"
    generator = torch.Generator().manual_seed(0)
    powers = torch.randint(0, 2, (len(candidate.rows),), generator=generator) * 2 - 1  # 1/2 and 2
    with restored(candidate):
        if candidate.form is Form.ONE_PLUS and isinstance(weight := candidate.source.weight, Tensor):
            candidate.source.weight = nn.Parameter(weight.float() if weight.dtype != torch.float64 else weight.clone())
        taken = fold(candidate, 2.0 ** powers.to(run.result.device))
        after = _run(step)
    for reader in candidate.readers:
        if reader not in after.inputs or not _same(
            after.inputs[reader] * taken[candidate.channels], run.inputs[reader]
        ):
            return f"{UNSCALED} what {names[candidate.source]} gives"
    if not _same(after.result, run.result):
        return f"something else reads what {names[candidate.source]} gives"
    return ""


def _same(found: Tensor, expected: Tensor) -> bool:
    off = float((found.double() - expected.double()).norm())
    return found.shape == expected.shape and off <= TOLERANCE * float(expected.double().norm())
