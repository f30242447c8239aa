"""What `prune_` may be asked for: frozen values that say how many weights go, and by what they are chosen.

    Magnitude(0.5)                    half of the weights of each matrix, the smallest
    Magnitude(0.5, scope="global")    half of the weights of all matrices together
    NM(2, 4)                          2 of every 4 neighbours along k stay; also criterion="wanda", "sparsegpt"
    Block(0.5, height=32, width=32)   half of the blocks of 32 rows and 32 neighbours along k: those of least magnitude
    Wanda(0.5)                        of each row those that move the output least: |w| times the norm of its input
    SparseGPT(0.5)                    by their error in the output, which the weights that stay make up for
    Structured(channels=0.25)         channels of MLPs, heads of attention, layers: all that belongs to one
    Movement(0.5)                     those that fine-tuning moves towards zero
    Zeros()                           what is zero already, for a model that was pruned and saved before

Wanda: Sun et al. 2023 (arXiv:2306.11695). SparseGPT: Frantar and Alistarh 2023 (arXiv:2301.00774).
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from llmcomp.errors import OptionError

SCOPES = ("tensor", "global")
CRITERIA = ("magnitude", "wanda", "sparsegpt")
UNIT_CRITERIA = ("magnitude", "activation", "taylor")


@dataclass(frozen=True)
class Sparsity:
    """What all of them share. `needs_data`: batches of token ids are needed to choose."""

    @property
    def needs_data(self) -> bool:
        return False


@dataclass(frozen=True)
class Part(Sparsity):
    """A part `sparsity` of the weights, in [0, 1)."""

    sparsity: float = 0.5

    def __post_init__(self) -> None:
        require_fraction("sparsity", self.sparsity)


@dataclass(frozen=True)
class Magnitude(Part):
    """The part `sparsity` of smallest magnitude, of each matrix or of all that this value prunes together."""

    scope: str = "tensor"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_one_of("scope", self.scope, SCOPES)


@dataclass(frozen=True)
class NM(Sparsity):
    """`n` of every `m` neighbours along k stay."""

    n: int = 2
    m: int = 4
    criterion: str = "magnitude"

    def __post_init__(self) -> None:
        whole = all(isinstance(x, int) and not isinstance(x, bool) for x in (self.n, self.m))
        if not whole or not 0 < self.n < self.m:
            raise OptionError(
                f"expected n of m weights to stay with 0 < n < m, found {self.n!r}:{self.m!r}: pass NM(2, 4)"
            )
        require_one_of("criterion", self.criterion, CRITERIA)

    @property
    def needs_data(self) -> bool:
        return self.criterion != "magnitude"

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"


@dataclass(frozen=True)
class Block(Part):
    """The part `sparsity` of the blocks of each matrix, `height` outputs by `width` inputs, whose weights are smallest
    on average; Block(0.5, 1, 64) takes runs of 64 out of each row by themselves.
    """

    height: int = 32
    width: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in (("height", self.height), ("width", self.width)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise OptionError(
                    f"expected the {name} of blocks to be a whole number of weights, found {value!r}: pass 32"
                )


@dataclass(frozen=True)
class Wanda(Part):
    """The part `sparsity` of every row whose product with the norm of their input over the data is smallest."""

    @property
    def needs_data(self) -> bool:
        return True


@dataclass(frozen=True)
class SparseGPT(Part):
    """The part `sparsity` whose removal costs least; `damping` times its mean is added to the moment's diagonal."""

    damping: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        number = isinstance(self.damping, int | float) and not isinstance(self.damping, bool)
        if not number or not 0 <= self.damping < math.inf:
            raise OptionError(f"expected damping to be a number from 0 on, found {self.damping!r}: pass 0.01")

    @property
    def needs_data(self) -> bool:
        return True


@dataclass(frozen=True)
class Structured(Sparsity):
    """Whole units: key/value heads of attention with the query heads that read them, channels of MLPs, layers.

    `heads` and `channels` are a part of each layer's, or a whole number of them; `layers` is a number. Each is chosen
    by the size of its weights ("magnitude"), of what it adds to the output of its layer ("activation"; a layer: by how
    little it turns the hidden states, as ShortGPT does, arXiv:2403.03853), or of what the loss would change by, to the
    first order ("taylor", Molchanov et al. 2019, arXiv:1906.10771).
    """

    heads: float = 0.0
    channels: float = 0.0
    layers: int = 0
    criterion: str = "magnitude"

    def __post_init__(self) -> None:
        for name, value in (("heads", self.heads), ("channels", self.channels)):
            if not isinstance(value, int) or isinstance(value, bool):
                require_fraction(name, value)
            elif value < 0:
                raise OptionError(
                    f"expected {name} to be a number of them, found {value}: pass 1, or a part such as 0.25"
                )
        if not isinstance(self.layers, int) or isinstance(self.layers, bool) or self.layers < 0:
            raise OptionError(
                f"expected layers to be a whole number of layers to remove, found {self.layers!r}: pass 1"
            )
        if not (self.heads or self.channels or self.layers):
            raise OptionError(
                "expected heads, channels or layers to remove, found none: pass channels=0.25, for example"
            )
        require_one_of("criterion", self.criterion, UNIT_CRITERIA)

    @property
    def needs_data(self) -> bool:
        return self.criterion != "magnitude"


@dataclass(frozen=True)
class Movement(Part):
    """The part `sparsity` that training moves towards zero most (Sanh et al. 2020, arXiv:2005.07683), of each matrix.

    For `llmcomp.PruningSchedule`: what a weight is worth is the sum over all steps of -weight * gradient, also while it
    is pruned; it comes back with the value that it had.
    """


@dataclass(frozen=True)
class Zeros(Sparsity):
    """Weights that are zero stay zero."""


def require_fraction(name: str, value: object) -> None:
    """Refuse what is no part of a whole.

    Raises:
        OptionError: `value` is not a number in [0, 1).
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise OptionError(f"expected {name} in [0, 1), found {value!r}: 0.5 removes half")


def require_one_of(name: str, value: object, names: Sequence[str]) -> None:
    """Refuse a name that is not known.

    Raises:
        OptionError: lists the names.
    """
    if value not in names:
        raise OptionError(f"expected {name} to be one of {', '.join(names)}, found {value!r}: pass one of these")


def parse_sparsity(name: str) -> Sparsity:
    """What a name asks for: "2:4", "4:8" (n of m stay), or a number such as "50%" (of each matrix, by magnitude).

    Raises:
        OptionError: it is neither.
    """
    if found := re.fullmatch(r"(\d+):(\d+)", name):
        return NM(int(found[1]), int(found[2]))
    if found := re.fullmatch(r"(\d+(?:\.\d+)?)%", name):
        return Magnitude(float(found[1]) / 100)
    raise OptionError(
        f'expected a way of pruning, found {name!r}: pass "2:4", "50%", or a value such as llmcomp.Wanda(0.5)'
    )
