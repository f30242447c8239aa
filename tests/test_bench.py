"""The benchmark measures what it says: rates, interleaving, memory, tables."""

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import Parameter
from transformers import PreTrainedModel

import llmcomp.bench_process
from llmcomp.bench import Load, Measured, loads, main, measure, parse, rate, setting, setup_of, split, table
from llmcomp.bench_growing import growing_table, measure_growing
from llmcomp.bench_llama_cpp import file_name, library
from llmcomp.bench_machine import Bandwidth
from llmcomp.bench_model import Setup, bytes_per_token
from llmcomp.bench_overhead import decoding_step, measure_loops, measure_overhead, without_kernels
from llmcomp.bench_peer import PEERS, quantize_one
from llmcomp.bench_process import Died, Process
from llmcomp.quantization import quantize_
from llmcomp.quantized import QuantizedTensor

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def test_rates() -> None:
    answer = {"first": 0.5, "rest": 2.0}
    assert rate(Load("prefill 512", 1, 512, 2), answer) == 1024
    assert rate(Load("decode b8", 8, 64, 5), answer) == 16


def test_llama_cpp_is_asked_for_what_it_can(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert file_name("model.layers.13.mlp.up_proj.weight") == "blk.13.ffn_up.weight"
    assert file_name("model.embed_tokens.weight") == "token_embd.weight"
    (tmp_path / "libllama-common.so").touch()
    with pytest.raises(SystemExit, match="LLAMA_CPP"):
        library(tmp_path, "llama")
    (tmp_path / "libllama.v0.5.0.so").touch()
    assert library(tmp_path, "llama").name == "libllama.v0.5.0.so"


def test_the_table_holds_medians() -> None:
    work = (Load("decode b1", 1, 64, 5), Load("prefill 8", 1, 8, 2))
    rates = {"decode b1": [1.0, 10.0, 100.0], "prefill 8": [5.0, 6.0, 7.0]}
    peers = {
        "eager": Measured(3.0, 2.0, 10**9, 3e9, 1e9, rates, [1, 2, 3, 4]),
        "llmcomp": Measured(None, 2.0, 10**9, 3e9, 1e9, rates, [1, 2, 3, 5]),
    }
    lines = table(peers, work, 40e9).splitlines()
    assert lines[2] == "| eager | 10.0 | 6.0 | 3.0 | 2.0 | 2.00 | 25% | 4/4 |"
    assert lines[3] == "| llmcomp | 10.0 | 6.0 | - | 2.0 | 2.00 | 25% | 3/4 |"


def stand_ins(monkeypatch: pytest.MonkeyPatch, does: Mapping[str, str]) -> None:
    """Processes that answer as peers do, once they have done what `does` says, in the place of the peers."""
    program = (
        "import json, os, sys\n"
        "say = lambda **fields: print('bench:' + json.dumps(fields), flush=True)\n"
        "say(weights=8)\n"
        "answers = dict(first=0.5, rest=0.5, tokens=[1, 2], peak=2e9, base=1e9, dynamo=3, backend=2, llmcomp=0.5)\n"
        "answers |= dict(seconds=[2e-3], host=1e-3)\n"
        "for line in sys.stdin: {}; say(**answers)"
    )
    command = lambda peer, setup: [sys.executable, "-c", program.format(does[peer])]  # noqa: E731
    monkeypatch.setattr(llmcomp.bench_process, "peer_command", command)


@pytest.mark.parametrize("cold", [True, False])
def test_a_peer_that_dies_has_a_row_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch, cold: bool) -> None:
    does = {"eager": "sys.exit(3)", "dynamo": "os.kill(os.getpid(), 9)", "llmcomp": "pass"}
    stand_ins(monkeypatch, does)
    work = (Load("decode b1", 1, 8, 2),)
    results, _ = measure(list(does), setup_of(parse(["--model", "tiny"])), work, 2, cold)
    assert split(results["llmcomp"]) == "3.0 s in Dynamo, 2.0 s in the backend (AOTAutograd 1.5 s, llmcomp 0.5 s)"
    lines = table(results, work, 16.0).splitlines()
    assert lines[2] == "| eager | died: exit status 3 | - | - | - | - | - |"
    assert lines[3] == "| dynamo | died: killed by signal 9, probably out of memory | - | - | - | - | - |"
    assert lines[4] == f"| llmcomp | 2.0 | {'1.0' if cold else '-'} | 1.0 | 1.00 | 100% | 2/2 |"


def test_other_backends_are_not_split() -> None:
    found = Measured(compiling={"dynamo": 5.0, "backend": 4.25, "llmcomp": 0.0})
    assert split(found) == "5.0 s in Dynamo, 4.2 s in the backend"


def test_a_peer_that_died_before_it_is_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stand_ins(monkeypatch, {"eager": "pass"})
    process = Process("eager", setup_of(parse(["--model", "tiny"])), tmp_path)
    process.pipe.kill()
    process.pipe.wait()
    with pytest.raises(Died, match="killed by signal 9"):
        process.ask("memory")
    process.close()


def test_loads_of_every_batch_and_context() -> None:
    names = [w.name for w in loads([1, 8], [64, 900], 512, 33)]
    assert names == ["decode b1", "decode b8", "decode b1 at 900", "decode b8 at 900", "prefill 512"]


def test_the_command_line_makes_the_model() -> None:
    args = parse(["--model", "tiny", "--vocab", "77", "--set", "num_hidden_layers=1", "hidden_act=gelu"])
    settings = setup_of(args).settings
    assert (settings["vocab_size"], settings["num_hidden_layers"], settings["hidden_act"]) == (77, 1, "gelu")
    assert setup_of(parse(["--config", "Qwen3Config"])).settings == {}
    assert setting("a=[1]") == ("a", [1]) and setting("a=b") == ("a", "b")


@pytest.mark.parametrize("tied", [True, False])
def test_weights_are_filled_and_counted(tied: bool) -> None:
    setup = Setup("LlamaConfig", {**SMALL, "tie_word_embeddings": tied}, "bfloat16", "cpu", 1)
    model = setup.build()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    weight = model.model.layers[0].mlp.up_proj.weight
    assert 0.01 < weight.float().std() < 0.03 and not torch.equal(weight[0], weight[1])
    assert bool((model.model.norm.weight == 1).all())
    total = sum(p.numel() for p in model.parameters())
    assert bytes_per_token(model) == 2 * (total - (0 if tied else 64 * 32))
    assert torch.get_default_dtype() is torch.float32


def test_weights_are_quantized_as_they_are_filled() -> None:
    setup, floats = Setup("LlamaConfig", SMALL, "bfloat16", "cpu", 1), list[int]()

    def then(model: PreTrainedModel, weight: Parameter) -> None:
        assert 0.01 < weight.float().std() < 0.03
        quantize_one(PEERS["llmcomp-int8"], model, weight)
        floats.append(sum(p.ndim == 2 and not isinstance(p, QuantizedTensor) for p in model.parameters()))

    model = setup.build(then)
    assert floats == list(range(9, 0, -1))  # the embedding stays as it is
    whole = setup.build()
    quantize_(whole, "int8")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), whole.parameters(), strict=True))


def test_bandwidth_is_that_of_a_machine() -> None:
    assert 1e8 < Bandwidth("cpu", 1).measure(repeats=1) < 1e13


@pytest.mark.slow
def test_a_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "out.json"
    dimensions = [f"{k}={v}" for k, v in SMALL.items()]
    command = ["--peers", "eager,llmcomp", "--rounds", "2", "--no-cold", "--new", "4", "--prefill", "64"]
    main([*command, "--batch", "1", "--dtype", "float32", "--json", str(path), "--set", *dimensions])
    found = json.loads(path.read_text())
    assert len(found["bandwidth"]) == 2 and len(found["peers"]["llmcomp"]["rates"]["decode b1"]) == 2
    assert found["peers"]["llmcomp"]["tokens"] == found["peers"]["eager"]["tokens"]
    out = capfd.readouterr().out
    assert "| llmcomp |" in out and "eager, compiling" not in out
    assert re.search(r"llmcomp, compiling with warm caches: .* \(AOTAutograd \d+\.\d s, llmcomp \d", out)


def test_overhead() -> None:
    setup = setup_of(parse(["--overhead", "--threads", "1", "--set", "num_hidden_layers=1"]))
    assert (setup.settings["hidden_size"], setup.settings["num_hidden_layers"]) == (32, 1)
    found = measure_overhead(setup, rounds=2)
    assert 0 < found.host < 1 and found.kernels > 5 and found.inputs > 10
    assert str(found).startswith(f"one decoding step, {found.kernels} kernels, {found.inputs} inputs: ")


@pytest.mark.slow
def test_overhead_of_loops() -> None:
    setup = setup_of(parse(["--overhead", "--threads", "1", "--set", "num_hidden_layers=1"]))
    found = measure_loops(setup, rounds=2, new=17)
    assert 0 < found.ours < found.transformers < 1
    assert "of llmcomp.generate: " in str(found)


def test_the_overhead_is_that_of_everything_but_kernels() -> None:
    program, inputs = decoding_step(setup_of(parse(["--overhead", "--set", "num_hidden_layers=1"])))
    idle = without_kernels(program)
    with torch.no_grad():
        before = [x.clone() for x in inputs]
        idle(*inputs)
        assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True)), "a kernel ran"
        program(*inputs)
        assert not all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True)), "the cache is written"


def test_a_growing_sequence_is_measured_segment_by_segment(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[str, dict[str, object]]] = []

    class StandIn:
        def __init__(self, name: str) -> None:
            self.name = name

        def ask(self, do: str, **fields: Any) -> dict[str, Any]:
            asked.append((self.name, fields))
            lengths = range(fields["start"], fields["stop"], fields["stride"])
            tokens = [*fields["tokens"], *lengths] if fields["chooses"] else fields["tokens"]
            answers = {str(n): n for n in lengths}
            return {"seconds": {n: 0.5 for n in answers}, "chosen": answers, "tokens": tokens}

    results = measure_growing({n: StandIn(n) for n in ("ours", "other")}, prompt=4, new=100, stride=10)  # type: ignore[misc]
    assert [(name, f["start"], f["stop"], f["stride"]) for name, f in asked] == [
        ("ours", 4, 68, 1), ("other", 4, 68, 10), ("ours", 68, 104, 1), ("other", 68, 104, 10),
    ]  # fmt: skip
    assert len(asked[3][1]["tokens"]) == 100  # type: ignore[arg-type]
    assert results["ours"].total == 50.0 and results["other"].total == 10 * 0.5 * (7 + 4)
    table = growing_table(results, 4, 100)
    assert "| ours | 50.0 | 500.0 | 500.0 | 1.0 | 100/100 |" in table and "| other | 55.0 |" in table
