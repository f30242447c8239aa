"""examples/gpu_check.py tried out without a GPU: every part, peers that fail, and what is written."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llmcomp import bench_gpu
from llmcomp.bench_gpu import PARTS, Asked, bad, main, run_part, table
from llmcomp.bench_kernels import Heads, Missing, Product, Row, library, measure_attention, measure_product, two_of_four
from llmcomp.bench_model import NARROW, Setup
from llmcomp.bench_steps import WARM, Steps
from llmcomp.bench_timing import Limits, copies, device_time, error
from tests.test_bench import stand_ins


@pytest.fixture
def asked(tmp_path: Path) -> Asked:
    return Asked("cpu", tiny=True, folder=tmp_path, rounds=2)


@pytest.mark.parametrize("part", ["kernels", "quantized", "attention"])
def test_kernels_beside_those_of_libraries(asked: Asked, part: str) -> None:
    rows = list(PARTS[part](asked))
    ours = [row for row in rows if "llmcomp" in row.peer]
    assert ours and all(row.seconds and row.error is not None and not row.note for row in ours), ours
    assert any(row.seconds for row in rows if row not in ours)
    assert all(row.seconds or row.note for row in rows)


def fails(x: Tensor, weights: Sequence[Tensor]) -> Sequence[object]:
    raise torch.OutOfMemoryError("no room")


def lacks(x: Tensor, weights: Sequence[Tensor]) -> Sequence[object]:
    raise Missing("sheep is not importable")


def errs(x: Tensor, weights: Sequence[Tensor]) -> Sequence[object]:
    return [lambda: x @ weights[-1].t() * 1.1]


def test_a_peer_that_fails_has_a_row() -> None:
    product = Product(2, 32, 64)
    rows = [measure_product(product, "p", make, 2.0, 0.01, "cpu") for make in (fails, lacks, errs, library)]
    assert rows[0].note == "OutOfMemoryError: no room" and rows[1].note == "sheep is not importable"
    assert rows[2].note.startswith("WRONG: an error of 0.") and not rows[3].note
    unknown = measure_attention(Heads(4, 4, 1, 2, 1, 16), "SDPA sheep", "cpu")
    assert unknown.seconds is None and "KeyError" in unknown.note


@pytest.mark.parametrize("part", ["steps", "gpt2", "batches", "steps8b", "quantized8b", "decode", "prefill", "build"])
def test_models_beside_those_of_peers(asked: Asked, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    peers = ["hf-static", "hf-reduce-overhead", "hf-llmcomp", "llmcomp", "eager", "llmcomp-generate"]
    dies = peers[0] if part in ("steps", "gpt2", "batches") else ""
    does = {p: "sys.exit(3)" if p == dies else "pass" for p in peers}
    stand_ins(monkeypatch, does)
    monkeypatch.setattr(bench_gpu, "find_spec", lambda name: None)
    rows = list(PARTS[part](asked))
    assert rows and all(row.note == "died: exit status 3" for row in rows if row.peer == dies)
    lacks = [row for row in rows if "torchao" in row.peer]
    assert all(row.note == "died: torchao is not importable" for row in lacks) and bool(lacks) == (
        part == "quantized8b"
    )
    assert all(row.seconds is not None for row in rows if row.peer != dies and row not in lacks)


@pytest.mark.slow
def test_steps_give_the_same_tokens_whoever_computes_them() -> None:
    setup = Setup("LlamaConfig", {**NARROW, "num_hidden_layers": 1}, "float32", "cpu", 1)
    model, found = setup.build(), []
    for backend in (None, "llmcomp"):
        steps = Steps(model, setup, backend, "reduce-overhead" if backend else None)
        first, again = (steps.measure(batch=2, context=5, count=16) for _ in range(2))
        assert first["tokens"] == again["tokens"] and len(first["tokens"]) == WARM + 16
        assert first["host"] <= max(first["seconds"])
        found.append(first["tokens"])
    torch._dynamo.reset()
    assert found[0] == found[1]


@pytest.mark.slow
def test_a_run_writes_what_it_knows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = main(["--device", "cpu", "--tiny", "--part", "attention", "--out", str(tmp_path)])
    record = json.loads((tmp_path / "gpu.json").read_text())
    assert status == 0 and list(record["parts"]) == ["attention"]
    assert record["limits"]["read"] > 0 and torch.__version__.startswith(record["versions"]["torch"])
    assert {"date", "machine", "driver", "commit", "command"} <= record.keys()
    assert capsys.readouterr().out.strip() == (tmp_path / "gpu.md").read_text().strip()


@pytest.mark.slow
def test_tests_without_a_gpu_are_skipped(asked: Asked) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    (row,) = PARTS["tests"](asked)
    assert "skipped in" in row.note and not bad(vars(row))


@pytest.mark.slow
def test_a_part_that_hangs_or_breaks_is_stopped(tmp_path: Path) -> None:
    args = bench_gpu.parse(["--device", "cpu", "--tiny"])
    assert run_part("kernels", args, tmp_path, 0.2)["rows"][-1]["note"] == "stopped after 0 s"
    (row,) = run_part("no such part", args, tmp_path, 60.0)["rows"]
    assert row["note"] == "exit status 1, see no such part.log" and bad(row)


def test_what_counts_as_bad() -> None:
    good = [Row("a", "llmcomp", 1.0), Row("a", "gemlite", note="gemlite is not importable"), Row("a", "library", 1.0)]
    worse = [Row("a", "llmcomp int4", note="RuntimeError: x"), Row("a", "hf-llmcomp", 1.0, note="WRONG: x")]
    worse.append(Row("t", "pytest", note="FAILED tests/test_gpu.py::test_x"))
    assert [bad(vars(row)) for row in (*good, *worse)] == [False] * 3 + [True] * 3


def test_rows_are_parts_of_what_the_machine_reaches() -> None:
    rows = [vars(Row("x", "p", 1e-3, bytes=5e8, flops=2e10)), vars(Row("y", "p", note="died"))]
    lines = table("kernels", rows, Limits(1e12, 1e14)).splitlines()
    assert lines[4:] == ["| x | p | 1000.0 | 50% | 20% | - |  |", "| y | p | - | - | - | - | died |"]


def test_times_errors_and_pruning() -> None:
    assert device_time([lambda: torch.ones(10)], "cpu") > 0 and copies(1 << 20, "cpu") == 2
    assert copies(1 << 28, "cuda") == 2 and copies(1 << 20, "cuda") == 64
    assert error(torch.tensor([1.1, 0.9]), torch.ones(2)) == pytest.approx(0.1)
    assert two_of_four(torch.tensor([[1.0, -4.0, 3.0, 2.0]])).tolist() == [[0.0, -4.0, 3.0, 0.0]]
