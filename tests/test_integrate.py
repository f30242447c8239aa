"""What llmcomp changes in the process: generate of compiled modules, Dynamo's limit, and nothing else."""

import threading

import pytest
import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM, CompileConfig, LlamaConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import llmcomp.backend
from llmcomp import integrate
from tests.models import LAYERS, PER_LAYER, small, token_ids

SMALL = dict(
    vocab_size=64,
    hidden_size=32,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=48,
)
# What is tested here does not depend on kernels, and building them takes longest.
OURS = {"backend": "llmcomp", "options": {"target": "reference"}}
PROMPT = torch.tensor([[3, 1, 4, 1, 5]])


@pytest.fixture
def model():
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LlamaConfig(**SMALL)).eval()


def generate(model, **settings):
    return model.generate(PROMPT, max_new_tokens=6, do_sample=False, pad_token_id=0, **settings)


def test_generate_of_a_compiled_module_is_compiled(model, graphs):
    expected = generate(model)
    fast = torch.compile(model, backend="llmcomp")
    assert torch.equal(generate(fast), expected)
    assert [g.kind for g in graphs] == ["inference"] * 2  # prefill, every decode
    assert torch.equal(generate(fast), expected)
    assert len(graphs) == 2, "a second generate compiles nothing"


def test_calls_and_generate_share_graphs(model, graphs):
    fast = torch.compile(model, **OURS)
    generate(fast)
    before = len(graphs)
    with torch.no_grad():
        fast(PROMPT, use_cache=True)
    assert len(graphs) <= before + 1


@pytest.mark.slow
def test_the_original_module_stays_eager(model, graphs):
    fast = torch.compile(model, **OURS)
    generate(fast)
    graphs.clear()
    generate(model, cache_implementation="static")
    assert not graphs
    assert model._compiled_call_impl is None
    assert type(fast._orig_mod) is type(model)


@pytest.mark.slow
def test_generate_in_a_thread_leaves_calls_in_another_eager(model, graphs):
    fast = torch.compile(model, **OURS)
    seen, inside = [], threading.Event()

    def slow_streamer(ids, scores):
        inside.set()
        return scores

    thread = threading.Thread(target=lambda: seen.append(generate(fast, logits_processor=[slow_streamer])))
    thread.start()
    assert inside.wait(60)
    assert model._compiled_call_impl is None
    eager = generate(model)
    thread.join()
    assert torch.equal(seen[0], eager) and graphs


@pytest.mark.slow
def test_static_cache_and_beams_run_compiled(model, graphs):
    fast = torch.compile(model, **OURS)
    for settings in ({"cache_implementation": "static"}, {"num_beams": 2}):
        expected = generate(model, **settings)
        graphs.clear()
        assert torch.equal(generate(fast, **settings), expected)
        assert graphs


def test_attributes_set_through_generate_reach_the_model(model):
    fast = torch.compile(model, **OURS)
    stand_in = fast.generate.__self__
    stand_in.noted = 1
    assert model.noted == 1 and isinstance(stand_in, type(model))
    model.generation_config.max_length = 7
    assert stand_in.generation_config.max_length == 7


def test_other_backends_keep_their_generate(model):
    assert torch.compile(model, backend="eager").generate == model.generate


@pytest.mark.parametrize("backend", ["llmcomp", "eager"])
def test_generate_can_be_replaced(model, backend):
    fast = torch.compile(model, backend=backend)
    fast.generate = lambda: "mine"
    assert fast.generate() == model.generate() == "mine"
    del fast.generate
    assert "generate" not in vars(model)


def test_a_module_without_generate_has_none():
    layer = nn.Linear(2, 2)
    for backend in ("llmcomp", "eager"):
        with pytest.raises(AttributeError, match="generate"):
            torch.compile(layer, backend=backend).generate  # noqa: B018


def test_compile_config_of_transformers(model, graphs):
    expected = generate(model, cache_implementation="static")
    config = CompileConfig(backend="llmcomp")
    config._compile_all_devices = True
    got = generate(model, cache_implementation="static", compile_config=config)
    assert torch.equal(got, expected) and graphs


def test_compile_config_does_not_take_over_a_compiled_module(model, graphs):
    config = CompileConfig(backend="eager")
    config._compile_all_devices = True
    fast = torch.compile(model, **OURS)
    generate(fast, cache_implementation="static", compile_config=config)
    kinds = len(graphs)
    assert kinds >= 2, "prefill and decoding are both ours"


def test_state_dict_and_saving(model, tmp_path, graphs):
    names = list(model.state_dict())
    fast = torch.compile(model, **OURS)
    generate(fast)
    assert list(model.state_dict()) == names
    # The prefix is torch's, for any backend; stripping it here would break loading into what others compiled.
    assert list(fast.state_dict()) == list(torch.compile(model, backend="eager").state_dict())
    fast.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as saved:
        assert set(saved.keys()) <= set(names)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(generate(again), generate(model))


def test_model_compile_keeps_the_state_dict(model, graphs):
    names = list(model.state_dict())
    model.compile(**OURS)
    generate(model)
    assert list(model.state_dict()) == names and graphs
    model.load_state_dict(model.state_dict())


MANY = """llama mistral qwen2 qwen3 gemma gemma2 gemma3_text gpt2
    gpt_neox opt phi3 olmo2 bloom falcon stablelm starcoder2""".split()


@pytest.mark.slow
def test_sixteen_models_of_several_shapes_in_one_process(graphs):
    """All forwards of transformers share one code object: Dynamo's own limit is 8 graphs for all of them."""
    calls = []

    def counting(gm, inputs):
        program = llmcomp.backend.llmcomp(gm, inputs, options=OURS["options"])
        return lambda *args: calls.append(name) or program(*args)

    for name in MANY:
        model = AutoModelForCausalLM.from_config(thin(name)).eval()
        fast = torch.compile(model, backend=counting, dynamic=False)
        for shape in ((1, 5), (2, 7)):
            ids = token_ids(*shape, seed=0)
            with torch.no_grad():
                torch.testing.assert_close(fast(ids, use_cache=False).logits, model(ids, use_cache=False).logits)
        assert calls.count(name) == 2, f"{name} ran in eager"
    assert len(graphs) == 2 * len(MANY) == 32


def thin(name):
    """The small config of an architecture, with one layer."""
    default = CONFIG_MAPPING[name]()
    settings = {k: v for k, v in small(default).items() if k not in PER_LAYER}
    return type(default)(**settings | {k: 1 for k in LAYERS if k in settings})


@pytest.mark.slow
def test_installing_again_changes_nothing(model, graphs):
    integrate.install(llmcomp.backend.llmcomp, ())
    fast = torch.compile(model, **OURS)
    generate(fast)
    assert len(graphs) == 3  # this target calls eager operators, whose caches are not known to grow
