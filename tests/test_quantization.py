"""`quantize_` and the option `weights`: what is quantized, what is left, and compiled models that read packed bytes."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import GPT2Config, GPT2LMHeadModel

import llmcomp
from llmcomp.errors import FormatError, OptionError
from llmcomp.formats import Format, Int4, Int8
from llmcomp.owners import models_of
from llmcomp.quantization import chosen, quantize_
from llmcomp.quantized import QuantizedTensor
from tests.numerics import assert_equal_float32
from tests.quantizable import IDS, llama, logits

pytestmark = pytest.mark.usefixtures("fresh")


def packed_bytes(model: nn.Module) -> int:
    """Bytes of all parameters, shared ones once."""
    return sum(p.nbytes for p in {id(p): p for p in model.parameters()}.values())


# ---- what is quantized ----------------------------------------------------------------------------------------------


def test_one_format_for_all_layers_and_int8_for_the_head() -> None:
    model = llama(tied=False)
    done = quantize_(model, "int4")
    assert len(done.quantized) == 15 and [r.name for r in done.left] == ["model.embed_tokens"]
    formats = {r.name: str(r.format) for r in done.quantized}
    assert formats.pop("lm_head") == "int8" and set(formats.values()) == {"int4"}
    assert isinstance(model.model.embed_tokens.weight, nn.Parameter)
    assert not isinstance(model.model.embed_tokens.weight, QuantizedTensor)
    assert "lm_head" in str(done) and "it is an embedding" in str(done)


def test_tied_weights_are_quantized_once() -> None:
    model = llama()
    quantize_(model, "int4")
    head = model.lm_head.weight
    assert isinstance(head, QuantizedTensor) and head is model.model.embed_tokens.weight
    assert head.format == Int8()


def test_patterns_choose() -> None:
    model = llama(tied=False)
    done = quantize_(model, {"*.mlp.*": "int4_g32", "*.self_attn.o_proj": None, "*.self_attn.*": Int8()})
    formats = {r.name.split(".")[-1]: r.format for r in done.rows}
    assert formats["up_proj"] == Int4(32) and formats["q_proj"] == Int8()
    assert formats["o_proj"] is None and formats["lm_head"] is None
    reasons = {r.name.split(".")[-1]: r.reason for r in done.left}
    assert "leaves it alone" in reasons["o_proj"] and reasons["lm_head"] == "no pattern matches it"


def test_a_function_chooses_and_may_name_embeddings() -> None:
    model = llama(tied=False)
    quantize_(model, lambda name, module: "int8" if isinstance(module, nn.Embedding) else None)
    assert isinstance(model.model.embed_tokens.weight, QuantizedTensor)
    assert not isinstance(model.lm_head.weight, QuantizedTensor)


def test_weights_that_do_not_fit_are_left_and_listed() -> None:
    model = nn.Sequential(nn.Linear(128, 8), nn.Linear(8, 8), nn.Linear(128, 8).double())
    done = quantize_(model, "int4")
    assert [r.name for r in done.quantized] == ["0"]
    assert "does not divide its 8 inputs" in done.left[0].reason and "float64" in done.left[1].reason
    again = quantize_(model, "int8")
    assert "it is int4 already" in again.left[0].reason


def test_parametrized_layers_are_left_alone() -> None:
    layers = (nn.utils.parametrizations.weight_norm(nn.Linear(128, 8)) for _ in range(3))
    model = nn.Sequential(*layers, nn.Linear(128, 8))
    assert [r.name for r in quantize_(model, "int8").rows] == ["3"]


@pytest.mark.parametrize(
    "spec,error,says",
    [
        ("int5", OptionError, "int4"),
        ({"nothing.*": "int8"}, OptionError, "matches none"),
        ({"0": "int4", "1": "int4"}, FormatError, "does not divide"),
        ({"0": 4}, OptionError, "name of one"),
        (4, OptionError, "mapping"),
    ],
)
def test_refusals_leave_the_model_untouched(spec: object, error: type[Exception], says: str) -> None:
    model = nn.Sequential(nn.Linear(128, 8), nn.Linear(8, 8))
    with pytest.raises(error, match=says):
        quantize_(model, spec)  # type: ignore[arg-type]
    assert not any(isinstance(p, QuantizedTensor) for p in model.parameters())


def test_weights_that_are_not_finite_are_refused_whatever_the_spec() -> None:
    model = nn.Sequential(nn.Linear(128, 8), nn.Linear(128, 8))
    with torch.no_grad():
        model[1].weight[0, 0] = float("nan")
    with pytest.raises(FormatError, match="1: expected finite"):
        quantize_(model, "int8")
    assert not isinstance(model[0].weight, QuantizedTensor)


class Held(nn.Module):
    """A module of its own that reads the weight of a linear layer."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.table = weight


def test_weights_that_other_modules_read_are_left_alone() -> None:
    model = nn.Sequential(nn.Linear(128, 8), nn.Linear(128, 8))
    model.add_module("held", Held(model[0].weight))
    done = quantize_(model, "int8")
    assert [r.name for r in done.quantized] == ["1"] and "held.table too" in done.left[0].reason
    assert model.held.table is model[0].weight
    with pytest.raises(FormatError, match="held.table"):
        quantize_(model, {"0": "int8"})


def test_a_layer_under_two_names() -> None:
    model = nn.ModuleDict({"a": nn.Linear(128, 8)})
    model["b"] = model["a"]
    quantize_(model, {"b": "int8"})
    assert isinstance(model["a"].weight, QuantizedTensor) and model["b"].weight is model["a"].weight
    twice = nn.ModuleDict({"a": (m := nn.Linear(128, 8)), "b": m})
    assert dict(chosen(twice, "int8")).keys() == {"a.weight", "b.weight"}


def test_layers_without_a_shape_yet_are_left_alone() -> None:
    done = quantize_(nn.Sequential(nn.LazyLinear(8), nn.Linear(128, 8)), "int8")
    assert "no shape yet" in done.left[0].reason and len(done.quantized) == 1
    assert "no shape yet" in str(done)


def test_a_layer_that_is_the_model() -> None:
    layer = nn.Linear(128, 8)
    assert "(the layer itself)" in str(quantize_(layer, "int8"))
    other = nn.Linear(128, 8)
    with torch.no_grad():
        other.weight.fill_(float("inf"))
    with pytest.raises(FormatError, match="the layer itself"):
        quantize_(other, "int8")


def test_the_base_of_all_formats_is_none() -> None:
    with pytest.raises(OptionError, match="such as Int8"):
        quantize_(nn.Linear(128, 8), Format())


# ---- compiled -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["int8", "int4", "nf4"])
def test_compiled_equals_eager(name: str) -> None:
    model = llama()
    quantize_(model, name)
    eager = logits(model)
    with torch.no_grad():
        tokens = model.generate(IDS, max_new_tokens=8, do_sample=False)
    counted = CompileCounterWithBackend("llmcomp")
    model.forward = torch.compile(model.forward, backend=counted)
    assert_equal_float32(logits(model), eager)
    with torch.no_grad():
        assert torch.equal(model.generate(IDS, max_new_tokens=8, do_sample=False), tokens)
    assert counted.frame_count > 0


@pytest.mark.slow
def test_the_lean_loop_gives_the_same_tokens() -> None:
    model = llama()
    quantize_(model, "int4")
    with torch.no_grad():
        tokens = model.generate(IDS, max_new_tokens=12, do_sample=False)
    assert torch.equal(llmcomp.generate(model, IDS, max_new_tokens=12, do_sample=False), tokens)


def test_packed_bytes_are_what_a_step_reads() -> None:
    model = llama()
    quantize_(model, "int4")
    with torch.no_grad():
        explained = llmcomp.explain(model, IDS[:, :1])
    (graph,) = explained.graphs
    linear = [k for k in graph.program.kernels if any("packed_linear" in node for node in k.nodes)]
    assert len(linear) == 2 * 4 + 1  # q/k/v, o, gate/up, down of two layers, and the head
    assert not any("linear" in x.op for x in graph.program.externs)
    norms = sum(p.nbytes for n, p in model.named_parameters() if "norm" in n)
    row = model.lm_head.weight.nbytes // 300  # of the embedding table, which is the head's
    read = sum(k.weight_bytes for k in graph.program.kernels)
    assert packed_bytes(model) <= read <= packed_bytes(model) + norms + 4 * row
    floats = packed_bytes(llama())
    assert read < 0.25 * floats


def test_gpt2_keeps_its_weights_transposed() -> None:
    torch.manual_seed(0)
    config = GPT2Config(n_embd=128, n_layer=1, n_head=2, vocab_size=300, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config).eval()
    done = quantize_(model, "int8")
    assert {r.name.split(".")[-1] for r in done.quantized} == {"lm_head", "c_attn", "c_proj", "c_fc"}
    eager = logits(model)
    model.compile(backend="llmcomp")
    assert_equal_float32(logits(model), eager)


def test_training_what_is_around_quantized_weights() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 4))
    quantize_(model, {"2": "int8"})
    other = copy.deepcopy(model)
    x = torch.randn(3, 128)
    torch.compile(model, backend="llmcomp")(x).square().sum().backward()
    other(x).square().sum().backward()
    grad, expected = model[0].weight.grad, other[0].weight.grad
    assert grad is not None and expected is not None and model[2].weight.grad is None
    assert_equal_float32(grad, expected)


# ---- the option -----------------------------------------------------------------------------------------------------


def test_the_option_quantizes_the_model_that_is_compiled() -> None:
    model, bystander = llama(tied=False), llama(tied=False)
    expected = copy.deepcopy(model)
    quantize_(expected, "int4")
    gone = weakref.ref(model.model.layers[0].mlp.up_proj.weight)
    fast = torch.compile(model, backend="llmcomp", options={"weights": "int4"})
    first = logits(fast)
    assert_equal_float32(first, logits(expected))
    assert isinstance(model.lm_head.weight, QuantizedTensor) and model.lm_head.weight.format == Int8()
    gc.collect()
    assert gone() is None  # the float weights are freed
    assert packed_bytes(model) == packed_bytes(expected)
    assert torch.equal(logits(fast), first)
    with torch.no_grad():
        tokens = fast.generate(IDS, max_new_tokens=6, do_sample=False)
        assert torch.equal(tokens, expected.generate(IDS, max_new_tokens=6, do_sample=False))
    assert not any(isinstance(p, QuantizedTensor) for p in bystander.parameters())


def test_the_option_leaves_what_the_graph_does_not_read() -> None:
    model = nn.ModuleDict({"used": nn.Linear(128, 8), "other": nn.Linear(128, 8)}).eval()
    torch.compile(model["used"], backend="llmcomp", options={"weights": "int8"})(torch.randn(2, 128))
    assert isinstance(model["used"].weight, QuantizedTensor)
    assert not isinstance(model["other"].weight, QuantizedTensor)


def test_the_option_refuses_a_model_that_is_being_trained() -> None:
    model = nn.Linear(128, 8)
    with pytest.raises(Exception, match="eval"):
        torch.compile(model, backend="llmcomp", options={"weights": "int8"})(torch.randn(2, 128))
    assert not isinstance(model.weight, QuantizedTensor)


def test_the_option_sees_the_model_around_a_compiled_part() -> None:
    model = nn.ModuleDict({"part": nn.Linear(128, 8), "other": nn.Linear(8, 8)}).eval()
    weight = model["part"].weight
    model["part"] = torch.compile(model["part"], backend="llmcomp")
    assert models_of([weight]) == [model]
    wrapped = torch.compile(layer := nn.Linear(128, 8), backend="llmcomp")
    assert models_of([layer.weight]) == [layer] and wrapped is not None


@pytest.mark.slow
def test_explaining_the_option_leaves_the_model_as_it_was() -> None:
    model = llama()
    before = dict(model.named_parameters())
    explained = llmcomp.explain(model, IDS, options={"weights": "int8"})
    assert any("packed_linear" in node for k in explained.kernels for node in k.nodes)
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    assert not hasattr(model.config, "quantization_config") and getattr(model, "hf_quantizer", None) is None


def test_breaks_are_counted_once_where_weights_are_quantized() -> None:
    class Breaks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(128, 128), nn.Linear(128, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.a(x)
            torch._dynamo.graph_break()
            return self.b(x)

    x, model = torch.randn(2, 128), Breaks().eval()
    with torch.no_grad():
        assert len(llmcomp.explain(model, x, options={"weights": "int8"}).breaks) == len(
            llmcomp.explain(model, x).breaks
        )
