"""Wrong arguments of a verification: one line that says what was expected and what came."""

import pytest
import torch

from stillhouse import ops


def given(**changes):
    parents = torch.tensor([[-1, 0, 0]] * 2, dtype=torch.int32)
    words = dict(
        tokens=torch.zeros(2, 3, dtype=torch.int32),
        links=ops.tree_build(parents),
        target=torch.zeros(2, 3, 5),
        draft=torch.zeros(2, 3, 5),
        mode="multi_round",
        seed=0,
    )
    return words | changes


def rows(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


WRONG = [
    (dict(tokens=rows(2, 3, dtype=torch.int64)), TypeError, "tokens must be torch.int32, got .*64"),
    (dict(tokens=[1]), TypeError, "tokens must be torch.int32, got <class 'list'>"),
    (dict(links=(1,)), TypeError, "links must be TreeLinks of tree_build, got tuple"),
    (dict(tokens=rows(2, 4).int()), ValueError, r"tokens must be \(2, 3\) .*, got \(2, 4\)"),
    (dict(target=rows(2, 3, 5).long()), TypeError, "target must be float32.*got torch.int64"),
    (dict(draft=rows(2, 3, 5).long()), TypeError, "draft must be float32.*got torch.int64"),
    (dict(target=rows(2, 3)), ValueError, r"target must be \[2, 3, 'V'\], got \(2, 3\)"),
    (dict(target=rows(2, 3, 0)), ValueError, r"target must be .*got \(2, 3, 0\)"),
    (dict(draft=rows(2, 4, 5)), ValueError, r"draft must be \[2, 3, 'V'\], got \(2, 4, 5\)"),
    (dict(draft=rows(2, 3, 6)), ValueError, "target has 5 columns and draft 6.* one vocabulary"),
    (dict(draft=rows(2, 3, 5).to("meta")), ValueError, "draft is on meta, links on cpu"),
    (dict(kind=rows(2, 3).int()), TypeError, "kind must be torch.uint8, got torch.int32"),
    (dict(kind=rows(2, 2).byte()), ValueError, r"kind must be \(2, 3\) on cpu, got \(2, 2\)"),
    (dict(coins=rows(2, 3, 2)), TypeError, "coins must be torch.float64, got torch.float32"),
    (dict(coins=rows(2, 3).double()), ValueError, r"coins must be \(2, 3, 2\)"),
    (dict(mode="block"), ValueError, "mode must be auto or one of greedy, .*, got 'block'"),
    (dict(draft=None, kind=rows(2, 3).byte()), ValueError, "sampled nodes .* need draft"),
    (dict(temperature=0), ValueError, '"multi_round" needs a temperature above 0 .*, got 0'),
    (dict(temperature=-1.0), ValueError, "needs a temperature above 0 and finite, got -1.0"),
    (dict(temperature=float("nan")), ValueError, "above 0 and finite, got nan"),
    (dict(temperature=float("inf")), ValueError, "above 0 and finite, got inf"),
    (dict(temperature=torch.tensor([1.0, 0.0])), ValueError, r"above 0 and finite, got .*\[0\.\]"),
    (dict(temperature=rows(3)), ValueError, r"must be a number or \[2\] on cpu, got \(3,\)"),
    (dict(temperature=0.5, is_prob=True), ValueError, "probabilities have no temperature, got 0.5"),
    (dict(temperature=1 + rows(2), is_prob=True), ValueError, "probabilities have no temperature"),
    (dict(seed=None), ValueError, '"multi_round" draws: it needs a seed'),
    (dict(seed=0.5), TypeError, r"seed must be an int or int64 \[2\], got 0.5"),
    (dict(seed=rows(2)), TypeError, "seed must be an int or int64, got torch.float32"),
    (dict(seed=rows(3).long()), ValueError, r"seed must be an int or \[2\] on cpu, got \(3,\)"),
    (dict(position=rows(1).long()), ValueError, r"position must be an int or \[2\] on cpu"),
    (dict(mode="typical", delta=-1.0), ValueError, "epsilon and delta must be at least 0"),
    (dict(kind=7 + rows(2, 3).byte(), check=True), ValueError, "kind must be 0 to 3, got 7"),
]


@pytest.mark.parametrize("case", WRONG, ids=lambda case: ", ".join(case[0]))
def test_one_line(case):
    changes, error, words = case
    with pytest.raises(error, match=words) as caught:
        ops.tree_verify(**given(**changes))
    assert "\n" not in str(caught.value)


def test_what_is_no_error():
    """Greedy decoding needs no seed and no temperature; a root's and a padded node's kind and
    token are not read."""
    ops.tree_verify(**given(mode="greedy", seed=None, temperature=0.0))
    ops.tree_verify(**given(mode="auto", seed=None, temperature=0.0))
    kind = torch.tensor([[0, 2, 0]], dtype=torch.uint8)
    links = ops.tree_build(torch.tensor([[-1, 0, -2]], dtype=torch.int32))
    words = dict(mode="traversal", kind=kind, seed=1, check=True)
    tokens = torch.tensor([[-7, 1, -7]], dtype=torch.int32)
    ops.tree_verify(tokens, links, torch.zeros(1, 3, 5), **words)
