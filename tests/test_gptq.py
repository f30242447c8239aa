"""GPTQ: less error than rounding where inputs are correlated, the same codes where they are not."""

import pytest
import torch

from llmcomp.errors import FormatError
from llmcomp.formats import Int4, Int8, names, parse_format
from llmcomp.gptq import gptq


def correlated(rows: int, columns: int) -> torch.Tensor:
    """Inputs of which a few directions hold most: what activations of a model are like."""
    return torch.randn(rows, columns // 8) @ torch.randn(columns // 8, columns) + 0.1 * torch.randn(rows, columns)


@pytest.mark.parametrize("name", [n for n in names() if not n.startswith(("int8", "fp8"))] + ["int8", "fp8"])
def test_products_are_nearer_than_those_of_rounded_weights(name: str) -> None:
    form, x, weight = parse_format(name), correlated(2000, 256), torch.randn(32, 256) * 0.02
    exact = x @ weight.t()

    def error(packed: object) -> float:
        return float((x @ form.dequantize(packed, 256, torch.float32).t() - exact).norm())  # type: ignore[arg-type]

    assert error(gptq(weight, x.t() @ x, form)) < 0.7 * error(form.quantize(weight))


@pytest.mark.parametrize("form", [Int8(), Int4(64), Int4(32, symmetric=True)])
def test_independent_inputs_leave_nothing_to_make_up_for(form: Int8 | Int4) -> None:
    weight = torch.randn(8, 128)
    ours, rounded = gptq(weight, 3.0 * torch.eye(128), form), form.quantize(weight)
    assert torch.equal(ours.codes, rounded.codes) and torch.equal(ours.scale, rounded.scale)
    assert (ours.zero is None) == (rounded.zero is None)


def test_inputs_that_are_always_zero() -> None:
    x = correlated(500, 128)
    x[:, :7] = 0
    packed = gptq(torch.randn(4, 128), x.t() @ x, Int4(32))
    assert bool(torch.isfinite(Int4(32).dequantize(packed, 128, torch.float32)).all())


def test_what_a_format_can_not_hold_is_refused() -> None:
    with pytest.raises(FormatError, match="multiple of the group"):
        gptq(torch.randn(4, 100), torch.eye(100), Int4(32))


def test_errors_reach_the_columns_of_later_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    form, first, weight = Int8(), torch.randn(2000, 128), torch.randn(32, 256)
    x = torch.cat([first, first + 0.05 * torch.randn(2000, 128)], 1)  # what one block loses the other can give back
    blocks = gptq(weight, x.t() @ x, form)
    monkeypatch.setattr("llmcomp.gptq.BLOCK", 256)
    whole = gptq(weight, x.t() @ x, form)
    assert float((blocks.codes == whole.codes).float().mean()) > 0.99
