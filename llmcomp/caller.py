"""Arguments of transformers' `generate` that it keeps from a custom_generate function.

    model.generate(ids, streamer=s, custom_generate=f)   ->   f(model, ids, ...), without s

Transformers hands such a function its prepared inputs, and neither the streamer nor the assistant model. A loop that
does not know them streams nothing, and says nothing. They are read from the call itself, by their public names.
"""

import inspect

from transformers import GenerationMixin


def argument_of_generate(name: str) -> object:
    """The argument `name` of the call of transformers' `generate` that we are in; None outside of one."""
    code = inspect.unwrap(GenerationMixin.generate).__code__
    frame = inspect.currentframe()
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return None if frame is None else frame.f_locals.get(name)
