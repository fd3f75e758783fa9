"""What quantizers without codebooks share: projections, masks, and what their codes amount to."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stillhouse.ops.rows import mask_of_rows


class ProjectedQuantizer(nn.Module):
    """Linear layers from a model's width to a quantizer's and back, none where they are equal."""

    def __init__(self, dim: int | None, width: int, seed: int):
        super().__init__()
        self.dim, self.width = width if dim is None else dim, width
        if self.dim < 1:
            raise ValueError(f"dim must be 1 or more, got {dim}")
        self.project_in, self.project_out = nn.Identity(), nn.Identity()
        if self.dim != width:
            generator = torch.Generator().manual_seed(seed)
            self.project_in = _linear(self.dim, width, generator)
            self.project_out = _linear(width, self.dim, generator)
        self._last: tuple[Tensor, ...] | None = None

    def _inside(self, x: Tensor, mask: Tensor | None) -> Tensor:
        if x.dim() < 1 or x.shape[-1] != self.dim:
            raise ValueError(f"x must be [..., {self.dim}], got {tuple(x.shape)}")
        if mask is not None:
            if mask.shape != x.shape[:-1]:
                raise ValueError(
                    f"mask must have the rows' shape {tuple(x.shape[:-1])}, got {tuple(mask.shape)}"
                )
            # NaN times a gradient of 0 would reach the weights.
            x = torch.where(mask_of_rows(mask, x)[..., None], x, 0)
        if isinstance(self.project_in, nn.Identity):
            return x
        weight = self.project_in.weight
        if not x.is_floating_point() or (x.dtype == torch.float64) != (
            weight.dtype == torch.float64
        ):
            raise TypeError(f"x is {x.dtype} and the layers are {weight.dtype}")
        return self.project_in(x.to(weight.dtype))

    def _outside(self, found: Tensor, x: Tensor | None, mask: Tensor | None = None) -> Tensor:
        if isinstance(self.project_out, nn.Linear):
            found = self.project_out(found.to(self.project_out.weight.dtype))
        found = found if x is None else found.to(x.dtype)
        return found if mask is None else torch.where(mask[..., None], found, 0)

    def metrics(self) -> dict[str, Tensor]:
        """Of the codes of the last call, float64 [] or one for each codebook or stage: "entropy"
        (nats), "perplexity" and "dead", the share of codes that were not used. Raises RuntimeError
        before the first call."""
        codes = self._last_call()[0]
        parts = codes[..., None] if self._single else codes
        entropy, dead = [], []
        for part in parts.reshape(-1, parts.shape[-1]).unbind(-1):
            counts = part[part >= 0].unique(return_counts=True)[1].double()
            share = counts / counts.sum()
            entropy.append(-(share * share.log()).sum())
            dead.append(1 - len(counts) / self.codebook_size)
        found, dead = torch.stack(entropy), torch.tensor(dead, dtype=torch.float64)
        if self._single:
            found, dead = found[0], dead[0]
        return {"entropy": found, "perplexity": found.exp(), "dead": dead}

    def _last_call(self) -> tuple[Tensor, ...]:
        if self._last is None:
            raise RuntimeError("metrics are of the last call, and there was none")
        return self._last


def _linear(inputs: int, outputs: int, generator: torch.Generator) -> nn.Linear:
    layer = nn.utils.skip_init(nn.Linear, inputs, outputs)
    bound = inputs**-0.5
    for parameter in layer.parameters():
        drawn = torch.rand(parameter.shape, generator=generator, device="cpu") * 2 - 1
        with torch.no_grad():
            parameter.copy_(bound * drawn)
    return layer
