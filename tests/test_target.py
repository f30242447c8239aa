"""Target: which kernels a graph gets, by its devices and the user's choice."""

import dataclasses

import pytest
import torch

from llmcomp import target
from llmcomp.errors import OptionError
from llmcomp.options import Options

CPU, GPU, META = torch.device("cpu"), torch.device("cuda", 0), torch.device("meta")


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch):
    monkeypatch.setattr(target, "cuda", lambda device: target.H100)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.mark.parametrize(
    ("asked", "devices", "name"),
    [
        ("auto", [CPU], "cpp"),
        ("auto", [], "cpp"),
        ("auto", [GPU], "triton"),
        ("auto", [CPU, GPU], "triton"),
        ("auto", [META], "reference"),
        ("cpp", [CPU], "cpp"),
        ("triton", [GPU], "triton"),
        ("reference", [CPU], "reference"),
        ("reference", [GPU], "reference"),
    ],
)
def test_choice(asked, devices, name):
    assert target.detect(Options(target=asked), devices).name == name


@pytest.mark.parametrize(("asked", "devices"), [("cpp", [GPU]), ("cpp", [META]), ("triton", [CPU])])
def test_refusal(asked, devices):
    with pytest.raises(OptionError, match=f"target '{asked}', found {devices[0].type}: move the model, or leave"):
        target.detect(Options(target=asked), devices)


def test_triton_on_the_cpu_is_its_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    found = target.detect(Options(target="triton"), [CPU])
    assert (found.name, found.device, found.interpreted) == ("triton", "cpu", True)
    assert target.detect(Options(), [CPU]).name == "cpp", "only where it was asked for"


def test_this_cpu():
    found = target.cpu()
    assert found.cores >= 1 and found.vector_bytes in (16, 32, 64)
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.cores = 3  # type: ignore[misc]
