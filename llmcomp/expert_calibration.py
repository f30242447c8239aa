"""Experts calibrated: each of their matrices on the rows that are routed to it.

    with watched(modules) as given:      experts(hidden (tokens, K), chosen (tokens, k), ...)  ->  kept as it is
        step.watch({})
    for each expert e:                   inputs of up[e]:   hidden of the tokens that chose e
                                         inputs of down[e]: what the gate makes of their products with up[e]

One second moment is there at a time: those of all experts would be many times the layer. An expert sees a part of the
data, and what a few rows have in common may be chance: codes that rely on it are worse than rounded ones. So moments
are shrunk to their diagonal, as Schaefer and Strimmer 2005 do ("A shrinkage approach to large-scale covariance matrix
estimation", section 2.4).
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn

from llmcomp.calibration_method import Method
from llmcomp.formats import Format, Packed
from llmcomp.moments import Moments, check_finite
from llmcomp.quantized import QuantizedTensor
from llmcomp.sites import Site, matrix, reading_key

DOWN = "down_proj"
FEW = 16  # inputs of a matrix for each row: with fewer rows it is rounded


@dataclass(frozen=True, eq=False)
class Given:
    """What a module of experts was given, call by call: rows (tokens, K), and which experts they chose (tokens, k)."""

    module: nn.Module
    rows: list[Tensor] = field(default_factory=list)
    chosen: list[Tensor] = field(default_factory=list)

    def inputs(self, key: str, expert: int) -> Tensor:
        """The rows that the matrix `key` of an expert multiplies, in the order of the data."""
        own = [rows[(chosen == expert).any(-1)] for rows, chosen in zip(self.rows, self.chosen, strict=True)]
        rows = torch.cat(own)
        return self._gated(rows, expert) if key == DOWN else rows

    def divide(self, scales: Tensor) -> None:
        """Take it that the rows were divided by these, one for each of K."""
        self.rows[:] = [(rows / scales).to(rows.dtype) for rows in self.rows]

    def gate(self, product: Tensor) -> Tensor:
        """What transformers' implementations of experts make of the first product for the second."""
        module = self.module
        result: Tensor = (module._apply_gate if module.has_gate else module.act_fn)(product)  # type: ignore[operator]
        return result

    def _gated(self, rows: Tensor, expert: int) -> Tensor:
        bias = getattr(self.module, f"{reading_key(self.module)}_bias", None)
        product = rows @ matrix(self.module)[expert].t()
        return self.gate(product if bias is None else product + bias[expert])


@contextmanager
def watched(modules: Iterable[nn.Module]) -> Iterator[Mapping[nn.Module, Given]]:
    """What modules of experts are given inside of this."""
    given = {module: Given(module) for module in modules}
    with ExitStack() as hooks:
        for module, seen in given.items():
            hook = module.register_forward_pre_hook(partial(_note, seen), with_kwargs=True)
            hooks.callback(hook.remove)
        yield given


def _note(seen: Given, module: nn.Module, args: tuple[Tensor, ...], kwargs: Mapping[str, Tensor]) -> None:
    rows, chosen = (*args, *kwargs.values())[:2]
    seen.rows.append(rows.flatten(0, -2).clone())
    seen.chosen.append(chosen.flatten(0, -2))


@torch.no_grad()
def quantized_experts(site: Site, form: Format, given: Given, method: Method) -> tuple[QuantizedTensor, str]:
    """The matrices of a site in a format; and of which experts they were rounded for want of rows, or nothing.

    Raises:
        FormatError: as `Method.codes`; an input is NaN or infinite.
    """
    found: list[Packed] = []
    rounded: list[int] = []
    for expert, weight in enumerate(site.matrices):
        moments = Moments.of(given.inputs(site.key, expert))
        check_finite(f"expert {expert} of {site.name}", moments)
        if not is_enough(moments, weight):
            rounded.append(expert)
        found.append(method.codes(weight, form, None if expert in rounded else shrunk(moments)))
    made = QuantizedTensor(stacked(found), form, site.weight.shape, site.weight.dtype, site.transposed)
    return made, _told(rounded, len(found), -(-site.matrix.shape[-1] // FEW)) if method.reads_data else ""


def is_enough(moments: Moments, weight: Tensor) -> bool:
    """Whether a matrix (N, K) of an expert got rows enough to be calibrated."""
    return moments.tokens * FEW >= weight.shape[1]


def shrunk(moments: Moments) -> Moments:
    """The same, what inputs have in common made less by the part of it that so many rows show by chance.

    That part is the variance of all correlations over their squares, between different inputs.
    """
    seen = moments.second.diagonal() > 0
    second = moments.second[seen][:, seen]
    sizes = second.diagonal().sqrt()
    squares = (second / sizes / sizes[:, None]).square().fill_diagonal_(1)
    variance = (1 - squares).square().sum() / max(moments.tokens, 1)
    part = (variance / (squares.sum() - len(squares)).clamp(min=1e-20)).clamp(max=1)
    return replace(moments, second=moments.second.lerp(moments.second.diagonal().diag(), float(part)))


def stacked(parts: list[Packed]) -> Packed:
    """The packed parts of several matrices as one."""
    zeros = [zero for packed in parts if (zero := packed.zero) is not None]
    scales = torch.stack([packed.scale for packed in parts])
    return Packed(torch.stack([packed.codes for packed in parts]), scales, torch.stack(zeros) if zeros else None)


def _told(rounded: list[int], count: int, least: int) -> str:
    if not rounded:
        return ""
    some = ", ".join(map(str, rounded[:8])) + (", ..." if len(rounded) > 8 else "")
    return f"{len(rounded)} of {count} experts were given fewer than {least} tokens: {some}"
