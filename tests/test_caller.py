"""Arguments are read from the call of generate that is nearest, and there are none outside of one."""

from transformers import GenerationConfig

from llmcomp.caller import argument_of_generate
from tests.models import token_ids
from tests.test_generation import llama


def test_arguments_of_the_nearest_call() -> None:
    model, ids, seen = llama(), token_ids(1, 9, 0), []
    inner, outer = GenerationConfig(max_new_tokens=1), GenerationConfig(max_new_tokens=2)

    def note(*args: object, **kwargs: object) -> None:
        seen.append(argument_of_generate("inputs") is ids and argument_of_generate("generation_config").max_new_tokens)

    def nest(*args: object, **kwargs: object) -> None:
        model.generate(ids, inner, custom_generate=note)
        note()

    model.generate(ids, outer, custom_generate=nest)
    assert seen == [1, 2]
    assert argument_of_generate("inputs") is None
