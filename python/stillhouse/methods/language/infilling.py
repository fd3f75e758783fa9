"""Filling the holes of a text with a causal model that was trained to."""

from collections.abc import Sequence
from typing import Any

import torch

from stillhouse.methods.language.sentinels import Sentinels


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
