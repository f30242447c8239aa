"""The Triton kernels of models at their real size, assembled: spills and narrow loads of weights show only there.

    python -m tests.triton_full                 prints a line for each kernel and what is wrong with it
    python -m tests.triton_full llama-1b gpt2

Two layers of each model on the meta device: no memory is needed and nothing runs. A prefill of 512 tokens and a decode
step with a static cache, for one sequence and for four.
"""

import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import transformers
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, StaticCache
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from llmcomp.capture import capture
from llmcomp.codegen.build import Source
from llmcomp.codegen.fit import Lowerer
from llmcomp.codegen.kernel import Kernel
from llmcomp.passes import pipeline
from llmcomp.passes.base import run_passes
from llmcomp.passes.facts import SHAPES
from llmcomp.passes.partition import read_partition
from llmcomp.program import lower_steps, render_all
from llmcomp.target import H100
from tests.sweep import one_line
from tests.triton_regions import assembled_verdict, load_bytes_wanted

CAPABILITIES = (80, 90)
LAYERS: Mapping[str, object] = {"num_hidden_layers": 2, "n_layer": 2}
MODELS: Mapping[str, tuple[str, Mapping[str, object]]] = {
    "llama-1b": (
        "llama",
        {
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "vocab_size": 128256,
        },
    ),
    "llama-8b": (
        "llama",
        {"intermediate_size": 14336, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256},
    ),
    "qwen3-4b": (
        "qwen3",
        {"hidden_size": 2560, "intermediate_size": 9728, "num_key_value_heads": 8, "vocab_size": 151936},
    ),
    "gemma2-2b": ("gemma2", {}),
    "gemma3-4b": ("gemma3_text", {}),
    "phi3-mini": ("phi3", {}),
    "gpt2": ("gpt2", {}),
    "bloom-560m": ("bloom", {"hidden_size": 1024, "n_head": 16}),
    "mixtral": ("mixtral", {}),
    "gpt-oss": ("gpt_oss", {}),
    "deepseek-v3": ("deepseek_v3", {"first_k_dense_replace": 1}),
}


@dataclass(frozen=True)
class Found:
    """A kernel as it is launched for some call: its source, and the sizes of that call."""

    call: str
    kernel: Kernel
    source: Source
    sizes: tuple[int, ...]


def config_of(name: str) -> PretrainedConfig:
    """The config of a model at its real size but for the number of layers."""
    model_type, settings = MODELS[name]
    depth = {k: v for k, v in LAYERS.items() if hasattr(CONFIG_MAPPING[model_type](), k)}
    return CONFIG_MAPPING[model_type](**depth, **settings)


def kernels_of(name: str, dtype: torch.dtype) -> Iterator[Found]:
    """The distinct kernels of a model, in order."""
    config = config_of(name)
    with torch.device("meta"), torch.no_grad():
        model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    known: set[str] = set()
    for batch in (1, 4):
        for call, function, ids in calls(model, config, batch):
            for found in kernels_of_call(f"{call} of {batch}", function, ids):
                if found.source.text not in known:
                    known.add(found.source.text)
                    yield found


def calls(
    model: PreTrainedModel, config: PretrainedConfig, batch: int
) -> Iterator[tuple[str, Callable[[torch.Tensor], torch.Tensor], torch.Tensor]]:
    """A prefill and a decode step: a name, the function, and its tokens."""
    prompt, token = (torch.zeros(batch, n, dtype=torch.long, device="meta") for n in (512, 1))
    yield "prefill", lambda ids: model(ids, use_cache=False).logits, prompt
    cache = StaticCache(config=config, max_cache_len=2048)
    with torch.no_grad():
        model(prompt[:, :8], past_key_values=cache, use_cache=True)  # it makes its buffers
    yield "decode", lambda ids: model(ids, past_key_values=cache, use_cache=True).logits, token


def kernels_of_call(call: str, function: Callable[[torch.Tensor], torch.Tensor], ids: torch.Tensor) -> Iterator[Found]:
    """The kernels of one call, all sizes static."""
    gm, lowerer = capture(function, ids, dynamic=False), Lowerer()
    run_passes(gm, pipeline(H100, lowerer.fits), frozenset({SHAPES}))
    steps = lower_steps(read_partition(gm.graph), lowerer)
    sources, which = render_all(steps, H100)
    for step, number in zip(steps, which, strict=True):
        if step.lowered is not None and not any(e.free_symbols for e in step.lowered.sizes):
            yield Found(call, step.lowered.kernel, sources[number], tuple(int(e) for e in step.lowered.sizes))


def verdicts(found: Found) -> list[tuple[str, str]]:
    """The verdict on a kernel for each GPU, and what is wrong."""
    dtypes, wanted = [b.dtype for b in found.kernel.buffers], load_bytes_wanted(found.kernel)
    return [assembled_verdict(found.source, dtypes, [found.sizes], c, wanted) for c in CAPABILITIES]


def main(names: Sequence[str]) -> int:
    """Print a line for each kernel; 1 if something is wrong with one."""
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    bad = sum(_look_at(name) for name in names or MODELS)
    print(f"{bad} kernels or models with something wrong")
    return int(bad > 0)


def _look_at(name: str) -> int:
    """Print the lines of a model; the number of those with something wrong."""
    bad = 0
    try:
        for found in kernels_of(name, torch.bfloat16):
            outcome = verdicts(found)
            print(f"{name:12} {found.call:13} {type(found.kernel).__name__:8} {found.kernel.name:50}", end=" ")
            print(*(v for v, _ in outcome), *(d for v, d in outcome if v != "ok"), flush=True)
            bad += any(v != "ok" for v, _ in outcome)
    except Exception as error:  # a model that cannot be captured so
        print(f"{name:12} error {one_line(error)}", flush=True)
        bad += 1
    return bad


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
