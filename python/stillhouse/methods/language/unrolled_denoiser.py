"""SUNDAE from a masked language model: a whole target is written at once, and corrected."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse import ops
from stillhouse.methods.language.mlm_seq2seq import seq2seq_from_mlm
from stillhouse.methods.language.unrolled_decoding import Mode, refine, sample
from stillhouse.train import reduce
from stillhouse.train.forward import evaluating
from stillhouse.train.rows import IGNORED

__all__ = ["UnrolledDenoiser", "seq2seq_from_mlm"]


class UnrolledDenoiser(nn.Module):
    """A non-autoregressive translator that is trained on its own mistakes.

    y_0 is the target y with a share a ~ U(0, 1) of its tokens replaced by uniform ones, y_{k+1}
    a sample, without a gradient, of softmax f(y_k | x); the loss is the mean over k of CE(f(y_k |
    x), y) over all positions. A linear head on the mean of the encoder's states, whose gradient
    ends there, says how long the target is: 1 to max_length tokens.

    encoder: a `transformers` encoder; decoder(ids, mask, states, source_mask) -> logits [B, T, V]
    with a `config`, such as `GatedDecoder`; both from `seq2seq_from_mlm`.
    Raises ValueError for unlike vocabularies, and for max_length < 1 or above the decoder's number
    of positions.

    Defaults: 2 unrolls (the paper; a public re-implementation has 3), 10 steps of its 4 to 16 and
    16 lengths (both from memory); max_length 64 (ours).

    Example:
        >>> import torch
        >>> from stillhouse.methods.language.unrolled_denoiser import (
        ...     UnrolledDenoiser,
        ...     seq2seq_from_mlm,
        ... )
        >>> from transformers import BertConfig, BertForMaskedLM
        >>> sizes = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
        >>> mlm = BertForMaskedLM(BertConfig(vocab_size=16, intermediate_size=8, **sizes))
        >>> model = UnrolledDenoiser(*seq2seq_from_mlm(mlm), max_length=6)
        >>> source, target = torch.tensor([[3, 1, 2]]), torch.tensor([[5, 6]])
        >>> batch = dict(input_ids=source, attention_mask=source.gt(0).long(), labels=target)
        >>> generator = torch.Generator().manual_seed(0)
        >>> model.loss(batch, generator=generator)["loss"].backward()
        >>> (ids,), scores = model.generate(batch, steps=4, lengths=3, generator=generator)
        >>> 1 <= len(ids) <= 6, scores.shape
        (True, torch.Size([1]))
    """

    def __init__(self, encoder: nn.Module, decoder: nn.Module, max_length: int = 64):
        super().__init__()
        sizes = encoder.config.vocab_size, decoder.config.vocab_size
        if sizes[0] != sizes[1]:
            raise ValueError(f"the encoder knows {sizes[0]} tokens and the decoder {sizes[1]}")
        positions = getattr(decoder.config, "max_position_embeddings", max_length)
        if not 1 <= max_length <= positions:
            raise ValueError(f"max_length must lie in [1, {positions}], got {max_length}")
        self.encoder, self.decoder, self.vocab_size = encoder, decoder, sizes[1]
        self.length = nn.Linear(encoder.config.hidden_size, max_length)
        nn.init.zeros_(self.length.weight)
        nn.init.zeros_(self.length.bias)

    def loss(
        self,
        batch: Mapping[str, Any],
        *,
        generator: torch.Generator,
        unrolls: int = 2,
        rate: float | None = None,
    ) -> dict[str, Tensor]:
        """`loss`, the mean of the unrolls' and the length's, and its parts `unroll_1`, ...,
        `length`, in nats.

        batch: `input_ids`, `attention_mask` int64 [B, S] of the source, `labels` int64 [B, T], the
        target, not shifted, -100 behind its end. rate: a, for all rows; None: drawn for each row.
        Raises ValueError for targets that are empty, longer than max_length or not padded on the
        right, a source without a token, unrolls < 1, and a rate outside [0, 1].
        """
        if unrolls < 1 or not (rate is None or 0 <= rate <= 1):
            raise ValueError(f"expected unrolls >= 1 and a rate in [0, 1], got {unrolls}, {rate}")
        labels = batch["labels"]
        mask = labels != IGNORED
        n = self._checked(mask.sum(1))
        if bool((mask.long().diff(dim=1) > 0).any()):
            raise ValueError("labels must have -100 behind the target only")
        target = labels.masked_fill(~mask, 0)
        states, source_mask, lengths = self._encode(batch)
        draw = dict(generator=generator, device=labels.device)
        share = torch.rand(len(labels), 1, **draw) if rate is None else rate
        uniform = torch.randint(self.vocab_size, labels.shape, **draw)
        y = torch.where(torch.rand(labels.shape, **draw) < share, uniform, target)
        parts = {}
        for number in range(1, unrolls + 1):
            logits = self.decoder(y, mask, states, source_mask)
            per_token = ops.divergence(logits, None, "cross_entropy", labels=target, mask=mask)
            parts[f"unroll_{number}"] = reduce(per_token, mask)
            if number < unrolls:
                y = sample(logits, 1.0, generator)
        unrolled = sum(parts.values()) / unrolls
        parts["length"] = ops.divergence(lengths, None, "cross_entropy", labels=n - 1).mean()
        return {"loss": unrolled + parts["length"], **parts}

    @torch.no_grad()
    def generate(
        self,
        batch: Mapping[str, Any],
        *,
        steps: int = 10,
        lengths: int | Tensor = 16,
        mode: Mode = "argmax_unrolled",
        generator: torch.Generator,
        **options: float,
    ) -> tuple[list[Tensor], Tensor]:
        """A target for each source of the batch: ids int64 [n] each, and its score, f32 [B].

        Uniform tokens go through `refine`, which takes steps, mode and its other arguments.
        lengths: one target for each of a source's so many likeliest lengths (of all, where there
        are fewer), or, int64 [B], the lengths themselves. The score is the mean log f(y | x) of a
        target's tokens; a source gets the target that has the highest.
        Raises ValueError for lengths outside [1, max_length], and `refine`'s reasons.
        """
        if isinstance(lengths, int) and lengths < 1:
            raise ValueError(f"lengths must be at least 1, got {lengths}")
        with evaluating(self):
            states, source_mask, logits = self._encode(batch)
            if isinstance(lengths, int):
                n = logits.topk(min(lengths, logits.shape[1])).indices + 1
            else:
                n = self._checked(lengths)[:, None]
            count, n = n.shape[1], n.flatten()
            given = [each.repeat_interleave(count, 0) for each in (states, source_mask)]
            mask = torch.arange(int(n.max()), device=n.device) < n[:, None]
            y = torch.randint(self.vocab_size, mask.shape, generator=generator, device=n.device)
            options |= dict(steps=steps, mode=mode, generator=generator)
            y = refine(lambda y: self.decoder(y, mask, *given), y, mask, **options)
            logits = self.decoder(y, mask, *given)
        nll = ops.divergence(logits, None, "cross_entropy", labels=y, mask=mask)
        score, best = (-nll.sum(1) / n).view(-1, count).max(1)
        rows = torch.arange(len(best), device=n.device) * count + best
        return [y[row, : n[row]] for row in rows.tolist()], score

    def _encode(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """The source's states, its mask as bool, and the logits of the lengths 1 .. max_length."""
        ids, mask = batch["input_ids"], batch["attention_mask"].bool()
        if not bool(mask.any(1).all()):
            raise ValueError("a source without a token has no translation")
        states = self.encoder(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        real = mask[..., None].to(states)
        return states, mask, self.length((states.detach() * real).sum(1) / real.sum(1))

    def _checked(self, lengths: Tensor) -> Tensor:
        longest = self.length.out_features
        if not bool(((lengths >= 1) & (lengths <= longest)).all()):
            raise ValueError(f"lengths must lie in [1, {longest}], got {lengths.tolist()}")
        return lengths
