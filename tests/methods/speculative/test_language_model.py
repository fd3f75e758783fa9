"""Drafts of another language model: what they are drawn from, what is read again."""

import numpy as np
import pytest
import torch
from scipy.stats import chi2

from stillhouse.methods.speculative import DraftState, LanguageModelDrafter

V = 6
IDS = torch.tensor([1, 2, 3])


@pytest.fixture(scope="module")
def model(llama):
    return llama(vocab_size=V)


def law(model, ids, temperature=1.0):
    with torch.no_grad():
        return (model(torch.tensor([ids])).logits[0, -1] / temperature).softmax(-1)


def path_to(tree, node):
    path = []
    while node > 0:
        path.append(int(tree.tokens[node]))
        node = int(tree.parents[node])
    return path[::-1]


@pytest.mark.parametrize("proposal", ["without_replacement", "iid", "greedy_draft"])
def test_rows_are_the_laws_that_children_were_drawn_from(model, proposal):
    drafter = LanguageModelDrafter(model, branching=(2, 2, 1), proposal=proposal)
    tree = drafter.draft(DraftState(IDS, position=3, temperature=0.7))
    assert tree.parents.tolist() == [-1, 0, 0, 1, 1, 2, 2, 3, 4, 5, 6]
    for node in range(7):
        wanted = law(model, [*IDS.tolist(), *path_to(tree, node)], 0.7)
        torch.testing.assert_close(tree.log_probs[node].exp(), wanted, rtol=1e-4, atol=1e-5)
    siblings = tree.tokens[1:3].tolist()
    if proposal != "iid":
        assert siblings[0] != siblings[1]
    kinds = {"without_replacement": [0, 0], "iid": [1, 1], "greedy_draft": [3, 2]}[proposal]
    assert tree.kind[1:3].tolist() == kinds


def test_siblings_are_drawn_by_the_law(model):
    drafter = LanguageModelDrafter(model, branching=(2,))
    q = law(model, IDS.tolist()).double().numpy()
    wanted = np.array([[q[a] * q[b] / (1 - q[a]) for b in range(V)] for a in range(V)])
    np.fill_diagonal(wanted, 0)
    counts = np.zeros((V, V))
    for position in range(600):
        tree = drafter.draft(DraftState(IDS, position=position, temperature=1.0))
        counts[tuple(tree.tokens[1:].tolist())] += 1
    assert not counts.diagonal().any()
    large = wanted * 600 > 5
    observed = np.append(counts[large], counts[~large].sum())
    expected = np.append(wanted[large], wanted[~large].sum()) * 600
    assert chi2.sf(((observed - expected) ** 2 / expected).sum(), len(expected) - 1) > 1e-4


def test_greedy_drafts_are_the_likeliest_tokens(model):
    tree = LanguageModelDrafter(model, branching=(2, 1)).draft(DraftState(IDS))
    assert tree.log_probs is None
    assert set(tree.kind.tolist()) == {2}
    assert tree.tokens[1:3].tolist() == law(model, IDS.tolist()).topk(2).indices.tolist()
    behind = law(model, [*IDS.tolist(), int(tree.tokens[2])])
    assert int(tree.tokens[4]) == int(behind.argmax())


def test_no_more_children_than_tokens_with_a_probability(model):
    drafter = LanguageModelDrafter(model, branching=(V + 2,))
    tree = drafter.draft(DraftState(IDS, temperature=1.0))
    assert sorted(tree.tokens[1:].tolist()) == list(range(V))
    assert len(drafter.draft(DraftState(IDS, temperature=0.0))) == V + 1
    with pytest.raises(ValueError, match="at most 64 children"):
        LanguageModelDrafter(model, branching=(2, 65))


def test_room_and_depth(model):
    drafter = LanguageModelDrafter(model, branching=(3, 2, 1))
    for room, depth, nodes in (
        (None, None, 15),
        (15, 2, 9),
        (14, None, 12),
        (8, None, 6),
        (2, 9, 4),
    ):
        tree = drafter.draft(DraftState(IDS, room=room, depth=depth))
        assert len(tree) - 1 <= nodes
        assert room is None or len(tree) - 1 <= room
    assert len(drafter.draft(DraftState(IDS, room=0))) == 1
    assert len(drafter.draft(DraftState(IDS, depth=0))) == 1
    assert len(drafter.draft(DraftState(IDS, room=9))) == 10


def test_only_what_is_new_is_read(model):
    """Behind an accepted path, a rejected draft, a round without a draft, and a new sequence."""
    drafter = LanguageModelDrafter(model, branching=(2, 2, 1))
    read = []
    handle = model.model.embed_tokens.register_forward_pre_hook(
        lambda module, given: read.append(given[0].shape[1])
    )
    try:
        ids, step = IDS, 0

        def draft(new, room=None):
            nonlocal ids, step
            ids, step = torch.cat([ids, torch.tensor(new, dtype=torch.int64)]), step + 1
            read.clear()
            state = DraftState(ids, step=step - 1, room=room)
            tree = drafter.draft(state)
            fresh = LanguageModelDrafter(model, branching=(2, 2, 1))
            mine = list(read)
            again = fresh.draft(state)
            assert torch.equal(tree.tokens, again.tokens)
            assert torch.equal(tree.parents, again.parents)
            return tree, mine

        tree, first = draft([])
        assert first == [2, 1, 2, 4]  # the prompt, its last token, and two levels
        path = path_to(tree, 5)
        tree, second = draft([*path, 0])
        assert second == [1, 2, 4]  # both accepted nodes were read already
        wrong = next(token for token in range(V) if token not in tree.tokens[1:3].tolist())
        tree, third = draft([wrong, 1])
        assert third == [2, 2, 4]
        drafter.draft(DraftState(torch.cat([ids, torch.tensor([2, 3])]), step=9, room=0))
        _, fourth = draft([2, 3, 4])
        assert fourth == [3, 2, 4]
    finally:
        handle.remove()


def test_draws_depend_on_seed_position_and_node(model):
    def tokens(**given):
        drafter = LanguageModelDrafter(model, branching=(2, 2, 1))
        state = dict(position=7, seed=3, temperature=1.5) | given
        return drafter.draft(DraftState(IDS, **state)).tokens.tolist()

    assert tokens() == tokens(row=4)
    assert len({tuple(tokens(seed=seed)) for seed in range(6)}) > 2
    assert len({tuple(tokens(position=place)) for place in range(6)}) > 2


def test_errors(model):
    for options, words in (
        ({"length": 0}, "length to be at least 1"),
        ({"branching": ()}, "branching of at least 1"),
        ({"branching": (2, 0)}, "branching of at least 1"),
        ({"proposal": "beam"}, "proposal to be one of without_replacement"),
        ({"temperature": -1.0}, "temperature must be"),
    ):
        with pytest.raises(ValueError, match=words):
            LanguageModelDrafter(model, **options)
    with pytest.raises(TypeError, match="the drafter's model"):
        LanguageModelDrafter(torch.nn.Linear(2, 2))
