"""What a draft head learns from: the target's features, and its distribution."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import smooth_l1_loss

from stillhouse import ops
from stillhouse.teachers import TensorCache, fingerprints
from stillhouse.train import Stage, capture, run_stages
from stillhouse.train.drawing import mixed
from stillhouse.train.forward import evaluating
from stillhouse.train.rows import IGNORED

# Of the masked means, so that nothing unmasked is 0 and not NaN (the authors' code).
EPSILON = 1e-5
# A sequence of this length gets the noise as it is named; longer ones get less (EAGLE's code).
NOISE_LENGTH = 512


def draft_head_loss(
    for_logits: Tensor,
    for_feedback: Tensor,
    target_features: Tensor,
    lm_head: Tensor | nn.Linear,
    mask: Tensor | None = None,
    *,
    w_feature: float = 1.0,
    w_logits: float = 0.1,
) -> dict[str, Tensor]:
    """Regression of the fed-back output to the target's feature, and cross-entropy of the other
    output's logits to the target's distribution there.

    for_logits, for_feedback: [..., D] of the head; the feature regression reaches the second alone,
    which is the partial alignment. target_features: [..., D], what the target's output head reads
    at the place predicted; no gradient reaches it. lm_head: that head, frozen: its weight [V, D] or
    the linear layer. mask: bool [...], True = this place counts. [N, V] logits never exist whole,
    on neither side.
    Returns "loss" = w_feature feature + w_logits logits, and without a gradient "feature" (mean
    over D of smooth L1, beta 1), "logits" (nats) and "acceptance"; masked means, 0 where nothing
    counts.
    Raises ValueError for shapes that do not match and for negative weights.

    Defaults: w_feature 1, w_logits 0.1, smooth L1 with beta 1 (the authors' code).

    Example:
        >>> import torch
        >>> from stillhouse.methods.speculative import draft_head_loss
        >>> features, weight = torch.eye(3, 4), torch.zeros(10, 4)
        >>> parts = draft_head_loss(features, features, features, weight)
        >>> round(parts["loss"].item(), 4)  # 0.1 log 10
        0.2303
    """
    is_weight = isinstance(lm_head, Tensor)
    weight, bias = (lm_head, None) if is_weight else (lm_head.weight, lm_head.bias)
    if not for_logits.shape == for_feedback.shape == target_features.shape:
        raise ValueError(
            f"expected outputs and target_features of one shape [..., D], got "
            f"{list(for_logits.shape)}, {list(for_feedback.shape)} and "
            f"{list(target_features.shape)}"
        )
    if weight.dim() != 2 or weight.shape[1] != for_logits.shape[-1]:
        raise ValueError(
            f"expected lm_head [V, D] with D = {for_logits.shape[-1]}, got {list(weight.shape)}: "
            "is it the target's?"
        )
    if min(w_feature, w_logits) < 0:
        raise ValueError(f"expected weights >= 0, got {w_feature} and {w_logits}")
    rows = for_logits.shape[:-1]
    counted = torch.ones(rows, dtype=torch.bool, device=for_logits.device) if mask is None else mask
    if counted.shape != rows or counted.dtype != torch.bool:
        raise ValueError(f"expected a bool mask {list(rows)}, got {counted.dtype} {mask.shape}")
    target_features = target_features.detach()
    count = counted.sum() + EPSILON
    regression = smooth_l1_loss(for_feedback, target_features, reduction="none").mean(-1)
    feature = regression.where(counted, 0).sum() / count
    weight, bias = (None if x is None else x.detach() for x in (weight, bias))
    dtype = for_logits.dtype
    logits, stats = ops.linear_divergence_loss(
        for_logits,
        weight.to(dtype),
        ops.LinearTeacher(target_features, *_as(target_features.dtype, weight, bias)),
        "soft_cross_entropy",
        student_bias=None if bias is None else bias.to(dtype),
        mask=counted,
        denominator=count,
        return_stats=True,
    )
    return {
        "loss": w_feature * feature + w_logits * logits,
        "feature": feature.detach(),
        "logits": logits.detach(),
        "acceptance": stats.acceptance.sum() / count,
    }


def _as(dtype: torch.dtype, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if x is None else x.to(dtype) for x in tensors)


@torch.no_grad()
def target_features(target: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """What the target's output head reads at each token, [B, T, D]: behind the final norm.

    target: a causal LM of transformers, run in evaluation mode and without a gradient. batch:
    `input_ids` and, where it is padded, `attention_mask`, [B, T] each.
    Raises ValueError for a model without an output head.

    Defaults: none; hidden states of transformers are raw but for the last one, which is this.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from stillhouse.methods.speculative import target_features
        >>> sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1)
        >>> sizes |= dict(num_attention_heads=2, num_key_value_heads=2, vocab_size=20)
        >>> target = LlamaForCausalLM(LlamaConfig(**sizes))
        >>> target_features(target, {"input_ids": torch.arange(6)[None]}).shape
        torch.Size([1, 6, 16])
    """
    head = target.get_output_embeddings()
    if head is None:
        raise ValueError(f"{type(target).__name__} has no output head: it has no features to read")
    path = next(name for name, module in target.named_modules() if module is head)
    given = {name: batch[name] for name in ("input_ids", "attention_mask") if name in batch}
    with evaluating(target), capture(target, [path], inputs=True, stop_after=path) as taps:
        target(**given, use_cache=False)
    return taps[path]


def train_draft_head(
    target: nn.Module,
    head: nn.Module,
    batches: Callable[[int], Mapping[str, Tensor]] | Iterable[Mapping[str, Tensor]],
    *,
    steps: int,
    lr: float = 5e-5,
    betas: tuple[float, float] = (0.9, 0.95),
    warmup: int | None = None,
    clip: float = 0.5,
    noise: float = 0.2,
    w_feature: float = 1.0,
    w_logits: float = 0.1,
    cache: TensorCache | None = None,
    resume: str | Path | None = None,
    save_every: int | None = None,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Train a draft head in place for a frozen causal LM of transformers.

    batches: language-model batches (`input_ids`, `attention_mask`, `labels` with -100 = not a
    target), padded on the right if at all; a function of the step, or an iterable that begins again
    when it ends. At t the head reads the target's feature f_t and token t + 1, and learns f_{t+1};
    that counts where token t + 1 is a target, or without labels where it is no padding. A batch
    with "features" [B, T, D] brings the target's own; otherwise the target makes them, once only
    with a `cache`. noise: uniform in +-noise / 2 on the features read, times 512 / T for T tokens.
    clip: of each gradient's value. warmup: steps of a linear rise, before the rate falls linearly
    to 0 behind the last step; None: one in 400, as the authors. resume, save_every: as in
    `train.run_stages`: a run that goes on repeats the one that was not interrupted.
    Returns a row for each step: `step` and the parts of `draft_head_loss`. Progress is printed.
    Raises ValueError for a target whose features have another width than the head, sequences of
    fewer than two tokens, and `run_stages`' reasons.

    Defaults: AdamW at 5e-5 with betas 0.9, 0.95, clipped by value at 0.5, noise 0.2, weights 1 and
    0.1 (the authors' code; they train 800,000 steps of 4 dialogues: short runs want a larger lr).

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from stillhouse.methods.speculative import FSPADHead, train_draft_head
        >>> sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1)
        >>> sizes |= dict(num_attention_heads=2, num_key_value_heads=2, vocab_size=20)
        >>> target = LlamaForCausalLM(LlamaConfig(**sizes))
        >>> head = FSPADHead(16, 32, heads=2)
        >>> batch = {"input_ids": torch.arange(20)[None]}
        >>> history = train_draft_head(target, head, [batch], steps=20, lr=1e-2)
        >>> history[-1]["loss"] < history[0]["loss"]
        True
    """
    width, hidden = target.get_input_embeddings().weight.shape[1], head.config.hidden
    if width != hidden:
        raise ValueError(f"the target's features are {width} wide, the head is for {hidden}")
    if warmup is None:
        warmup = steps // 400
    weights = {"w_feature": w_feature, "w_logits": w_logits}
    loss = _HeadLoss(target, noise=noise, seed=seed, cache=cache, **weights)

    def optimizer(parameters: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
        return _ClippedAdamW(parameters, lr, betas, clip=clip, warmup=warmup, steps=steps)

    stage = Stage("draft head", loss, steps, data=batches, lr=lr, optimizer=optimizer)
    history = run_stages(head, [stage], resume=resume, save_every=save_every)
    return [{name: x for name, x in row.items() if name != "stage"} for row in history]


class _HeadLoss:
    """`draft_head_loss` of a batch; it counts the steps, whose noise is each their own."""

    def __init__(
        self,
        target: nn.Module,
        *,
        noise: float,
        seed: int,
        cache: TensorCache | None,
        **weights: float,
    ):
        self.target, self.noise, self.seed, self.weights = target, noise, seed, weights
        self.cache, self.step = cache, 0
        self.fingerprint = None if cache is None else fingerprints.of_model(target)

    def __call__(self, head: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        ids = batch["input_ids"]
        if ids.shape[1] < 2:
            raise ValueError(f"expected at least two tokens, got input_ids {list(ids.shape)}")
        weight = head.fuse.weight
        features = self._features(batch).to(weight.device, weight.dtype)
        with torch.no_grad():
            embeddings = self.target.get_input_embeddings()(ids)[:, 1:].to(features)
        generator = torch.Generator().manual_seed(mixed(self.seed, self.step))
        shift = torch.rand(features[:, :-1].shape, generator=generator) - 0.5
        shift = shift.to(features) * (self.noise * NOISE_LENGTH / ids.shape[1])
        outputs = head(features[:, :-1] + shift, embeddings)
        output_head, counted = self.target.get_output_embeddings(), self._counted(batch)
        mask = counted.to(features.device)
        return draft_head_loss(*outputs, features[:, 1:], output_head, mask, **self.weights)

    def _features(self, batch: Mapping[str, Tensor]) -> Tensor:
        if "features" in batch:
            return batch["features"]
        if self.cache is None:
            return target_features(self.target, batch)
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask") if name in batch}
        key = {"what": "features", "model": self.fingerprint, **inputs}
        made = self.cache.get(key, lambda: {"features": target_features(self.target, batch)})
        return made["features"]

    @staticmethod
    def _counted(batch: Mapping[str, Tensor]) -> Tensor:
        """bool [B, T - 1]: whether token t + 1 is one to learn from."""
        if "labels" in batch:
            return batch["labels"][:, 1:] != IGNORED
        attended = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
        return attended[:, 1:] > 0

    def update(self, row: Mapping[str, Any], step: int, steps: int) -> None:
        self.step = step

    def state_dict(self) -> dict[str, int]:
        return {"step": self.step}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.step = state["step"]


class _ClippedAdamW(torch.optim.AdamW):
    """AdamW with gradients clipped by value, and a rate that rises and falls linearly. What it
    counts by is in its groups, so in its state_dict."""

    def __init__(
        self,
        parameters: list[nn.Parameter],
        lr: float,
        betas: tuple[float, float],
        *,
        clip: float,
        warmup: int,
        steps: int,
    ):
        super().__init__(parameters, lr=lr, betas=betas)
        for group in self.param_groups:
            group |= {"peak": lr, "clip": clip, "warmup": warmup, "steps": steps, "taken": 0}

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        for group in self.param_groups:
            taken, warmup = group["taken"], group["warmup"]
            rising = (taken + 1) / (warmup + 1)
            falling = (group["steps"] - taken) / max(group["steps"] - warmup, 1)
            group["lr"] = group["peak"] * min(rising, falling, 1.0)
            group["taken"] += 1
            nn.utils.clip_grad_value_(group["params"], group["clip"])
        return super().step(closure)
