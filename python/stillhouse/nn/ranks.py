"""What processes that train one model agree on: sums, and rows drawn from all of them."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor


class Ranks:
    """The processes of the default group, or this one alone.

    synchronize: False = this process keeps to itself. Rows are counted over all processes, those of
    the first one first: where all have as many, results are those of one process with the joined
    batch.
    """

    def __init__(self, synchronize: bool = True):
        self.many = (
            synchronize
            and dist.is_available()
            and dist.is_initialized()
            and dist.get_world_size() > 1
        )

    def sum_(self, *tensors: Tensor) -> None:
        """Adds up over processes, in place and in one collective."""
        if not self.many:
            return
        flat = torch.cat([each.flatten() for each in tensors])
        dist.all_reduce(flat)
        parts = flat.split([each.numel() for each in tensors])
        for each, part in zip(tensors, parts, strict=True):
            each.copy_(part.view_as(each))

    def draw(self, shape: tuple[int, int], generator: torch.Generator) -> Tensor:
        """Exponential numbers float64 [G, N], one for each row of this process."""
        # As if all processes had as many rows: no need to ask them.
        world, rank = (dist.get_world_size(), dist.get_rank()) if self.many else (1, 0)
        first, total = rank * shape[1], world * shape[1]
        uniform = torch.rand(shape[0], total, generator=generator, dtype=torch.float64)
        return -torch.log1p(-uniform[:, first : first + shape[1]])

    def lowest(
        self, keys: Tensor, count: int, rows: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """The rows of the lowest keys, [G, count, W], and how many of them there are, int64 [G].

        keys: float64 [G, N], inf = not this row. rows: what to take of rows [G, m], as [G, m, W].
        Where there are fewer than `count`, they come again from the first on.
        """
        here = min(count, keys.shape[1])
        low = keys.topk(here, -1, largest=False, sorted=True)
        low, taken = low.values, rows(low.indices)
        missing = count - here
        if missing:
            low = torch.nn.functional.pad(low, (0, missing), value=math.inf)
            taken = torch.nn.functional.pad(taken, (0, 0, 0, missing))
        if self.many:
            all_low = [torch.empty_like(low) for _ in range(dist.get_world_size())]
            all_taken = [torch.empty_like(taken) for _ in all_low]
            dist.all_gather(all_low, low.contiguous())
            dist.all_gather(all_taken, taken.contiguous())
            low, order = torch.cat(all_low, -1).topk(count, -1, largest=False, sorted=True)
            taken = torch.cat(all_taken, 1)
            taken = taken.gather(1, order[..., None].expand(-1, -1, taken.shape[-1]))
        known = low.isfinite().sum(-1)
        again = torch.arange(count, device=keys.device) % known.clamp(min=1)[:, None]
        return taken.gather(1, again[..., None].expand(-1, -1, taken.shape[-1])), known
