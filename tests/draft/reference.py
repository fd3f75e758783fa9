"""The table and the search of ADED as the paper has them, in plain Python, for the tests."""

import math
from collections import Counter, defaultdict

from stillhouse.ops.random import philox_words


class Table:
    """{pair: {token: [count, hits]}}; a pair keeps one token more than it shows."""

    def __init__(self, successors=12, step=0.04, cap=3.0):
        self.successors, self.step, self.cap = successors, step, cap
        self.pairs, self.totals = defaultdict(dict), Counter()

    def add(self, text):
        for a, b, c in zip(text, text[1:], text[2:], strict=False):
            self.totals[a, b] += 1
            self.pairs[a, b].setdefault(c, [0, 0])[0] += 1
        for pair in self.pairs:
            self.drop(pair, self.successors + 1)

    def drop(self, pair, kept):
        for token, _ in self.ranked(pair)[kept:]:
            del self.pairs[pair][token]

    def update(self, window):
        for a, b, c in zip(window, window[1:], window[2:], strict=False):
            if c not in self.pairs[a, b]:
                self.drop((a, b), self.successors)
            entry = self.pairs[a, b].setdefault(c, [0, 0])
            if self.score((a, b), c) < self.cap:
                entry[1] += 1

    def score(self, pair, token):
        count, hits = self.pairs[pair][token]
        share = count / self.totals[pair] if count else 0.0
        return min(share + self.step * hits, self.cap)

    def ranked(self, pair):
        """(token, score), best first."""
        ranked = sorted((-self.score(pair, c), c) for c in self.pairs.get(pair, ()))
        return [(c, -negative) for negative, c in ranked]

    def find(self, a, b):
        return self.ranked((a, b))[: self.successors]


class Node:
    def __init__(self, pair, score, parent):
        self.pair, self.score, self.parent = pair, score, parent
        self.visits, self.sum, self.children = 0, 0.0, None


def puct(node, visits, c1, c2):
    if node.visits == 0:
        return math.inf
    explore = (c1 + math.log((visits + c2 + 1) / c2)) * math.sqrt(visits)
    return node.sum / node.visits + explore * node.score / (1 + node.visits)


def uniform(seed, position, node):
    """53 bits of stream 2."""
    words = philox_words(seed, position, node, 2).tolist()
    return ((words[0] << 21 | words[1] >> 11) + 0.5) * 2.0**-53


def search(table, context, *, iterations, depth, seed, c1=32.0, c2=8.0):
    """The root of the searched tree, and all nodes in the order in which they were made."""
    root = Node(tuple(context[-2:]), 0.0, None)
    nodes = [root]

    def expand(node):
        node.children = [
            Node((node.pair[1], token), score, node) for token, score in table.find(*node.pair)
        ]
        nodes.extend(node.children)

    for iteration in range(iterations):
        node, level, value = root, 0, 1.0
        while node.children and level < depth:
            parent = node
            node = max(parent.children, key=lambda child: puct(child, parent.visits, c1, c2))
            level, value = level + 1, value + node.score
        if level < depth and node.children is None:
            expand(node)
            if node.children:
                node = node.children[0]
                level, value = level + 1, value + node.score
        pair = node.pair
        for place in range(level, depth):
            found = table.find(*pair)
            if not found:
                break
            left = uniform(seed, len(context), iteration * depth + place)
            left *= sum(score for _, score in found)
            for token, score in found:  # noqa: B007
                if left < score:
                    break
                left -= score
            value += score
            pair = pair[1], token
        while node is not None:
            node.visits += 1
            node.sum += value
            node = node.parent
    return root, nodes


def path(node):
    """Tokens from behind the root."""
    return () if node.parent is None else (*path(node.parent), node.pair[1])


def draft(table, root, nodes, *, keep, max_nodes):
    """{path: visits} of the drafted nodes."""
    order = sorted(range(len(nodes)), key=lambda i: (-nodes[i].visits, i))[:keep]
    visits = {path(node): node.visits for node in nodes}
    drafted = {path(nodes[i]): nodes[i].visits for i in order}
    for i in order:
        found = table.find(*nodes[i].pair)
        if found:
            longer = (*path(nodes[i]), found[0][0])
            drafted.setdefault(longer, visits.get(longer, 0))
    while len(drafted) > max_nodes:
        leaves = [p for p in drafted if not any(q[:-1] == p and q for q in drafted)]
        fewest = min(drafted[p] for p in leaves)
        del drafted[[p for p in leaves if drafted[p] == fewest][-1]]
    return drafted
