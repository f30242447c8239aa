"""Checkpoints in the layouts of GPTQ, AWQ and compressed-tensors, packed number by number from their descriptions.

gptq   the README of AutoGPTQ and its `QuantLinear.pack`: neighbours along the inputs share a word, the first one in
       its lowest bits; zeros along the outputs, less one; `g_idx` tells the group of every input. "gptq_v2" of
       GPTQModel stores zeros as they are.
awq    AutoAWQ's `WQLinear_GEMM`: eight neighbouring outputs share a word, in the order 0 2 4 6 1 3 5 7.
ct     https://github.com/vllm-project/compressed-tensors, "compressors": `pack_to_int32` of codes + 2^(bits - 1).
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Coded:
    """A weight (N, K) as whole numbers: (codes - zero[group]) * scale[group], group of every input in `groups`."""

    codes: Tensor
    zero: Tensor
    scale: Tensor
    groups: Tensor
    bits: int

    def numbers(self) -> Tensor:
        """The float32 matrix."""
        zero, scale = (part.float()[:, self.groups] for part in (self.zero, self.scale))
        return (self.codes.float() - zero) * scale


def coded(weight: Tensor, bits: int, group: int, symmetric: bool, dtype: torch.dtype, scattered: bool) -> Coded:
    """Some codes for a weight, from a range for each group; `scattered`: which inputs form a group is drawn."""
    rows, columns = weight.shape
    count = 1 if group == -1 else columns // group
    groups = torch.arange(columns) * count // columns
    if scattered:
        groups = groups[torch.randperm(columns, generator=torch.Generator().manual_seed(0))]
    most, zeros, scales = 2**bits - 1, [], []
    for g in range(count):
        part = weight[:, groups == g]
        low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
        scale = (2 * part.abs().amax(1) if symmetric else high - low) / most
        scales.append(scale.to(dtype))
        middle = torch.full_like(low, 2 ** (bits - 1))
        zeros.append(middle if symmetric else torch.round(-low / scale).clamp(1, most))
    zero, scale = torch.stack(zeros, 1), torch.stack(scales, 1)
    codes = torch.round(weight / scale.float()[:, groups] + zero[:, groups]).clamp(0, most)
    return Coded(codes.int(), zero.int(), scale, groups, bits)


def words(numbers: Tensor, bits: int, places: tuple[int, ...] = ()) -> Tensor:
    """Rows of whole numbers in int32 words; `places`: which neighbour stands at each place of a word."""
    per = 32 // bits
    rows = []
    for row in numbers.tolist():
        row += [0] * (-len(row) % per)
        parts = [row[i : i + per] for i in range(0, len(row), per)]
        made = [sum(part[place] << bits * i for i, place in enumerate(places or range(per))) for part in parts]
        rows.append([word - 2**32 if word >= 2**31 else word for word in made])
    return torch.tensor(rows, dtype=torch.int32)


def gptq(w: Coded, version: int = 1) -> Tensors:
    zero = w.zero.t() - (1 if version == 1 else 0)
    return {
        "qweight": words(w.codes.t().contiguous().t(), w.bits).t().contiguous(),
        "qzeros": words(zero, w.bits),
        "scales": w.scale.t().contiguous(),
        "g_idx": w.groups.int(),
    }


def awq(w: Coded) -> Tensors:
    places = (0, 2, 4, 6, 1, 3, 5, 7)
    return {
        "qweight": words(w.codes.t(), 4, places),
        "qzeros": words(w.zero.t(), 4, places),
        "scales": w.scale.t().contiguous(),
    }


def packed(w: Coded) -> Tensors:
    made = {
        "weight_packed": words(w.codes, w.bits),
        "weight_scale": w.scale,
        "weight_shape": torch.tensor(w.codes.shape),
    }
    if bool((w.zero != 2 ** (w.bits - 1)).any()):
        made["weight_zero_point"] = words(w.zero.t(), w.bits).t().contiguous()
    return made


def write(
    folder: Path,
    model: PreTrainedModel,
    settings: Mapping[str, object],
    pack: Callable[[str, nn.Linear], tuple[Tensors, Tensor]],
    files: int = 1,
) -> None:
    """Save a model as a checkpoint with these settings, and make it the float model that the checkpoint means.

    `pack` gives the tensors of a layer and the float weight that they stand for; the head is left as it is.
    """
    tensors: Tensors = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            made, numbers = pack(name, module)
            tensors |= {f"{name}.{part}": value for part, value in made.items()}
            module.weight = nn.Parameter(numbers.float())
    linear = {f"{name}.weight" for name, m in model.named_modules() if isinstance(m, nn.Linear) and name != "lm_head"}
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    tensors |= {n: v.detach() for n, v in model.state_dict().items() if n not in linear | tied}
    folder.mkdir(exist_ok=True)
    config = model.config.to_dict() | {"quantization_config": dict(settings), "architectures": ["LlamaForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config, default=str))
    names = [f"model-{i}.safetensors" for i in range(files)] if files > 1 else ["model.safetensors"]
    shards: list[Tensors] = [{} for _ in names]
    for i, name in enumerate(sorted(tensors)):
        shards[i % files][name] = tensors[name].contiguous()
    for name, shard in zip(names, shards, strict=True):
        save_file(shard, folder / name, metadata={"format": "pt"})
    if files > 1:
        where = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
