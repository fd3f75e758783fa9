"""Speculative decoding: a drafter proposes a tree of tokens, one forward of the target verifies it.

A round drafts behind the last committed token, lets the target read all nodes at once, each seeing
its ancestors alone, and commits the accepted path and one token more (`ops.tree_verify`). What is
written follows the target's own law, whatever the drafter proposes: at temperature 0 it is the
target's greedy text, otherwise a sample of its softmax.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, TopKLogitsWarper, TopPLogitsWarper

from stillhouse.methods.speculative.budget import Budget, Costs, FixedBudget, depths_of
from stillhouse.methods.speculative.cached_model import CachedModel, check_model
from stillhouse.methods.speculative.few_rows import few_rows
from stillhouse.methods.speculative.statistics import GenerationStats
from stillhouse.methods.speculative.tree import Drafter, DraftState, DraftTree, batch_trees
from stillhouse.ops import TreeLinks, tree_build, tree_mask, tree_positions, tree_verify
from stillhouse.ops.random import philox_words
from stillhouse.ops.tree_reference import MOST_DEPTH, MOST_NODES
from stillhouse.train.forward import evaluating
from stillhouse.train.models import head_width
from stillhouse.train.responses import Tokens, end_tokens
from stillhouse.train.responses import tokens as as_tokens


def generate(
    target: PreTrainedModel,
    drafter: Drafter | Sequence[Drafter],
    prompts: Sequence[Tokens],
    *,
    max_new_tokens: int,
    mode: str = "auto",
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | Tensor = 0,
    eos_token_id: int | Iterable[int] | None = None,
    on_tokens: Callable[[int, list[int]], object] | None = None,
    max_nodes: int = 32,
    adaptive: bool = True,
) -> tuple[list[Tensor], GenerationStats]:
    """Write behind each prompt what `target` would write, with fewer of its forwards.

    target: a causal language model of `transformers` with full attention in all layers; it is put
    in evaluation mode and back again. What its generation config says about sampling does not
    count. drafter: proposes trees; one for all prompts (`DraftState.row` tells them apart), or one
    each. prompts: token ids, B sequences of any lengths. mode: as in `ops.tree_verify`; "typical"
    does not keep the target's law. temperature: 0 is greedy. top_k, top_p: as in `transformers`, in
    that order. seed: an int, or int64 [B]; a sequence's random numbers depend on its own seed and
    on the tokens' places. eos_token_id: what ends a sequence, one token or several; None: the
    model's own, () nothing. on_tokens: called as on_tokens(prompt number, tokens) with what each
    round commits, in order. max_nodes: nodes behind the root of a tree, at most. adaptive: verify
    as many of them as pay, by the clock: where drafts fail, decoding is nearly plain. Sampled text
    then depends on the clock through the trees, its law does not; False verifies every tree in
    full, and a seed gives the same text again.

    Returns the responses, int64 [n] each on the CPU, with the token that ended them, and
    `GenerationStats`. In float32 greedy text is the one of `target.generate`; in 16 bits forwards
    over several rows round differently, so that tokens of equal logits may change places.

    Raises ValueError and TypeError for empty prompts, tokens that the target has no row for,
    numbers out of range, a prompt without room for its response, and models that cannot read trees.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from stillhouse.methods.speculative import LanguageModelDrafter, generate
        >>> sizes = dict(hidden_size=16, intermediate_size=24, num_attention_heads=2)
        >>> config = LlamaConfig(vocab_size=20, num_hidden_layers=2, **sizes)
        >>> target = LlamaForCausalLM(config)
        >>> drafter = LanguageModelDrafter(target, length=3)  # drafts what it will accept
        >>> ids, stats = generate(target, drafter, [[1, 2]], max_new_tokens=8, eos_token_id=(),
        ...                       adaptive=False)
        >>> len(ids[0]), stats.accepted
        (8, [[3, 3]])
    """
    check_model(target)
    rows = _check_prompts(target, prompts, max_new_tokens)
    _check_numbers(max_new_tokens, max_nodes, temperature, top_k, top_p)
    drafters = _one_each(drafter, len(rows), head_width(target))
    job = _Generation(
        CachedModel(target, needs_features=any(map(_needs_features, drafters))),
        max_nodes=max_nodes,
        adaptive=adaptive,
        verification=dict(mode=mode),
        warp=_Warp(temperature, top_k, top_p),
        ends=frozenset(end_tokens(target, eos_token_id)),
        on_tokens=on_tokens,
    )
    since = time.perf_counter()
    sequences = [
        _Sequence(number, prompt, max_new_tokens, each, seed)
        for number, (prompt, each, seed) in enumerate(
            zip(rows, drafters, _seeds(seed, len(rows)), strict=True)
        )
    ]
    with torch.inference_mode(), evaluating(target), few_rows(target):
        job.run(sequences)
    responses = [torch.from_numpy(each.response()) for each in sequences]
    stats = job.stats
    stats.accepted = [each.accepted for each in sequences]
    stats.drafted = [each.drafted for each in sequences]
    stats.tokens = sum(map(len, responses))
    stats.seconds = time.perf_counter() - since
    return responses, stats


@dataclass
class _Sequence:
    """One prompt and what has been written behind it."""

    number: int
    prompt: Tensor
    most: int
    drafter: Drafter
    seed: int
    accepted: list[int] = field(default_factory=list)
    drafted: list[int] = field(default_factory=list)
    hidden: Tensor | None = None
    budget: Budget | FixedBudget | None = None

    def __post_init__(self) -> None:
        start = len(self.prompt)
        self.ids = np.zeros(start + self.most, dtype=np.int64)
        self.ids[:start] = self.prompt.numpy()
        self.length = start

    @property
    def left(self) -> int:
        """Tokens that may still be written."""
        return len(self.ids) - self.length

    @property
    def deepest(self) -> int:
        """Levels of a tree: the target's own token comes behind them."""
        return min(self.left - 1, MOST_DEPTH)

    def state(self, temperature: float) -> DraftState:
        return DraftState(
            torch.from_numpy(self.ids[: self.length]),
            seed=self.seed,
            position=self.length,
            temperature=temperature,
            row=self.number,
            step=len(self.accepted),
            room=self.budget.room(),
            depth=self.deepest,
            hidden=self.hidden,
        )

    def commit(self, tokens: list[int], ends: frozenset[int]) -> tuple[list[int], bool]:
        """Write them down, up to an end; what was written, and whether it goes on."""
        end = next((place for place, token in enumerate(tokens) if token in ends), None)
        if end is not None:
            tokens = tokens[: end + 1]
        self.ids[self.length : self.length + len(tokens)] = tokens
        self.length += len(tokens)
        return tokens, end is None and self.left > 0

    def response(self) -> np.ndarray:
        return self.ids[len(self.prompt) : self.length].copy()


@dataclass
class _Generation:
    """Rounds over the sequences that go on."""

    target: CachedModel
    max_nodes: int
    adaptive: bool
    verification: dict[str, str]
    warp: _Warp
    ends: frozenset[int]
    on_tokens: Callable[[int, list[int]], object] | None
    stats: GenerationStats = field(default_factory=GenerationStats)

    def run(self, sequences: list[_Sequence]) -> None:
        since = time.perf_counter()
        room = max(each.most for each in sequences) + self.max_nodes + 1
        features = self.target.read([each.prompt for each in sequences], room)
        for place, each in enumerate(sequences):
            each.hidden = None if features is None else features[place]
            each.budget = FixedBudget(self.max_nodes)
            if self.adaptive:
                each.budget = Budget(self._costs(len(sequences)), self.max_nodes)
        self.stats.prompt_seconds = time.perf_counter() - since
        active = sequences
        while active:
            goes_on = self._round(active)
            if not all(goes_on):
                rows = [row for row, more in enumerate(goes_on) if more]
                active = [active[row] for row in rows]
                if rows:
                    self.target.cache.keep(rows)

    def _round(self, active: list[_Sequence]) -> list[bool]:
        since = time.perf_counter()
        drafts = [self._draft(each) for each in active]
        pairs = zip(active, drafts, strict=True)
        trees = [each.budget.choose(tree, each.deepest) for each, tree in pairs]
        then = time.perf_counter()
        self.stats.draft_seconds += then - since
        paths, committed = self._verify(active, trees)
        seconds = time.perf_counter() - then
        self.stats.target_seconds += seconds
        self.stats.calls += 1
        if self.adaptive:
            active[0].budget.costs.update(max(map(len, trees)), seconds)
        goes_on = []
        for row, (each, draft, tree) in enumerate(zip(active, drafts, trees, strict=True)):
            if self.target.needs_features:
                # A drafter that had nothing to draft may not have read its features either.
                before = [each.hidden] if len(draft) == 1 else []
                each.hidden = torch.cat([*before, self.target.features[row, paths[row]]])
            each.accepted.append(len(paths[row]) - 1)
            each.drafted.append(max(depths_of(tree)))
            each.budget.observe(draft, tree, committed[row])
            self.stats.nodes += len(tree) - 1
            written, more = each.commit(committed[row], self.ends)
            each.drafter.accept(torch.tensor(written))
            if self.on_tokens is not None:
                self.on_tokens(each.number, written)
            goes_on.append(more)
        return goes_on

    def _draft(self, sequence: _Sequence) -> DraftTree:
        since = time.perf_counter()
        tree = sequence.drafter.draft(sequence.state(self.warp.temperature))
        root = int(sequence.ids[sequence.length - 1])
        if int(tree.tokens[0]) != root:
            raise ValueError(
                f"expected the root of a draft to be the last token, {root}, got "
                f"{int(tree.tokens[0])} from {type(sequence.drafter).__name__}"
            )
        vocabulary = self.target.vocab_size
        if int(tree.tokens.max()) >= vocabulary:
            raise ValueError(
                f"expected draft tokens below the {vocabulary} of the target, got "
                f"{int(tree.tokens.max())}: drafter and target need one vocabulary"
            )
        sequence.budget.drafted(time.perf_counter() - since, len(tree) - 1)
        return tree

    def _verify(
        self, active: list[_Sequence], trees: list[DraftTree]
    ) -> tuple[list[list[int]], list[list[int]]]:
        """Accepted nodes, the root first, and committed tokens of each sequence."""
        tokens, parents, kind, draft = batch_trees(trees)
        links = tree_build(parents)  # on the CPU, where a tree that is none is noticed at once
        device = self.target.device
        start = torch.tensor([each.length - 1 for each in active])
        positions = tree_positions(links, start).to(device)
        visible = tree_mask(links) if tokens.shape[1] > 1 else None
        logits = self.target.forward(tokens.long().to(device), positions, visible)
        temperature, logits = self.warp(logits, sampled=draft is not None)
        out = tree_verify(
            tokens.to(device),
            TreeLinks(*(each.to(device) for each in links)),
            logits,
            None if draft is None else draft.to(device),
            kind=kind.to(device),
            temperature=temperature,
            seed=torch.tensor([each.seed for each in active], device=device),
            position=start.to(device) + 1,
            check=True,
            **self.verification,
        )
        ends = (out.n_accepted + 1).tolist()
        paths = [row[:end] for row, end in zip(out.path.tolist(), ends, strict=True)]
        committed = [row[:end] for row, end in zip(out.out_tokens.tolist(), ends, strict=True)]
        self.target.cache.accept(paths)
        return paths, committed

    def _costs(self, rows: int) -> Costs:
        """Of the target's forwards behind what it has read now."""
        target = self.target

        def measure(size: int) -> float:
            tokens = torch.zeros(rows, size, dtype=torch.int64, device=target.device)
            seconds = []
            for _ in range(3):
                since = time.perf_counter()
                target.forward(tokens, tokens)[0, 0, 0].item()  # waits for the device
                seconds.append(time.perf_counter() - since)
                target.cache.stored = 0
            return min(seconds[1:])

        return Costs.of(target.model, rows, measure, self.max_nodes + 1)


class _Warp:
    """Logits to what is sampled: temperature, top-k, top-p."""

    def __init__(self, temperature: float, top_k: int | None, top_p: float | None):
        self.temperature = temperature
        self.warpers = [] if top_k is None else [TopKLogitsWarper(top_k)]
        self.warpers += [] if top_p is None else [TopPLogitsWarper(top_p)]

    def __call__(self, logits: Tensor, *, sampled: bool) -> tuple[float, Tensor]:
        """The temperature that is left to divide by, and logits [B, T, V]."""
        if self.temperature == 0 or not (sampled or self.warpers):
            return self.temperature, logits
        # Drafts come as log-probabilities of what was drawn from: no temperature is theirs.
        scores = logits.float() / self.temperature
        rows = scores.flatten(0, 1)
        for warper in self.warpers:
            rows = warper(None, rows)
        return 1.0, rows.view(scores.shape)


def _needs_features(drafter: Drafter) -> bool:
    return bool(getattr(drafter, "needs_features", False))


def _one_each(drafter: Drafter | Sequence[Drafter], count: int, vocabulary: int) -> list[Drafter]:
    drafters = [drafter] * count if isinstance(drafter, Drafter) else list(drafter)
    if len(drafters) != count:
        raise ValueError(
            f"expected one drafter, or one for each of {count} prompts, got {len(drafters)}"
        )
    for each in drafters:
        if not isinstance(each, Drafter):
            raise TypeError(f"expected a drafter with draft and accept, got {type(each).__name__}")
        size = getattr(each, "vocab_size", vocabulary)
        if size != vocabulary:
            raise ValueError(
                f"vocabulary mismatch: the drafter has {size} tokens and the target {vocabulary}"
            )
    return drafters


def _check_prompts(target: PreTrainedModel, prompts: Sequence[Tokens], count: int) -> list[Tensor]:
    rows = [each.cpu() for each in as_tokens(prompts)]
    if not rows:
        raise ValueError("there is no prompt to write behind")
    vocabulary = target.get_input_embeddings().weight.shape[0]
    for number, each in enumerate(rows):
        if int(each.min()) < 0 or int(each.max()) >= vocabulary:
            raise ValueError(
                f"expected tokens 0 to {vocabulary - 1}, got {int(each.min())} to "
                f"{int(each.max())} in prompt {number}: it is of another tokenizer"
            )
    positions = getattr(target.config, "max_position_embeddings", None)
    longest = max(map(len, rows))
    if positions is not None and longest + count > positions:
        raise ValueError(
            f"a prompt of {longest} and a response of {count} tokens are more than the model's "
            f"{positions} positions"
        )
    return rows


def _check_numbers(
    count: int, nodes: int, temperature: float, top_k: int | None, top_p: float | None
) -> None:
    if count < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {count}")
    if not 0 <= nodes < MOST_NODES:
        raise ValueError(f"max_nodes must be 0 to {MOST_NODES - 1}, got {nodes}")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature must be a number >= 0, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}")


def _seeds(seed: int | Tensor, rows: int) -> list[int]:
    """One for each row; row b's of an int is the same in a batch of any size."""
    if isinstance(seed, int):
        words = philox_words(seed, torch.arange(rows))
        return (words[:, 0] << 31 | words[:, 1] >> 1).tolist()
    if seed.shape != (rows,):
        raise ValueError(f"seed must be an int or one for each of {rows} prompts")
    return seed.tolist()
