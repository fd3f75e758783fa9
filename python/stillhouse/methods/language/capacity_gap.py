"""The law of capacity gap: which teacher size suits a student that was cut out of its teacher.

A bigger teacher is better up to a point and then worse. Where the student is the teacher without
its least important channels, distilled on, the best teacher's size grows in proportion to the
student's. So: measure it on small pairs, fit the line, and choose the teacher of a large student.

Equation, with masks xi of ones on channels, L the label loss, z the student's logits, t the
teacher's, S and T the sizes of students and teachers:

    I = E_batch |dL/dxi|,   I_layer <- I_layer / ||I_layer||_2        (what is cut: the smallest I)
    p' = 1 - sqrt(1 - p)    of heads, inner units and hidden channels for a share p of parameters
    L_distil = 1/2 CE(y, z) + 1/2 CE(softmax(t), softmax(z))
    T*(S) = argmin_T loss(S, T),   T* = a S + b

Paper: Towards the Law of Capacity Gap in Distilling Language Models, ACL 2025, arXiv 2311.07052.
Code by its authors: GeneZC/MiniMA. They find a = 2.498 and b = -11.498 (millions) for GPT-2 and
Pythia.

**The line is one of a budget.** With more steps of distillation the best teachers grow, so a fit
belongs to the data and steps it was made with; 2.5 is no constant.

Where the code differs from the paper: p' is rounded to whole percents (`rounded`), and beyond 90 %
heads stay at 90 % while more inner units go. Where we differ: heads and inner units are ranked
within a block, not over all of them, because a `transformers` configuration has one size for all
blocks; heads that share keys and values go together; padded positions do not count in the loss.
"""

from __future__ import annotations

import math

from stillhouse.methods.language.capacity_law import CapacityGapLaw, fit_capacity_gap_law
from stillhouse.methods.language.capacity_sweep import capacity_gap_sweep
from stillhouse.methods.language.mask_importance import Ranking, mask_importance
from stillhouse.methods.language.teacher_optimum import Optimum, optimal_teacher
from stillhouse.train import DivergenceObjective

__all__ = [
    "CapacityGapLaw",
    "CapacityGapLoss",
    "Optimum",
    "Ranking",
    "capacity_gap_sweep",
    "component_sparsity",
    "fit_capacity_gap_law",
    "mask_importance",
    "optimal_teacher",
]


def component_sparsity(p: float, *, rounded: bool = False) -> float:
    """The share of heads, inner units and hidden channels to remove so that a share p of the
    parameters goes: 1 - sqrt(1 - p), because a matrix shrinks on two sides.

    rounded: to whole percents, as the authors' code does. Raises ValueError for p outside [0, 1).

    Defaults: not rounded (the paper).

    Example:
        >>> from stillhouse.methods.language import component_sparsity
        >>> round(component_sparsity(0.6), 4)
        0.3675
    """
    if not 0 <= p < 1:
        raise ValueError(f"a share of parameters to remove is in [0, 1), got {p}")
    share = 1 - math.sqrt(1 - p)
    return round(100 * share) / 100 if rounded else share


class CapacityGapLoss(DivergenceObjective):
    """Half the labels' cross-entropy, half the teacher's, at temperature 1.

    Raises ValueError for a label_weight outside [0, 1].

    Defaults: label_weight 0.5, temperature 1 (the authors' code).

    Example:
        >>> import torch
        >>> from stillhouse.methods.language import CapacityGapLoss
        >>> from stillhouse.train import LogitRows, supervised_rows
        >>> index = supervised_rows(torch.tensor([[5, 3, 1, 2]]))
        >>> student = torch.zeros(3, 8, requires_grad=True)
        >>> rows = LogitRows(student * 1, index), LogitRows(torch.eye(3, 8), index)
        >>> CapacityGapLoss()(*rows, {})["loss"].backward()
    """

    def __init__(self, label_weight: float = 0.5, *, temperature: float = 1.0):
        super().__init__("soft_cross_entropy", temperature=temperature, label_weight=label_weight)
