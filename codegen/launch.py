"""What launchers of generated Triton kernels share: launch configurations, their defaults, and index types.

A configuration is chosen by the class of the shape, with no search. tune.py searches, on a GPU.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton.language as tl


@dataclass(frozen=True)
class Config:
    """Block sizes, warps and pipeline stages of a launch; `form` is the function where a file has several."""

    blocks: tuple[tuple[str, int], ...]
    warps: int = 4
    stages: int = 1
    form: str = ""

    def __getitem__(self, block: str) -> int:
        return dict(self.blocks)[block]

    def options(self) -> dict[str, int]:
        """The keyword arguments of a launch."""
        return {**dict(self.blocks), "num_warps": self.warps, "num_stages": self.stages}


def power(n: int) -> int:
    """The smallest power of two that is not below `n`."""
    return 1 << max(n - 1, 0).bit_length()


def index_type(buffers: Sequence[torch.Tensor], points: int) -> tl.dtype:
    """int32, or int64 where an element of a buffer or a point of the loop may lie beyond 2**31."""
    largest = max((b.untyped_storage().nbytes() // b.element_size() for b in buffers), default=0)
    return tl.int64 if max(largest, points) >= 2**31 - 2**20 else tl.int32


def processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; 132 (an H100) elsewhere."""
    if device.type != "cuda":
        return 132
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


# ---- Map ----------------------------------------------------------------------------------------------

MAP = tuple(
    Config((("BLOCK", block),), warps)
    for block, warps in ((128, 1), (256, 2), (512, 4), (1024, 4), (2048, 8))
)


def map_config(points: int) -> Config:
    """For a Map over `points`: small blocks while they are needed to fill the GPU."""
    return MAP[1] if points < 2**17 else MAP[2] if points < 2**20 else MAP[3]


def map_configs(points: int) -> tuple[Config, ...]:
    """Candidates for a Map over `points`."""
    return MAP


# ---- Rows ---------------------------------------------------------------------------------------------

ROWS = tuple(Config((("ROWS", rows),), warps) for rows in (1, 2, 4, 8, 16) for warps in (1, 2, 4, 8, 16))
LONG_ROWS = tuple(
    Config((("ROWS", rows), ("COLS", columns)), warps)
    for rows, columns, warps in (
        (1, 1024, 4),
        (1, 2048, 8),
        (1, 4096, 8),
        (1, 8192, 16),
        (4, 256, 4),
        (16, 64, 4),
    )
)


def rows_config(rows: int, columns: int) -> Config:
    """For Rows that are held whole: about 2048 elements a program, fewer rows while there are few."""
    width = power(columns)
    together = max(1, min(2048 // width, power(rows) // 256, 16))
    return Config((("ROWS", together),), max(1, min(16, power(together * width // 512))))


def rows_configs(rows: int, columns: int) -> tuple[Config, ...]:
    """Candidates for Rows that are held whole: 2 to 64 elements of a row for each thread."""
    width = power(columns)
    return tuple(c for c in ROWS if 64 <= c["ROWS"] * width // c.warps <= 2048)


def long_rows_config(rows: int, columns: int) -> Config:
    """For Rows that are walked in chunks."""
    return LONG_ROWS[5] if columns <= 128 else LONG_ROWS[4] if columns <= 512 else LONG_ROWS[1]


def long_rows_configs(rows: int, columns: int) -> tuple[Config, ...]:
    """Candidates for Rows that are walked in chunks."""
    return LONG_ROWS
