"""What is verified of a draft: by measured time and by what became of earlier drafts."""

import pytest
import torch

from stillhouse.methods.speculative import DraftTree
from stillhouse.methods.speculative.budget import Budget, Costs, FixedBudget, depths_of, take
from stillhouse.methods.speculative.tree import IID

TREE = DraftTree.of([9, 1, 2, 3, 4, 5], [-1, 0, 0, 1, 3, 2])


def chain(count):
    return DraftTree.chain([9, *range(1, count + 1)])


def test_costs_between_and_beyond_what_was_measured():
    costs = Costs({1: 2.0, 4: 3.5, 8: 3.1})
    assert [costs(size) for size in (1, 2, 4, 8)] == [2.0, 2.5, 3.5, 3.1]
    assert costs(6) == pytest.approx(3.3)
    assert costs(12) == pytest.approx(2.7)
    assert Costs({1: 2.0})(5) == 2.0


def test_costs_are_measured_once_for_a_model_and_a_batch_size():
    model, asked = torch.nn.Linear(2, 2), []

    def measure(size):
        asked.append(size)
        return float(size)

    def sizes(*arguments):
        asked.clear()
        return Costs.of(*arguments[:2], measure, *arguments[2:]), list(asked)

    first, measured = sizes(model, 1, 9)
    assert measured == [1, 2, 4, 8, 16]
    assert sizes(model, 1, 12) == (first, [])
    assert sizes(model, 2, 3)[1] == [1, 2, 4]
    assert sizes(model, 1, 500)[1] == sizes(torch.nn.Linear(2, 2), 1, 500)[1]
    assert sizes(model, 1, 500)[1] == []
    assert sizes(model.bfloat16(), 1, 1)[1] == [1]


def test_a_disturbed_forward_counts_for_little():
    costs = Costs({1: 1.0, 2: 2.0})
    costs.update(1, 100.0)
    assert costs(1) == pytest.approx(1.1)
    costs.update(2, 1.0)
    assert costs(2) == pytest.approx(1.9)


def test_as_many_nodes_as_pay():
    # The first child of the root is always right, those below it in nine of ten cases.
    budget = Budget(Costs({1: 10.0, 2: 11.0, 33: 42.0}), most=32)
    for key, chance in (((0, 1, 0), 1.0), ((0, 0, 0), 0.9)):
        budget.counts[key] = [1e9 * chance, 1e9]
    chances = budget.chances(chain(20))
    assert chances[:4] == pytest.approx([1, 1, 0.9, 0.81])
    rates = [sum(chances[: count + 1]) / (10 + count) for count in range(21)]
    best = max(range(21), key=rates.__getitem__)
    assert 3 < best < 20
    assert len(budget.choose(chain(20), depth=99)) == best + 1
    assert len(budget.choose(chain(20), depth=2)) == 3


def test_the_likeliest_nodes_are_taken_with_their_ancestors():
    budget = Budget(Costs({1: 10.0, 2: 10.5, 64: 1e6}), most=32)
    budget.counts = {(0, 1, 0): [2e8, 1e9], (1, 1, 0): [8e8, 1e9], (0, 0, 0): [9e8, 1e9]}
    # Only two forwards are cheap: the node at hand is the second child, whatever lies behind 1.
    assert budget.choose(TREE, depth=9).tokens.tolist() == [9, 2]


def test_guesses_that_are_never_right_are_soon_not_verified():
    budget = Budget(Costs({1: 10.0, 2: 11.0, 64: 73.0}), most=32)
    verified = []
    for _ in range(40):
        chosen = budget.choose(TREE, depth=9)
        verified.append(len(chosen) - 1)
        budget.observe(TREE, chosen, [7])
    assert verified[0] > 0
    assert sum(verified[15:]) == 0
    # What was not verified is seen all the same.
    for _ in range(8):
        budget.observe(TREE, budget.choose(TREE, depth=9), [1])
    assert 1 in budget.choose(TREE, depth=9).tokens.tolist()


def test_what_is_counted_of_a_round():
    budget = Budget(Costs({1: 1.0}), most=32)
    budget.observe(TREE, TREE, [1, 3, 8])
    # Behind the root the first child was right and the second wrong; then a first child was right,
    # and one wrong.
    assert budget.counts == {
        (0, 1, 0): [1, 1],
        (1, 1, 0): [0, 1],
        (0, 0, 0): [0.9 * 1 + 0, 0.9 * 1 + 1],
    }
    assert budget.steps == [2, 3]


def test_drafts_that_take_time_are_asked_for_only_where_they_pay():
    costs = Costs({1: 10.0, 2: 10.1, 64: 16.3})
    budget = Budget(costs, most=32)
    assert budget.room() == 4
    budget.drafted(0.01, 4)
    assert budget.room() == 32
    slow = Budget(costs, most=32)
    slow.drafted(20.0, 5)
    slow.steps = [90.0, 100.0]
    # (1 + .9 + … ) / (10 + 4.1 size): the best size by hand
    chance = 90.7 / 101
    rates = [
        sum(chance**power for power in range(size + 1)) / (costs(size + 1) + 4 * size)
        for size in range(33)
    ]
    assert slow.room() == max(range(33), key=rates.__getitem__) > 1
    hopeless = Budget(costs, most=32)
    hopeless.drafted(50.0, 5)
    hopeless.steps = [0.0, 9.0]
    assert hopeless.room() == 0
    assert hopeless.steps == [0.0, 8.1]  # forgotten bit by bit, and tried again some day


def test_sampled_drafts_are_cut_by_depth_alone():
    rows = torch.zeros(6, 10)
    tree = DraftTree.of(TREE.tokens, TREE.parents, kind=IID, log_probs=rows)
    for budget in (FixedBudget(5), Budget(Costs({1: 1.0, 2: 99.0}), 5)):
        assert len(budget.choose(tree, depth=9)) == 6
        assert budget.choose(tree, depth=1).tokens.tolist() == [9, 1, 2]
    with pytest.raises(ValueError, match="at most 4 sampled nodes, got 5"):
        FixedBudget(4).choose(tree, depth=9)


def test_a_fixed_budget():
    assert FixedBudget(3).room() == 3
    assert FixedBudget(3).choose(TREE, depth=9).tokens.tolist() == [9, 1, 2, 3]
    assert FixedBudget(9).choose(TREE, depth=2).tokens.tolist() == [9, 1, 2, 3, 5]


def test_parts_of_a_tree():
    assert depths_of(TREE) == [0, 1, 1, 2, 3, 2]
    part = take(TREE, [0, 2, 5])
    assert part.tokens.tolist() == [9, 2, 5]
    assert part.parents.tolist() == [-1, 0, 1]
    assert take(TREE, range(6)) is TREE
