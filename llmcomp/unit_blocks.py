"""Where the units of a decoder lie: which rows and columns of which parameters belong to a head or a channel.

    heads      key/value head j with the query heads that read it: rows of q, k, v, columns of o
    channels   channel c of an MLP: row c of what makes it (gate, up), column c of what reads it (down)

Layers are found by their names. Where several are one (q, k and v; gate and up), llmcomp/unit_layout.py finds out which
of its rows belong together.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmcomp.errors import PruneError
from llmcomp.sites import PROJECTIONS, Site, experts, is_conv, is_linear, matrix
from llmcomp.unit_layout import Between, Layout, layout, layouts

# The names that decoders of transformers give: what makes the channels, and what reads them.
MLPS = (
    (("gate_proj", "up_proj"), "down_proj"),
    (("up_proj",), "down_proj"),
    (("gate_up_proj",), "down_proj"),
    (("w1", "w3"), "w2"),
    (("fc1",), "fc2"),
    (("c_fc",), "c_proj"),
    (("dense_h_to_4h",), "dense_4h_to_h"),
)
ATTENTIONS = (
    *((("q_proj", "k_proj", "v_proj"), reader) for reader in ("o_proj", "out_proj", "dense")),
    (("c_attn",), "c_proj"),
    (("qkv_proj",), "o_proj"),
    (("qkv_proj",), "out_proj"),
    (("query_key_value",), "dense"),
    (("Wqkv",), "out_proj"),
)
Form = tuple[tuple[str, ...], str]


@dataclass(frozen=True)
class Part:
    """What units are of one matrix or bias: along `dim` of it, row i of `units` (count, each) belongs to unit i.

    It is the parameter `key` of a module, or what that holds for one expert.
    """

    module: nn.Module
    key: str
    dim: int
    units: Tensor
    expert: int | None = None

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter."""
        found = self.module._parameters[self.key]
        assert isinstance(found, nn.Parameter)
        return found

    def of(self, like: Tensor) -> Tensor:
        """The matrix or bias, of something like the parameter."""
        return like if self.expert is None else like[self.expert]

    def along(self, like: Tensor) -> Tensor:
        """Sums of something like the parameter, over all axes but `dim`."""
        found = self.of(like)
        return found.sum(1 - self.dim) if found.dim() == 2 else found

    def sums(self, along: Tensor) -> Tensor:
        """What numbers along `dim` sum to, unit by unit: (count,)."""
        return along[self.units.to(along.device)].sum(1)

    def drop(self, mask: Tensor, unit: int) -> None:
        """Set a unit to False in a mask of the parameter."""
        self.of(mask).index_fill_(self.dim, self.units[unit].to(mask.device), False)


@dataclass(frozen=True)
class Block:
    """Parameters that units go through: rows of `makers` and their `biases`, columns of the `reader`."""

    name: str
    makers: tuple[Part, ...]
    biases: tuple[Part, ...]
    reader: Part

    @property
    def count(self) -> int:
        """How many units."""
        return len(self.reader.units)

    @property
    def parts(self) -> tuple[Part, ...]:
        """All of it."""
        return *self.makers, *self.biases, self.reader


@dataclass(frozen=True)
class _Group:
    """Linear layers that may be a block, with the number of their units where it is known beforehand."""

    name: str
    module: nn.Module
    makers: tuple[nn.Module, ...]
    reader: nn.Module
    count: int | None


def mlp_blocks(model: nn.Module) -> list[Block]:
    """The MLPs of a model and of its experts; a unit is one channel.

    Raises:
        PruneError: gate and up are one layer, and how they lie in it can't be known.
    """
    groups = [_mlp(*found) for found in _matching(model, MLPS)]
    return [*_blocks(model, groups), *_expert_blocks(model)]


def attention_blocks(model: nn.Module) -> list[Block]:
    """The attention layers of a model; a unit is one key/value head.

    Raises:
        PruneError: queries, keys and values are one layer, and how they lie in it can't be known.
    """
    return _blocks(model, [group for found in _matching(model, ATTENTIONS) if (group := _attention(*found))])


def forms(kind: str) -> str:
    """The names that are known."""
    return "; ".join(", ".join((*makers, reader)) for makers, reader in (ATTENTIONS if kind == "heads" else MLPS))


def _matching(
    model: nn.Module, known: Sequence[Form]
) -> Iterator[tuple[str, nn.Module, tuple[nn.Module, ...], nn.Module]]:
    for name, module in model.named_modules():
        children = dict(module.named_children())
        for makers, reader in known:
            found = [children.get(child) for child in (*makers, reader)]
            if all(child is not None and is_linear(child) for child in found):
                linear = [child for child in found if child is not None]
                yield name, module, tuple(linear[:-1]), linear[-1]
                break


def _mlp(name: str, module: nn.Module, makers: tuple[nn.Module, ...], reader: nn.Module) -> _Group:
    width = matrix(reader).shape[1]
    return _Group(name, module, makers, reader, width if all(matrix(m).shape[0] == width for m in makers) else None)


def _attention(name: str, module: nn.Module, makers: tuple[nn.Module, ...], reader: nn.Module) -> _Group | None:
    if len(makers) == 1:
        return _Group(name, module, makers, reader, None)
    head_dim, keys = getattr(module, "head_dim", None), matrix(makers[1]).shape[0]
    whole = isinstance(head_dim, int) and keys % head_dim == 0
    return _Group(name, module, makers, reader, keys // head_dim) if isinstance(head_dim, int) and whole else None


def _blocks(model: nn.Module, groups: Sequence[_Group]) -> list[Block]:
    fused = [group for group in groups if group.count is None]
    between = [Between(g.name, g.module, g.makers[0], g.reader, *_sizes(g)) for g in fused]
    known = {id(group): found for group, found in zip(fused, layouts(model, between), strict=True)}
    return [_block(group, known.get(id(group))) for group in groups]


def _sizes(group: _Group) -> tuple[int, int]:
    return matrix(group.makers[0]).shape[0], matrix(group.reader).shape[1]


def _block(group: _Group, found: Layout | None) -> Block:
    def units(size: int) -> Tensor:
        assert group.count is not None
        return torch.arange(size).view(group.count, -1)

    rows = [units(matrix(m).shape[0]) if found is None else found.rows for m in group.makers]
    columns = units(matrix(group.reader).shape[1]) if found is None else found.columns
    makers = tuple(Part(m, "weight", int(is_conv(m)), at) for m, at in zip(group.makers, rows, strict=True))
    biases = tuple(Part(part.module, "bias", 0, part.units) for part in makers if _has(part.module, "bias"))
    return Block(group.name, makers, biases, Part(group.reader, "weight", int(not is_conv(group.reader)), columns))


def _has(module: nn.Module, key: str) -> bool:
    return isinstance(getattr(module, key, None), Tensor)


# ---- experts --------------------------------------------------------------------------------------------------------


def _expert_blocks(model: nn.Module) -> Iterator[Block]:
    """A block for each expert: they lose channels of their own."""
    by_module: dict[nn.Module, dict[str, Site]] = {}
    for site in experts(model):
        by_module.setdefault(site.holders[0], {})[site.key] = site
    for module, found in by_module.items():
        maker, reader = found.get("gate_up_proj", found.get("up_proj")), found.get("down_proj")
        if maker is not None and reader is not None:
            yield from _blocks_of_experts(module, maker, reader)


def _blocks_of_experts(module: nn.Module, maker: Site, reader: Site) -> Iterator[Block]:
    rows, columns = maker.matrix.shape[1], reader.matrix.shape[2]
    try:
        found = layout(_gate(module, maker), rows, columns)
    except PruneError as problem:
        raise PruneError(f"expected channels of {maker.name}, found that {problem}: prune by matrices") from problem
    bias, dim = f"{maker.key}_bias", int(maker.transposed)
    for expert in range(maker.weight.shape[0]):
        biases = (Part(module, bias, 0, found.rows, expert),) if _has(module, bias) else ()
        makers = (Part(module, maker.key, dim, found.rows, expert),)
        name = f"{reader.name.rpartition('.')[0]}.{expert}"
        yield Block(name, makers, biases, Part(module, reader.key, 1 - dim, found.columns, expert))


def _gate(module: nn.Module, maker: Site) -> Callable[[Tensor], Tensor]:
    """What experts make of what their first matrix gives, as llmcomp/unit_layout.py asks for it."""
    between = module._apply_gate if maker.key == "gate_up_proj" else module.act_fn
    assert callable(between)

    def reach(values: Tensor) -> Tensor:
        result = between(values.to(maker.weight))
        assert isinstance(result, Tensor)
        return result.isnan().cpu()

    return reach


def parameters_of(layer: nn.Module) -> list[tuple[nn.Module, str]]:
    """The parameters of the linear layers and experts of a layer: their modules, and what they are called there."""
    found = [(m, key) for m in layer.modules() if is_linear(m) for key in ("weight", "bias") if _has(m, key)]
    for module in {id(site.holders[0]): site.holders[0] for site in experts(layer)}.values():
        found += [(module, key) for p in PROJECTIONS for key in (p, f"{p}_bias") if _has(module, key)]
    return found
