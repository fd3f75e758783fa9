"""What a residual quantizer holds: its tables, what they follow, and its projections."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse import ops
from stillhouse.nn.codebooks import BEGUN
from stillhouse.nn.quantizer_options import Options

WIDE = (torch.float32, torch.float64)


class QuantizerState(nn.Module):
    """Tables [G, T, K, d] (T = 1 where all stages share one) with running means of their use.

    Everything here stays float32 in a module that is cast to a narrower type: codes of rounded
    tables are other codes. The tables as the search reads them are kept while they do not change.
    """

    grouped = False

    def __init__(self, options: Options):
        super().__init__()
        for name, value in vars(options).items():
            setattr(self, name, value)
        self.plain = self.groups == 1 and self.projection == "none" and not self.grouped
        generator = torch.Generator().manual_seed(self.seed)
        tables = 1 if self.shared_codebook else self.num_quantizers
        shape = self.groups, tables, self.codebook_size, self.codebook_dim
        # Codes of length 1 on average.
        drawn = torch.randn(shape, generator=generator, device="cpu") / math.sqrt(shape[-1])
        drawn = drawn.to(torch.get_default_device())
        averages = self.update == "ema"
        if averages:
            self.register_buffer("tables", drawn)
        else:
            self.tables = nn.Parameter(drawn)
        sums = torch.zeros_like(drawn) if averages else drawn.new_empty(0)
        self.register_buffer("sums", sums, persistent=averages)
        self.register_buffer("counts", drawn.new_zeros(shape[:3]))
        stages = 0 if self.projection == "per_stage" else self.num_quantizers
        self.register_buffer("energy", drawn.new_zeros(self.groups, 2, stages))
        # On the CPU and not among the buffers, so that it can be read and is never broadcast.
        begun = not self.kmeans_init
        self.progress = torch.tensor([begun, 0], dtype=torch.int64, device="cpu")
        self._cached: tuple[Tensor, int, Tensor] | None = None
        if self.projection != "none":
            self._add_projections(generator)

    def _add_projections(self, generator: torch.Generator) -> None:
        """Linear maps into the tables' space and out of it: of each group [G, ...], or of each
        stage [Q, ...]."""
        own = self.dim // self.groups
        count = self.num_quantizers if self.projection == "per_stage" else self.groups
        maps = ("into", self.codebook_dim, own), ("out_of", own, self.codebook_dim)
        for name, rows, columns in maps:
            for kind, shape in (("weight", (rows, columns)), ("bias", (rows,))):
                drawn = 2 * torch.rand(count, *shape, generator=generator, device="cpu") - 1
                value = nn.Parameter((drawn / math.sqrt(columns)).to(self.tables.device))
                wanted = kind == "weight" or self.projection_bias
                self.register_parameter(f"{name}_{kind}", value if wanted else None)

    def extra_repr(self) -> str:
        shown = "dim", "codebook_size", "num_quantizers", "groups", "codebook_dim", "projection"
        shown = *shown, "metric", "update", "grad"
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in shown)

    def get_extra_state(self) -> Tensor:
        return self.progress.clone()

    def set_extra_state(self, state: Any) -> None:
        self.progress.copy_(state)
        self._cached = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_cached": None}

    def _apply(self, fn, recurse=True):
        self._cached = None
        names = [*self._parameters, *self._buffers]
        before = {
            name: held.detach() for name in names if (held := getattr(self, name)) is not None
        }
        super()._apply(fn, recurse)
        for name, held in before.items():
            now = getattr(self, name)
            if now.dtype in WIDE:
                continue
            if name in self._parameters:
                now.data = held.to(now.device)
            else:
                self._buffers[name] = held.to(now.device)
        return self

    def train(self, mode: bool = True):
        self._cached = None
        return super().train(mode)

    def packed(self) -> Tensor | None:
        """`ops.rvq_pack` of the tables, from where it is kept if they are the same."""
        tables = self.tables
        if torch.compiler.is_compiling() or tables.is_inference():
            return None
        kept = self._cached
        if kept is None or kept[0] is not tables or kept[1] != tables._version:
            kept = self._cached = tables, tables._version, ops.rvq_pack(tables, metric=self.metric)
        return kept[2]

    @property
    def begun(self) -> bool:
        """Whether tables are those of k-means, or were loaded, or need not be."""
        return bool(self.progress[BEGUN])

    @torch.no_grad()
    def take_(self, tensors: dict[str, Tensor]) -> None:
        """Copies tables, statistics and maps by name; of what is left out nothing is known."""
        for name in ("counts", "sums", "energy"):
            getattr(self, name).zero_()
        for name, value in tensors.items():
            held = getattr(self, name)
            if held.numel():  # sums only where they are kept
                held.copy_(value)

    @torch.no_grad()
    def metrics(self) -> dict[str, Tensor]:
        """What the steps of training have shown, as running means; of each stage, [Q] or [G, Q].

        entropy of the codes in nats, perplexity (e^entropy, at most K), dead (the share of codes
        used less than `dead_code_threshold` times the mean, or a tenth of it where that is 0) and
        snr_db: rows in the tables' space against what the stage leaves of them. A shared table
        has one entropy; projections of each stage have no snr_db.
        """
        rare = self.dead_code_threshold or 0.1
        total = self.counts.sum(-1, keepdim=True)
        share = self.counts / total.clamp(min=torch.finfo(total.dtype).tiny)
        entropy = torch.special.entr(share).sum(-1)
        found = {
            "entropy": entropy,
            "perplexity": entropy.exp(),
            "dead": (share < rare / share.shape[-1]).to(share.dtype).mean(-1),
        }
        if self.projection != "per_stage":
            signal, noise = self.energy.unbind(1)
            found["snr_db"] = 10 * torch.log10(signal / noise)
        return {name: self._ungrouped(value) for name, value in found.items()}

    def _ungrouped(self, found: Tensor) -> Tensor:
        """[G, ...], without G where there are no groups."""
        return found if self.grouped else found[0]
