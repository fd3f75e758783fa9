"""Debian packages as tasks that only demonstrations can solve: "summary : word", where two random
words stand for two sections; the test bed of MEND's recipe."""

import itertools
import random
import re
from collections import Counter, defaultdict
from collections.abc import Sequence

import torch

from stillhouse import data

WORDS = 6  # of a summary
VOCABULARY = 2048
SMALLEST = 120  # summaries of a section that is used
LABELS = 32
SEPARATOR, UNKNOWN = 0, 1

Example = tuple[list[int], list[int]]


class SectionTasks:
    """The sections' summaries as word ids, split into `train` and `test` (section -> [ids]), and
    the pairs of sections `held_out`, 10, and `meta`, 40.

    Ids: 0 ends a summary, 1 is any rare word, then a token a section, the commonest words and, in
    no summary, the words that tasks are labelled with.
    """

    def __init__(self, seed: int = 0):
        shuffle = torch.Generator().manual_seed(seed)
        texts: dict[str, list[list[str]]] = defaultdict(list)
        seen = set()
        for package in data.debian_packages():
            words = re.findall(r"[a-z0-9+#]+", package.summary.lower())
            if len(words) > 2 and package.summary not in seen:
                seen.add(package.summary)
                texts[package.section].append(words)
        self.sections = sorted(name for name in texts if len(texts[name]) >= SMALLEST)
        counts = Counter(word for name in self.sections for words in texts[name] for word in words)
        first = 2 + len(self.sections)
        commonest = [word for word, _ in counts.most_common(VOCABULARY - first - LABELS)]
        id_of = {word: first + i for i, word in enumerate(commonest)}
        self.section_id = {name: 2 + i for i, name in enumerate(self.sections)}
        self.train: dict[str, list[list[int]]] = {}
        self.test: dict[str, list[list[int]]] = {}
        for name in self.sections:
            ids = [[id_of.get(word, UNKNOWN) for word in words[:WORDS]] for words in texts[name]]
            order = torch.randperm(len(ids), generator=shuffle).tolist()
            held = min(len(ids) // 5, 200)
            self.test[name] = [ids[i] + [SEPARATOR] for i in order[:held]]
            self.train[name] = [ids[i] + [SEPARATOR] for i in order[held:]]
        pairs = list(itertools.combinations(self.sections, 2))
        order = torch.randperm(len(pairs), generator=shuffle).tolist()
        self.held_out = [pairs[i] for i in order[:10]]
        self.meta = [pairs[i] for i in order[10:50]]
        self.labels = list(range(VOCABULARY - LABELS, VOCABULARY))

    def sections_of(self, ways: int, draw: random.Random) -> list[str]:
        """So many sections at random, no held-out pair among them."""
        while True:
            found = draw.sample(self.sections, ways)
            if not any(one in found and other in found for one, other in self.held_out):
                return found

    def text(self, lines: int, draw: random.Random) -> list[int]:
        """Plain text: "summary : section" of four sections, line after line."""
        some = self.sections_of(4, draw)
        names = [draw.choice(some) for _ in range(lines)]
        rows = [[*draw.choice(self.train[name]), self.section_id[name]] for name in names]
        return list(itertools.chain(*rows))


class PairTask(Sequence):
    """Two sections' texts under two words: (text ids, [word id]), as many of each."""

    def __init__(self, texts: tuple[list[list[int]], list[list[int]]], words: list[int]):
        self.texts, self.words = texts, words

    @classmethod
    def drawn(
        cls,
        texts: dict[str, list[list[int]]],
        pairs: Sequence[tuple[str, str]],
        labels: list[int],
        draws: torch.Generator,
    ) -> "PairTask":
        """One of the pairs, and two of the labels, at random."""
        one, other = pairs[int(torch.randint(len(pairs), (), generator=draws))]
        words = torch.randperm(len(labels), generator=draws)[:2].tolist()
        return cls((texts[one], texts[other]), [labels[i] for i in words])

    def __len__(self) -> int:
        return 2 * min(map(len, self.texts))

    def __getitem__(self, i: int) -> Example:
        return self.texts[i % 2][i // 2], [self.words[i % 2]]
