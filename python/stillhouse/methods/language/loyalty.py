"""How loyal a student is to its teacher, whatever the labels say.

Label and probability loyalty: Beyond Preserved Accuracy, arXiv 2109.03228; regression loyalty:
arXiv 2112.12650. Code seen in public takes the root of a Jensen-Shannon *distance*, the root twice.
"""

import math

from torch import Tensor

from stillhouse import ops


def label_loyalty(student: Tensor, teacher: Tensor) -> float:
    """How often student and teacher have the same most probable class, in [0, 1].

    Both [N, C], probabilities or logits. Raises ValueError for shapes that differ, and no row.

    Defaults: none.

    Example:
        >>> import torch
        >>> from stillhouse.methods.language import label_loyalty
        >>> label_loyalty(torch.tensor([[0.9, 0.1], [0.4, 0.6]]), torch.tensor([[0.6, 0.4]] * 2))
        0.5
    """
    _same(student, teacher, 2)
    return (student.argmax(-1) == teacher.argmax(-1)).double().mean().item()


def probability_loyalty(student: Tensor, teacher: Tensor, base: float = 2.0) -> float:
    """Mean of 1 - sqrt(JS) of each row's two distributions; 1 = the same, 0 = disjoint (base 2).

    Both [N, C] probabilities. With base e disjoint ones have 1 - sqrt(ln 2) = 0.167.
    Raises ValueError for shapes that differ, no row, base <= 1, and rows that do not add up to 1.

    Defaults: base 2; published tables use the natural logarithm.

    Example:
        >>> import torch
        >>> from stillhouse.methods.language import probability_loyalty
        >>> student, teacher = torch.tensor([[0.8, 0.1, 0.1]]), torch.tensor([[0.75, 0.2, 0.05]])
        >>> round(probability_loyalty(student, teacher), 4)
        0.8623
    """
    _same(student, teacher, 2)
    if not base > 1:
        raise ValueError(f"base must be above 1, got {base}")
    for name, p in (("student", student), ("teacher", teacher)):
        if (p < 0).any() or ((p.sum(-1) - 1).abs() > 1e-3).any():
            raise ValueError(f"the rows of {name} must be probabilities that add up to 1")
    js = ops.divergence(student.double().log(), teacher.double().log(), "jsd") / math.log(base)
    return (1 - js.clamp(min=0).sqrt()).mean().item()


def regression_loyalty(
    student: Tensor,
    teacher: Tensor,
    kind: str = "pearson",
    *,
    value_range: tuple[float, float] | None = None,
) -> float:
    """How well a student's numbers [N] follow its teacher's.

    "pearson": their correlation; "mae": 1 - mean |student - teacher| / (high - low), of the labels'
    `value_range`. Raises ValueError for shapes that differ, constant numbers (which correlate with
    nothing), an unknown kind, and "mae" without a range.

    Defaults: "pearson" (our reading: the paper's formula could not be checked).

    Example:
        >>> import torch
        >>> from stillhouse.methods.language import regression_loyalty
        >>> teacher = torch.tensor([1.0, 2.0, 4.0])
        >>> round(regression_loyalty(2 * teacher + 1, teacher), 6)
        1.0
    """
    _same(student, teacher, 1)
    if kind == "mae":
        if value_range is None or not value_range[0] < value_range[1]:
            raise ValueError(f"mae needs value_range=(low, high) of the labels, got {value_range}")
        low, high = value_range
        return 1 - (student.double() - teacher.double()).abs().mean().item() / (high - low)
    if kind != "pearson":
        raise ValueError(f"kind must be 'pearson' or 'mae', got {kind!r}")
    a, b = (x.double() - x.double().mean() for x in (student, teacher))
    if not (a.norm() > 0 and b.norm() > 0):
        raise ValueError("constant predictions correlate with nothing")
    return (a @ b / (a.norm() * b.norm())).item()


def _same(student: Tensor, teacher: Tensor, dimensions: int) -> None:
    if student.shape != teacher.shape or student.dim() != dimensions or not len(student):
        raise ValueError(
            f"student and teacher must both be [{'N, C' if dimensions == 2 else 'N'}] with N >= 1, "
            f"got {tuple(student.shape)} and {tuple(teacher.shape)}"
        )
