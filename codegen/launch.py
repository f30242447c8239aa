"""What launchers of generated Triton kernels share: launch configurations, their defaults, and index types.

A configuration is chosen by the class of the shape, with no search. tune.py searches, on a GPU.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton.language as tl


@dataclass(frozen=True)
class Config:
    """Block sizes, warps and pipeline stages of a launch; `form` is the function where a file has several.

    `registers` is what a thread may use at most; 0 leaves it to the assembler.
    """

    blocks: tuple[tuple[str, int], ...]
    warps: int = 4
    stages: int = 1
    form: str = ""
    registers: int = 0

    def __getitem__(self, block: str) -> int:
        return dict(self.blocks)[block]

    def options(self) -> dict[str, int]:
        """The keyword arguments of a launch. Fused multiply-adds are named: Triton's default changes."""
        limit = {"maxnreg": self.registers} if self.registers and torch.version.hip is None else {}
        return {
            **dict(self.blocks),
            "num_warps": self.warps,
            "num_stages": self.stages,
            "enable_fp_fusion": True,
            **limit,
        }


# Limits of registers in the order of trying, until none are spilled to memory. The assembler spills a few where one
# more block would then find room on a multiprocessor; under a limit it weighs otherwise, in no way that one foresees.
REGISTERS = (0, 255, 168, 128)


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


def multiplies_float8(device: torch.device) -> bool:
    """Whether tensor cores of a GPU multiply float8 e4m3; taken for granted where there is none."""
    return device.type != "cuda" or torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 9)


# ---- Map ----------------------------------------------------------------------------------------------

MAP = tuple(Config((("BLOCK", block),), warps) for block, warps in ((128, 1), (256, 2), (512, 4), (1024, 4), (2048, 8)))


class Points(NamedTuple):
    """The size of a Map."""

    points: int


def map_config(shape: Points) -> Config:
    """For a Map: small blocks while they are needed to fill the GPU."""
    return MAP[1] if shape.points < 2**17 else MAP[2] if shape.points < 2**20 else MAP[3]


def map_configs(shape: Points) -> tuple[Config, ...]:
    """Candidates for a Map."""
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


class Table(NamedTuple):
    """The sizes of a Rows."""

    rows: int
    columns: int


def rows_config(shape: Table) -> Config:
    """For Rows that are held whole: about 2048 elements a program, fewer rows while there are few."""
    width = power(shape.columns)
    together = max(1, min(2048 // width, power(shape.rows) // 256, 16))
    return Config((("ROWS", together),), max(1, min(16, power(together * width // 512))))


def rows_configs(shape: Table) -> tuple[Config, ...]:
    """Candidates for Rows that are held whole: 2 to 64 elements of a row for each thread."""
    width = power(shape.columns)
    return tuple(c for c in ROWS if 64 <= c["ROWS"] * width // c.warps <= 2048)


def long_rows_config(shape: Table) -> Config:
    """For Rows that are walked in chunks."""
    return LONG_ROWS[5] if shape.columns <= 128 else LONG_ROWS[4] if shape.columns <= 512 else LONG_ROWS[1]


def long_rows_configs(shape: Table) -> tuple[Config, ...]:
    """Candidates for Rows that are walked in chunks."""
    return LONG_ROWS


# ---- Contract -----------------------------------------------------------------------------------------


class Product(NamedTuple):
    """The sizes of a Contract."""

    rows: int
    columns: int  # weight rows, over all sections and accumulators
    depth: int
    parts: int = 1  # accumulators of a section
    width: int = 0  # columns that a program must own together; 0 where any number will do
    bytes: int = 2  # of an element of the weights; of the operand, where they are codes of 4 bits
    experts: int = 1
    across: bool = False  # weights lie along the columns (K, N), not along the depth
    room: int = 64  # results for which a thread has registers, as far as what follows the products goes
    together: int = 128  # columns that a program may own
    operands: int = 16  # numbers of a row of the operand that a quad meets, in registers
    quads: int = 8  # of words that a thread has registers for where one row meets them
    quad: int = 0  # codes of weights that few rows meet in quads of words: how many of what `depth` counts these hold


def _divisor(depth: int, wanted: int) -> int:
    """The largest power of two up to `wanted` that divides `depth`; 64 at least, which may be masked."""
    return max(64, min(wanted, depth & -depth))


def _gemv(shape: Product, block_k: int, elements: int, warps: int) -> Config:
    """A thread holds `elements` products of each step; 16 bytes of weights lie together, a sector if across."""
    rows = min(power(-(-shape.rows // shape.experts)), 4)
    depth = _divisor(shape.depth, block_k)
    products = elements * 32 * warps // (rows * shape.parts)
    block_n = shape.width or min(shape.together, max(1, products // depth))
    if shape.across:
        block_n = max(block_n, 32 // shape.bytes)
    if shape.width or shape.across:  # the columns are given: take what depth is left
        depth = max(16, min(depth, power(products // block_n)))
    # Small heads of a shallow layer: a thread still loads 16 bytes of weights at a time.
    warps = max(1, min(warps, block_n * depth * shape.bytes // (16 * 32)))
    blocks = (("BLOCK_M", rows), ("BLOCK_N", block_n), ("BLOCK_K", depth))
    return Config(blocks, warps, 1, "gemv")


def _quads_gemv(shape: Product, block_quads: int, quads: int, warps: int) -> Config:
    """A thread holds `quads` of words of each step; columns share what is done for the operands of a quad."""
    rows = min(power(-(-shape.rows // shape.experts)), 64 // shape.operands)
    along = _units(shape, block_quads * shape.quad) // shape.quad
    warps = warps if shape.width else max(1, min(warps, along // 32))
    held = quads * 32 * warps // shape.parts
    block_n = shape.width or min(128, max(1, held // along))
    if shape.width:
        along = max(1, min(along, power(held // block_n)))
    blocks = (("BLOCK_M", rows), ("BLOCK_N", block_n), ("BLOCK_K", along * shape.quad))
    return Config(blocks, warps, 1, "gemv")


def _units(shape: Product, wanted: int) -> int:
    """The largest power of two up to `wanted` that divides the depth; a few quads at least, which may be masked."""
    return max(32 if shape.quad == 4 else 64, min(wanted, shape.depth & -shape.depth))


def gemv_config(shape: Product) -> Config:
    """For few rows: 32 products a thread keep four 16-byte loads of weights under way, or 8 quads of codes eight."""
    if shape.quad:
        quads = shape.quads if shape.rows <= shape.experts else shape.quads // 2
        return _quads_gemv(shape, 128, quads, 8 if shape.width else 4)
    return _gemv(shape, 1024, 32 if shape.rows <= shape.experts else 64, 8 if shape.width else 4)


def gemv_configs(shape: Product) -> tuple[Config, ...]:
    """Candidates for few rows."""
    if shape.quad:
        choices = itertools.product((32, 64, 128, 256), (2, 4, 8, 16), (1, 2, 4, 8))
        return tuple(sorted({_quads_gemv(shape, *choice) for choice in choices}, key=str))
    found = {
        _gemv(shape, block_k, elements, warps)
        for block_k in (256, 512, 1024, 2048)
        for elements in (16, 32, 64)
        for warps in (1, 2, 4, 8)
    }
    return tuple(sorted(found, key=str))


def _dot(shape: Product, block_m: int, block_n: int, block_k: int, warps: int, stages: int) -> Config:
    block_n = shape.width or min(block_n, shape.together)
    if shape.quad == 4:  # words of two halves that are multiplied one after the other
        block_k = max(16, min(block_k // 4, shape.depth & -shape.depth))
    else:
        block_k = _divisor(shape.depth, block_k) if shape.bytes < 4 else min(block_k, 32)
    blocks = (("BLOCK_M", block_m), ("BLOCK_N", block_n), ("BLOCK_K", block_k))
    return Config(blocks, warps, stages, "dot")


def _fits(config: Config, shape: Product) -> bool:
    """Whether the accumulators fit in registers and the pipeline in 160 KiB of shared memory.

    float32 is multiplied without tensor cores: a thread holds a row of its operands along the depth as well.
    """
    results = config["BLOCK_M"] * config["BLOCK_N"]
    if results > shape.room * 32 * config.warps:
        return False
    accumulators = results * shape.parts
    most = 128 if shape.bytes < 4 else 512 // config["BLOCK_K"]
    columns = config["BLOCK_M"] + config["BLOCK_N"] * shape.parts
    stage = columns * config["BLOCK_K"] * shape.bytes
    return accumulators <= most * 32 * config.warps and stage * config.stages <= 160 * 1024


def dot_config(shape: Product) -> Config:
    """For more rows: the tile grows with the rows, as far as the accumulators fit."""
    rows = -(-shape.rows // shape.experts)
    if shape.bytes > 2:
        large = [_dot(shape, 64, 64, 32, 8, 2), _dot(shape, 64, 64, 16, 8, 2)]
        guesses = [*(large if rows > 64 else []), _dot(shape, 16 if rows <= 16 else 32, 32, 32, 8, 2)]
    elif rows > 64 and shape.quad == 4:  # words that are unpacked take registers
        guesses = [_dot(shape, 64, 128, 64, 8, 3)] if shape.parts == 1 else [_dot(shape, 64, 32, 64, 4, 3)]
    elif rows <= 16:
        guesses = [_dot(shape, 16, 32, 128, 4, 4)]
    elif rows <= 64:
        guesses = [_dot(shape, power(rows), 64 // min(shape.parts, 2), 64, 4, 4), _dot(shape, 32, 32, 64, 4, 3)]
    else:
        guesses = [_dot(shape, 128, 128 // min(shape.parts, 2), 64, 8, 3), _dot(shape, 128, 64, 64, 8, 3)]
        guesses += [_dot(shape, 64, 64, 64, 8, 3)]
    smaller = [_dot(shape, 32, 32, 64, 8, 2), _dot(shape, 16, 16, 64, 8, 2), _dot(shape, 16, 16, 16, 8, 2)]
    return next(c for c in [*guesses, *smaller] if _fits(c, shape) or c == smaller[-1])


def dot_configs(shape: Product) -> tuple[Config, ...]:
    """Candidates for more rows."""
    rows = power(-(-shape.rows // shape.experts))
    found = {
        _dot(shape, block_m, block_n, block_k, warps, stages)
        for block_m in (16, 32, 64, 128)
        for block_n in (32, 64, 128)
        for block_k in (32, 64, 128)
        for warps in (4, 8)
        for stages in (3, 4)
        if block_m <= max(16, rows) and block_m * block_n * block_k >= 64 * 1024
    }
    return tuple(sorted((c for c in found if _fits(c, shape)), key=str))


# ---- Attend -------------------------------------------------------------------------------------------


class Heads(NamedTuple):
    """The sizes of an Attend."""

    pairs: int  # batch * heads of k and v
    group: int  # heads of q for each
    queries: int
    keys: int  # seen by some query
    width: int  # of a head, and of a value: the larger
    bytes: int = 2  # of an element of k and v
    window: bool = False  # queries do not see the first keys
    unpacks: bool = False  # elements of k and v are widened by arithmetic, which takes registers


def prefill_config(shape: Heads) -> Config:
    """For many queries: tiles as large as the accumulators allow."""
    width = power(shape.width)
    if shape.bytes > 2:
        block_m, block_n, warps, stages = 32, 32 if width <= 128 else 16, 8, 2
    elif width <= 128:
        block_m, block_n, warps, stages = 128, 64, 8, 3 if width <= 64 else 2
        if shape.window and width > 64:  # the masks of a window take registers
            block_n = 32
    else:
        block_m, block_n, warps, stages = 64, 32, 8, 2
    block_m = max(16, min(block_m, power(shape.queries)))
    blocks = (("BLOCK_M", block_m), ("BLOCK_N", block_n))
    return Config(blocks, warps if block_m >= 64 or shape.bytes > 2 else 4, stages, "prefill")


def prefill_configs(shape: Heads) -> tuple[Config, ...]:
    """Candidates for many queries."""
    widest = 128 * 128 // max(64, power(shape.width))
    return tuple(
        Config((("BLOCK_M", block_m), ("BLOCK_N", block_n)), warps, stages, "prefill")
        for block_m in (32, 64, 128)
        for block_n in (32, 64, 128)
        for warps in (4, 8)
        for stages in (2, 3)
        if block_m <= max(32, power(shape.queries)) and block_n <= widest
    )


def decode_config(shape: Heads) -> Config:
    """For few queries: the queries of a group of heads fill one tile."""
    wide = power(shape.width) * shape.bytes > (128 if shape.unpacks else 256) or shape.bytes > 2
    return _decode(shape, 32 if wide else 64, 4, 2)


def decode_configs(shape: Heads) -> tuple[Config, ...]:
    """Candidates for few queries."""
    blocks = (16, 32, 64, 128)
    return tuple(_decode(shape, n, warps, stages) for n in blocks for warps in (2, 4) for stages in (2, 3))


def _decode(shape: Heads, block_n: int, warps: int, stages: int) -> Config:
    block_m = max(16, power(shape.group * shape.queries))
    return Config((("BLOCK_M", block_m), ("BLOCK_N", block_n)), warps, stages, "decode")


def splits(shape: Heads, block_n: int, device: torch.device) -> int:
    """Into how many parts the keys are split: two programs for each multiprocessor, at least two blocks each."""
    wanted = -(-2 * processors(device) // max(shape.pairs, 1))
    return max(1, min(wanted, shape.keys // (2 * block_n), 128, 16384 // power(shape.width)))


def combine_config(splits: int, width: int) -> Config:
    """For the function that combines the parts, `width` channels of each."""
    return Config((("SPLITS", power(splits)),), max(1, min(8, power(splits) * width // 2048)))
