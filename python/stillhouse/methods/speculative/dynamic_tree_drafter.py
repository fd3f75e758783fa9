"""Trees that a draft head grows where it is sure of itself (EAGLE-2's)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from stillhouse.methods.speculative.draft_head import FSPADHead, HeadCache
from stillhouse.methods.speculative.expansion import dynamic_tree
from stillhouse.methods.speculative.tree import DraftState, DraftTree
from stillhouse.ops.tree_reference import MOST_CHILDREN


class Candidates(NamedTuple):
    """Nodes behind the roots of B sequences, level by level, before the best are chosen.

    tokens, parents: int64 [B, M], a parent is a candidate's number, or -1 = the root; scores:
    float32 [B, M], the sum of log-probabilities from the root on.
    """

    tokens: Tensor
    parents: Tensor
    scores: Tensor


@torch.no_grad()
def grow(
    head: FSPADHead,
    embedding: nn.Module,
    output_head: nn.Linear,
    for_logits: Tensor,
    for_feedback: Tensor,
    cache: HeadCache,
    *,
    depth: int,
    top_k: int,
) -> Candidates:
    """The candidates of B sequences of one length: top_k children of the root, and `depth` - 1
    times those of the top_k best of the last level.

    for_logits, for_feedback: [B, D], the head's outputs at the roots; cache: what it has read up to
    there, and no more afterwards. A level is one forward of the head, whose nodes see what the
    cache held and their ancestors.
    """
    batch, committed = len(for_logits), cache.length
    scores, tokens = _best(for_logits, output_head, top_k)
    features = for_feedback[:, None].expand(-1, top_k, -1)
    number = torch.arange(top_k, device=tokens.device).expand(batch, -1)
    levels = [Candidates(tokens, torch.full_like(tokens, -1), scores)]
    # Which nodes behind the committed ones a node of the frontier descends from.
    ancestors = torch.zeros(batch, top_k, 0, dtype=torch.bool, device=tokens.device)
    own = torch.eye(top_k, dtype=torch.bool, device=tokens.device).expand(batch, -1, -1)
    before = torch.ones(batch, top_k, committed, dtype=torch.bool, device=tokens.device)
    try:
        for level in range(depth - 1):
            seen = torch.cat([ancestors, own], -1)
            place = torch.full((top_k,), committed + level, device=tokens.device)
            for_logits, for_feedback = head(
                features,
                embedding(tokens).to(features.dtype),
                cache=cache,
                positions=place,
                mask=torch.cat([before, seen], -1)[:, None],
            )
            log_probs, children = _best(for_logits, output_head, top_k)
            sums = (scores[..., None] + log_probs).flatten(1)
            parents = number.repeat_interleave(top_k, 1)
            levels.append(Candidates(children.flatten(1), parents, sums))
            scores, chosen = sums.topk(top_k)
            parent = chosen // top_k
            tokens = children.flatten(1).gather(1, chosen)
            number = top_k + level * top_k**2 + chosen
            features = _rows(for_feedback, parent)  # p would be another space than the target's
            ancestors = _rows(seen, parent)
    finally:
        cache.truncate(committed)
    return Candidates(*(torch.cat(parts, 1) for parts in zip(*levels, strict=True)))


def _best(for_logits: Tensor, output_head: nn.Linear, top_k: int) -> tuple[Tensor, Tensor]:
    """Log-probabilities and tokens of the likeliest ones, [..., top_k] each."""
    weight, bias = output_head.weight, output_head.bias
    logits = linear(for_logits.to(weight.dtype), weight, bias).float()
    best, tokens = logits.topk(top_k)
    return best - logits.logsumexp(-1, keepdim=True), tokens


def _rows(x: Tensor, chosen: Tensor) -> Tensor:
    return x.gather(1, chosen[..., None].expand(-1, -1, x.shape[-1]))


def trees_of(candidates: Candidates, roots: Tensor, total: int) -> list[DraftTree]:
    """The best `total` - 1 candidates of each sequence behind its root, int64 [B].

    No score is above its parent's, so the best are closed under parents.
    """
    tokens = torch.cat([roots[:, None].to(candidates.tokens), candidates.tokens], 1)
    parents = torch.nn.functional.pad(candidates.parents + 1, (1, 0), value=-1)
    scores = torch.nn.functional.pad(candidates.scores, (1, 0))
    total = min(total, tokens.shape[1])
    arrays = (x.cpu().numpy() for x in (tokens.int(), parents.int(), scores))
    chosen = dynamic_tree(*arrays, total=total)[:3]
    trees = []
    for tokens, parents, scores in zip(*chosen, strict=True):
        kept = parents > -2  # a token of probability 0 is no candidate
        trees.append(
            DraftTree.of(tokens[kept], parents[kept], scores=torch.from_numpy(scores[kept]))
        )
    return trees


class DynamicTreeDrafter:
    """Drafts trees with an `FSPADHead`, for `generate`; they are deterministic (kind 2).

    head: trained for `target`, the causal LM of transformers whose embedding and output head it
    borrows. total: nodes of a tree at most, the root included; 1 drafts nothing. depth: levels
    behind the root. top_k: children of a node, and nodes of a level that have children. As many
    sequences as there are rows of the batch may be drafted for side by side; one that begins anew
    is known by its features, which are those of all its tokens.
    Raises ValueError for total, depth or top_k < 1, top_k beyond the vocabulary, and a head of
    another width than the target's features; TypeError for another dtype. `draft` raises ValueError
    where features are missing, or where a tree would not fit into the target's positions.

    Defaults: total 60, depth 6, top_k 10 (the authors' wrapper: 59 nodes behind the root).

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from stillhouse.methods.speculative import DraftState, DynamicTreeDrafter, FSPADHead
        >>> sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1)
        >>> sizes |= dict(num_attention_heads=2, num_key_value_heads=2, vocab_size=20)
        >>> target = LlamaForCausalLM(LlamaConfig(**sizes))
        >>> head = FSPADHead(16, 32, heads=2)
        >>> drafter = DynamicTreeDrafter(head, target, total=8, depth=3, top_k=4)
        >>> state = DraftState(torch.tensor([3, 1, 4]), hidden=torch.randn(2, 16))
        >>> tree = drafter.draft(state)
        >>> len(tree), tree.tokens[0].item()
        (8, 4)
    """

    needs_features = True

    def __init__(
        self,
        head: FSPADHead,
        target: nn.Module,
        *,
        total: int = 60,
        depth: int = 6,
        top_k: int = 10,
    ):
        if min(total, depth, top_k) < 1:
            raise ValueError(
                f"expected total, depth and top_k >= 1, got {total}, {depth} and {top_k}"
            )
        self.embedding, self.output_head = (
            target.get_input_embeddings(),
            target.get_output_embeddings(),
        )
        vocabulary, width = self.output_head.weight.shape
        if top_k > min(vocabulary, MOST_CHILDREN):
            most = min(vocabulary, MOST_CHILDREN)
            raise ValueError(f"expected top_k of at most {most}, got {top_k}")
        if width != head.config.hidden:
            raise ValueError(
                f"the target's features are {width} wide, the head is for {head.config.hidden}"
            )
        if head.fuse.weight.dtype != self.output_head.weight.dtype:
            raise TypeError(
                f"the head is {head.fuse.weight.dtype}, the target {self.output_head.weight.dtype}:"
                " convert one"
            )
        self.head, self.total, self.depth, self.top_k = head, total, depth, top_k
        self.positions = getattr(target.config, "max_position_embeddings", None)
        self._read: dict[int, tuple[Tensor, HeadCache]] = {}  # of rows: ids, what was made of them

    @torch.no_grad()
    def draft(self, state: DraftState) -> DraftTree:
        """The tree behind the last of `state.ids`, as large as `state.room` and `state.depth` let
        it be, from `state.hidden`."""
        ids, features = state.ids, state.hidden
        if features is None:
            raise ValueError("expected the target's features: the drafter has needs_features set")
        depth = self.depth if state.depth is None else min(self.depth, state.depth)
        total = self.total if state.room is None else min(self.total, state.room + 1)
        root = ids[-1:]
        if total == 1 or depth < 1 or not len(features):
            return DraftTree.chain(root.tolist())
        if self.positions is not None and len(ids) + depth > self.positions:
            raise ValueError(
                f"a tree of depth {depth} behind {len(ids)} tokens is more than the target's "
                f"{self.positions} positions"
            )
        cache, weight = self._cache(state.row, ids, features), self.output_head.weight
        # At t the head reads feature t and token t + 1: the root is its last token.
        embeddings = self.embedding(ids[cache.length + 1 :].to(weight.device))
        outputs = self.head(features[None].to(weight), embeddings[None], cache=cache)
        self._read[state.row] = ids, cache
        last = (each[:, -1] for each in outputs)
        options = {"depth": depth, "top_k": self.top_k}
        found = grow(self.head, self.embedding, self.output_head, *last, cache, **options)
        return trees_of(found, root, total)[0]

    def accept(self, ids: Tensor) -> None:
        """Nothing to learn: the next state has the tokens, and their features."""

    def _cache(self, row: int, ids: Tensor, features: Tensor) -> HeadCache:
        """What the head has read of this sequence: all up to where the features begin."""
        start = len(ids) - 1 - len(features)
        if start == 0:
            return HeadCache()
        known, cache = self._read.get(row, (ids[:0], None))
        if cache is None or cache.length != start or not torch.equal(known, ids[: len(known)]):
            raise ValueError(
                f"expected features of the {len(ids) - 1} tokens before the root, or of those "
                f"since the root of the last tree, got {len(features)}"
            )
        return cache
