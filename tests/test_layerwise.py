"""A walk through the layers of a decoder: what is watched, what goes on, how often a layer runs, what memory holds."""

import gc

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from llmcomp.errors import FormatError
from llmcomp.layerwise import layerwise
from tests.quantizable import llama

DATA = [torch.randint(0, 300, (2, 24), generator=torch.Generator().manual_seed(i)) for i in range(3)]


def inputs_of(model: nn.Module, module: nn.Module, data: list[Tensor]) -> Tensor:
    """Rows that a module is given when the model itself runs."""
    seen: list[Tensor] = []
    hook = module.register_forward_pre_hook(lambda m, args: seen.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        for ids in data:
            model(ids)
    hook.remove()
    return torch.cat(seen)


def test_each_layer_is_watched_on_what_the_changed_ones_before_it_give() -> None:
    model = llama(spread=0.2)
    watched: dict[str, list[Tensor]] = {}
    with layerwise(model, DATA) as steps:
        assert len(steps) == 2
        for step in steps:
            seen: list[Tensor] = []
            step.watch({step.layer.mlp.down_proj: seen.append})
            watched[step.linears[step.layer.mlp.down_proj]] = seen
            with torch.no_grad():
                step.layer.mlp.up_proj.weight.mul_(2)
    for layer in model.model.layers:  # what the walk changed after a layer was watched
        layer.mlp.up_proj.weight.data.div_(2 if layer is model.model.layers[1] else 1)
    exact = inputs_of(model, model.model.layers[1].mlp.down_proj, DATA)
    torch.testing.assert_close(torch.cat(watched["model.layers.1.mlp.down_proj"]), exact)
    assert not torch.equal(watched["model.layers.0.mlp.down_proj"][0], exact[:48])


def test_padding_is_never_seen() -> None:
    model = llama(spread=0.2)
    short, long = DATA[0][:1, :7], DATA[1][:1]
    ids, mask = torch.cat([torch.zeros_like(long), long]), torch.ones(2, 24, dtype=torch.long)
    ids[0, 17:], mask[0, :17] = short, 0

    def seen(batches: object) -> Tensor:
        rows: list[Tensor] = []
        with layerwise(model, batches) as steps:  # type: ignore[arg-type]
            for step in steps:
                step.watch({step.layer.mlp.down_proj: rows.append})
        return torch.cat(rows)

    assert torch.equal(seen([{"input_ids": ids, "attention_mask": mask}]), seen([short, long]))


def test_layers_run_no_more_than_they_have_to() -> None:
    model, runs = llama(), [0, 0]
    for i, layer in enumerate(model.model.layers):

        def count(*_: object, i: int = i) -> None:
            runs[i] += 1

        layer.self_attn.register_forward_hook(count)
    with layerwise(model, DATA) as steps:
        for step in steps:
            step.watch({module: lambda rows: None for module in step.linears})
    assert runs == [9, 3]  # to see how layers are called, to watch, for the outputs; the last: to watch
    assert not any(layer._forward_pre_hooks for layer in model.modules())


@pytest.mark.slow
def test_hidden_states_of_one_layer_are_in_memory() -> None:
    model, data = llama(), [torch.randint(0, 300, (1, 37)) for _ in range(8)]

    def living() -> int:
        gc.collect()
        tensors = (o for o in gc.get_objects() if isinstance(o, Tensor) and not is_lazy(o))  # of other tests
        return sum(t.shape == (1, 37, 128) for t in tensors)

    most = 0

    def note(*_: object) -> None:
        nonlocal most
        most = max(most, living())

    before = living()
    model.model.layers[1].mlp.register_forward_hook(note)
    with layerwise(model, data) as steps:
        for step in steps:
            step.watch({module: lambda rows: None for module in step.linears})
    assert before == 0 and 8 <= most <= 8 + 4  # the inputs of one layer, and what one call makes
    assert living() == 0


def test_the_model_is_as_it_was_after_an_error() -> None:
    model = llama().train()
    with pytest.raises(ZeroDivisionError), layerwise(model, DATA) as steps:
        next(iter(steps))
        assert not model.training
        raise ZeroDivisionError
    assert all(module.training for module in model.modules())


def test_layers_that_return_tuples() -> None:
    config = GPTNeoXConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    model = GPTNeoXForCausalLM(config).eval()
    rows: list[Tensor] = []
    module = model.gpt_neox.layers[1].mlp.dense_4h_to_h
    with layerwise(model, DATA) as steps:
        for step in steps:
            if module in step.linears:
                step.watch({module: rows.append})
    torch.testing.assert_close(torch.cat(rows), inputs_of(model, module, DATA))


def test_a_decoder_that_skips_a_layer_is_refused() -> None:
    class Skips(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

        def forward(self, ids: Tensor) -> Tensor:
            out: Tensor = self.layers[1](torch.ones(*ids.shape, 8))
            return out

    with pytest.raises(FormatError, match="every decoder layer"), layerwise(Skips(), DATA):
        pass
