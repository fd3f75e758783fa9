"""A draft head of one decoder layer behind the target's last features, and its files."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from stillhouse.methods.language.encoder_decoder_blocks import Attention, KeyValues, rotation

WEIGHTS, CONFIG = "head.safetensors", "config.json"
FUSIONS = ("gated", "linear")


@dataclass(frozen=True)
class DraftHeadConfig:
    """Sizes of an `FSPADHead`, as its config.json has them."""

    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_size: int
    theta: float
    eps: float
    fusion: str
    split: bool

    @property
    def width(self) -> int:
        """The name that `Attention` has for it."""
        return self.hidden

    @property
    def interleaved(self) -> bool:
        """Query heads that share a key head are neighbours."""
        return True


class HeadCache(KeyValues):
    """Keys and values of the positions that a head has read; it grows as it needs to."""

    def __init__(self) -> None:
        super().__init__(room=0)

    def append(self, *new: Tensor) -> tuple[Tensor, ...]:
        needed = self.length + new[0].shape[2]
        if needed > self.room:
            self.room = max(2 * self.room, needed, 64)
            old, self.kept = (
                self.kept,
                tuple(x.new_zeros(*x.shape[:2], self.room, x.shape[3]) for x in new),
            )
            for kept, x in zip(self.kept, old, strict=False):
                kept[:, :, : self.length] = x[:, :, : self.length]
        return super().append(*new)

    def truncate(self, length: int) -> None:
        """Forget what stands behind the first `length` positions."""
        if not 0 <= length <= self.length:
            raise ValueError(f"expected a length in [0, {self.length}], got {length}")
        self.length = length


class FSPADHead(nn.Module):
    """Two predictions of the target's next feature from its last one and the token that came.

    hidden D: width of the target's features, which are what its output head reads, behind the final
    norm. ffn: width I of both MLPs, the target's own. heads, kv_heads (None: heads), head_size
    (None: D / heads), theta: of the attention, the target's own; eps: of the norms. fusion: "gated"
    lets the token choose among the features in I dimensions, "linear" is EAGLE's. split: two
    outputs; otherwise both are the same. generator: of the initial weights.

    Called with features [B, T, D] of the target and embeddings [B, T, D] of the tokens behind each:
    gives (for_logits, for_feedback), [B, T, D] each. The target's output head makes logits of the
    first; the second takes the features' place where those are not known yet. cache: a `HeadCache`,
    what came before, which these positions are added to. positions: int64 [T] or [B, T], None
    counts on from the cache. mask: bool, broadcast to [B, heads, T, cached + T], True = is read;
    None is causal.
    Raises ValueError for sizes that do not fit together, in the constructor and in the call, and
    TypeError for features of another dtype than the head's.

    Defaults: the paper's head, fusion gated and split; weights normal with variance 1 / fan-in, but
    0 behind the gate, so that it begins as EAGLE's fusion; theta 10,000, eps 1e-6 (Llama's).

    Example:
        >>> import torch
        >>> from stillhouse.methods.speculative import FSPADHead
        >>> head = FSPADHead(hidden=16, ffn=32, heads=2)
        >>> features, embeddings = torch.randn(2, 1, 5, 16)
        >>> for_logits, for_feedback = head(features, embeddings)
        >>> for_logits.shape, torch.equal(for_logits, for_feedback)
        (torch.Size([1, 5, 16]), False)
    """

    def __init__(
        self,
        hidden: int,
        ffn: int,
        *,
        heads: int,
        kv_heads: int | None = None,
        head_size: int | None = None,
        theta: float = 10_000.0,
        eps: float = 1e-6,
        fusion: str = "gated",
        split: bool = True,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        if min(hidden, ffn, heads, heads if kv_heads is None else kv_heads) < 1:
            raise ValueError(f"expected sizes >= 1, got {hidden}, {ffn}, {heads}, {kv_heads}")
        if head_size is None and hidden % heads:
            raise ValueError(f"{heads} heads do not divide a width of {hidden}: name a head_size")
        size = hidden // heads if head_size is None else head_size
        if size % 2 or heads % (kv_heads or heads):
            raise ValueError(
                f"expected an even head_size and kv_heads that divide the heads, got {size} and "
                f"{kv_heads} of {heads}"
            )
        if fusion not in FUSIONS:
            raise ValueError(f"no fusion {fusion!r}: expected one of {', '.join(FUSIONS)}")
        self.config = DraftHeadConfig(
            hidden, ffn, heads, kv_heads or heads, size, float(theta), eps, fusion, split
        )
        gated = fusion == "gated"
        self.fuse = nn.Linear(2 * hidden, hidden)
        self.gate = GatedMLP(hidden, ffn, hidden, eps) if gated else None
        self.attention = Attention(self.config)
        self.mlp = GatedMLP(hidden, ffn, 2 * hidden if split else hidden, eps)
        self._initialize(generator)

    @torch.no_grad()
    def _initialize(self, generator: torch.Generator | None) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                std = module.in_features**-0.5
                module.weight.normal_(std=std, generator=generator)
        self.fuse.bias.zero_()
        if self.gate is not None:
            self.gate.down.weight.zero_()

    def forward(
        self,
        features: Tensor,
        embeddings: Tensor,
        *,
        cache: HeadCache | None = None,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        self._check(features, embeddings)
        # The token's embedding gates the feature: what was really sampled decides what is read.
        x = self.fuse(torch.cat([embeddings, features], -1))
        if self.gate is not None:
            x = x + self.gate(x, gate=embeddings)
        if positions is None:
            start = 0 if cache is None else cache.length
            positions = torch.arange(start, start + x.shape[1], device=x.device)
        if positions.dim() == 2:
            positions = positions[:, None]  # for all heads
        angles = rotation(positions, self.config.head_size, self.config.theta)
        # No norm before this layer's attention: features come normalised from the target.
        keys_values = self.attention.keys_values(x, angles)
        if cache is not None:
            keys_values = cache.append(*keys_values)
        x = x + self.attention(x, keys_values, angles, mask, causal=mask is None)
        out = self.mlp(x)
        if not self.config.split:
            return x + out, x + out
        for_logits, for_feedback = out.chunk(2, -1)
        return x + for_logits, x + for_feedback

    def _check(self, features: Tensor, embeddings: Tensor) -> None:
        width, dtype = self.config.hidden, self.fuse.weight.dtype
        if features.shape != embeddings.shape or features.dim() != 3:
            raise ValueError(
                "expected features and embeddings [B, T, D], got "
                f"{list(features.shape)} and {list(embeddings.shape)}"
            )
        if features.shape[-1] != width:
            raise ValueError(
                f"this head is for features of width {width}, got {features.shape[-1]}: was it "
                "trained for another target?"
            )
        for name, x in (("features", features), ("embeddings", embeddings)):
            if x.dtype != dtype and not torch.is_autocast_enabled(x.device.type):
                raise TypeError(f"the head is {dtype}, its {name} are {x.dtype}: convert one")

    def save(self, folder: str | Path) -> Path:
        """Write `head.safetensors` and `config.json` into a folder, each of them whole or not."""
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f".{WEIGHTS}.partial"
        state = {name: x.detach().cpu().contiguous() for name, x in self.state_dict().items()}
        save_file(state, partial)
        os.replace(partial, folder / WEIGHTS)
        partial = folder / f".{CONFIG}.partial"
        partial.write_text(json.dumps(asdict(self.config), indent=1) + "\n")
        os.replace(partial, folder / CONFIG)
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> FSPADHead:
        """What `save` wrote, in its dtype, on the CPU. Raises FileNotFoundError where a file is
        missing, ValueError where weights and config do not belong together."""
        from safetensors.torch import load_file

        folder = Path(folder)
        for name in (CONFIG, WEIGHTS):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder} holds no draft head: {name} is missing")
        config = json.loads((folder / CONFIG).read_text())
        state = load_file(folder / WEIGHTS)
        try:
            head = cls(**config).to(next(iter(state.values())).dtype)
            head.load_state_dict(state)
        except (TypeError, RuntimeError) as error:
            line = str(error).splitlines()[-1].strip()
            raise ValueError(f"{folder}: weights and {CONFIG} do not fit: {line}") from error
        return head


class GatedMLP(nn.Module):
    """down(silu(gate of one input) * up of the normalised other one); both are one by default."""

    def __init__(self, width: int, ffn: int, out: int, eps: float):
        super().__init__()
        self.norm = nn.RMSNorm(width, eps=eps)
        self.gate = nn.Linear(width, ffn, bias=False)
        self.up = nn.Linear(width, ffn, bias=False)
        self.down = nn.Linear(ffn, out, bias=False)

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        x = self.norm(x)
        return self.down(silu(self.gate(x if gate is None else gate)) * self.up(x))
