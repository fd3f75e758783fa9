"""Many rounds with the real random numbers: the joint law of the first two tokens is the target's.
Rules that are a little wrong fail the same test."""

import pytest
import torch
from scipy.stats import chisquare

from stillhouse import ops
from stillhouse.ops import tree_reference
from stillhouse.ops.random import philox_uniform

V, PARENTS = 8, [-1, 0, 0, 1, 1, 2, 2, 3, 4, 5, 6]
# Kinds of two siblings; a node's only child has the first.
PLANS = {
    "iid": (1, 1),
    "without replacement": (0, 0),
    "deterministic": (2, 2),
    "sampled, deterministic": (3, 2),
}
MODES = ["target", "multi_round", "traversal"]
LEVEL = 1e-4 / (2 * len(PLANS) * len(MODES) * 2 + 3)


def tables(seed, scale):
    """Logits behind paths of 0 to 3 tokens."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return [scale * torch.randn(V**d, V, generator=generator, device="cpu") for d in range(4)]


TARGET, PROPOSAL = tables(1, 1.0), tables(2, 1.2)


def rounds(n, plan, temperature, seed=0):
    """Trees drafted from the proposal: tokens, kinds, and rows of both behind each node."""
    generator = torch.Generator("cpu").manual_seed(seed)
    size, like = len(PARENTS), dict(device="cpu")
    tokens, place = torch.zeros(2, n, size, dtype=torch.int64, **like)
    kinds = torch.zeros(size, dtype=torch.uint8, **like)
    depth = [0] * size
    target, draft = torch.zeros(2, n, size, V, **like)
    for node in range(size):
        level = depth[node]
        target[:, node], draft[:, node] = (
            each[level][place[:, node]] for each in (TARGET, PROPOSAL)
        )
        children = [child for child, parent in enumerate(PARENTS) if parent == node]
        if not children:
            continue
        chosen = PLANS[plan][: len(children)]
        q = (draft[:, node] / temperature).softmax(-1)
        if 3 in chosen and len(chosen) == 2:
            top = q.argmax(-1, keepdim=True)
            drawn = q.scatter(1, top, 0).multinomial(1, generator=generator)
            drawn = torch.cat([drawn, top], 1)
        elif chosen[0] == 2:
            drawn = q.topk(len(chosen)).indices
        else:
            drawn = q.multinomial(len(chosen), replacement=chosen[0] == 1, generator=generator)
        for number, child in enumerate(children):
            depth[child], kinds[child] = level + 1, chosen[number]
            tokens[:, child] = drawn[:, number]
            place[:, child] = place[:, node] * V + drawn[:, number]
    return tokens.int(), kinds.expand(n, size), target, draft


def p_value(n, plan, mode, temperature):
    """Of the first two tokens' counts; a round's missing second token is drawn from the target."""
    device = torch.get_default_device()
    tokens, kinds, target, draft = (x.to(device) for x in rounds(n, plan, temperature))
    parents = torch.tensor(PARENTS, dtype=torch.int32).expand(n, -1)
    position = torch.arange(n)
    out = ops.tree_verify(
        tokens,
        ops.tree_build(parents),
        target,
        draft,
        mode=mode,
        kind=kinds,
        temperature=temperature,
        seed=5,
        position=position,
    )
    assert (out.status & 7 == 0).all()
    first, second = out.out_tokens[:, :2].long().cpu().T
    p0, p1 = ((each / temperature).double().softmax(-1) for each in TARGET[:2])
    more = (p1[first].cumsum(-1) < philox_uniform(6, position.cpu())[:, None]).sum(-1)
    second = torch.where(second < 0, more, second)
    counts = torch.bincount(first * V + second, minlength=V * V).double()
    return chisquare(counts.numpy(), (n * p0.T * p1).flatten().numpy()).pvalue


@pytest.fixture(params=["reference", "best", "cuda"], ids=lambda name: f"level{name}")
def count(request, monkeypatch):
    """Rounds of the reference, or of a kernel."""
    if request.param == "reference":
        monkeypatch.setattr("stillhouse.ops.tree_registered.has_kernel", lambda x: False)
        return 5000
    if request.param == "cuda":
        request.getfixturevalue("on_cuda")
    return 200_000


@pytest.mark.parametrize("temperature", [0.7, 1.0])
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("mode", MODES)
def test_law(mode, plan, temperature, count):
    if count == 5000 and temperature == 1:
        pytest.skip("the reference is slow: one temperature")
    assert p_value(count, plan, mode, temperature) > LEVEL


def _accept_at_once(self, node, accept, path):
    """Block verification that stops at the first rejection, from the root down."""
    if node > 0 and not self.coins[node][0] < accept:
        return False
    left = self._residual(node)
    for child, token in self.children(node):
        q = left.proposal(token, self.kinds[child])
        if self._visit(child, min(1.0, accept * left.p[token] / q), [*path, child]):
            return True
        accept = left.reject(token, self.kinds[child], accept)
    self.path, self.final = path, tree_reference.sample(left.p, self.coins[node][1])
    return True


def _no_residual(self, token, kind, accept=1.0):
    return accept


def _certain_proposal(self, token, kind):
    """q = 1 when it is accepted, and the residual of what it was drawn from."""
    return 1.0


WRONG = {
    "early stop": (tree_reference.Walk, "_visit", _accept_at_once, "traversal"),
    "p for the residual": (tree_reference.Residual, "reject", _no_residual, "multi_round"),
    "q = 1": (tree_reference.Residual, "proposal", _certain_proposal, "multi_round"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_rules_are_found(name, monkeypatch):
    """With the fewest rounds of any test above."""
    owner, method, rule, mode = WRONG[name]
    monkeypatch.setattr("stillhouse.ops.tree_registered.has_kernel", lambda x: False)
    monkeypatch.setattr(owner, method, rule)
    assert p_value(5000, "iid", mode, 0.7) < LEVEL
