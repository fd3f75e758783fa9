"""What a user can get wrong: exception type and what the message says."""

import math

import pytest
import torch

from stillhouse import ops

Z, T = torch.randn(4, 30), torch.randn(4, 30)
Y = torch.tensor([0, 1, 2, 3])
LEAF = torch.randn(4, 30).requires_grad_()

ROWS = [
    (TypeError, "must be a tensor, got list", lambda: ops.divergence([1.0], T)),
    (TypeError, "got torch.int64", lambda: ops.divergence(Z.long(), T)),
    (ValueError, r"V >= 1", lambda: ops.divergence(Z[:, :0], T[:, :0])),
    (ValueError, "same rows", lambda: ops.divergence(Z, T[:2])),
    (ValueError, "pass vocab_size=", lambda: ops.divergence(Z, T[:, :20])),
    (
        ValueError,
        r"vocab_size must lie in \[1, 20\], got 30",
        lambda: ops.divergence(Z, T[:, :20], vocab_size=30),
    ),
    (ValueError, "needs teacher_logits", lambda: ops.divergence(Z, None)),
    (ValueError, "has no teacher", lambda: ops.divergence(Z, T, "cross_entropy", labels=Y)),
    (ValueError, "needs labels", lambda: ops.divergence(Z, None, "cross_entropy")),
    (ValueError, "takes no labels", lambda: ops.divergence(Z, T, labels=Y)),
    (
        TypeError,
        "labels must be torch.int64",
        lambda: ops.divergence(Z, None, "cross_entropy", labels=Y.int()),
    ),
    (ValueError, "one a row", lambda: ops.divergence(Z, None, "cross_entropy", labels=Y[:2])),
    (
        RuntimeError,
        r"label 30 of row 3 is outside \[0, 30\)",
        lambda: ops.divergence(Z, None, "cross_entropy", labels=Y * 10),
    ),
    (ValueError, "temperature must be a positive", lambda: ops.divergence(Z, T, temperature=0.0)),
    (
        ValueError,
        "teacher_temperature must be",
        lambda: ops.divergence(Z, T, teacher_temperature=-1.0),
    ),
    (
        RuntimeError,
        "temperatures must be positive",
        lambda: ops.divergence(Z, T, temperature=torch.tensor(0.0)),
    ),
    (
        ValueError,
        "logit_softcap must be a positive",
        lambda: ops.divergence(Z, T, logit_softcap=0.0),
    ),
    (ValueError, "pair", lambda: ops.divergence(Z, T, logit_scale=(1.0, 1.0, 1.0))),
    (TypeError, "mask must be torch.bool", lambda: ops.divergence(Z, T, mask=torch.ones(4))),
    (
        ValueError,
        "mask must be",
        lambda: ops.divergence(Z, T, mask=torch.ones(3, dtype=torch.bool)),
    ),
    (ValueError, "unknown divergence 'kl'", lambda: ops.divergence(Z, T, "kl")),
    (ValueError, "pass ops.TAID", lambda: ops.divergence(Z, T, "taid")),
    (TypeError, "must be a string or an ops.Kind", lambda: ops.divergence(Z, T, 3)),
    (ValueError, r"JSD.beta must lie in \(0, 1\), got 0", lambda: ops.JSD(0.0)),
    (ValueError, r"SymmetricKL.weight must lie in \(0, 1\)", lambda: ops.SymmetricKL(1.0)),
    (ValueError, "AlphaBeta.beta must lie in the finite", lambda: ops.AlphaBeta(1.0, math.inf)),
    (ValueError, "Amari.alpha must lie .* other than 0 and 1", lambda: ops.Amari(1.0)),
    (ValueError, "Renyi.alpha must lie .* other than 1", lambda: ops.Renyi(0.0)),
    (ValueError, r'MSELogits.of must be "logits", .* got 2', lambda: ops.MSELogits(2)),
    *(
        (ValueError, "no gradient to the teacher", lambda k=k: ops.divergence(Z, LEAF, k))
        for k in ("soft_cross_entropy", "chi2", "renyi", "standardized_kl", "adaptive_kl")
    ),
    (ValueError, "DKD needs labels", lambda: ops.divergence(Z, T, "dkd")),
    (ValueError, "DKD needs labels", lambda: ops.divergence_loss(Z, T, "dkd")),
    (
        RuntimeError,
        r"label 30 of row 3 is outside \[0, 30\)",
        lambda: ops.divergence(Z, T, "dkd", labels=Y * 10),
    ),
    (
        ValueError,
        "DKD has no gradient to the teacher",
        lambda: ops.divergence(Z, LEAF, "dkd", labels=Y),
    ),
    (ValueError, "DKD.beta must lie in the finite", lambda: ops.DKD(1.0, -1.0)),
    (ValueError, r"AdaptiveKL.mu must lie in \(0, 1\)", lambda: ops.AdaptiveKL(1.0)),
    (ValueError, r"TAID.t must lie in \[0, 1\], got 1.1", lambda: ops.TAID(1.1)),
    (ValueError, "must be one number", lambda: ops.TAID(torch.zeros(2))),
    (ValueError, "label_smoothing must lie", lambda: ops.CrossEntropy(1.0)),
    (ValueError, "no gradient to the teacher", lambda: ops.divergence(Z, LEAF, ops.TAID(0.5))),
    (ValueError, "no gradient to the teacher", lambda: ops.divergence_loss(Z, LEAF)),
    (
        ValueError,
        "label_weight must lie",
        lambda: ops.divergence_loss(Z, T, labels=Y, label_weight=2.0),
    ),
    (ValueError, "needs labels", lambda: ops.divergence_loss(Z, T, label_weight=0.5)),
    (ValueError, "reduction must be", lambda: ops.divergence_loss(Z, T, reduction="none")),
    (
        ValueError,
        "denominator goes with",
        lambda: ops.divergence_loss(Z, T, reduction="sum", denominator=3),
    ),
    (
        ValueError,
        "denominator must be a positive",
        lambda: ops.divergence_loss(Z, T, denominator=0),
    ),
    (
        TypeError,
        "a bool is a mask",
        lambda: ops.divergence_loss(Z, T, weight=torch.ones(4, dtype=torch.bool)),
    ),
    (
        ValueError,
        "weight is not differentiable",
        lambda: ops.divergence_loss(Z, T, weight=LEAF[:, 0]),
    ),
    (RuntimeError, "no instruction-set level 7", lambda: ops.cpu_level(7)),
]


@pytest.mark.parametrize(("error", "message", "call"), ROWS, ids=[m for _, m, _ in ROWS])
def test_errors(error, message, call):
    with pytest.raises(error, match=message):
        call()


def test_a_second_derivative_raises():
    z = torch.randn(3, 20, dtype=torch.float64).requires_grad_()
    (gradient,) = torch.autograd.grad(
        ops.divergence(z, T[:3, :20].double()).sum(), z, create_graph=True
    )
    with pytest.raises(RuntimeError, match="second derivative"):
        gradient.sum().backward()
