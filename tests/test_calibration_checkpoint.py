"""A calibration that was interrupted goes on from its finished layers, to the same result."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

import llmcomp
from llmcomp import calibration
from llmcomp.errors import OptionError
from llmcomp.quantized import QuantizedTensor
from tests.quantizable import llama

DATA = [torch.randint(0, 300, (2, 24), generator=torch.Generator().manual_seed(i)) for i in range(2)]
SPEC = {"*.self_attn.*": "int4", "*.mlp.*": "int8"}


def parts(model: torch.nn.Module) -> dict[str, Tensor]:
    """All that a model holds, codes and scales among them."""
    found: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        held = {"": value}
        if isinstance(value, QuantizedTensor):
            held = {"codes": value.codes, "scale": value.scale} | ({} if value.zero is None else {"zero": value.zero})
        found |= {f"{name}:{part}": tensor for part, tensor in held.items()}
    return found


def calibrated(
    folder: Path | None, monkeypatch: pytest.MonkeyPatch, dies_at: int | None = None
) -> tuple[object, list[int]]:
    """A model and the layers that were calibrated, not read."""
    model, layers, calibrate_one = llama(spread=0.2), [], calibration.calibrated_layer

    def one(step, *rest):  # type: ignore[no-untyped-def]
        if step.index == dies_at:
            raise KeyboardInterrupt
        layers.append(step.index)
        return calibrate_one(step, *rest)

    monkeypatch.setattr(calibration, "calibrated_layer", one)
    try:
        llmcomp.calibrate(model, DATA, SPEC, "awq+gptq", checkpoint=folder)
    except KeyboardInterrupt:
        pass
    monkeypatch.undo()
    return model, layers


def test_it_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, all_layers = calibrated(None, monkeypatch)
    _, begun = calibrated(tmp_path / "kept", monkeypatch, dies_at=1)
    resumed, rest = calibrated(tmp_path / "kept", monkeypatch)
    again, none = calibrated(tmp_path / "kept", monkeypatch)
    assert (all_layers, begun, rest, none) == ([0, 1], [0], [1], [])
    exact = parts(whole)  # type: ignore[arg-type]
    for model in (resumed, again):
        found = parts(model)  # type: ignore[arg-type]
        assert found.keys() == exact.keys() and all(torch.equal(found[key], exact[key]) for key in exact)
    assert sorted(p.name for p in (tmp_path / "kept").iterdir()) == [
        "calibration.json", "layer_00000.safetensors", "layer_00001.safetensors",
    ]  # fmt: skip


def test_the_report_of_read_layers_is_that_of_calibrated_ones(tmp_path: Path) -> None:
    first, second = (llmcomp.calibrate(llama(), DATA, SPEC, "awq", checkpoint=tmp_path) for _ in range(2))
    assert first == second and len(first.quantized) == 14


def test_a_damaged_layer_is_calibrated_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _ = calibrated(tmp_path, monkeypatch)
    file = tmp_path / "layer_00000.safetensors"
    file.write_bytes(file.read_bytes()[:500])
    repaired, layers = calibrated(tmp_path, monkeypatch)
    exact, found = parts(whole), parts(repaired)  # type: ignore[arg-type]
    assert layers == [0] and all(torch.equal(found[key], exact[key]) for key in exact)


def test_what_another_calibration_kept_is_refused(tmp_path: Path) -> None:
    llmcomp.calibrate(llama(), DATA, SPEC, checkpoint=tmp_path)
    other = llama()
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight.add_(1e-3)
    for what, model, data, spec, method in (
        ("data", llama(), [DATA[0], DATA[0]], SPEC, "gptq"),
        ("formats", llama(), DATA, SPEC | {"*.mlp.*": "int4"}, "gptq"),
        ("method", llama(), DATA, SPEC, "awq"),
        ("model", other, DATA, SPEC, "gptq"),
    ):
        with pytest.raises(OptionError, match=f"with other {what}: pass another folder"):
            llmcomp.calibrate(model, data, spec, method, checkpoint=tmp_path)
        assert not any(isinstance(p, QuantizedTensor) for p in model.parameters())
