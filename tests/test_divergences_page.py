"""docs/divergences.md: its expressions are what the kernels compute, and it is up to date."""

import importlib.util
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from stillhouse import ops

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("page", ROOT / "tools" / "divergences_page.py")
page = sys.modules["page"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(page)


def kl(p, q):
    return torch.where(p > 0, p * (p.log() - q.log()), 0).sum()


def tail(p, mu):
    head, total = [], 0.0
    for j in p.argsort(descending=True, stable=True).tolist():
        total += p[j].item()
        if head and total > mu:
            break
        head.append(j)
    return torch.ones_like(p).index_fill(0, torch.tensor(head), 0)


def partner(q, p):
    rank = q.argsort(descending=True, stable=True).argsort()
    return p.sort(descending=True).values[rank]


KNOWN = torch.zeros(17, dtype=torch.bool).index_fill(0, torch.tensor([2, 3, 11]), True)


def evaluate(row, z, v, y):
    """Value and gradient by the page's own words."""
    hot = torch.zeros_like(z).index_fill(0, torch.tensor([y]), 1)
    q, p = z.softmax(-1), v.softmax(-1)
    names = {
        **{f: getattr(torch, f) for f in ("sum", "mean", "log", "sqrt", "abs", "sign", "std")},
        "minimum": torch.minimum,
        "norm": torch.linalg.vector_norm,
        "softmax": lambda x: x.softmax(-1),
        "kl": kl,
        "tail": tail,
        "partner": partner,
        "descending": lambda x: x.sort(descending=True).values,
        "standard": lambda x: (x - x.mean()) / x.std(),
        "two": lambda x: torch.stack([x[y], 1 - x[y]]),
        "support": lambda x: torch.where(KNOWN, x, 0) / x[KNOWN].sum(),
        "rest": lambda x: torch.where(hot > 0, 0, x) / (1 - x[y]),
        **{"z": z, "v": v, "q": q, "p": p, "lq": q.log(), "lp": p.log(), "V": len(z), "hot": hot},
        **{"q_y": q[y], "p_y": p[y], "lq_y": q[y].log()},
        **{field.name: getattr(row.kind, field.name) for field in fields(row.kind)},
    }
    for symbol, meaning in row.where:
        names[symbol] = eval(meaning, {"__builtins__": {}}, names)
    return [eval(e, {"__builtins__": {}}, names) for e in (row.value, row.gradient)]


CASES = [(row, 1.0) for row in page.ROWS]
CASES += [(row, 2.5) for row in page.ROWS if not isinstance(row.kind, ops.StandardizedKL)]


@pytest.mark.parametrize(
    ("row", "temperature"), CASES, ids=[f"{row.kind!r} at {t}" for row, t in CASES]
)
def test_expressions_are_what_the_kernels_compute(row, temperature):
    z = (torch.randn(17, dtype=torch.float64) * 2).requires_grad_()
    v = torch.randn(17, dtype=torch.float64) * 2
    labels = torch.tensor(5) if row.kind.needs_labels else None
    teacher = v if row.kind.needs_teacher else None
    if isinstance(row.kind, ops.SupportKL):
        ids = KNOWN.nonzero()[:, 0]
        teacher = ops.SparseTeacher(ids, v.log_softmax(-1)[ids], 17)
    value = ops.divergence(z, teacher, row.kind, temperature=temperature, labels=labels)
    (gradient,) = torch.autograd.grad(value, z)
    said, slope = evaluate(row, z.detach() / temperature, v / temperature, 5)
    torch.testing.assert_close(value.detach(), said, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(temperature * gradient, slope, rtol=1e-9, atol=1e-12)


def test_the_page_is_up_to_date():
    assert page.PAGE.read_text() == page.page(), "run tools/divergences_page.py"


def test_the_plot_is_small():
    assert page.PLOT.stat().st_size < 300_000


@pytest.mark.parametrize("tail", ops.SparseTeacher.TAILS)
def test_what_it_says_of_tails(tail):
    z, v = (torch.randn(17, dtype=torch.float64) for _ in range(2))
    z.requires_grad_()
    ids = KNOWN.nonzero()[:, 0]
    value = ops.divergence(z, ops.SparseTeacher(ids, v.log_softmax(-1)[ids], 17, tail=tail))
    (gradient,) = torch.autograd.grad(value, z)
    q, p = z.detach().softmax(-1), torch.where(KNOWN, v.softmax(-1), 0)
    if tail == "renormalize":
        p = p / p.sum()
    r, q_r = 1 - p.sum(), q[~KNOWN].sum()
    said = kl(p[KNOWN], q[KNOWN])
    elsewhere = {"bucket": q * (1 - r / q_r), "renormalize": q, "drop": (1 - r) * q}
    inside = (1 - r) * q - p if tail == "drop" else q - p
    if tail == "uniform":
        p = torch.where(KNOWN, p, r / 14)
        said, elsewhere = kl(p, q), {"uniform": q - p}
    if tail == "bucket":
        said = said + r * (r / q_r).log()
    torch.testing.assert_close(value.detach(), said, rtol=1e-11, atol=1e-13)
    want = torch.where(KNOWN, inside, elsewhere[tail])
    torch.testing.assert_close(gradient, want, rtol=1e-9, atol=1e-12)


def test_coarser_outcomes_are_never_further_apart():
    z, v = (torch.randn(50, 17, dtype=torch.float64) * 2 for _ in range(2))
    sparse = {
        tail: ops.SparseTeacher.from_logits(v, k=4, tail=tail) for tail in ("bucket", "uniform")
    }
    for kind in ("forward_kl", "reverse_kl", "jsd", "tvd", "hellinger"):
        bucket, uniform = (ops.divergence(z, sparse[tail], kind) for tail in ("bucket", "uniform"))
        assert (bucket <= uniform + 1e-12).all()
        assert (bucket <= ops.divergence(z, v, kind) + 1e-12).all()
