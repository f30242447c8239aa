"""What a model takes of the machine's memory once its weights are packed, and on the way there."""

import subprocess
import sys
import textwrap

import pytest

MIB = 2**20
START = """
    import sys, torch, transformers
    from pathlib import Path
    import llmcomp
    from llmcomp.bench_model import stored_bytes

    def resident(key="RssAnon"):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

    def reset_peak():
        Path("/proc/self/clear_refs").write_text("5")
"""
IN_PLACE = """
    llmcomp.quantize_(torch.nn.Sequential(torch.nn.Linear(8, 8)), "int8")  # what imports and threads take
    before = resident()
    model = torch.nn.Sequential(*(torch.nn.Linear(2048, 2048, bias=False) for _ in range(16)))
    built = resident() - before
    reset_peak()
    llmcomp.quantize_(model, "int8")
    peak = resident("VmHWM") - resident("RssFile") - before
    print(built, peak, resident() - before, sum(map(stored_bytes, model.parameters())))
"""
LOADED = """
    sizes = dict(hidden_size=1024, intermediate_size=4096, num_attention_heads=8, num_key_value_heads=8)
    config = transformers.LlamaConfig(**sizes, num_hidden_layers=4, vocab_size=1024)
    transformers.LlamaForCausalLM(config).save_pretrained(sys.argv[1] + "/whole", max_shard_size="64MB")
    small = transformers.LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1)
    transformers.LlamaForCausalLM(small).save_pretrained(sys.argv[1] + "/small")
    load = transformers.AutoModelForCausalLM.from_pretrained
    load(sys.argv[1] + "/small", quantization_config=llmcomp.QuantizationConfig("int8"))
    before = resident()
    model = load(sys.argv[1] + "/whole", quantization_config=llmcomp.QuantizationConfig("int8"))
    mapped = Path("/proc/self/maps").read_text().count(sys.argv[1])
    print(resident() - before, mapped, sum(map(stored_bytes, model.parameters())))
"""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def numbers(script: str, *arguments: str) -> list[int]:
    """What a script prints, run in a process of its own."""
    code = textwrap.dedent(START) + textwrap.dedent(script)
    run = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return [int(text) for text in run.stdout.split()]


@pytest.mark.slow
def test_quantizing_in_place_frees_the_float_weights() -> None:
    built, peak, after, packed = numbers(IN_PLACE)
    assert built > 3.9 * packed
    assert after < 1.15 * packed + 8 * MIB
    assert peak < built + 128 * MIB  # float weights go as packed ones come; a few MB are computed with in float32


@pytest.mark.slow
def test_a_loaded_model_keeps_no_file_in_memory(tmp_path: object) -> None:
    after, mapped, packed = numbers(LOADED, str(tmp_path))
    assert after < 1.15 * packed + 16 * MIB
    assert mapped == 0
