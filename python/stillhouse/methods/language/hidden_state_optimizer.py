"""Hidden-state optimisation: gradient steps on a model's cached keys and values."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from stillhouse import ops
from stillhouse.methods.language.cached_states import CachedStates, read
from stillhouse.train.forward import frozen


class HiddenStateOptimizer:
    """Predicts text while it learns from it, in the cache instead of in the weights.

    lm: a causal language model of transformers that caches keys and values of one shape in all
    layers; its weights stay as they are. Tokens come by `chunk`: they are predicted with the cache
    as it is; then their loss takes a step of Adam (`lr`, `betas`) on what is cached, and their own
    states are computed behind that and join it. So no prediction knows of an update by its own
    token or a later one. clip: the largest norm of a row's gradient over all of its states. memory:
    how many states are kept, the latest ones; None: all.
    Raises ValueError for chunk or memory < 1, lr < 0, betas outside [0, 1) and clip <= 0.

    Defaults: lr 3e-3, chunk 25, betas (0.9, 0.999), one step, clip 1: our reading of the paper, of
    which no code is public. The states are keys and values; of a Transformer-XL, the paper's other
    model, they are the layers' inputs, which is left out here.

    Example:
        >>> import torch
        >>> from stillhouse.methods.language import HiddenStateOptimizer
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(hidden_size=8, intermediate_size=8, num_attention_heads=1)
        >>> lm = LlamaForCausalLM(LlamaConfig(vocab_size=16, num_hidden_layers=1, **sizes))
        >>> optimizer = HiddenStateOptimizer(lm, chunk=4)
        >>> optimizer.score(torch.arange(12)).shape
        torch.Size([12])
        >>> prompt = optimizer.adapt(torch.arange(12), steps=3)
        >>> optimizer.score(torch.tensor([5, 6]), prompt).shape
        torch.Size([2])
    """

    def __init__(
        self,
        lm: nn.Module,
        lr: float = 3e-3,
        chunk: int = 25,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        clip: float = 1.0,
        memory: int | None = None,
    ):
        if chunk < 1 or (memory is not None and memory < 1):
            raise ValueError(f"expected chunk and memory >= 1, got {chunk} and {memory}")
        if not (0 <= lr < math.inf and clip > 0 and all(0 <= beta < 1 for beta in betas)):
            raise ValueError(
                f"expected lr >= 0, betas in [0, 1) and clip > 0, got {lr}, {betas} and {clip}"
            )
        self.lm, self.chunk, self.memory = lm, chunk, memory
        self._adam = dict(lr=lr, betas=betas, clip=clip)

    def score(self, ids: Tensor, states: CachedStates | None = None) -> Tensor:
        """-log p of each token in nats, float32 [T] of ids int64 [T], or [B, T] of rows that know
        nothing of each other (float64 of a float64 model).

        states: of what comes before, from `adapt`, with as many rows; they are not changed. Without
        them the first token has 0, as nothing predicts it.
        Raises ValueError for more tokens than the model has positions, states of other rows, and
        within `torch.inference_mode` or for states of it, which no gradient can reach.
        """
        rows, place = _rows(ids), 0
        known = rows
        if states is not None:
            if states.states.is_inference():
                raise ValueError("states of torch.inference_mode() have no gradient: adapt outside")
            if len(states.last) != len(rows):
                raise ValueError(f"states of {len(states.last)} rows, ids of {len(rows)}")
            known = torch.cat([states.last[:, None], rows], 1)
            place = states.offset + len(states)
        length = known.shape[1] - 1
        self._require_room(place + length)
        nll = [] if states is not None else [torch.zeros(rows[:, :1].shape, device=rows.device)]
        with torch.enable_grad(), frozen(self.lm):
            for start in range(0, length, self.chunk):
                end = min(start + self.chunk, length)
                inputs, targets = known[:, start:end], known[:, start + 1 : end + 1]
                leaf = None if states is None else states.states.detach().requires_grad_()
                logits, fresh = read(self.lm, leaf, inputs, place + start)
                loss = _nll(logits, targets)
                nll.append(loss.detach())
                if end == length:
                    break
                if states is not None:
                    states = states.step(torch.autograd.grad(loss.sum(), leaf)[0], **self._adam)
                    with torch.no_grad():
                        _, fresh = read(self.lm, states.states, inputs, place + start)
                joining = CachedStates.of(fresh.detach(), targets[:, -1])
                states = joining if states is None else states.append(joining)
                states = states.newest(self.memory)
        return torch.cat(nll, 1).view(ids.shape)

    def adapt(
        self, prompt_ids: Tensor, label_mask: Tensor | None = None, steps: int = 1
    ) -> CachedStates:
        """The states of a prompt, after `steps` updates by the loss of its labels: in each, every
        token reads the states of those before it from the cache.

        prompt_ids: int64 [T] or [B, T]. label_mask: bool of the same shape, True = this token is to
        be predicted (the labels of demonstrations); None: all but the first, which nothing can.
        Raises ValueError for a row without such a token, another shape, steps < 0, more tokens than
        the model has positions, and within `torch.inference_mode`.
        """
        rows = _rows(prompt_ids)
        mask = torch.ones_like(rows, dtype=torch.bool)
        if label_mask is not None:
            if label_mask.shape != prompt_ids.shape or label_mask.dtype != torch.bool:
                raise ValueError(f"expected label_mask bool {tuple(prompt_ids.shape)}")
            mask = label_mask.view(rows.shape)
        inputs, targets, mask = rows[:, :-1], rows[:, 1:], mask[:, 1:]
        if not bool(mask.any(1).all()) or steps < 0:
            raise ValueError(
                f"expected a label after the first token of each prompt and steps >= 0 ({steps})"
            )
        self._require_room(inputs.shape[1])
        with torch.enable_grad(), frozen(self.lm):
            states = CachedStates.of(read(self.lm, None, inputs, 0)[1].detach(), rows[:, -1])
            for _ in range(steps):
                leaf = states.states.detach().requires_grad_()
                logits, _ = read(self.lm, leaf, inputs, 0, again=True)
                loss = (_nll(logits, targets) * mask).sum()
                states = states.step(torch.autograd.grad(loss, leaf)[0], **self._adam)
        return states.newest(self.memory)

    def _require_room(self, count: int) -> None:
        if torch.is_inference_mode_enabled():
            raise ValueError("no gradient reaches a cache within torch.inference_mode()")
        positions = getattr(self.lm.config, "max_position_embeddings", None)
        if positions is not None and count > positions:
            raise ValueError(f"{count} tokens to read, but the model has {positions} positions")


def _rows(ids: Tensor) -> Tensor:
    if ids.dim() not in (1, 2) or ids.numel() == 0:
        raise ValueError(f"expected token ids [T] or [B, T], got {tuple(ids.shape)}")
    return ids.reshape(-1, ids.shape[-1])


def _nll(logits: Tensor, targets: Tensor) -> Tensor:
    return ops.divergence(logits, None, "cross_entropy", labels=targets)
