"""Finished layers of a calibration on disk, so that one that was interrupted goes on where it was.

    folder/calibration.json             digests of the model, the formats, the method and the data
    folder/layer_00007.safetensors      what calibration made of the layer: codes, scales, norms, rows of the report

Files are written under another name and renamed. One that can't be read is not there: its layer is calibrated again.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from llmcomp.calibration_method import Method
from llmcomp.errors import OptionError
from llmcomp.formats import Format, Packed, parse_format
from llmcomp.quantization import Row
from llmcomp.quantized import PARTS, QuantizedTensor
from llmcomp.sites import is_transposed
from llmcomp.token_batches import TokenBatch

VERSION = "2"  # of what calibration computes: raised when the same inputs give other weights
SAMPLES = 4096  # numbers of each parameter that a model is known by


@dataclass(frozen=True)
class Finished:
    """What calibration made of a layer: parameters by their names in the model, and what the report says of them."""

    parameters: Mapping[str, Tensor]
    rows: tuple[Row, ...]
    unscaled: Mapping[str, str]
    rounded: Mapping[str, str]


def fingerprint(
    model: nn.Module, plan: Mapping[str, Format], method: Method, batches: Iterable[TokenBatch]
) -> dict[str, str]:
    """Digests of all that decides what calibration gives; of each parameter a sample is read."""
    formats = {name: str(form) for name, form in sorted(plan.items())}
    return {
        "model": _digest(part for pair in model.state_dict().items() for part in _described(*pair)),
        "formats": _digest([json.dumps(formats).encode()]),
        "method": _digest([json.dumps([VERSION, asdict(method)]).encode()]),
        "data": _digest(_bytes(t) for b in batches for t in (b.ids, b.positions) if t is not None),
    }


def _digest(parts: Iterable[bytes]) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(len(part).to_bytes(8, "little") + part)
    return found.hexdigest()


def _described(name: str, value: Tensor) -> Sequence[bytes]:
    if isinstance(value, QuantizedTensor):
        return (f"{name} {value.format}".encode(), _bytes(value.codes), _bytes(value.scale))
    return (f"{name} {value.dtype} {tuple(value.shape)}".encode(), _bytes(value))


def _bytes(values: Tensor) -> bytes:
    some = values.detach().flatten()[:: max(1, values.numel() // SAMPLES)]
    return some.cpu().contiguous().view(torch.uint8).numpy().tobytes() + str(tuple(values.shape)).encode()


class Checkpoint:
    """A folder for the finished layers of one calibration. Made if it is not there.

    Raises:
        OptionError: it holds the layers of a calibration of something else.
    """

    def __init__(self, folder: str | os.PathLike[str], marks: Mapping[str, str]) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        mark = self.folder / "calibration.json"
        found = _read(mark)
        other = [part for part, digest in marks.items() if found is not None and found.get(part) != digest]
        if other:
            raise OptionError(
                f"expected {self.folder} to be empty or to hold layers of this calibration, found one with other "
                f"{' and '.join(other)}: pass another folder, or delete this one"
            )
        if found is None:
            _write(mark, lambda path: path.write_text(json.dumps(marks)))

    def _file(self, index: int) -> Path:
        return self.folder / f"layer_{index:05}.safetensors"

    def save(self, index: int, finished: Finished) -> None:
        """Keep a layer."""
        tensors: dict[str, Tensor] = {}
        formats: dict[str, str] = {}
        for name, value in finished.parameters.items():
            if isinstance(value, QuantizedTensor):
                formats[name] = str(value.format)
                tensors |= {f"{name}:{p}": part for p in PARTS if (part := getattr(value, p)) is not None}
            else:
                tensors[name] = value.detach()
        rows = [asdict(row) | {"format": str(row.format)} for row in finished.rows]
        told = {"unscaled": dict(finished.unscaled), "rounded": dict(finished.rounded)}
        text = json.dumps({"formats": formats, "rows": rows} | told)
        plain = {name: value.cpu().contiguous() for name, value in tensors.items()}
        _write(self._file(index), lambda path: save_file(plain, path, {"llmcomp": text}))

    def load(self, index: int, modules: Mapping[str, nn.Module]) -> Finished | None:
        """A layer that was kept, its parameters where those of `modules`, by name, are now."""
        try:
            with safe_open(self._file(index), "pt") as file:
                about = json.loads(file.metadata()["llmcomp"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError):
            return None
        of_name: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            name, _, part = key.partition(":")
            of_name.setdefault(name, {})[part] = tensor
        parameters = {n: _joined(n, parts, modules, about["formats"].get(n)) for n, parts in of_name.items()}
        rows = [Row(**(r | {"format": parse_format(r["format"]), "shape": tuple(r["shape"])})) for r in about["rows"]]
        return Finished(parameters, tuple(rows), about["unscaled"], about["rounded"])


def _joined(name: str, parts: Mapping[str, Tensor], modules: Mapping[str, nn.Module], form: str | None) -> Tensor:
    """A parameter of a finished layer, where the one it replaces is."""
    owner, _, key = name.rpartition(".")
    before = getattr(modules[owner], key)
    moved = {part: tensor.to(before.device) for part, tensor in parts.items()}
    if form is None:
        return moved[""]
    packed = Packed(moved["codes"], moved["scale"], moved.get("zero"))
    return QuantizedTensor(packed, parse_format(form), before.shape, before.dtype, is_transposed(modules[owner]))


def _read(path: Path) -> dict[str, str] | None:
    """The mark of a calibration, or None where there is none that can be read."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _write(path: Path, write: Callable[[Path], object]) -> None:
    """As a whole or not at all."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    write(temporary)
    os.replace(temporary, path)
