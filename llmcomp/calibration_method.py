"""What `llmcomp.calibrate` does to a layer: scales that are folded away before, and how codes are found.

method              scales                               codes
gptq                                                     GPTQ
awq                 AWQ                                  rounded, of weights that AWQ clips
smoothquant         SmoothQuant, of dynamic formats      rounded
awq+gptq            AWQ                                  GPTQ
smoothquant+gptq    SmoothQuant, of dynamic formats      GPTQ
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmcomp.awq import awq_scales, clipped
from llmcomp.errors import OptionError
from llmcomp.folding import Fold
from llmcomp.formats import Format, Packed
from llmcomp.gptq import gptq
from llmcomp.moments import Moments
from llmcomp.sites import matrix
from llmcomp.smoothquant import smoothing_scales

METHODS = ("gptq", "awq", "smoothquant", "awq+gptq", "smoothquant+gptq")


@dataclass(frozen=True)
class Method:
    """One of METHODS with its numbers: `damping` of GPTQ, `alpha` of SmoothQuant (searched for if None).

    Raises:
        OptionError: there is no such method, or a number is out of range.
    """

    name: str
    damping: float = 0.01
    alpha: float | None = None

    def __post_init__(self) -> None:
        if self.name not in METHODS:
            raise OptionError(f"expected a method of calibration, one of {', '.join(METHODS)}, found {self.name!r}")
        if not 0 <= (self.alpha or 0) <= 1 or not self.damping >= 0:
            raise OptionError(
                f"expected alpha from 0 to 1 and a damping of 0 or more, found {self.alpha} and {self.damping}: leave "
                "them out, most models are served so"
            )

    def check(self, formats: Collection[Format]) -> None:
        """Refuse formats that the method can do nothing for.

        Raises:
            OptionError: SmoothQuant is to calibrate weights none of which meets quantized activations.
        """
        if self._smooths and not any(form.dynamic for form in formats):
            raise OptionError(
                f"expected formats that quantize activations for {self.name}, found "
                f'{", ".join(sorted(set(map(str, formats)))) or "none"}: pass "int8_dynamic", or the method "awq"'
            )

    @property
    def reads_data(self) -> bool:
        """Whether codes are other than those of rounding."""
        return self.name != "smoothquant"

    @property
    def scales_experts(self) -> bool:
        """Whether what the second matrices of experts read is scaled."""
        return self.name.startswith("awq")

    @property
    def _smooths(self) -> bool:
        return self.name.startswith("smoothquant")

    def scaled(self, formats: Mapping[nn.Module, Format]) -> list[nn.Module]:
        """The modules whose inputs may be scaled."""
        if self.name == "gptq":
            return []
        return [m for m, form in formats.items() if form.dynamic or not self._smooths]

    def scales(self, fold: Fold, formats: Mapping[nn.Module, Format], moments: Moments) -> Tensor:
        """Scales for the channels of a fold, whose readers in `formats` will be quantized.

        Powers of two where a reader stays as it is in a half precision: those lose nothing.
        """
        readers = [r for r in fold.readers if r in formats]
        weights, forms = [matrix(r).detach().float().flatten(0, -2) for r in readers], [formats[r] for r in readers]
        if self._smooths:
            found = smoothing_scales(weights, forms, moments, fold.channels, self.alpha)
        else:
            found = awq_scales(weights, forms, moments, fold.channels)
        exact = all(r in formats or matrix(r).dtype in (torch.float32, torch.float64) for r in fold.readers)
        return found if exact else torch.exp2(found.log2().round())

    def codes(self, weight: Tensor, form: Format, moments: Moments | None) -> Packed:
        """The codes of a matrix (N, K), rounded where it saw no data."""
        if moments is None:
            return form.quantize(weight)
        if self.name.endswith("gptq"):
            return gptq(weight, moments.second, form, self.damping)
        return form.quantize(clipped(weight, form, moments.second) if self.name == "awq" else weight)
