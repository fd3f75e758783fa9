"""Shared by the tests of draft trees: every way that they are verified, and an enumerator of exact
laws in fractions, which shares no code with what it proves."""

from fractions import Fraction
from functools import cache
from itertools import product

import pytest

from stillhouse import ops
from stillhouse.ops import tree_registered

KERNELS = [*range(ops.cpu_level() + 1), "simt", "cuda"]


def _without_kernel(x):
    return False


@pytest.fixture(params=["reference", *KERNELS], ids=lambda name: f"level{name}")
def way(request, monkeypatch):
    """The reference, an instruction set of the CPU, or the CUDA kernels."""
    if request.param == "reference":
        monkeypatch.setattr(tree_registered, "has_kernel", _without_kernel)
        yield request.param
        return
    if isinstance(request.param, str):
        request.getfixturevalue({"simt": "simt", "cuda": "on_cuda"}[request.param])
    best = ops.cpu_level()
    if isinstance(request.param, int):
        ops.cpu_level(request.param)
    yield request.param
    ops.cpu_level(best)


@pytest.fixture
def reference(monkeypatch):
    """reference(call): what it returns without any kernel."""

    def run(call):
        with monkeypatch.context() as patch:
            patch.setattr(tree_registered, "has_kernel", _without_kernel)
            return call()

    return run


@pytest.fixture
def kernel_way(way):
    """The ways that have a kernel."""
    if way == "reference":
        pytest.skip("compares a kernel with the reference")
    return way


def normed(weights):
    total = sum(weights)
    return tuple(Fraction(weight) / total for weight in weights)


def sheet_p(path):
    return normed([1 + (3 * x + 2 * sum(path) + len(path)) % 5 for x in range(3)])


def sheet_q(path):
    return normed([1 + (x + 3 * sum(path) + 2 * len(path)) % 4 for x in range(3)])


def constant(*weights):
    row = normed(weights)
    return lambda path: row


def alternating(even, odd):
    even, odd = normed(even), normed(odd)
    return lambda path: odd if (sum(path) + len(path)) % 2 else even


MODELS = {
    "sheet": (3, sheet_p, sheet_q),
    "equal": (3, sheet_p, sheet_p),
    "zeros in q": (3, sheet_p, alternating((0, 1, 3), (1, 0, 0))),
    "zeros in p": (3, alternating((2, 0, 1), (0, 1, 0)), sheet_q),
    "disjoint": (3, constant(1, 2, 0), constant(0, 0, 1)),
    "one third": (2, constant(1, 2), constant(2, 1)),
    "one node": (3, constant(5, 3, 2), constant(2, 3, 5)),
    "two tokens": (2, alternating((1, 2), (3, 1)), alternating((2, 1), (1, 4))),
}

# What a node with k children makes of them: a kind each, in order.
PLANS = {
    "iid": lambda k: (1,) * k,
    "without replacement": lambda k: (0,) * k,
    "deterministic": lambda k: (2,) * k,
    "sampled, deterministic": lambda k: (3, 2)[:k],
    "deterministic, sampled": lambda k: (2, 3)[:k] if k > 1 else (3,),
    "iid, deterministic": lambda k: (1, 2)[:k],
    "deterministic, iid": lambda k: (2, 1)[:k],
    "deterministic, without replacement": lambda k: (2, 0)[:k],
}


def shapes(depth, most=2):
    """All trees of ordered children, as nested tuples."""
    if depth == 0:
        return [()]
    below = shapes(depth - 1, most)
    return [kids for k in range(most + 1) for kids in product(below, repeat=k)]


def full(depth, k):
    return tuple([full(depth - 1, k)] * k) if depth else ()


class Laws:
    """Exact laws of a target p and a proposal q, functions of the path's tokens."""

    def __init__(self, model, plan):
        self.vocabulary, self.p, self.q = MODELS[model]
        self.plan = PLANS[plan]
        self.law, self.draws = cache(self.law), cache(self.draws)

    def draws(self, path, k):
        """(probability, tokens, kinds, proposals) of a node's children. A proposal is the law that
        the child was drawn from; where its support is used up there are fewer children."""
        q, kinds = self.q(path), self.plan(k)
        fixed = sorted(range(self.vocabulary), key=lambda x: (-q[x], x))[: kinds.count(2)]
        partial = [(Fraction(1), (), (), ())]
        for place, kind in enumerate(kinds):
            longer = []
            for weight, tokens, used, laws in partial:
                if kind == 2:
                    law = [0] * self.vocabulary
                    law[fixed[kinds[:place].count(2)]] = 1
                else:
                    gone = [x for x, other in zip(tokens, used, strict=True) if other == kind != 1]
                    gone += fixed if kind == 3 else []
                    law = [0 if x in gone else q[x] for x in range(self.vocabulary)]
                if not any(law):
                    longer.append((weight, tokens, used, laws))
                    continue
                law = normed(law)
                longer += [
                    (weight * law[x], (*tokens, x), (*used, kind), (*laws, law))
                    for x in range(self.vocabulary)
                    if law[x]
                ]
            partial = longer
        return partial

    def law(self, mode, shape, path=(), a=Fraction(1)):
        """{output: probability} of the tokens behind a path, the final one included; None is the
        output of a node that is not accepted."""
        out = {}

        def add(weight, tokens):
            if weight:
                out[tokens] = out.get(tokens, 0) + weight

        for weight, tokens, _, laws in self.draws(path, len(shape)):
            kids = list(zip(tokens, laws, shape, strict=False))
            getattr(self, "_" + mode)(kids, path, a, weight, add)
        return out

    def _target(self, kids, path, a, weight, add):
        for x, chance in enumerate(self.p(path)):
            sub = next((sub for token, _, sub in kids if token == x), None)
            if sub is None:
                add(weight * chance, (x,))
                continue
            for tail, share in self.law("target", sub, (*path, x)).items():
                add(weight * chance * share, (x, *tail))

    def _multi_round(self, kids, path, a, weight, add):
        left = self.p(path)
        for x, law, sub in kids:
            accept = min(Fraction(1), left[x] / law[x])
            if accept:
                for tail, share in self.law("multi_round", sub, (*path, x)).items():
                    add(weight * accept * share, (x, *tail))
            weight *= 1 - accept
            over = [max(0, had - had_q) for had, had_q in zip(left, law, strict=True)]
            left = normed(over) if any(over) else left
        for x, chance in enumerate(left):
            add(weight * chance, (x,))

    def _traversal(self, kids, path, a, weight, add):
        left = self.p(path)
        for x, law, sub in kids:
            of_child = min(Fraction(1), a * left[x] / law[x])
            outputs = self.law("traversal", sub, (*path, x), of_child)
            for tail, share in outputs.items():
                if tail is not None:
                    add(weight * share, (x, *tail))
            weight *= outputs.get(None, 0)
            over = [max(0, a * had - had_q) for had, had_q in zip(left, law, strict=True)]
            mass = sum(over)
            left = normed(over) if mass else left
            a = mass / (mass + 1 - a) if mass + 1 - a else Fraction(1)
        for x, chance in enumerate(left):
            add(weight * a * chance, (x,))
        add(weight * (1 - a), None)

    def tokens_per_round(self, mode, shape):
        return sum(weight * len(out) for out, weight in self.law(mode, shape).items())

    def check(self, outputs, path=(), mass=1):
        """Asserts that the outputs behind a path, with what they lack drawn from p, are `mass`
        times the product law: by the first token, and then by what comes behind it."""
        behind = {x: {} for x in range(self.vocabulary)}
        for (x, *tail), weight in outputs.items():
            behind[x][tuple(tail)] = weight
        for x, chance in enumerate(self.p(path)):
            assert sum(behind[x].values()) == mass * chance
            ended = behind[x].pop((), 0)
            if behind[x]:
                self.check(behind[x], (*path, x), mass * chance - ended)


@pytest.fixture(scope="session")
def laws():
    """laws(model, plan)"""
    return cache(Laws)


@pytest.fixture(scope="session")
def trees_of():
    return dict(shapes=shapes, full=full)
