"""The random numbers are those of the paper, and follow the distributions that they are named after."""

import pytest
import torch
from torch import Tensor

from llmcomp import philox


def numbers(*values: int) -> list[Tensor]:
    return [torch.tensor(v) for v in values]


# From the file kat_vectors of the authors' library, Random123.
@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0), 0, 0xFF1DAE59),
        ((0xFFFFFFFF, 0xFFFFFFFF), 0xFFFFFFFF, 0x2C3F628B),
        ((0x243F6A88, 0x85A308D3), 0x13198A2E, 0xDD7CE038),
    ],
)
def test_known_answers(counter: tuple[int, int], key: int, expected: int) -> None:
    assert philox.words(*numbers(*counter, key)).item() == expected


def test_words_are_uniform() -> None:
    words = philox.words(torch.arange(100_000), *numbers(3, 7))
    counts = torch.histc((words >> 24).float(), bins=256, min=0, max=255)
    statistic = float(((counts - counts.mean()) ** 2 / counts.mean()).sum())
    assert 180 < statistic < 340  # chi-square with 255 degrees of freedom
    assert int(words.min()) >= 0 and int(words.max()) < 2**32


def test_neighbours_do_not_resemble_each_other() -> None:
    tokens, steps, keys = torch.arange(300)[:, None, None], torch.arange(20)[:, None], torch.arange(5)
    noise = philox.gumbel(tokens, steps, keys).double()
    for dim in range(3):
        a, b = noise.narrow(dim, 0, noise.shape[dim] - 1), noise.narrow(dim, 1, noise.shape[dim] - 1)
        assert abs(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]) < 0.02


def test_gumbel_has_its_mean_and_variance_and_is_finite() -> None:
    noise = philox.gumbel(torch.arange(200_000), *numbers(1, 2))
    assert noise.isfinite().all()
    assert abs(noise.mean() - 0.5772) < 0.01 and abs(noise.var() - 1.6449) < 0.03


@pytest.mark.parametrize("word", [0, 1, 2**31, 2**32 - 2, 2**32 - 1])
def test_gumbel_is_finite_for_every_word(monkeypatch: pytest.MonkeyPatch, word: int) -> None:
    monkeypatch.setattr(philox, "words", lambda *_: torch.tensor([word]))
    assert philox.gumbel(*numbers(0, 0, 0)).isfinite().all()
