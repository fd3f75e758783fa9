"""The rules of verification keep the target's law: exactly, over all trees and drafts."""

from fractions import Fraction

import pytest

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


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("model", MODELS)
def test_law_of_all_trees(model, plan, mode, laws, trees_of):
    """Every tree of at most two children a node and depth 3."""
    exact = laws(model, plan)
    for shape in trees_of["shapes"](3):
        exact.check(exact.law(mode, shape))
