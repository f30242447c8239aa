"""Activations that are quantized token by token: the arithmetic, layers that use it in eager code and in training."""

import copy

import pytest
import torch
from torch import Tensor, nn

import llmcomp
from llmcomp.dynamic import multiply, quantize_tokens
from llmcomp.formats import Fp8, Int8, parse_format
from llmcomp.quantized import QuantizedTensor
from tests.numerics import assert_equal_float32
from tests.quantizable import IDS, llama

NAMES = ("int8_dynamic", "fp8_dynamic")
INT8, FP8 = Int8(dynamic=True), Fp8(dynamic=True)


def layer(name: str, k: int = 128, n: int = 20, dtype: torch.dtype = torch.float32) -> nn.Linear:
    made = nn.Linear(k, n).to(dtype)
    made.weight = nn.Parameter(QuantizedTensor.quantize(made.weight, parse_format(name)), requires_grad=False)
    return made


def expected(x: Tensor, made: nn.Linear) -> Tensor:
    """The definition, in float64."""
    codes, scale = quantize_tokens(x, made.weight.format)
    weight = made.weight.codes.double() * made.weight.scale.double()[:, None]
    return codes.double() @ weight.t() * scale.double() + made.bias.double()


def test_tokens_by_hand() -> None:
    codes, scale = quantize_tokens(torch.tensor([[254.0, -127.0, 1.0, 3.0, -300 / 127], [0, 0, 0, 0, 0]]), INT8)
    assert codes.tolist() == [[127, -64, 0, 2, -1], [0, 0, 0, 0, 0]]  # ties: 63.5, 0.5 and 1.5 become even
    assert codes.dtype == torch.int8 and scale[0].item() == 2.0
    codes, scale = quantize_tokens(torch.tensor([[896.0, -2.0]]), FP8)
    assert codes.float().tolist() == [[448.0, -1.0]] and scale.item() == 2.0


@pytest.mark.parametrize("name", NAMES)
def test_zeros_give_zeros_and_what_is_not_finite_gives_nan(name: str) -> None:
    form, tiny = parse_format(name), torch.finfo(torch.float32).smallest_normal
    x, packed = torch.randn(6, 128), form.quantize(torch.randn(9, 128))
    x[0], x[1, 5], x[2, 0], x[3, 127], x[4] = 0, torch.nan, torch.inf, -torch.inf, tiny * 2**-20
    got = multiply(x, packed, form)
    assert torch.equal(got[0], torch.zeros(9)) and bool(got[1:4].isnan().all()) and bool(got[4:].isfinite().all())


def test_sums_of_int8_are_exact() -> None:
    k = 5000
    weight, x = torch.full((1, k), 127.0), torch.full((1, k), 127.0)
    weight[0, 0], x[0, 1] = -126, 125
    got = multiply(x, INT8.quantize(weight), INT8)
    exact = 127 * 127 * (k - 2) - 126 * 127 + 127 * 125
    assert got.item() == torch.tensor(exact).float().item()  # float32 holds no odd number of this size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(128,), (3, 128), (2, 3, 128), (2, 1, 3, 128)])
def test_eager_layers_quantize_their_operand(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    made, x = layer(name, dtype=dtype), torch.randn(shape).to(dtype)
    exact = expected(x, made)
    assert made(x).shape == exact.shape and made(x).dtype == dtype
    torch.testing.assert_close(made(x).double(), exact, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)
    with torch.inference_mode():
        assert torch.equal(made(x), made(x.clone()))
        torch.testing.assert_close(made(x).double(), exact, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)
    rounded = (x.double() @ made.weight.dequantize().double().t() + made.bias.double() - exact).norm() / exact.norm()
    assert rounded > 1e-3  # the weight alone would be seen


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_go_through_the_weight_as_if_nothing_were_rounded(name: str, compiled: bool) -> None:
    made, x = layer(name), torch.randn(2, 3, 128, requires_grad=True)
    run = torch.compile(made, backend="llmcomp") if compiled else made
    y = run(x)
    assert_equal_float32(y.detach(), expected(x.detach(), made).float())
    grad = torch.randn_like(y)
    y.backward(grad)
    assert x.grad is not None
    assert_equal_float32(x.grad.detach(), grad @ made.weight.dequantize())


def test_adapters_beside_a_layer_train() -> None:
    torch.manual_seed(0)
    base, down, up = layer("int8_dynamic"), nn.Linear(128, 4, bias=False), nn.Linear(4, 20, bias=False)
    x, wanted = torch.randn(8, 128), torch.randn(8, 20)
    optimizer = torch.optim.SGD([*down.parameters(), *up.parameters()], lr=0.05)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = (base(x) + up(down(x)) - wanted).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_tables_are_looked_up_as_they_are() -> None:
    table = nn.Embedding(30, 64)
    table.weight = nn.Parameter(QuantizedTensor.quantize(table.weight, INT8), requires_grad=False)
    ids = torch.tensor([[3, 29], [0, 3]])
    assert torch.equal(table(ids), table.weight.dequantize()[ids])
    assert torch.equal(torch.compile(table, backend="llmcomp")(ids), table.weight.dequantize()[ids])


@pytest.mark.slow
def test_packed_bytes_are_what_a_step_reads() -> None:
    model = llama()
    llmcomp.quantize_(model, "int8_dynamic")
    with torch.no_grad():
        (graph,) = llmcomp.explain(model, IDS[:, :1]).graphs
    kernels = [k for k in graph.program.kernels if any("packed_linear" in node for node in k.nodes)]
    packed = sum(p.nbytes for p in {id(p): p for p in model.parameters()}.values() if isinstance(p, QuantizedTensor))
    norms = sum(p.nbytes for name, p in model.named_parameters() if "norm" in name)
    assert len(kernels) == 2 * 4 + 1  # q/k/v, o, gate/up, down of two layers, and the head
    assert packed <= sum(k.weight_bytes for k in kernels) <= packed + norms


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("length", [*(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2)), 9])
def test_compiled_models_equal_eager_ones(name: str, length: int) -> None:
    model, plain = llama(spread=0.05), llama(spread=0.05)
    llmcomp.quantize_(model, name)
    llmcomp.quantize_(plain, name.removesuffix("_dynamic"))
    with torch.no_grad():
        eager, unrounded = model(IDS[:, :length]).logits, plain(IDS[:, :length]).logits
        compiled = torch.compile(model, backend="llmcomp")(IDS[:, :length]).logits
    # Sums in another order make a code another one now and then.
    assert (compiled - eager).norm() < 0.2 * (unrounded - eager).norm()


def test_the_option_quantizes_activations_too() -> None:
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 8)).eval()
    other, x = copy.deepcopy(model), torch.randn(5, 64)
    llmcomp.quantize_(other, "int8_dynamic")
    with torch.no_grad():
        got = torch.compile(model, backend="llmcomp", options={"weights": "int8_dynamic"})(x)
        assert model[0].weight.format == INT8
        torch.testing.assert_close(got, other(x), rtol=1e-2, atol=1e-2)
