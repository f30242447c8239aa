"""Triton kernels -> machine code of a GPU that need not be there, and what a reader wants to know of it.

    module.launch(buffers, sizes)  --record-->  Launch  --assemble-->  Assembly(registers, spills, loads, ...)

The assembler and disassembler are those of the triton wheel. Triton compiles only where it does not
interpret: this module is of no use under TRITON_INTERPRET=1.
"""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

from llmcomp.codegen.launch import Config
from llmcomp.errors import BuildError

POINTERS: dict[torch.dtype, str] = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int16: "*i16",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.bool: "*i1",
    torch.float8_e4m3fn: "*u8",  # kernels are given its bits: not every GPU knows the type
}
ALIGNMENT = 16  # bytes; what torch's allocator and our arena give every buffer
LINE = re.compile(
    r"^(?P<label>\.L_x_\d+):|^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?(?P<opcode>[A-Z][A-Z0-9_.]*)(?P<rest>.*)",
    re.MULTILINE,
)
TARGET = re.compile(r"`\((\.L_x_\d+)\)")
INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\d+ )?([A-Z][A-Z0-9_.]*)", re.MULTILINE)
TENSOR_CORE = re.compile(r"^(HMMA|HGMMA|QGMMA|IMMA|IGMMA|UTCHMMA)")
SPILL = re.compile(r"^(STL|LDL)\b")
GLOBAL_LOAD = re.compile(r"^(LDG|LDGSTS)\.E\b")


@dataclass(frozen=True)
class Launch:
    """One launch of a jitted function as a launcher would do it."""

    function: Any  # triton.JITFunction
    grid: tuple[int, ...]
    signature: Mapping[str, str]
    constants: Mapping[str, object]
    options: Mapping[str, int]


@dataclass(frozen=True)
class Assembly:
    """A kernel as machine code for `capability` (80: sm_80, 90: sm_90)."""

    name: str
    capability: int
    ptx: str
    cubin: bytes
    sass: str
    registers: int  # per thread
    shared: int  # bytes per block
    instructions: Counter[str]

    @property
    def spills(self) -> int:
        """Instructions that store registers to local memory or load them back."""
        return sum(n for op, n in self.instructions.items() if SPILL.match(op))

    @property
    def loop(self) -> Counter[str]:
        """The instructions of the longest loop that contains no other; of none, nothing."""
        return max(loops(self.sass), key=Counter.total, default=Counter())

    @property
    def tensor_core_instructions(self) -> int:
        """Matrix instructions (mma.sync and wgmma)."""
        return sum(n for op, n in self.instructions.items() if TENSOR_CORE.match(op))

    @property
    def widest_load(self) -> int:
        """Bytes of the widest load of a thread from global memory; 0 where it loads nothing."""
        return max((load_bytes(op) for op in self.instructions if GLOBAL_LOAD.match(op)), default=0)

    @property
    def narrowest_streamed_load(self) -> int:
        """Bytes of the narrowest load that marks its cache lines to be evicted first, as weights do; or 0."""
        streamed = [op for op in self.instructions if GLOBAL_LOAD.match(op) and ".EF" in op]
        return min(map(load_bytes, streamed), default=0)

    def __str__(self) -> str:
        return (
            f"{self.name} for sm_{self.capability}: {self.registers} registers, {self.shared} bytes shared, "
            f"{self.spills} spills, loads up to {self.widest_load} bytes, "
            f"{self.tensor_core_instructions} tensor core instructions"
        )


def load_bytes(opcode: str) -> int:
    """Bytes that an instruction moves for each thread.

    >>> load_bytes("LDG.E.EF.128"), load_bytes("LDG.E.U16"), load_bytes("LDG.E")
    (16, 2, 4)
    """
    suffixes = opcode.split(".")[1:]
    narrow = {"U8": 1, "S8": 1, "U16": 2, "S16": 2}
    for suffix in suffixes:
        if suffix in narrow:
            return narrow[suffix]
        if suffix in ("64", "128"):
            return int(suffix) // 8
    return 4


def loops(sass: str) -> list[Counter[str]]:
    """The instructions of each loop of a disassembly that contains no other: what lies behind a branch backwards."""
    opcodes: list[str] = []
    labels: dict[str, int] = {}
    found: list[tuple[int, int]] = []
    for line in LINE.finditer(sass):
        if line["label"]:
            labels[line["label"]] = len(opcodes)
            continue
        opcodes.append(line["opcode"])
        target = TARGET.search(line["rest"])
        if line["opcode"].startswith("BRA") and target is not None and target[1] in labels:
            found.append((labels[target[1]], len(opcodes)))
    inner = [a for a in found if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in found)]
    return [Counter(opcodes[first:end]) for first, end in inner]


def record(
    module: ModuleType,
    buffers: Sequence[torch.Tensor],
    sizes: Sequence[int],
    config: Config | None = None,
    status: torch.Tensor | None = None,
) -> tuple[Launch, ...]:
    """What `module.launch` launches for these arguments; nothing runs. The buffers may be meta tensors."""
    launches: list[Launch] = []
    functions = {n: f for n, f in vars(module).items() if isinstance(f, triton.JITFunction)}
    try:
        for name, function in functions.items():
            setattr(module, name, _Recorder(function, launches))
        module.launch(buffers, sizes, config, status)
    finally:
        for name, function in functions.items():
            setattr(module, name, function)
    return tuple(launches)


class _Recorder:
    """Stands for a jitted function: `recorder[grid](...)` notes the launch."""

    def __init__(self, function: Any, launches: list[Launch]) -> None:
        self.function = function
        self.launches = launches

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def note(*arguments: object, **keywords: Any) -> None:
            self.launches.append(_launch(self.function, grid, arguments, keywords))

        return note


def _launch(function: Any, grid: tuple[int, ...], arguments: Sequence[object], keywords: Mapping[str, Any]) -> Launch:
    names = function.arg_names
    given = dict(zip(names, arguments, strict=False)) | {k: v for k, v in keywords.items() if k in names}
    signature = {name: _type(given[name]) for name in names[: len(arguments)]}
    constants = {n: v for n, v in given.items() if n not in signature or signature[n] == "constexpr"}
    signature |= dict.fromkeys(constants, "constexpr")
    options = {k: v for k, v in keywords.items() if k not in names}
    return Launch(function, grid, {n: signature[n] for n in names}, constants, options)


def _type(argument: object) -> str:
    if isinstance(argument, torch.Tensor):
        return POINTERS[argument.dtype]
    if argument is None:
        return "constexpr"
    assert isinstance(argument, int), argument
    return "i32" if -(2**31) <= argument < 2**31 else "i64"


def assemble(
    function: Any,
    signature: Mapping[str, str],
    constants: Mapping[str, object],
    capability: int,
    options: Mapping[str, int] | None = None,
) -> Assembly:
    """Compile a jitted function for sm_<capability>.

    `signature` maps every argument to a Triton type ("*bf16", "i32", "constexpr"), `constants` gives the
    values of the constexpr ones, `options` are those of a launch (num_warps, num_stages, ...). Pointers are
    taken to be aligned to 16 bytes.

    Raises:
        BuildError: the kernel does not compile for this capability, or wants more than it has.
    """
    pointers = [i for i, kind in enumerate(signature.values()) if kind.startswith("*")]
    attributes = {(i,): [["tt.divisibility", ALIGNMENT]] for i in pointers}
    source = ASTSource(function, dict(signature), dict(constants), attributes)
    wanted = {"enable_fp_fusion": True, **(options or {})}
    try:
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=wanted)
    except (CompilationError, PTXASError, OutOfResources, RuntimeError) as error:
        raise BuildError(
            f"expected {function.__name__} to compile for sm_{capability}, found: {error}\n"
            f"with {dict(constants)} and {wanted}"
        ) from error
    cubin, shared = compiled.asm["cubin"], int(compiled.metadata.shared)
    sass, usage = disassemble(cubin)
    registers = re.search(r"REG:(\d+)", usage)
    assert registers is not None, usage
    return Assembly(
        function.__name__,
        capability,
        compiled.asm["ptx"],
        cubin,
        sass,
        int(registers[1]),
        shared,
        Counter(INSTRUCTION.findall(sass)),
    )


def assemble_launch(launch: Launch, capability: int) -> Assembly:
    """Compile what a launcher launches; what its constants say of the GPU is made true of this one."""
    constants = {**launch.constants}
    if "FLOAT8" in constants:
        constants["FLOAT8"] = capability >= 89
    return assemble(launch.function, launch.signature, constants, capability, launch.options)


def disassemble(cubin: bytes) -> tuple[str, str]:
    """(machine code as text, resource usage as text) of a compiled kernel."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        nvdisasm = [triton.knobs.nvidia.nvdisasm.path, "-c", str(path)]
        cuobjdump = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(path)]
        texts = [
            subprocess.run(command, capture_output=True, text=True, check=True).stdout
            for command in (nvdisasm, cuobjdump)
        ]
    return texts[0], texts[1]
