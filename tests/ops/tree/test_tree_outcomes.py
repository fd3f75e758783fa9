"""Every branch of every rule, at coins on either side of each threshold, in fractions."""

import random
from fractions import Fraction

import pytest
import torch

from stillhouse import ops

NEAR = Fraction(1, 10**5)
SEVEN, CHAIN = [-1, 0, 0, 1, 1, 2, 2], [-1, 0, 1, 2]
# Parents and kinds.
TREES = {
    "iid": (SEVEN, [1] * 7),
    "without replacement": (SEVEN, [0] * 7),
    "deterministic": (SEVEN, [2] * 7),
    "sampled, deterministic": (SEVEN, [2, 3, 2, 3, 2, 3, 2]),
    "deterministic, sampled": (SEVEN, [2, 2, 3, 2, 3, 2, 0]),
    "chain": (CHAIN, [1] * 4),
    "three children": ([-1, 0, 0, 0, 2], [2, 0, 0, 0, 1]),
}


def drafts(parents, kinds, count, seed=0):
    """Tokens that can have been drafted: siblings differ, but for independent ones."""
    generator = random.Random(seed)
    found = []
    while len(found) < count:
        tokens = [generator.randrange(3) for _ in parents]
        places = list(zip(parents, tokens, strict=True))[1:]
        if kinds[1] == 1 or len(set(places)) == len(places):
            found.append(tokens)
    return found


class Branches:
    """All ways through one drafted tree: (coins, path, final token) with coins near thresholds."""

    def __init__(self, model, tokens, parents, kinds):
        self.size, self.tokens, self.kinds = model.vocabulary, tokens, kinds
        self.children = [[i for i, p in enumerate(parents) if p == n] for n in range(len(parents))]
        words = [()]
        for node in range(1, len(tokens)):
            words.append((*words[parents[node]], tokens[node]))
        self.p, self.q = [model.p(word) for word in words], [model.q(word) for word in words]

    def law(self, node, before):
        """What the child after these was drawn from, by its kind."""
        child = self.children[node][len(before)]
        kind, q = self.kinds[child], list(self.q[node])
        if kind == 2:
            return [Fraction(x == self.tokens[child]) for x in range(self.size)]
        gone = {self.tokens[other] for other in before if self.kinds[other] in (0, 3)}
        if kind == 3:
            gone |= {self.tokens[i] for i in self.children[node] if self.kinds[i] == 2}
        if kind == 1:
            gone = set()
        rest = [0 if x in gone else q[x] for x in range(self.size)]
        return [x / sum(rest) for x in rest]

    def finals(self, node, left):
        """Both ends of the interval of coins of each token."""
        low = Fraction(0)
        for x, chance in enumerate(left):
            high = low + chance
            if chance:
                near = min(NEAR, chance / 2)
                yield from (({(node, 1): coin}, [], x) for coin in (low + near, high - near))
            low = high

    def multi_round(self, node):
        left, coins = self.p[node], {}
        for place, child in enumerate(self.children[node]):
            law = self.law(node, self.children[node][:place])
            x = self.tokens[child]
            accept = min(Fraction(1), left[x] / law[x])
            if accept > 0:
                under = {(child, 0): accept - min(NEAR, accept / 2)}
                for more, path, final in self.multi_round(child):
                    yield coins | under | more, [child, *path], final
            if accept == 1:
                return
            coins = coins | {(child, 0): accept + min(NEAR, (1 - accept) / 2)}
            over = [max(Fraction(0), a - b) for a, b in zip(left, law, strict=True)]
            left = [a / sum(over) for a in over]
        for more, path, final in self.finals(node, left):
            yield coins | more, path, final

    def traversal(self, node, a=Fraction(1)):
        """Path None: the node is rejected, whatever its final token would have been."""
        left, before = self.p[node], [{}]
        for place, child in enumerate(self.children[node]):
            law = self.law(node, self.children[node][:place])
            x = self.tokens[child]
            of_child = min(Fraction(1), a * left[x] / law[x])
            rejected = []
            for more, path, final in self.traversal(child, of_child):
                if path is None:
                    rejected.append(more)
                    continue
                yield before[0] | more, [child, *path], final
            # One way to be rejected stands for all: what comes after does not depend on it.
            if not rejected:
                return
            before = [before[0] | rejected[-1]]
            over = [max(Fraction(0), a * b - c) for b, c in zip(left, law, strict=True)]
            mass = sum(over)
            left = [b / mass for b in over] if mass else left
            a = mass / (mass + 1 - a) if mass + 1 - a else Fraction(1)
        coin = {} if node == 0 else {(node, 0): a - min(NEAR, a / 2)}
        if a > 0:
            for more, path, final in self.finals(node, left):
                yield before[0] | coin | more, path, final
        if a < 1:
            yield before[0] | {(node, 0): a + min(NEAR, (1 - a) / 2)}, None, None

    def target(self, node):
        for coins, _, x in self.finals(node, self.p[node]):
            child = next((i for i in self.children[node] if self.tokens[i] == x), None)
            if child is None:
                yield coins, [], x
                continue
            for more, path, final in self.target(child):
                yield coins | more, [child, *path], final


@pytest.mark.parametrize("logits", [False, True], ids=["probabilities", "logits"])
@pytest.mark.parametrize("mode", ["target", "multi_round", "traversal"])
@pytest.mark.parametrize("name", TREES)
def test_every_branch(name, mode, logits, way, laws):
    parents, kinds = TREES[name]
    model, cases = laws("sheet", "iid"), []
    for tokens in drafts(parents, kinds, 12):
        tree = Branches(model, tokens, parents, kinds)
        cases += [(tree, *each) for each in getattr(tree, mode)(0)]
    n, size = len(cases), len(parents)
    assert n > 100
    coins = torch.full((n, size, 2), 0.5, dtype=torch.float64, device="cpu")
    for row, (_, given, _, _) in enumerate(cases):
        for (node, stream), coin in given.items():
            coins[row, node, stream] = float(coin)
    p, q = (
        torch.tensor(
            [[[float(x) for x in row] for row in each] for each in rows], dtype=torch.float64
        )
        for rows in ([tree.p for tree, *_ in cases], [tree.q for tree, *_ in cases])
    )
    if logits:
        p, q = p.log() - 3, q.log() + 2
    else:
        p, q = p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)
    out = ops.tree_verify(
        torch.tensor([tree.tokens for tree, *_ in cases], dtype=torch.int32),
        ops.tree_build(torch.tensor([parents] * n, dtype=torch.int32)),
        p,
        q,
        mode=mode,
        kind=torch.tensor([kinds] * n, dtype=torch.uint8),
        coins=coins.to(p.device),
        is_prob=not logits,
    )
    accepted, paths, written = (x.tolist() for x in out[:3])
    for row, (tree, _, path, final) in enumerate(cases):
        end, width = len(path), out.path.shape[1]
        tokens = [*(tree.tokens[node] for node in path), final]
        assert accepted[row] == end
        assert paths[row] == [0, *path] + [-1] * (width - 1 - end)
        assert written[row] == tokens + [-1] * (width - len(tokens))
