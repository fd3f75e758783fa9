"""The trees of a draft head, against a head that reads every path anew."""

import pytest
import torch

from stillhouse.methods.speculative import (
    DraftState,
    DynamicTreeDrafter,
    FSPADHead,
    generate,
    target_features,
)
from stillhouse.ops import tree_build, tree_paths
from stillhouse.recipes.speculative import fspad as recipe

VOCABULARY = 11


@pytest.fixture
def head():
    """Untrained, so that its drafts are mostly wrong, with an open gate."""
    head = FSPADHead(16, 24, heads=2, generator=torch.Generator().manual_seed(0))
    torch.nn.init.normal_(head.gate.down.weight, std=0.3)
    return head.double().requires_grad_(False)


def state_of(target, ids, since=0, **options):
    """After a round that has committed all behind `since`."""
    ids = torch.tensor(ids)
    features = target_features(target, {"input_ids": ids[None]})[0, since:-1]
    return DraftState(ids, hidden=features, **options)


def scored(head, target, ids, path):
    """The score of a path of tokens behind `ids`: everything is read anew, without a cache."""
    ids = torch.tensor(ids)
    features = target_features(target, {"input_ids": ids[None]})[:, :-1]
    embedding, total = target.get_input_embeddings(), 0.0
    tokens = ids[1:]
    for token in path:
        for_logits, for_feedback = head(features, embedding(tokens)[None])
        law = target.lm_head(for_logits[0, -1]).log_softmax(-1)
        total += law[token].item()
        features = torch.cat([features, for_feedback[:, -1:]], 1)
        tokens = torch.cat([tokens, torch.tensor([token])])
    return total


def paths_of(tree):
    """Tokens from the root to each node."""
    paths = [[]]
    for token, parent in zip(tree.tokens[1:].tolist(), tree.parents[1:].tolist(), strict=True):
        paths.append([*paths[parent], token])
    return paths


def test_scores_are_those_of_their_paths(head, target):
    ids = [3, 1, 4, 1, 5, 9, 2]
    drafter = DynamicTreeDrafter(head, target, total=30, depth=4, top_k=3)
    tree = drafter.draft(state_of(target, ids))
    assert len(tree) == 30
    paths = paths_of(tree)
    assert max(map(len, paths)) == 4
    assert len({tuple(path) for path in paths}) == 30
    for path, score in zip(paths, tree.scores.tolist(), strict=True):
        assert score == pytest.approx(scored(head, target, ids, path), abs=1e-5)


def test_it_finds_the_best_nodes(head, target):
    """With as many children as there are tokens, nothing that is better has been left out."""
    ids = [3, 1, 4]
    drafter = DynamicTreeDrafter(head, target, total=25, depth=2, top_k=VOCABULARY)
    tree = drafter.draft(state_of(target, ids))
    every = [[a] for a in range(VOCABULARY)]
    every += [[a, b] for a in range(VOCABULARY) for b in range(VOCABULARY)]
    best = sorted((scored(head, target, ids, path) for path in every), reverse=True)[:24]
    assert sorted(tree.scores[1:].tolist(), reverse=True) == pytest.approx(best, abs=1e-5)


@pytest.mark.parametrize("total", [2, 7, 60, 400])
def test_trees_are_closed_and_scores_fall(head, target, total):
    drafter = DynamicTreeDrafter(head, target, total=total, depth=5, top_k=4)
    tree = drafter.draft(state_of(target, [7, 7, 3]))
    assert len(tree) == min(total, 1 + 4 + 4 * 16)
    assert tree.tokens[0] == 3
    assert (tree.kind == 2).all()
    parents = tree.parents[1:].long()
    assert (tree.scores[1:] <= tree.scores[parents]).all()
    links = tree_build(tree.parents[None])
    for node in range(len(tree)):
        ancestors, at = {node}, node
        while at:
            at = tree.parents[at].item()
            ancestors.add(at)
        words = links.ancestors[0, node]
        assert {j for j in range(len(tree)) if words[j // 64] >> (j % 64) & 1} == ancestors
        assert links.depth[0, node] == len(ancestors) - 1
    leaves = set(range(len(tree))) - set(tree.parents.tolist())
    paths = tree_paths(links)[0]
    ends = {row[row >= 0][-1].item() for row in paths if (row >= 0).any()}
    assert ends == leaves


def test_what_was_read_need_not_be_read_again(head, target):
    """Rounds with a cache draft what one that begins with the whole text drafts."""
    ids = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]
    drafter, rounds = DynamicTreeDrafter(head, target, total=20, depth=3, top_k=4), [3, 5, 6, 10]
    since = 0
    for step, end in enumerate(rounds):
        # The second round has no time for a tree; the third is told its features once more.
        room = 0 if step == 1 else None
        tree = drafter.draft(state_of(target, ids[:end], since, step=step, room=room))
        since = since if step == 1 else end - 1
        fresh = DynamicTreeDrafter(head, target, total=20, depth=3, top_k=4)
        expected = fresh.draft(state_of(target, ids[:end], room=room))
        assert torch.equal(tree.tokens, expected.tokens)
        assert torch.equal(tree.parents, expected.parents)
        torch.testing.assert_close(tree.scores, expected.scores)
    # Another text in the same row begins anew.
    again = drafter.draft(state_of(target, [2, 2, 8]))
    torch.testing.assert_close(
        again.scores,
        DynamicTreeDrafter(head, target, total=20, depth=3, top_k=4)
        .draft(state_of(target, [2, 2, 8]))
        .scores,
    )


def test_rows_do_not_disturb_each_other(head, target):
    texts = {0: [3, 1, 4, 1, 5], 1: [9, 2, 6, 5, 3]}
    drafter = DynamicTreeDrafter(head, target, total=12, depth=3, top_k=4)
    for end, since in ((3, 0), (5, 2)):
        for row, ids in texts.items():
            tree = drafter.draft(state_of(target, ids[:end], since, row=row))
            alone = DynamicTreeDrafter(head, target, total=12, depth=3, top_k=4)
            expected = alone.draft(state_of(target, ids[:end]))
            assert torch.equal(tree.tokens, expected.tokens)


def test_limits_of_a_round(head, target):
    drafter = DynamicTreeDrafter(head, target, total=20, depth=3, top_k=4)
    assert len(drafter.draft(state_of(target, [3, 1, 4], room=5))) == 6
    tree = drafter.draft(state_of(target, [3, 1, 4], depth=1))
    assert tree.parents.tolist() == [-1, 0, 0, 0, 0]
    for nothing in (dict(room=0), dict(depth=0)):
        assert len(drafter.draft(state_of(target, [3, 1, 4], **nothing))) == 1
    one = DynamicTreeDrafter(head, target, total=1)
    assert one.draft(state_of(target, [3, 1, 4])).tokens.tolist() == [4]
    # Before the root of a single token there is nothing to draft from.
    assert len(drafter.draft(state_of(target, [3]))) == 1


def test_a_head_that_returns_logits_features_is_caught(head, target, monkeypatch):
    """Feeding back the output that is for logits gives other trees: the two are told apart."""
    ids = [3, 1, 4, 1, 5]
    right = DynamicTreeDrafter(head, target, total=30, depth=4, top_k=3)
    expected = right.draft(state_of(target, ids))
    forward = FSPADHead.forward
    monkeypatch.setattr(
        FSPADHead, "forward", lambda self, *x, **o: (forward(self, *x, **o)[0],) * 2
    )
    wrong = DynamicTreeDrafter(head, target, total=30, depth=4, top_k=3)
    assert not torch.equal(wrong.draft(state_of(target, ids)).tokens, expected.tokens)


def test_drafters_that_are_refused(head, target):
    for options in (dict(total=0), dict(depth=0), dict(top_k=0)):
        with pytest.raises(ValueError, match="expected total, depth and top_k >= 1"):
            DynamicTreeDrafter(head, target, **options)
    with pytest.raises(ValueError, match="top_k of at most 11, got 12"):
        DynamicTreeDrafter(head, target, top_k=12)
    with pytest.raises(ValueError, match="features are 16 wide, the head is for 8"):
        DynamicTreeDrafter(FSPADHead(8, 16, heads=2).double(), target)
    with pytest.raises(TypeError, match=r"the head is torch.float32, the target torch.float64"):
        DynamicTreeDrafter(FSPADHead(16, 16, heads=2), target)


def test_states_that_are_refused(head, target):
    drafter = DynamicTreeDrafter(head, target, total=12, depth=3, top_k=4)
    with pytest.raises(ValueError, match="the drafter has needs_features set"):
        drafter.draft(DraftState(torch.tensor([1, 2])))
    with pytest.raises(ValueError, match="expected features of the 4 tokens before the root"):
        drafter.draft(state_of(target, [3, 1, 4, 1, 5], since=2))
    drafter.draft(state_of(target, [3, 1, 4]))
    with pytest.raises(ValueError, match="of those since the root of the last tree, got 1"):
        drafter.draft(state_of(target, [3, 1, 4, 1, 5], since=3))
    with pytest.raises(ValueError, match="expected features"):
        drafter.draft(state_of(target, [9, 1, 4, 1, 5], since=2))
    with pytest.raises(ValueError, match="a tree of depth 3 behind 62 tokens is more than the"):
        drafter.draft(state_of(target, [1] * 62))


# With the target's verification -------------------------------------------------------------------

PROMPTS = [[3, 1, 4, 1, 5], [9], [2, 6, 5]]


def greedy(target, prompt, count):
    ids = torch.tensor([prompt])
    for _ in range(count):
        ids = torch.cat([ids, target(ids).logits[:, -1:].argmax(-1)], 1)
    return ids[0, len(prompt) :].tolist()


@pytest.mark.parametrize("total", [1, 12])
def test_greedy_text_is_the_targets(head, target, total):
    drafter = DynamicTreeDrafter(head, target, total=total, depth=3, top_k=4)
    options = dict(max_new_tokens=20, eos_token_id=(), adaptive=False)
    ids, stats = generate(target, drafter, PROMPTS, **options)
    for prompt, found in zip(PROMPTS, ids, strict=True):
        assert found.tolist() == greedy(target, prompt, 20)
    if total == 1:
        assert stats.tokens_per_round == 1
        assert stats.nodes == 0
    else:
        assert stats.tokens_per_round > 1


@pytest.mark.parametrize("prompt", [[3, 1, 4, 1, 5], [9, 2], [2, 6, 5]])
def test_what_is_accepted_is_what_the_target_goes_on_with(head, target, prompt):
    """What the recipe counts: how far the tree holds the target's own text."""
    drafter = DynamicTreeDrafter(head, target, total=30, depth=5, top_k=6)
    options = dict(max_new_tokens=20, eos_token_id=(), adaptive=False)
    ids, stats = generate(target, drafter, [prompt], **options)
    whole, at = [*prompt, *ids[0].tolist()], len(prompt)
    for accepted in stats.accepted[0]:
        depth = len(whole) - at - 1
        tree = drafter.draft(state_of(target, whole[:at], depth=depth))
        assert recipe._depth_of(tree, whole[at:]) == accepted
        at += accepted + 1
    assert stats.n_accepted > 0


def test_a_tree_with_all_tokens_is_right_for_certain(head, target):
    drafter = DynamicTreeDrafter(head, target, total=VOCABULARY + 1, depth=1, top_k=VOCABULARY)
    for temperature in (0.0, 1.0):
        _, stats = generate(
            target,
            drafter,
            [[3, 1, 4]],
            max_new_tokens=20,
            temperature=temperature,
            eos_token_id=(),
            adaptive=False,
        )
        assert stats.tokens_per_round == 2


def law_of(target, prompt, count):
    """Of the first `count` tokens, by path, as one vector."""
    paths, law = [prompt], torch.ones(1, dtype=torch.float64)
    for _ in range(count):
        rows = target(torch.tensor(paths)).logits[:, -1].softmax(-1)
        law = (law[:, None] * rows).flatten()
        paths = [[*path, token] for path in paths for token in range(VOCABULARY)]
    return law


def test_sampled_text_has_the_targets_law(head, target):
    """Chi-square of the first two tokens, 121 cells; the same statistic refuses a wrong law."""
    drafter = DynamicTreeDrafter(head, target, total=6, depth=2, top_k=3)
    draws, prompt = 8_000, [3, 1, 4]
    expected = law_of(target, prompt, 2) * draws
    counts = torch.zeros(VOCABULARY**2, dtype=torch.float64)
    options = dict(max_new_tokens=2, temperature=1.0, eos_token_id=(), adaptive=False)
    for seed in range(draws // 1000):
        ids, _ = generate(target, drafter, [prompt] * 1000, seed=seed, **options)
        pairs = torch.stack(ids)
        counts += (pairs[:, 0] * VOCABULARY + pairs[:, 1]).bincount(minlength=VOCABULARY**2)
    assert _p_value(counts, expected) > 1e-3
    assert _p_value(counts, law_of(target, [3, 1, 5], 2) * draws) < 1e-6


def _p_value(counts, expected):
    """Of the chi-square statistic; cells with fewer than five expected draws are one."""
    small = expected < 5
    pooled = [torch.cat([x[~small], x[small].sum(0, keepdim=True)]) for x in (counts, expected)]
    statistic = ((pooled[0] - pooled[1]) ** 2 / pooled[1]).sum()
    freedom = torch.tensor(len(pooled[0]) - 1.0, dtype=torch.float64)
    return torch.special.gammaincc(freedom / 2, statistic / 2).item()
