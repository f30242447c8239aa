"""llmcomp/gradual.py: patterns, blocks and whole units, a few more at a time."""

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers import OPTConfig, OPTForCausalLM

from llmcomp.errors import PruneError
from llmcomp.masks import masks
from llmcomp.pruning import prune_
from llmcomp.pruning_schedule import PruningSchedule, cubic
from llmcomp.sparsity import NM, Block, Magnitude, Sparsity, Structured
from tests.quantizable import IDS, llama


def trained(model: nn.Module, schedule: PruningSchedule, steps: int) -> list[dict[str, Tensor]]:
    """What is zero after each step."""
    seen = []
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(IDS, labels=IDS).loss if hasattr(model, "config") else model(torch.ones(2, 32)).square().sum()
        loss.backward()
        optimizer.step()
        schedule.step()
        seen.append({name: p.detach() == 0 for name, p in model.named_parameters()})
    return seen


def matrices() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 64))


def share(zero: Tensor) -> float:
    return float(zero.float().mean())


def test_patterns_come_one_weight_of_a_group_after_the_other() -> None:
    model = matrices()
    seen = trained(model, schedule := PruningSchedule(model, "1:4", steps=8), 10)
    shares = [share(zero["0.weight"]) for zero in seen]
    assert shares[:8] == [int(cubic(i / 8, 0, 0.75) * 4 + 1e-9) / 4 for i in range(1, 9)] and shares[8:] == [0.75] * 2
    for zero in seen:
        groups = zero["0.weight"].unflatten(1, (-1, 4)).sum(-1)
        assert len(groups.unique()) == 1  # as many of each group
    assert schedule.report().pruned[0].by == NM(1, 4)


def test_the_last_of_a_pattern_goes() -> None:
    """1 / 49 * 49 is less than 1."""
    model = nn.Linear(49, 2)
    schedule = PruningSchedule(model, NM(48, 49), steps=1)
    schedule.step()
    assert (model.weight == 0).sum(1).tolist() == [1, 1]


def test_earlier_masks_hold() -> None:
    model = matrices()
    prune_(model, "2:4")
    seen = trained(model, PruningSchedule(model, Magnitude(0.25), steps=2), 4)
    assert [share(zero["0.weight"]) for zero in seen] == [0.5] * 4


def test_blocks() -> None:
    model = matrices()
    seen = trained(model, PruningSchedule(model, Block(0.5, 8, 8), steps=4), 5)
    for zero in seen:
        blocks = zero["1.weight"].unflatten(1, (-1, 8)).unflatten(0, (-1, 8)).float().mean((1, 3))
        assert set(blocks.unique().tolist()) <= {0.0, 1.0}
    assert [share(zero["0.weight"]) for zero in seen] == [int(cubic(i / 4, 0, 0.5) * 16) / 16 for i in (1, 2, 3, 4, 4)]


def test_all_matrices_together() -> None:
    model = matrices()
    with torch.no_grad():
        model[1].weight *= 0.01
    seen = trained(model, PruningSchedule(model, Magnitude(0.5, "global"), steps=3), 4)
    total = [int(z["0.weight"].sum() + z["1.weight"].sum()) for z in seen]
    assert total == [int(3072 * cubic(i / 3, 0, 0.5)) for i in (1, 2, 3, 3)]
    assert share(seen[-1]["1.weight"]) > 0.7 and share(seen[-1]["0.weight"]) < 0.1


@pytest.mark.parametrize(
    "spec", ["1:4", Block(0.5, 8, 8), Magnitude(0.5, "global"), Structured(heads=1, channels=0.25, layers=1)], ids=str
)
def test_what_is_zero_stays_zero(spec: Sparsity | str) -> None:
    model = llama().train() if isinstance(spec, Structured) else matrices()
    seen = trained(model, PruningSchedule(model, spec, steps=4), 6)
    for before, after in zip(seen, seen[1:], strict=False):
        for name in masks(model):
            assert not bool((before[name] & ~after[name]).any()), name
    zero = [sum(int(x.sum()) for x in step.values()) for step in seen]
    assert zero[0] < zero[-1]


# ---- units ----------------------------------------------------------------------------------------------------------


def test_channels_rise_to_the_target() -> None:
    model = llama().train()
    schedule = PruningSchedule(model, Structured(channels=0.25), steps=4, begin=1, every=2)
    seen = trained(model, schedule, 6)
    counts = [int(zero["model.layers.0.mlp.down_proj.weight"].all(0).sum()) for zero in seen]
    assert counts == [0, 0, (half := int(cubic(0.5, 0, 0.25) * 256)), half, 64, 64]
    last = seen[-1]
    for row in ("gate_proj", "up_proj"):
        rows = last[f"model.layers.1.mlp.{row}.weight"].all(1)
        assert torch.equal(rows, last["model.layers.1.mlp.down_proj.weight"].all(0)) and int(rows.sum()) == 64
    rows = schedule.report().pruned
    assert len(rows) == 6 and {row.by for row in rows} == {Structured(channels=0.25)}
    assert {row.sparsity for row in rows} == {0.25}


def test_it_ends_where_pruning_at_once_does() -> None:
    """Weights that nobody trains are worth the same at every step."""
    spec = Structured(heads=1, channels=0.5, layers=1)
    model, at_once = llama(), llama()
    schedule = PruningSchedule(model, spec, steps=5)
    for _ in range(5):
        schedule.step()
    prune_(at_once, spec)
    assert all(torch.equal(p, at_once.get_parameter(name)) for name, p in model.named_parameters())


def test_layers_go_whole() -> None:
    model = llama().train()
    seen = trained(model, schedule := PruningSchedule(model, Structured(layers=1), steps=4), 4)
    whole = [[bool(zero[f"model.layers.{i}.mlp.up_proj.weight"].all()) for i in (0, 1)] for zero in seen]
    assert whole[:3] == [[False, False]] * 3 and sum(whole[3]) == 1 and len(schedule.report().pruned) == 7


def test_biases_that_are_zero_are_free() -> None:
    config = OPTConfig(
        hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=300, word_embed_proj_dim=32
    )
    model = OPTForCausalLM(config).train()
    bias = model.model.decoder.layers[0].fc1.bias
    assert not bool(bias.any())
    trained(model, PruningSchedule(model, Structured(channels=0.5), steps=2), 3)
    assert int((bias == 0).sum()) == 32


def test_going_on_from_a_state() -> None:
    whole = llama().train()
    spec = Structured(channels=0.5, heads=1)
    first = copy.deepcopy(whole)
    trained(whole, schedule := PruningSchedule(whole, spec, steps=4), 4)
    half = PruningSchedule(first, spec, steps=4)
    half.step()
    half.step()
    again = llama()
    again.load_state_dict(first.state_dict())
    rest = PruningSchedule(again, spec, steps=4)
    rest.load_state_dict(half.state_dict())
    assert rest.count == 2 and masks(again).keys() == masks(first).keys()
    assert all(torch.equal(mask, masks(first)[name]) for name, mask in masks(again).items())
    rest.step()
    rest.step()
    assert rest.done and schedule.done
    assert [row.sparsity for row in rest.report().pruned] == [row.sparsity for row in schedule.report().pruned]


def test_refusals_leave_the_model_untouched() -> None:
    for spec, says in ((Structured(heads=2), "to stay"), (Structured(heads=0.1), "less than one")):
        model = llama()
        with pytest.raises(PruneError, match=says):
            PruningSchedule(model, spec, steps=3)
        assert not masks(model)
    model = llama()
    model.model.layers[0].mlp.up_proj.requires_grad_(False)
    with pytest.raises(PruneError, match="layers.0.mlp.up_proj.weight frozen"):
        PruningSchedule(model, Structured(channels=0.5), steps=3)
    assert not masks(model)
