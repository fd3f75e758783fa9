"""What a speculative generation took and gave."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class GenerationStats:
    """Counts and seconds of one `generate`.

    accepted: for each prompt and each of its rounds, how many draft tokens were accepted; a round
    commits one token more. drafted: how many a round could have accepted at most, the depths of the
    verified trees, likewise. nodes: of all verified trees, roots left out. calls: forwards of the
    target, the prompts' own left out. tokens: what was written, of all prompts. seconds: the whole
    call; draft_seconds, target_seconds: its drafts, and its forwards with their verification;
    prompt_seconds: reading the prompts.

    Example:
        >>> from stillhouse.methods.speculative import GenerationStats
        >>> stats = GenerationStats(accepted=[[3, 0], [1, 3]], drafted=[[3, 3], [3, 3]])
        >>> stats.tokens_per_round, stats.histogram
        (2.75, {0: 1, 1: 1, 2: 0, 3: 2})
        >>> round(stats.acceptance_rate, 3)
        0.583
    """

    accepted: list[list[int]] = field(default_factory=list)
    drafted: list[list[int]] = field(default_factory=list)
    nodes: int = 0
    calls: int = 0
    tokens: int = 0
    seconds: float = 0.0
    prompt_seconds: float = 0.0
    draft_seconds: float = 0.0
    target_seconds: float = 0.0

    @property
    def rounds(self) -> int:
        """Of all prompts; a batch of B takes B rounds in one call."""
        return sum(map(len, self.accepted))

    @property
    def n_accepted(self) -> int:
        """Draft tokens that were accepted, in all."""
        return sum(map(sum, self.accepted))

    @property
    def histogram(self) -> dict[int, int]:
        """How many rounds accepted 0, 1, 2, … draft tokens."""
        counts = Counter(count for each in self.accepted for count in each)
        return {count: counts[count] for count in range(max(counts, default=-1) + 1)}

    @property
    def tokens_per_round(self) -> float:
        """Accepted tokens and the final one, on average; 1 is plain decoding."""
        return self.n_accepted / self.rounds + 1 if self.rounds else 0.0

    @property
    def acceptance_rate(self) -> float:
        """Share of the tokens that could have been accepted; 0 where nothing was drafted."""
        possible = sum(map(sum, self.drafted))
        return self.n_accepted / possible if possible else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Of the whole call, reading the prompts included."""
        return self.tokens / self.seconds if self.seconds else 0.0
