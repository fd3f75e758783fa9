"""CodeGen2: one causal model that continues and fills in, from a mixture of two objectives.

A study of what to train a model of code on. What it keeps: the plain causal decoder; each sequence
with probability 1/2 as it is and with probability 1/2 with spans cut out of each document and asked
for at its end. What it gives up: bidirectional attention within a prefix, which brought nothing.
The transforms stand here for distillation too: teacher and student see the same rewritten ids, and
any divergence is taken on its targets. A teacher that never saw the sentinels can teach `CausalLM`
examples only.

Equation, d a document and s_1 .. s_M its spans:

    x = d with <mask_m> for s_m, <|endoftext|> <sep>, <mask_1> s_1 <eom> .. <mask_M> s_M <eom>
    L = -sum over the tokens of all s_m <eom> of log q(x_i | x_<i)
    attention of position i to j with a prefix of k: j <= i or j < k

Paper: CodeGen2: Lessons for Training LLMs on Programming and Natural Languages, arXiv 2305.02309.
Code by its authors: salesforce/CodeGen2, which samples; the corruption was not released.
"""

import math
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stillhouse.methods.language.span_corruption import (
    CausalLM,
    FillInMiddle,
    Mixture,
    PrefixLM,
    Sentinels,
    SpanCorruption,
    restore,
)

__all__ = [
    "CausalLM",
    "FillInMiddle",
    "Mixture",
    "PrefixLM",
    "Sentinels",
    "SpanCorruption",
    "document_mask",
    "infill",
    "infill_prompt",
    "pass_at_k",
    "prefix_lm_mask",
    "restore",
    "truncate_completion",
]

# Two blank lines, a comment or a docstring at the start of a line: a function is over.
STOPS = (r"\n\n^#", r"^'''", r"\n\n\n")


def prefix_lm_mask(lengths: Tensor, prefix: Tensor, total: int) -> Tensor:
    """Who may attend to whom, bool [B, 1, total, total], True = may: j <= i, or j in the prefix.

    lengths, prefix: int64 [B], tokens of each sequence and how many of them are the prefix (0 =
    causal). Columns from `lengths` on are padding. For `attention_mask` of a `transformers` model,
    with prefixes as `collate` hands them on. A cache cannot be kept: what is put behind a prefix
    changes nothing in it, what is put into it changes all of its states.
    Raises ValueError for 1 <= length <= total or 0 <= prefix <= length not so.

    Defaults: none; the paper's models are causal.

    Example:
        >>> import torch
        >>> from stillhouse.methods.language import prefix_lm_mask
        >>> prefix_lm_mask(torch.tensor([5]), torch.tensor([3]), 5)[0, 0].int()
        tensor([[1, 1, 1, 0, 0],
                [1, 1, 1, 0, 0],
                [1, 1, 1, 0, 0],
                [1, 1, 1, 1, 0],
                [1, 1, 1, 1, 1]], dtype=torch.int32)
    """
    if not ((lengths >= 1) & (lengths <= total)).all():
        raise ValueError(f"lengths must lie in [1, {total}], got {lengths.tolist()}")
    if prefix.shape != lengths.shape or not ((prefix >= 0) & (prefix <= lengths)).all():
        raise ValueError(f"prefixes {prefix.tolist()} are not within {lengths.tolist()} tokens")
    at = torch.arange(total, device=lengths.device)
    allowed = (at <= at[:, None]) | (at < prefix[:, None, None])
    return (allowed & (at < lengths[:, None, None]))[:, None]


def document_mask(document_ids: Tensor) -> Tensor:
    """Causal attention within documents, bool [B, 1, T, T], True = may attend.

    document_ids: int64 [B, T] as `collate` gives them; padding (-1) sees padding only.
    Raises ValueError for another number of dimensions.

    Defaults: none; whether the paper's models see across packed documents is not said.

    Example:
        >>> import torch
        >>> from stillhouse.methods.language import document_mask
        >>> document_mask(torch.tensor([[0, 0, 1]]))[0, 0].int()
        tensor([[1, 0, 0],
                [1, 1, 0],
                [0, 0, 1]], dtype=torch.int32)
    """
    if document_ids.dim() != 2:
        raise ValueError(f"document_ids must be [B, T], got {tuple(document_ids.shape)}")
    same = document_ids[:, None, :] == document_ids[:, :, None]
    return same.tril()[:, None]


def infill_prompt(
    segments: Sequence[Sequence[int]],
    sentinels: Sentinels,
    answers: Sequence[Sequence[int]] = (),
) -> list[int]:
    """The ids that ask for the next hole of a text with a hole between each two `segments`.

    answers: what the holes before it were filled with. One hole: prefix <mask_1> suffix
    <|endoftext|> <sep> <mask_1>, the model card's prompt.
    Raises ValueError for no hole, more holes than masks, and no hole left to ask for.

    Defaults: none.

    Example:
        >>> from stillhouse.methods.language import Sentinels, infill_prompt
        >>> words = Sentinels(masks=(100,), separator=102, end_of_span=103, end_of_text=99)
        >>> infill_prompt([[1, 2], [4]], words)
        [1, 2, 100, 4, 99, 102, 100]
    """
    holes = len(segments) - 1
    if not 1 <= holes <= len(sentinels.masks):
        raise ValueError(f"{holes} holes: expected 1 to {len(sentinels.masks)}, one a mask")
    if len(answers) >= holes:
        raise ValueError(f"{len(answers)} answers for {holes} holes: there is none to ask for")
    ids = list(segments[0])
    for mask, segment in zip(sentinels.masks, segments[1:], strict=False):
        ids += [mask, *segment]
    ids += [sentinels.end_of_text, sentinels.separator]
    for mask, answer in zip(sentinels.masks, answers, strict=False):
        ids += [mask, *answer, sentinels.end_of_span]
    return [*ids, sentinels.masks[len(answers)]]


def infill(
    model: Any,
    *segments: Sequence[int],
    sentinels: Sentinels,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> list[list[int]]:
    """What a `transformers` causal model puts between each two of the `segments` (token ids).

    Holes are filled left to right, each answer being there for the next; an answer ends before its
    <eom>, or after `max_new_tokens`. temperature 0 takes the most probable token. The model is in
    evaluation mode meanwhile.
    Raises ValueError as `infill_prompt`, and for a negative temperature.

    Defaults: 128 tokens (the authors' sample); greedy is ours, they sample at 0.2 to 0.8.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from stillhouse.methods.language import Sentinels, infill
        >>> config = LlamaConfig(
        ...     vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        ...     num_attention_heads=2, num_key_value_heads=2,
        ... )
        >>> words = Sentinels(masks=(60,), separator=61, end_of_span=62, end_of_text=63)
        >>> (middle,) = infill(
        ...     LlamaForCausalLM(config), [1, 2], [4, 5], sentinels=words, max_new_tokens=3
        ... )
        >>> len(middle) <= 3
        True
    """
    if not temperature >= 0:
        raise ValueError(f"temperature must be at least 0, got {temperature}")
    options: dict[str, Any] = {"do_sample": temperature > 0}
    if temperature > 0:
        options |= {"temperature": temperature, "top_p": top_p, "top_k": 0}
    end, answers = sentinels.end_of_span, []
    device, was_training = next(model.parameters()).device, model.training
    model.eval()
    try:
        # generate() draws from the global generator, which is the caller's.
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            for _ in segments[1:] or [()]:  # the prompt says that there is no hole
                prompt = torch.tensor([infill_prompt(segments, sentinels, answers)], device=device)
                made = model.generate(
                    prompt,
                    attention_mask=torch.ones_like(prompt),
                    max_new_tokens=max_new_tokens,
                    eos_token_id=end,
                    pad_token_id=end,
                    **options,
                )
                answer = made[0, prompt.shape[1] :].tolist()
                answers.append(answer[: answer.index(end)] if end in answer else answer)
    finally:
        model.train(was_training)
    return answers


def truncate_completion(text: str, stops: Sequence[str] = STOPS) -> str:
    """Text up to the first match of any of the regular expressions (^ is the start of a line).

    Raises re.error for a pattern that is none.

    Defaults: two blank lines, or a comment or docstring at the margin (ours after the authors').

    Example:
        >>> from stillhouse.methods.language import truncate_completion
        >>> truncate_completion("    return 1\\n\\n# a test")
        '    return 1'
    """
    found = (re.search(stop, text, re.MULTILINE) for stop in stops)
    return text[: min((match.start() for match in found if match), default=len(text))]


def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that one of k samples is right, if c of n are: 1 - C(n - c, k) / C(n, k).

    The unbiased estimate of arXiv 2107.03374. Raises ValueError unless 0 <= c <= n, 1 <= k <= n.

    Defaults: none.

    Example:
        >>> from stillhouse.methods.language import pass_at_k
        >>> pass_at_k(5, 2, 2)
        0.7
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"expected 0 <= c <= n and 1 <= k <= n, got n={n}, c={c}, k={k}")
    return 1 - math.comb(n - c, k) / math.comb(n, k)
