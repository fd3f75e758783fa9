"""CodeGen2: one causal model that continues and fills in, from a mixture of two objectives.

A study of what to train a model of code on. What it keeps: the plain causal decoder; each sequence
with probability 1/2 as it is and with probability 1/2 with spans cut out of each document and asked
for at its end. What it gives up: bidirectional attention within a prefix, which brought nothing.
The transforms stand here for distillation too: teacher and student see the same rewritten ids, and
any divergence is taken on its targets. A teacher that never saw the sentinels can teach `CausalLM`
examples only.

Equation, d a document and s_1 .. s_M its spans:

    x = d with <mask_m> for s_m, <|endoftext|> <sep>, <mask_1> s_1 <eom> .. <mask_M> s_M <eom>
    L = -sum over the tokens of all s_m <eom> of log q(x_i | x_<i)
    attention of position i to j with a prefix of k: j <= i or j < k

Paper: CodeGen2: Lessons for Training LLMs on Programming and Natural Languages, arXiv 2305.02309.
Code by its authors: salesforce/CodeGen2, which samples; the corruption was not released.
"""

import math
import re
from collections.abc import Sequence

from stillhouse.methods.language.attention_masks import document_mask, prefix_lm_mask
from stillhouse.methods.language.infilling import infill, infill_prompt
from stillhouse.methods.language.sentinels import Sentinels, restore
from stillhouse.methods.language.sequence_transforms import CausalLM, Mixture, PrefixLM
from stillhouse.methods.language.span_corruption import FillInMiddle, SpanCorruption

__all__ = [
    "CausalLM",
    "FillInMiddle",
    "Mixture",
    "PrefixLM",
    "Sentinels",
    "SpanCorruption",
    "document_mask",
    "infill",
    "infill_prompt",
    "pass_at_k",
    "prefix_lm_mask",
    "restore",
    "truncate_completion",
]

# Two blank lines, a comment or a docstring at the start of a line: a function is over.
STOPS = (r"\n\n^#", r"^'''", r"\n\n\n")


def truncate_completion(text: str, stops: Sequence[str] = STOPS) -> str:
    """Text up to the first match of any of the regular expressions (^ is the start of a line).

    Raises re.error for a pattern that is none.

    Defaults: two blank lines, or a comment or docstring at the margin (ours after the authors').

    Example:
        >>> from stillhouse.methods.language import truncate_completion
        >>> truncate_completion("    return 1\\n\\n# a test")
        '    return 1'
    """
    found = (re.search(stop, text, re.MULTILINE) for stop in stops)
    return text[: min((match.start() for match in found if match), default=len(text))]


def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that one of k samples is right, if c of n are: 1 - C(n - c, k) / C(n, k).

    The unbiased estimate of arXiv 2107.03374. Raises ValueError unless 0 <= c <= n, 1 <= k <= n.

    Defaults: none.

    Example:
        >>> from stillhouse.methods.language import pass_at_k
        >>> pass_at_k(5, 2, 2)
        0.7
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"expected 0 <= c <= n and 1 <= k <= n, got n={n}, c={c}, k={k}")
    return 1 - math.comb(n - c, k) / math.comb(n, k)
