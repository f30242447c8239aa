"""What a user may ask for; the only module that reads environment variables.

    torch.compile(model, backend="llmcomp", options={"verify": True})
    torch.compile(model, backend="llmcomp", mode="max-autotune")
    LLMCOMP_CACHE=/fast/disk LLMCOMP_DEBUG=2 LLMCOMP_DUMP=/tmp/stages python script.py

An option given in code wins over the environment.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmcomp.errors import OptionError

if TYPE_CHECKING:
    from llmcomp.formats import Format

TARGETS = ("auto", "triton", "cpp", "reference")
# torch's own names. "default" and "max-autotune-no-cudagraphs" launch kernels one by one; "reduce-overhead"
# (which transformers passes unasked) and "max-autotune" replay launches as a CUDA graph where they can; both
# "max-autotune" search for Triton launch configurations. On the CPU all four mean the same.
MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
KV_CACHES = ("auto", "off")
KV_DTYPES = ("int8", "fp8")
# What a compiled graph may spend on that search with the "max-autotune" modes, in seconds.
TUNE_SECONDS = 60.0


@dataclass(frozen=True)
class Options:
    """Everything that can be chosen about a compilation."""

    target: str = "auto"  # one of TARGETS; auto follows the device of the graph's tensors
    mode: str = "default"  # one of MODES
    verify: bool = False  # check every pass and the kernels against the captured graph, on the first call
    threads: int | None = None  # of a CPU kernel; None asks torch at each call
    tune: float | None = None  # seconds to search launch configurations, for each graph; None follows the mode
    cache: Path = Path("~/.cache/llmcomp")  # folder of generated sources and what was built from them
    cuda_graphs: bool | None = None  # replay launches as CUDA graphs; None: as the mode says, and in llmcomp.generate
    weights: "Format | None" = None  # quantize the weights that compiled graphs read, in the model itself
    kv_cache: str = "auto"  # one of KV_CACHES; auto keeps what growing sequences can reuse between calls
    kv_cache_bytes: int = 4 * 2**30  # memory that one program may keep so
    strided_results: bool = False  # growing results of several rows are not copied, and so not contiguous
    kv_dtype: str | None = None  # one of KV_DTYPES, of caches; None is the model's dtype
    debug: int = 0  # 1 passes and times, 2 operator counts, 3 graphs, 4 kernel sources; on stderr
    dump: Path | None = None  # folder that gets every stage as a numbered runnable file

    @property
    def captures(self) -> bool:
        """Whether the launches of a graph behind torch.compile are replayed as a CUDA graph."""
        return self.mode in ("reduce-overhead", "max-autotune") if self.cuda_graphs is None else self.cuda_graphs

    @property
    def tune_seconds(self) -> float:
        """Seconds that a graph may spend searching for launch configurations on a GPU; 0: it takes what it finds."""
        if self.tune is not None:
            return self.tune
        return TUNE_SECONDS if self.mode.startswith("max-autotune") else 0.0


@dataclass(frozen=True)
class _Rule:
    """What an option accepts: in words, as a test, and how it is stored."""

    says: str
    accepts: Callable[[Any], bool]
    store: Callable[[Any], object] = lambda value: value


def _format(value: object) -> "Format | None":
    """The weight format that a value is, or is the name of."""
    from llmcomp.formats import Format, parse_format  # brings in torch, which options do without

    if isinstance(value, str):
        try:
            return parse_format(value)
        except OptionError:
            return None
    return value if isinstance(value, Format) else None


def _whole_number(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _path(value: str | Path) -> Path:
    return Path(value).expanduser().absolute()


def _one_of(names: tuple[str, ...]) -> _Rule:
    return _Rule("one of " + ", ".join(names), lambda v: isinstance(v, str) and v in names)


_RULES = {
    "target": _one_of(TARGETS),
    "mode": _one_of(MODES),
    "verify": _Rule("True or False", lambda v: isinstance(v, bool)),
    "threads": _Rule(
        "a positive whole number, or None for torch's number of threads",
        lambda v: v is None or (_whole_number(v) and v > 0),
    ),
    "tune": _Rule(
        "a number of seconds, or None for 60 with the max-autotune modes and 0 otherwise",
        lambda v: v is None or (isinstance(v, int | float) and not isinstance(v, bool) and v >= 0),
    ),
    "weights": _Rule(
        "a weight format, such as int8, fp8, int4, int4_g32, nf4 or mxfp4 (README lists them), or None",
        lambda v: v is None or _format(v) is not None,
        lambda v: None if v is None else _format(v),
    ),
    "cuda_graphs": _Rule("True, False or None", lambda v: v is None or isinstance(v, bool)),
    "kv_cache": _one_of(KV_CACHES),
    "kv_cache_bytes": _Rule("a positive whole number of bytes", lambda v: _whole_number(v) and v > 0),
    "strided_results": _Rule("True or False", lambda v: isinstance(v, bool)),
    "kv_dtype": _Rule(
        f"one of {', '.join(KV_DTYPES)}, or None for the model's dtype",
        lambda v: v is None or (isinstance(v, str) and v in KV_DTYPES),
    ),
    "cache": _Rule("a folder", lambda v: isinstance(v, str | Path) and str(v) != "", _path),
    "debug": _Rule("a whole number from 0 to 4", lambda v: _whole_number(v) and 0 <= v <= 4),
    "dump": _Rule(
        "a folder, or None",
        lambda v: v is None or (isinstance(v, str | Path) and str(v) != ""),
        lambda v: None if v is None else _path(v),
    ),
}


def read_options(
    options: Mapping[str, object] | None = None,
    mode: str | None = None,
    environment: Mapping[str, str] = os.environ,
) -> Options:
    """Build Options from what torch.compile passes (`options`, `mode`) and from the environment.

    Raises:
        OptionError: an unknown key, or a value that the key does not take; the message lists what is valid.
    """
    if options is not None and not isinstance(options, Mapping):
        raise OptionError(f"expected options to be a dict, found {options!r}: pass options={{'verify': True}}")
    asked: dict[str, Any] = {"cache": _path(Options.cache)}
    asked |= {key: _checked(key, value, name) for name, key, value in _from_environment(environment)}
    asked |= {key: _checked(key, value, key) for key, value in (options or {}).items()}
    if mode is not None:
        asked["mode"] = _checked("mode", mode, "mode")
    return Options(**asked)


def _from_environment(environment: Mapping[str, str]) -> Iterator[tuple[str, str, object]]:
    for name, key in {"LLMCOMP_CACHE": "cache", "LLMCOMP_DEBUG": "debug", "LLMCOMP_DUMP": "dump"}.items():
        if value := environment.get(name):
            yield name, key, int(value) if key == "debug" and value.isdecimal() else value


def _checked(key: str, value: object, source: str) -> Any:
    """Return `value` as it is stored; `source` is what the user wrote: key or environment variable."""
    if key not in _RULES:
        raise OptionError(
            f"expected an option of llmcomp, found {key!r}: {_did_you_mean(str(key), list(_RULES))}"
            f"the options are {', '.join(_RULES)}"
        )
    rule = _RULES[key]
    if not rule.accepts(value):
        hint = _did_you_mean(str(value), rule.says.replace(",", "").split())
        raise OptionError(f"expected {source} to be {rule.says}, found {value!r}: {hint}pass one of these")
    return rule.store(value)


def _did_you_mean(word: str, valid: list[str]) -> str:
    close = get_close_matches(word, valid, n=1)
    return f"did you mean {close[0]!r}? " if close else ""


def triton_interprets(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether Triton runs kernels in its interpreter, on CPU tensors (TRITON_INTERPRET=1)."""
    return environment.get("TRITON_INTERPRET", "").lower() in ("1", "y", "yes", "on", "true")
