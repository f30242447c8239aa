"""`llmcomp.train_quantized_`: a model is trained with the weights that `quantize_` will give it.

llmcomp.train_quantized_(model, "int4_g32")     # the weights are rounded now, and after every step of an optimizer
... train ...                                   # llmcomp/latents.py: gradients pass straight through
llmcomp.quantize_(model, "int4_g32")            # exactly the values that it was trained with
"""

from torch import nn

from llmcomp.errors import OptionError
from llmcomp.formats import Format, packed_bytes
from llmcomp.latents import train_latent
from llmcomp.quantization import Quantization, Row, Spec, check_site, left_alone, planned
from llmcomp.sites import Site
from llmcomp.torchao_weights import is_torchao


def train_quantized_(model: nn.Module, spec: Spec) -> Quantization:
    """Let weights of `model` be what `spec` (as for `quantize_`) makes of them while it is trained by any optimizer of
    torch; returns what will become of each. Masks of `prune_` go on to hold: call it before or after.

    `state_dict` has the float values that are trained. `quantize_` with the same spec ends the training.

    Raises:
        OptionError: an unknown format, a pattern that no module matches, or a format of which activations are
            quantized, which training does not do.
        FormatError: as `quantize_`. The model is then as it was.
    """
    plans = [_trainable(*plan) for plan in planned(model, spec)]
    for site, form, _ in plans:
        if form is not None and form.dynamic:
            raise OptionError(f"expected a format of weights to train in, found {form}: train in {form.stem}")
        if form is not None:
            check_site(site, form)
    return Quantization(tuple(_train(*plan) for plan in plans))


def _trainable(site: Site, form: Format | None, reason: str) -> tuple[Site, Format | None, str]:
    if form is not None and is_torchao(site.weight):
        return site, None, "torchao quantized it"
    if form is not None and site.is_experts:
        return site, None, "experts are trained as floats"
    return site, form, reason


def _train(site: Site, form: Format | None, reason: str) -> Row:
    if form is None:
        return left_alone(site, reason)
    train_latent(site.holders, form, site.transposed)
    return Row(site.name, tuple(site.weight.shape), form, "", site.weight.nbytes, packed_bytes(form, site.matrix.shape))
