"""Which of a teacher's hidden states a student's is compared with."""

from __future__ import annotations

from collections.abc import Sequence


def layer_map(
    n_student: int,
    n_teacher: int,
    how: str | Sequence[int] = "even",
    embeddings: bool = True,
) -> list[tuple[int, int]]:
    """Pairs (k_s, k_t): the student's state after k_s blocks and the teacher's after k_t.

    States are counted in blocks passed, so 0 are the embeddings (a pair of their own, unless
    `embeddings` is false) and `n_student` of them is the last. how: "even" spreads the student's
    over the teacher's depth, k_t = floor(k_s n_teacher / n_student); "last" takes the teacher's
    last ones, k_t = n_teacher - n_student + k_s; a sequence says k_t of each block itself.
    Raises ValueError for a student deeper than its teacher, a list of another length, a state that
    does not exist and an unknown word.

    Example:
        >>> from stillhouse.train import layer_map
        >>> layer_map(2, 5)
        [(0, 0), (1, 2), (2, 5)]
    """
    if not 1 <= n_student <= n_teacher:
        raise ValueError(
            f"expected at least one block and no more than the teacher's {n_teacher}, the student "
            f"has {n_student}"
        )
    own = range(1, n_student + 1)
    if how == "even":
        others = [k * n_teacher // n_student for k in own]
    elif how == "last":
        others = [n_teacher - n_student + k for k in own]
    elif isinstance(how, str):
        raise ValueError(f"how must be even, last or a list of states, got {how!r}")
    else:
        others = list(how)
        if len(others) != n_student:
            raise ValueError(f"expected a state for each of {n_student} blocks, got {len(others)}")
        for k in others:
            if not 0 <= k <= n_teacher:
                raise ValueError(f"state {k} does not exist: the teacher has 0 to {n_teacher}")
    return [(0, 0)] * embeddings + list(zip(own, others, strict=True))
