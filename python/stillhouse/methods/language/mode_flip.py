"""Why the mode of a good model may be a bad text: the contamination that makes it one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stillhouse.train import Responses, rollout, sequence_logprobs
from stillhouse.train.forward import evaluating
from stillhouse.train.responses import Tokens, end_tokens


def mode_flip_threshold(bits: float) -> float:
    """The share of a bad text in a mixture above which it is the mode.

    bits: h, where no good text has a probability above 2^-h. In (1 - e) P + e delta the bad text is
    the mode as soon as e > (1 - e) 2^-h, that is e > 2^-h / (1 + 2^-h). Above 1,074 bits the answer
    is below what float64 can say, and 0. Raises ValueError for bits < 0 or not finite.

    Defaults: none. The thesis's argument.

    Example:
        >>> from stillhouse.methods.language import mode_flip_threshold
        >>> mode_flip_threshold(1), mode_flip_threshold(100) < 1e-30
        (0.3333333333333333, True)
    """
    if not 0 <= bits < math.inf:
        raise ValueError(f"expected a finite number of bits >= 0, got {bits}")
    return 2.0**-bits / (1 + 2.0**-bits)


@dataclass(frozen=True, eq=False)
class OutputEntropy:
    """Of each of P prompts, float64 [P]: the entropy of the responses in `bits` and its standard
    error; `best_bits` of the likeliest response that was drawn, an upper bound of what h can be;
    the probability of the `empty` response."""

    bits: Tensor
    stderr: Tensor
    best_bits: Tensor
    empty: Tensor

    @property
    def threshold(self) -> Tensor:
        """`mode_flip_threshold` of the entropy, [P]: the share of bad texts that would be the mode
        if responses were about equally likely."""
        shares = [mode_flip_threshold(max(0.0, each)) for each in self.bits.tolist()]
        return self.bits.new_tensor(shares)


def output_entropy(
    model: Any,
    prompts: Sequence[Tokens],
    *,
    samples: int,
    max_new_tokens: int,
    seed: int,
    eos_token_id: int | None = None,
) -> OutputEntropy:
    """The entropy of a causal language model's responses to each prompt, from `samples` draws.

    -log2 p of responses of at most max_new_tokens tokens, the end included: where they are cut, it
    is the entropy of what is left, a lower bound. Raises ValueError for samples < 2, a model that
    has no end token, and what `train.rollout` refuses.

    Defaults: none. The thesis's estimator; standard errors over draws are ours.

    Example:
        >>> import torch
        >>> from stillhouse.methods.language import output_entropy
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(hidden_size=8, intermediate_size=8, num_attention_heads=1)
        >>> config = LlamaConfig(vocab_size=4, num_hidden_layers=1, eos_token_id=3, **sizes)
        >>> lm = LlamaForCausalLM(config)
        >>> with torch.no_grad():
        ...     _ = lm.lm_head.weight.zero_()  # 2 bits a token, one of four ends
        >>> found = output_entropy(lm, [[0]], samples=64, max_new_tokens=60, seed=0)
        >>> bool(abs(found.bits[0] - 8) < 4 * found.stderr[0]), round(found.empty[0].item(), 4)
        (True, 0.25)
    """
    ends = end_tokens(model, eos_token_id)
    if samples < 2:
        raise ValueError(f"an error needs at least 2 samples, got {samples}")
    if not ends:
        raise ValueError("the model has no end token: no response of it is complete")
    options = dict(max_new_tokens=max_new_tokens, seed=seed, eos_token_id=ends)
    drawn = rollout(model, [each for each in prompts for _ in range(samples)], **options)
    prompts = drawn.prompts()[::samples]
    with torch.no_grad(), evaluating(model):
        bits = -sequence_logprobs(model, drawn.batch()).double().view(-1, samples) / math.log(2)
        at_once = [Responses.of(prompts, [x.new_tensor([end]) for x in prompts]) for end in ends]
        empty = sum(sequence_logprobs(model, each.batch()).double().exp() for each in at_once)
    stderr = bits.std(1) / samples**0.5
    return OutputEntropy(bits.mean(1), stderr, bits.min(1).values, empty)
