"""Options: what is accepted, what is refused and how the refusal reads."""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed

from llmcomp.errors import OptionError
from llmcomp.formats import Int4, Int8
from llmcomp.options import MODES, Options, read_options, triton_interprets


def test_defaults():
    options = read_options(None, None, {})
    assert options == Options(cache=Path.home() / ".cache" / "llmcomp")
    assert not options.captures and not options.tune_seconds


def test_options_are_frozen_and_hashable():
    options = read_options({}, None, {})
    assert hash(options) == hash(read_options({}, None, {}))
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.verify = True  # type: ignore[misc]


def test_every_field_can_be_set():
    asked = {
        "target": "cpp",
        "mode": "max-autotune",
        "verify": True,
        "threads": 3,
        "tune": 2.5,
        "cuda_graphs": False,
        "weights": Int4(32),
        "kv_cache": "off",
        "kv_cache_bytes": 1 << 20,
        "strided_results": True,
        "kv_dtype": "int8",
        "cache": "/tmp/a",
        "debug": 2,
        "dump": Path("/tmp/b"),
    }
    assert set(asked) == {f.name for f in dataclasses.fields(Options)}
    stored = asked | {"cache": Path("/tmp/a")}
    options = read_options(asked, None, {})
    assert {f.name: getattr(options, f.name) for f in dataclasses.fields(Options)} == stored


def test_weights_are_named_or_given():
    assert read_options({"weights": "int8"}, None, {}).weights == Int8()
    assert read_options({"weights": Int4(64)}, None, {}).weights == Int4(64)
    assert read_options({"weights": None}, None, {}).weights is None


@pytest.mark.parametrize(
    ("mode", "captures", "seconds"),
    [
        ("default", False, 0.0),
        ("reduce-overhead", True, 0.0),
        ("max-autotune", True, 60.0),
        ("max-autotune-no-cudagraphs", False, 60.0),
    ],
)
def test_modes(mode, captures, seconds):
    assert mode in MODES
    options = read_options(None, mode, {})
    assert (options.captures, options.tune_seconds) == (captures, seconds)


def test_seconds_of_tuning_win_over_the_mode():
    assert read_options({"tune": 5}, None, {}).tune_seconds == 5
    assert read_options({"tune": 0}, "max-autotune", {}).tune_seconds == 0


@pytest.mark.parametrize(
    ("asked", "parts"),
    [
        ({"verfy": True}, ["'verfy'", "did you mean 'verify'", "target, mode, verify, threads, tune"]),
        ({"zzz": 1}, ["'zzz'", "target, mode, verify, threads, tune", "cache, debug, dump"]),
        ({"target": "cuda"}, ["target", "auto, triton, cpp, reference", "'cuda'"]),
        ({"target": "trito"}, ["did you mean 'triton'"]),
        ({"target": ["cpp"]}, ["target", "['cpp']"]),
        ({"verify": 1}, ["verify", "True or False", "found 1"]),
        ({"threads": 0}, ["threads", "positive", "found 0"]),
        ({"threads": True}, ["threads", "True"]),
        ({"threads": "2"}, ["threads", "'2'"]),
        ({"tune": -1}, ["tune", "seconds", "found -1"]),
        ({"tune": True}, ["tune", "True"]),
        ({"debug": 5}, ["debug", "0 to 4", "5"]),
        ({"debug": -1}, ["debug", "-1"]),
        ({"cache": ""}, ["cache", "folder"]),
        ({"dump": 3}, ["dump", "folder", "3"]),
        ({"weights": "int3"}, ["weights", "int8", "int4", "nf4", "'int3'"]),
        ({"weights": 8}, ["weights", "int8", "8"]),
        ({3: True}, ["3", "the options are"]),
    ],
)
def test_refusals_say_what_is_valid(asked, parts):
    with pytest.raises(OptionError) as caught:
        read_options(asked, None, {})
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize("value", ["int4", "fp16", 8, True])
def test_an_unknown_kv_dtype_is_told_what_there_is(value):
    with pytest.raises(OptionError, match="expected kv_dtype to be one of int8, fp8, or None for the model's dtype"):
        read_options({"kv_dtype": value}, None, {})


def test_unknown_mode():
    with pytest.raises(OptionError, match="mode.*default, reduce-overhead.*'max-autotun'.*did you mean 'max-autotune'"):
        read_options(None, "max-autotun", {})


def test_options_must_be_a_dict():
    with pytest.raises(OptionError, match="dict"):
        read_options(["verify"], None, {})  # type: ignore[arg-type]


def test_environment():
    environment = {"LLMCOMP_CACHE": "/tmp/c", "LLMCOMP_DEBUG": "3", "LLMCOMP_DUMP": "/tmp/d", "OTHER": "x"}
    options = read_options(None, None, environment)
    assert (options.cache, options.debug, options.dump) == (Path("/tmp/c"), 3, Path("/tmp/d"))


def test_code_wins_over_the_environment():
    assert read_options({"debug": 0}, None, {"LLMCOMP_DEBUG": "4"}).debug == 0


def test_empty_variables_count_as_unset():
    assert read_options(None, None, {"LLMCOMP_DEBUG": "", "LLMCOMP_DUMP": ""}) == read_options(None, None, {})


@pytest.mark.parametrize("value", ["9", "yes", "-1", "1.5"])
def test_a_bad_variable_is_named(value):
    with pytest.raises(OptionError, match=f"LLMCOMP_DEBUG.*{value}"):
        read_options(None, None, {"LLMCOMP_DEBUG": value})


def test_home_is_expanded():
    assert read_options({"cache": "~/x"}, None, {}).cache == Path.home() / "x"


@pytest.mark.parametrize(("value", "expected"), [("1", True), ("true", True), ("0", False), ("", False)])
def test_triton_interpreter(value, expected):
    assert triton_interprets({"TRITON_INTERPRET": value}) is expected


def test_an_unknown_option_reaches_the_user_of_torch_compile():
    with pytest.raises(BackendCompilerFailed, match="OptionError: .* did you mean 'verify'") as caught:
        torch.compile(torch.sin, backend="llmcomp", options={"verfy": True})(torch.ones(2))
    assert isinstance(caught.value.inner_exception, OptionError)
