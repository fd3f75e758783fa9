"""Another language model as drafter: a chain or a tree of what it would say next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from stillhouse.methods.speculative.cached_model import CachedModel, check_model
from stillhouse.methods.speculative.few_rows import few_rows
from stillhouse.methods.speculative.tree import (
    BEHIND_DETERMINISTIC,
    DETERMINISTIC,
    IID,
    WITHOUT_REPLACEMENT,
    DraftState,
    DraftTree,
)
from stillhouse.ops.random import DRAFTING, philox_uniform
from stillhouse.ops.tree_reference import MOST_CHILDREN
from stillhouse.train.forward import evaluating

Proposal = Literal["without_replacement", "iid", "greedy_draft", "top"]
ROOM = 64  # places to have behind a prompt at first


class LanguageModelDrafter:
    """Drafts with a causal language model that has the target's vocabulary, one token at a time.

    model: of `transformers`, with full attention; put in evaluation mode while it drafts. length:
    tokens of a chain; or branching: how many children each node of depth 0, 1, … gets, for a tree.
    proposal: how a node's children are chosen, and so verified: "without_replacement" (kind 0) and
    "iid" (kind 1) draw them from the model's softmax; "greedy_draft" draws the first one from what
    the most likely others leave, which follow it (kinds 3 and 2; Hu et al. 2025, optimal for one
    node); "top" takes the most likely ones (kind 2). At temperature 0 it is always "top".
    temperature: of the drafts; None: the target's.

    It keeps what it has read of each sequence, and reads what was committed in one forward when it
    drafts again. Numbers are drawn by Philox, keyed by the round's seed and position and the node.
    Raises TypeError for what is no such model, ValueError for numbers out of range.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from stillhouse.methods.speculative import DraftState, LanguageModelDrafter
        >>> sizes = dict(hidden_size=16, intermediate_size=24, num_attention_heads=2)
        >>> config = LlamaConfig(vocab_size=20, num_hidden_layers=1, **sizes)
        >>> drafter = LanguageModelDrafter(LlamaForCausalLM(config), branching=(2, 1))
        >>> drafter.draft(DraftState(torch.tensor([1, 2, 3]))).parents.tolist()
        [-1, 0, 0, 1, 2]
    """

    needs_features = False

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        length: int = 4,
        branching: Sequence[int] | None = None,
        proposal: Proposal = "without_replacement",
        temperature: float | None = None,
    ):
        check_model(model, "the drafter's model")
        if length < 1:
            raise ValueError(f"expected length to be at least 1, got {length}")
        self.branching = tuple([1] * length if branching is None else branching)
        if not self.branching or min(self.branching) < 1:
            raise ValueError(f"expected branching of at least 1 at each depth, got {branching}")
        if max(self.branching) > MOST_CHILDREN:
            raise ValueError(
                f"a node has at most {MOST_CHILDREN} children, got branching {branching}"
            )
        # No more children than there are tokens.
        self.vocab_size = model.get_output_embeddings().weight.shape[0]
        self.branching = tuple(min(each, self.vocab_size) for each in self.branching)
        if proposal not in Proposal.__args__:
            choices = ", ".join(Proposal.__args__)
            raise ValueError(f"expected proposal to be one of {choices}, got {proposal!r}")
        if temperature is not None and not 0 <= temperature < float("inf"):
            raise ValueError(f"temperature must be a number >= 0, got {temperature}")
        self.model, self.proposal, self.temperature = model, proposal, temperature
        self._read: dict[int, _Reading] = {}

    def draft(self, state: DraftState) -> DraftTree:
        """The tree behind the last of `state.ids`, as deep as `state.room` and `state.depth` let
        it be."""
        branching = self._within(state.room, state.depth)
        if not branching:
            return DraftTree.chain([int(state.ids[-1])])
        with torch.inference_mode(), evaluating(self.model), few_rows(self.model):
            return self._draft(state, branching)

    def accept(self, ids: Tensor) -> None:
        """`state.ids` tells it all."""

    def _within(self, room: int | None, depth: int | None) -> tuple[int, ...]:
        """The levels that fit, whatever their tokens will be."""
        nodes, level, kept = 0, 1, []
        for children in self.branching[:depth]:
            if room is not None:
                children = min(children, (room - nodes) // level)
            if children < 1:
                break
            level *= children
            nodes += level
            kept.append(children)
        return tuple(kept)

    def _draft(self, state: DraftState, branching: tuple[int, ...]) -> DraftTree:
        reading = self._read.get(state.row)
        if reading is None or state.step == 0:
            self._read[state.row] = reading = _Reading(self.model)
        logits = reading.catch_up(state.ids)
        temperature = state.temperature if self.temperature is None else self.temperature
        sampled = temperature > 0 and self.proposal != "top"
        tokens, parents, kinds = [int(state.ids[-1])], [-1], [DETERMINISTIC]
        rows: dict[int, Tensor] = {}
        level = [0]
        for depth, count in enumerate(branching, 1):
            following = []
            for node, row in zip(level, logits, strict=True):
                first = len(tokens)
                if sampled:
                    rows[node] = torch.log_softmax(row.float() / temperature, -1)
                    chosen = self._drawn(rows[node], count, state, first)
                else:
                    chosen = [(token, DETERMINISTIC) for token in row.topk(count).indices.tolist()]
                for token, kind in chosen:
                    following.append(len(tokens))
                    tokens.append(token)
                    parents.append(node)
                    kinds.append(kind)
            level = following
            if depth < len(branching):
                logits = reading.extend(tokens, parents, level, depth)
        reading.tree = tokens, parents
        log_probs = None
        if sampled:
            log_probs = next(iter(rows.values())).new_zeros(len(tokens), self.vocab_size)
            for node, row in rows.items():
                log_probs[node] = row
        return DraftTree(
            torch.tensor(tokens, dtype=torch.int32),
            torch.tensor(parents, dtype=torch.int32),
            torch.tensor(kinds, dtype=torch.uint8),
            log_probs,
        )

    def _drawn(
        self, log_probs: Tensor, count: int, state: DraftState, first: int
    ) -> list[tuple[int, int]]:
        """Tokens and kinds of a node's children, the first of which is node `first`; fewer where no
        more of them have a probability."""
        left = log_probs.double().exp()
        if self.proposal == "greedy_draft":
            top = log_probs.topk(count - 1).indices.tolist()
            left[top] = 0
            drawn = self._draw(left, state, first)
            others = [(token, DETERMINISTIC) for token in top]
            return others if drawn is None else [(drawn, BEHIND_DETERMINISTIC), *others]
        kind = IID if self.proposal == "iid" else WITHOUT_REPLACEMENT
        chosen = []
        for node in range(first, first + count):
            token = self._draw(left, state, node)
            if token is None:
                break
            chosen.append((token, kind))
            if kind == WITHOUT_REPLACEMENT:
                left[token] = 0
        return chosen

    def _draw(self, left: Tensor, state: DraftState, node: int) -> int | None:
        """The inverse of the cumulated probabilities at the node's uniform."""
        cumulated = left.cumsum(-1)
        total = cumulated[-1]
        if not total > 0:
            return None
        uniform = float(philox_uniform(state.seed, state.position, node, DRAFTING))
        return int(torch.searchsorted(cumulated, uniform * total, right=True))


class _Reading:
    """What the model has read of one sequence, and the nodes of its last draft."""

    def __init__(self, model: PreTrainedModel):
        self.model = CachedModel(model)
        self.known = 0  # tokens of the sequence that were read
        self._forget()

    def _forget(self) -> None:
        self.tree: tuple[list[int], list[int]] = ([], [])
        self.places: dict[int, int] = {}  # of the nodes that were read, behind the sequence
        self.visible = np.zeros((0, 0), dtype=bool)

    def catch_up(self, ids: Tensor) -> Tensor:
        """Read up to the last of the ids, whose logits are returned, [1, V]."""
        if self.model.cache is None:
            self.model.read([ids], ROOM)
            self.known = len(ids) - 1
        else:
            self._keep_accepted(ids[self.known : -1].tolist())
        new = ids[self.known :].to(self.model.device)[None]
        positions = torch.arange(self.known, len(ids), device=new.device)[None]
        logits = self.model.forward(new, positions)
        self.model.cache.accept([range(new.shape[1])])
        self.known = len(ids)
        return logits[0, -1:]

    def extend(self, tokens: list[int], parents: list[int], level: list[int], depth: int) -> Tensor:
        """Logits [n, V] behind the n nodes of a level, all of one depth."""
        before, count = len(self.visible), len(level)
        visible = np.zeros((before + count, before + count), dtype=bool)
        visible[:before, :before] = self.visible
        for place, node in enumerate(level, before):
            self.places[node] = place
            if parents[node]:  # the root is of the sequence
                visible[place] |= visible[self.places[parents[node]]]
            visible[place, place] = True
        self.visible = visible
        device = self.model.device
        ids = torch.tensor([[tokens[node] for node in level]], device=device)
        positions = torch.full_like(ids, self.known - 1 + depth)
        seen = torch.from_numpy(visible[before:])[None]
        return self.model.forward(ids, positions, seen)[0]

    def _keep_accepted(self, new: list[int]) -> None:
        """Nodes of the last draft that were committed need not be read again."""
        tokens, parents = self.tree
        path, node = [], 0
        for token in new:
            node = next(
                (
                    child
                    for child in self.places
                    if parents[child] == node and tokens[child] == token
                ),
                None,
            )
            if node is None:
                break
            path.append(self.places[node])
        self.model.cache.accept([path])
        self.known += len(path)
        self._forget()
