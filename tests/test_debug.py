"""Debugging aids: what is printed at each level, and files that run by themselves."""

import subprocess
import sys
from collections import Counter

import pytest
import torch
from torch import nn

import llmcomp.backend
from llmcomp.capture import capture
from llmcomp.debug import count_changes, operator_counts, random_tensor, runnable
from llmcomp.options import Options


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.norm, self.out = nn.Embedding(7, 8), nn.LayerNorm(8), nn.Linear(8, 7)

    def forward(self, ids, scale):
        mask = torch.tensor([[0.0, float("-inf")], [0.0, 0.0]])
        x = self.norm(self.embed(ids)) * scale + torch.arange(8) + mask.exp().sum() * 1e-3
        return self.out(x), ids.shape[1], None


def compile_once(**options):
    ids = torch.randint(0, 7, (2, 5))
    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(Model(), backend="llmcomp", options=options, dynamic=True)(ids, torch.tensor(0.5))


@pytest.mark.parametrize(
    ("level", "shown", "hidden"),
    [
        (0, "", "llmcomp: inference"),
        (1, "canonicalize", "+1 "),
        (2, "aten.", "def forward"),
        (3, "def forward", 'extern "C"'),
        (4, 'extern "C"', "no such text"),
    ],
)
def test_levels(level, shown, hidden, capfd):
    compile_once(debug=level)
    text = capfd.readouterr().err
    assert shown in text and hidden not in text


def test_dumped_stages_run(tmp_path):
    compile_once(dump=tmp_path / "dump")
    (folder,) = (tmp_path / "dump").iterdir()
    assert folder.name == "000_inference"
    files = sorted(folder.glob("*.py"))
    assert files[0].name == "00_captured.py" and len(files) >= 2
    assert list(folder.glob("*.cpp")), "kernel sources are there to read"
    done = subprocess.run([sys.executable, files[-1]], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("output 0 ((2, 5, 7), torch.float32)\noutput 1 5\n")


def test_every_graph_has_its_folder(tmp_path):
    for _ in range(2):
        compile_once(dump=tmp_path / "dump")
    assert sorted(p.name for p in (tmp_path / "dump").iterdir()) == ["000_inference", "001_inference"]


def run_text(text, gm):
    """The outputs of a dumped graph on the inputs of `gm`."""
    names: dict[str, object] = {"__name__": "dumped"}
    exec(compile(text, "dumped", "exec"), names)
    return names["Graph"]()(*gm.meta["inputs"])  # type: ignore[operator]


def test_a_dumped_graph_is_the_graph():
    gm = capture(Model(), torch.randint(0, 7, (2, 5)), torch.tensor(0.5), dynamic=True)
    with torch.no_grad():
        torch.testing.assert_close(run_text(runnable(gm, "test"), gm), gm(*gm.meta["inputs"]))


def test_graphs_inside_a_graph_are_dumped_too():
    def f(x):
        return torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x - 1, (x,))

    gm = capture(f, torch.ones(3))
    assert any(isinstance(m, torch.fx.GraphModule) for m in gm.children())
    torch.testing.assert_close(run_text(runnable(gm, "test"), gm), gm(*gm.meta["inputs"]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64])
@pytest.mark.parametrize(("shape", "stride"), [([2, 3], [1, 2]), ([2, 3], [0, 1]), ([0, 3], [3, 1]), ([], [])])
def test_random_tensor(dtype, shape, stride):
    t = random_tensor(shape, stride, dtype)
    assert (list(t.shape), list(t.stride()), t.dtype) == (shape, stride, dtype)


def test_operator_counts():
    gm = capture(lambda x: (x + 1) + x.sin(), torch.ones(2))
    assert operator_counts(gm) == {"aten.add.Tensor": 2, "aten.sin.default": 1}


def test_count_changes():
    assert count_changes(Counter(a=2, b=1), Counter(b=1, c=3)) == ["  -2 a (2 -> 0)", "  +3 c (0 -> 3)"]


def test_near_misses_are_logged(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(llmcomp.backend, "compile_program", None)
    with caplog.at_level("INFO", logger="llmcomp"):
        gm = capture(lambda x: x.cumsum(0), torch.ones(3))
        with pytest.raises(TypeError):
            llmcomp.backend.compile_aten(gm, Options(cache=tmp_path))
    assert any("left cumsum alone" in r.message for r in caplog.records)
