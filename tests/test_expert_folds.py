"""Scales of what the second matrices of experts read, folded into the first."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import NemotronHConfig
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

from llmcomp.expert_calibration import Given
from llmcomp.expert_folds import multiplied_rows, scale_down
from llmcomp.formats import Int4, Int8
from llmcomp.quantized import QuantizedTensor
from llmcomp.sites import Site, experts
from tests.quantizable import gpt_oss, mixtral

I = 96  # noqa: E741  (what a second matrix reads)


def down(model: nn.Module) -> Site:
    return next(site for site in experts(model) if site.key == "down_proj")


class Gated(nn.Module):
    """Experts with a gate that a test chooses."""

    has_gate, is_transposed, has_bias = True, False, False

    def __init__(self, apply: Any) -> None:
        super().__init__()
        self.gate_up_proj, self._apply_gate = nn.Parameter(torch.zeros(1, 2 * I, 8)), apply


@pytest.mark.parametrize(
    "apply,rows",
    [
        (lambda x: x[..., :I].tanh() * x[..., I:], torch.arange(I, 2 * I)),
        (lambda x: x[..., I:].sigmoid() * x[..., :I], torch.arange(I)),
        (lambda x: x[..., 1::2] * torch.nn.functional.silu(x[..., ::2]), torch.arange(I) * 2 + 1),
        (lambda x: x[..., 1::2].relu() ** 2 * x[..., ::2], torch.arange(I) * 2),
        (lambda x: x[..., :I].tanh() * (x[..., I:] + 1), None),
        (lambda x: x[..., :I].tanh() * x[..., I:].clamp(-7, 7), None),
    ],
)
def test_rows_that_a_gate_only_multiplies_by(apply: Any, rows: Tensor | None) -> None:
    found = multiplied_rows(Given(Gated(apply)), I)
    assert (found is None) == (rows is None) and (rows is None or torch.equal(found, rows))


def test_gates_of_models() -> None:
    assert torch.equal(multiplied_rows(Given(down(mixtral()).holders[0]), I), torch.arange(I, 2 * I))
    assert multiplied_rows(Given(down(gpt_oss()).holders[0]), I) is None
    squares = NemotronHExperts(NemotronHConfig(hidden_size=64, n_routed_experts=4, moe_intermediate_size=I))
    assert multiplied_rows(Given(squares), I) is None


@pytest.mark.parametrize("biased", [False, True])
def test_experts_compute_what_they_did(biased: bool) -> None:
    site = down(mixtral(spread=0.15).requires_grad_(False))
    module, rows = site.holders[0], torch.randn(200, 64) * torch.logspace(-1, 1, 64)
    chosen = torch.tensor([[0, 1]] * 150 + [[1, 3]] * 48 + [[1, 2]] * 2)
    if biased:
        module.register_parameter("gate_up_proj_bias", nn.Parameter(torch.randn(4, 2 * I), requires_grad=False))
    given = Given(module, [rows], [chosen])
    before = [given.inputs("down_proj", e) @ site.matrices[e].t() for e in range(4)]
    weights = site.weight.clone()
    assert scale_down(site, Int4(group=32), given) == ""
    for expert in range(4):
        found = given.inputs("down_proj", expert) @ site.matrices[expert].t()
        torch.testing.assert_close(found, before[expert], rtol=1e-4, atol=1e-4)
    changed = [not torch.equal(a, b) for a, b in zip(weights, site.weight, strict=True)]
    assert changed == [True, True, False, True]  # two tokens are too few
    ratios = [(site.weight[e] / weights[e])[0] for e in (0, 1)]
    assert not torch.allclose(*ratios, rtol=0.01)


def test_reasons() -> None:
    site = down(gpt_oss())
    assert scale_down(site, Int8(), Given(site.holders[0])) == "its gate does more than multiply"
    site = down(mixtral())
    made = QuantizedTensor.quantize(site.holders[0].gate_up_proj.detach(), Int8())
    site.holders[0].gate_up_proj = nn.Parameter(made, requires_grad=False)
    assert scale_down(site, Int8(), Given(site.holders[0])) == "gate_up_proj is quantized already"
