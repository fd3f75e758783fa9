"""The rules of verification keep the target's law: exactly, over all trees and drafts. What they
accept, too, is exact. The enumerator of conftest is proved here; the ops are held against it."""

from fractions import Fraction as F

import pytest

from stillhouse import ops

MODELS = ["sheet", "equal", "zeros in q", "zeros in p", "disjoint", "two tokens"]
PLANS = [
    "iid",
    "without replacement",
    "deterministic",
    "sampled, deterministic",
    "deterministic, sampled",
    "iid, deterministic",
    "deterministic, iid",
    "deterministic, without replacement",
]
MODES = ["target", "multi_round", "traversal"]


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("model", MODELS)
def test_law_of_all_trees(model, plan, laws, trees_of):
    """Every tree of at most two children a node and depth 3: the tokens of a round, completed by
    the target, follow the product law."""
    exact = laws(model, plan)
    for shape in trees_of["shapes"](3):
        for mode in MODES:
            exact.check(exact.law(mode, shape))


# Tokens of a round on the model of conftest's sheet_p and sheet_q: target, multi_round, traversal.
EXPECTED = [
    ("iid", (2, 1), F(3451297, 2328480), F(461869, 194040), F(135899, 55440)),
    ("iid", (3, 1), 1.526903, F(94138441, 32598720), F(28497443, 9313920)),
    ("without replacement", (2, 2), F(671317, 302400), F(73841, 26950), F(256147, 92400)),
    ("iid", (2, 2), 1.900890, F(107751001, 41912640), F(31395911, 11975040)),
    ("sampled, deterministic", (2, 2), F(28757, 12936), F(419, 140), F(3)),
    ("deterministic", (2, 2), F(1329, 539), F(1329, 539), F(1329, 539)),
]


@pytest.mark.parametrize("case", EXPECTED, ids=lambda case: f"{case[0]} {case[1]}")
def test_tokens_per_round(case, laws, trees_of):
    plan, shape, *expected = case
    found = [laws("sheet", plan).tokens_per_round(mode, trees_of["full"](*shape)) for mode in MODES]
    for value, wanted in zip(found, expected, strict=True):
        assert value == wanted if isinstance(wanted, F) else abs(value - wanted) < 1e-6


def test_chain_of_two(laws):
    """p = (1/3, 2/3), q = (2/3, 1/3): block verification accepts 1/9 more than token by token."""
    exact = laws("one third", "iid")
    chain = (((),),)
    assert exact.tokens_per_round("multi_round", chain) == 1 + F(10, 9)
    assert exact.tokens_per_round("traversal", chain) == 1 + F(11, 9)


ACCEPTANCE = [
    ("iid", 2, F(483, 1000), F(19, 25), F(43, 50)),
    ("without replacement", 2, F(1717, 2800), F(41, 50), F(69, 70)),
    ("iid", 1, F(29, 100), F(7, 10), F(7, 10)),
]


@pytest.mark.parametrize("case", ACCEPTANCE, ids=lambda case: f"{case[0]} {case[1]}")
def test_acceptance_at_one_node(case, laws):
    plan, k, target, multi_round, bound = case
    exact, shape = laws("one node", plan), ((),) * k
    assert exact.tokens_per_round("target", shape) == 1 + target
    assert exact.tokens_per_round("multi_round", shape) == 1 + multi_round
    p, q = exact.p(()), exact.q(())
    kind = {"iid": 1, "without replacement": 0}[plan]
    assert ops.acceptance_bound(p, q, k, kind=kind).item() == pytest.approx(float(bound), abs=1e-15)


def test_greedy_draft_reaches_the_bound(laws):
    """A child sampled beside the top token, first, accepts as much as any rule could: of the law of
    the set, which is q' beside the top token."""
    exact = laws("one node", "sampled, deterministic")
    p, q = exact.p(()), exact.q(())
    rest = [F(q[0], q[0] + q[1]), F(q[1], q[0] + q[1]), F(0)]
    best = p[2] + sum(map(min, p, rest))
    assert exact.tokens_per_round("multi_round", ((), ())) == 1 + best
    assert exact.tokens_per_round("traversal", ((), ())) == 1 + best
