"""Layouts of others: what their own packers write is read number by number (where their packages are installed)."""

import pytest
import torch

from llmcomp.layouts import Parts, Repacked, packed, plain


def numbers(read: Repacked, dtype: torch.dtype) -> torch.Tensor:
    return read.format.dequantize(read.packed, 256, dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "stored,weights",
    [
        ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 128, "symmetric": True}),
        ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False}),
        ("pack-quantized", {"num_bits": 4, "strategy": "channel", "symmetric": False}),
        ("pack-quantized", {"num_bits": 8, "strategy": "group", "group_size": 64, "symmetric": True}),
        ("int-quantized", {"num_bits": 8, "strategy": "channel", "symmetric": True}),
        ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}),
        ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True}),
    ],
)
def test_compressed_tensors(stored: str, weights: dict[str, object], dtype: torch.dtype) -> None:
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    weight = torch.randn(28, 256, dtype=dtype, generator=torch.Generator().manual_seed(0))
    args = QuantizationArgs(**weights)
    whole = weights["strategy"] == "tensor"
    parts = weight.reshape(1, -1) if whole else weight.reshape(28, -1, int(str(weights.get("group_size", 256))))
    scale, zero = calculate_qparams(parts.amin(-1), parts.amax(-1), args)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    given = {"weight": weight, "weight_scale": scale} | ({} if weights["symmetric"] else {"weight_zero_point": zero})
    compressor = BaseCompressor.get_value_from_registry(stored)
    tensors = compressor.compress(given, scheme)
    read = (packed if "weight_packed" in tensors else plain)(Parts("layer", tensors), (28, 256))
    assert torch.equal(numbers(read, dtype), compressor.decompress(tensors, scheme)["weight"].to(dtype))
