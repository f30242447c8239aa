"""llmcomp: a torch.compile backend that lowers language models to generated Triton and C++ kernels.

torch.compile(model, backend="llmcomp")     needs no import of this package
llmcomp.explain(model, *inputs)             tells what that does
"""

from importlib import import_module
from typing import TYPE_CHECKING

from llmcomp.errors import (
    BuildError,
    CacheError,
    CaptureError,
    FormatError,
    GenerationError,
    LlmcompError,
    MemoryFullError,
    OptionError,
    PassError,
    PruneError,
    VerifyError,
)

if TYPE_CHECKING:
    from llmcomp.calibration import Calibration, calibrate
    from llmcomp.explanation import Explanation, explain
    from llmcomp.formats import Format, Fp8, Int4, Int8, Mxfp4, Nf4
    from llmcomp.generation import custom_generate, generate, stream
    from llmcomp.hf_quantizer import QuantizationConfig
    from llmcomp.mixed_precision import Budget, assign
    from llmcomp.options import Options
    from llmcomp.pruning import Pruning, prune_
    from llmcomp.pruning_schedule import PruningSchedule
    from llmcomp.quantization import Quantization, quantize_
    from llmcomp.quantized import safe_globals
    from llmcomp.quantized_training import train_quantized_
    from llmcomp.reuse import reset
    from llmcomp.sparsity import NM, Block, Magnitude, Movement, SparseGPT, Structured, Wanda, Zeros

__version__ = "0.1.0"
__all__ = [
    "Block",
    "Budget",
    "BuildError",
    "CacheError",
    "Calibration",
    "CaptureError",
    "Explanation",
    "Format",
    "FormatError",
    "Fp8",
    "GenerationError",
    "Int4",
    "Int8",
    "LlmcompError",
    "Magnitude",
    "MemoryFullError",
    "Movement",
    "Mxfp4",
    "NM",
    "Nf4",
    "OptionError",
    "Options",
    "PassError",
    "PruneError",
    "Pruning",
    "PruningSchedule",
    "Quantization",
    "QuantizationConfig",
    "SparseGPT",
    "Structured",
    "VerifyError",
    "Wanda",
    "Zeros",
    "assign",
    "calibrate",
    "custom_generate",
    "explain",
    "generate",
    "prune_",
    "quantize_",
    "reset",
    "safe_globals",
    "stream",
    "train_quantized_",
]

# Imported when asked for: they bring in torch, and those of generation transformers.
_LATER = {
    "Explanation": "llmcomp.explanation",
    "explain": "llmcomp.explanation",
    "Options": "llmcomp.options",
    "reset": "llmcomp.reuse",
    **dict.fromkeys(("Calibration", "calibrate"), "llmcomp.calibration"),
    **dict.fromkeys(("Budget", "assign"), "llmcomp.mixed_precision"),
    "Quantization": "llmcomp.quantization",
    "QuantizationConfig": "llmcomp.hf_quantizer",
    "quantize_": "llmcomp.quantization",
    "safe_globals": "llmcomp.quantized",
    "train_quantized_": "llmcomp.quantized_training",
    "Pruning": "llmcomp.pruning",
    "prune_": "llmcomp.pruning",
    "PruningSchedule": "llmcomp.pruning_schedule",
    **dict.fromkeys(
        ("Block", "Magnitude", "Movement", "NM", "SparseGPT", "Structured", "Wanda", "Zeros"), "llmcomp.sparsity"
    ),
    **dict.fromkeys(("Format", "Fp8", "Int4", "Int8", "Mxfp4", "Nf4"), "llmcomp.formats"),
    "custom_generate": "llmcomp.generation",
    "generate": "llmcomp.generation",
    "stream": "llmcomp.generation",
}


def __getattr__(name: str) -> object:
    if name not in _LATER:
        raise AttributeError(f"module 'llmcomp' has no attribute {name!r}")
    return getattr(import_module(_LATER[name]), name)
