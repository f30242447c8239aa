"""Which weights of a matrix stay: from what each is worth to a mask (True: it stays).

matrix (N, K) of a linear layer     rows are its outputs, columns k its inputs
magnitude                           |w|; of blocks, its mean
wanda                               |w[n, k]| * norm of input k over the data
"""

import torch
from torch import Tensor


def keep_largest(worth: Tensor, sparsity: float) -> Tensor:
    """All but the part `sparsity` of least worth; of equals, any."""
    dropped = int(sparsity * worth.numel())
    mask = torch.ones(worth.numel(), dtype=torch.bool, device=worth.device)
    mask[worth.flatten().topk(dropped, largest=False).indices] = False
    return mask.view(worth.shape)


def keep_largest_of_rows(worth: Tensor, sparsity: float) -> Tensor:
    """The same for every row of (N, K) by itself."""
    dropped = int(sparsity * worth.shape[1])
    return torch.ones_like(worth, dtype=torch.bool).scatter_(
        1, worth.topk(dropped, dim=1, largest=False).indices, False
    )


def keep_of_groups(worth: Tensor, n: int, m: int) -> Tensor:
    """The n of greatest worth among every m neighbours along k, whose number m divides."""
    groups = worth.unflatten(-1, (-1, m))
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, groups.topk(n, dim=-1).indices, True).flatten(-2)


def keep_blocks(worth: Tensor, sparsity: float, height: int, width: int) -> Tensor:
    """All of (N, K) but the part `sparsity` of its blocks of least mean worth; those at the edges may be smaller."""
    rows, columns = worth.shape
    sums, counts = (_sums(x, height, width) for x in (worth, torch.ones_like(worth)))
    stay = keep_largest(sums / counts, sparsity)
    return stay.repeat_interleave(height, 0).repeat_interleave(width, 1)[:rows, :columns].contiguous()


def _sums(x: Tensor, height: int, width: int) -> Tensor:
    padded = torch.nn.functional.pad(x, (0, -x.shape[1] % width, 0, -x.shape[0] % height))
    sums: Tensor = padded.unflatten(1, (-1, width)).sum(2).unflatten(0, (-1, height)).sum(1)
    return sums


def wanda(weight: Tensor, squares: Tensor) -> Tensor:
    """What weights (N, K) are worth, by the sums of squares (K,) of their inputs."""
    return weight.float().abs() * squares.float().sqrt()
