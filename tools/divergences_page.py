"""Write docs/divergences.md and its plot from the table of kinds, or `--check` the page.

Names, parameters, sources and gradients to the teacher are those of `stillhouse.ops`. The formulas
stand here as expressions, which tests/test_divergences_page.py evaluates against the kernels.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import MISSING, dataclass, fields
from pathlib import Path

from stillhouse import ops

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "divergences.md"
PLOT = ROOT / "docs" / "divergences.png"


@dataclass(frozen=True)
class Row:
    """A kind's mathematics. `where` names parts of the expressions, in order."""

    kind: ops.Kind
    value: str
    gradient: str
    where: tuple[tuple[str, str], ...] = ()
    used_by: str = ""
    note: str = ""


M_JSD = ("m", "beta * p + (1 - beta) * q")
REVERSE_SLOPE = "q * (lq - lp - kl(q, p))"
ROWS = (
    Row(ops.ForwardKL(), "kl(p, q)", "q - p", used_by="Hinton et al., most of what is distilled"),
    Row(ops.ReverseKL(), "kl(q, p)", REVERSE_SLOPE, used_by="MiniLLM's token form, DistiLLM"),
    Row(
        ops.SymmetricKL(0.3),
        "(1 - weight) * kl(p, q) + weight * kl(q, p)",
        f"(1 - weight) * (q - p) + weight * {REVERSE_SLOPE}",
        used_by="mutual learning",
        note="Jeffreys' divergence is twice the value at 0.5. PaddleClas calls half of Jeffreys' a "
        "JS divergence.",
    ),
    Row(
        ops.JSD(0.3),
        "beta * kl(p, m) + (1 - beta) * kl(q, m)",
        "(1 - beta) * q * (log(q / m) - kl(q, m))",
        (M_JSD,),
        "GKD",
        "GKD and TRL return forward KL at beta = 0 and reverse KL at beta = 1, unscaled, so that "
        "their loss jumps there; here both limits are excluded, and `normalize=True` divides by "
        "min(beta, 1 - beta), which makes them continuous.",
    ),
    Row(
        ops.SkewKL(0.1),
        "kl(p, m)",
        "(1 - alpha) * q * (sum(p * q / m) - p / m)",
        (("m", "alpha * p + (1 - alpha) * q"),),
        "DistiLLM",
        "DistiLLM's and TAID's code leaves the teacher's entropy out: another value, not 0 at "
        "p = q, and the same gradient.",
    ),
    Row(
        ops.SkewReverseKL(0.1),
        "kl(q, m)",
        "q * (r - sum(q * r))",
        (("m", "(1 - alpha) * p + alpha * q"), ("r", "log(q / m) - alpha * q / m")),
        "DistiLLM",
    ),
    Row(
        ops.AdaptiveKL(0.5),
        "(1 - w) * kl(p, q) + w * kl(q, p)",
        f"(1 - w) * (q - p) + w * {REVERSE_SLOPE}",
        (("w", "sum(tail(p, mu) * abs(p - q)) / sum(abs(p - q))"),),
        "AKL",
        "tail(p, mu) is 0 in the teacher's head, else 1. Elsewhere the column that crosses mu is "
        "counted as head, the mask is made in sorted order and used on what is not sorted, or the "
        "weights are not constants.",
    ),
    Row(
        ops.TAID(0.4),
        "-sum(m * lq)",
        "q - m",
        (("m", "softmax((1 - t) * z + t * v)"),),
        "TAID",
        "The gradient is that of Renyi(t).",
    ),
    Row(
        ops.SoftCrossEntropy(),
        "-sum(p * lq)",
        "q - p",
        used_by="LLaVA-MoD; what some code calls forward KL",
    ),
    Row(
        ops.TVD(),
        "sum(abs(p - q)) / 2",
        "q * (sign(q - p) - sum(q * sign(q - p))) / 2",
        used_by="TVD++, which divides it by sqrt(m (1 - m)), m the batch's mean of `student_below`",
        note="SinKD's TVD is a mean over columns times 0.1.",
    ),
    Row(
        ops.LogAcceptance(),
        "-log(a)",
        "-q / a * (1 * (q < p) - sum(q * (q < p)))",
        (("a", "sum(minimum(p, q))"),),
        "drafters of speculative sampling",
    ),
    Row(
        ops.Hellinger(),
        "sum((sqrt(p) - sqrt(q)) ** 2)",
        "q * sum(sqrt(p * q)) - sqrt(p * q)",
        note="The squared distance of some books is half of it.",
    ),
    Row(ops.Chi2(), "sum((p - q) ** 2 / q)", "q * sum(p ** 2 / q) - p ** 2 / q"),
    Row(
        ops.AlphaBeta(0.2, 0.7),
        "-sum(A - alpha / s * p ** s - beta / s * q ** s) / (alpha * beta)",
        "h - q * sum(h)",
        (
            ("s", "alpha + beta"),
            ("A", "p ** alpha * q ** beta"),
            ("h", "(q ** s - A) / alpha"),
        ),
        "ABKD",
        "ABKD's code divides its limits at alpha = 0, beta = 0 and s = 0 by alpha or beta once; "
        "continuity wants their squares.",
    ),
    Row(
        ops.Amari(0.3),
        "(sum(w) - 1) / (alpha * (alpha - 1))",
        "(q * sum(w) - w) / alpha",
        (("w", "p ** alpha * q ** (1 - alpha)"),),
    ),
    Row(
        ops.Renyi(0.5),
        "log(sum(w)) / (alpha - 1)",
        "q - w / sum(w)",
        (("w", "p ** alpha * q ** (1 - alpha)"),),
    ),
    Row(
        ops.DKD(1.0, 8.0),
        "alpha * kl(two(p), two(q)) + beta * kl(rest(p), rest(q))",
        "alpha * (q_y - p_y) * (hot - rest(q)) + beta * (rest(q) - rest(p))",
        used_by="DKD",
        note="two(p) is (p_y, 1 - p_y); rest(p) is p without the label's column y, with sum 1; hot "
        "is 1 at y, else 0. mdistiller and TAID multiply by T squared, and TAID's divides by all "
        "positions instead of the supervised ones.",
    ),
    Row(
        ops.ULD(),
        "sum(abs(descending(q) - descending(p)))",
        "q * (s - sum(q * s))",
        (("s", "sign(q - partner(q, p))"),),
        "ULD, GOLD",
        "partner(q, p) is, for each column of q, the probability of the same rank in p, 0 beyond "
        "its end.",
    ),
    Row(
        ops.MSELogits(),
        "sum((z - v) ** 2) / V",
        "2 * (z - v) / V",
        used_by="logit matching",
    ),
    Row(
        ops.MSELogits("centered"),
        "sum(g ** 2) / V",
        "2 * g / V",
        (("g", "(z - mean(z)) - (v - mean(v))"),),
    ),
    Row(
        ops.MSELogits("log_probs"),
        "sum((lq - lp) ** 2) / V",
        "h - q * sum(h)",
        (("h", "2 * (lq - lp) / V"),),
    ),
    Row(
        ops.CosineLogits(),
        "1 - c",
        "(c * z / norm(z) - v / norm(v)) / norm(z)",
        (("c", "sum(z * v) / (norm(z) * norm(v))"),),
        "Liger",
    ),
    Row(
        ops.CosineProbs(),
        "1 - c",
        "h - q * sum(h)",
        (
            ("c", "sum(q * p) / (norm(q) * norm(p))"),
            ("h", "q * (c * q / norm(q) - p / norm(p)) / norm(q)"),
        ),
    ),
    Row(
        ops.StandardizedKL(),
        "kl(softmax(standard(v)), softmax(standard(z)))",
        "(g - mean(g) - standard(z) * sum(g * standard(z)) / (V - 1)) / std(z)",
        (("g", "softmax(standard(z)) - softmax(standard(v))"),),
        "logit standardisation",
        "standard(x) is (x - mean(x)) / std(x), with V - 1 in the deviation. A temperature divides "
        "standardised logits; the expressions are those at T = 1.",
    ),
    Row(
        ops.SupportKL(),
        "kl(support(p), support(q))",
        "support(q) - support(p)",
        used_by="Minitron's top-k loss, alignment losses over a few classes",
        note="support(x) is x where the teacher is known, with sum 1 there, and 0 elsewhere.",
    ),
    Row(
        ops.CrossEntropy(0.1),
        "-(1 - label_smoothing) * lq_y - label_smoothing * mean(lq)",
        "q - (1 - label_smoothing) * hot - label_smoothing / V",
        used_by="training on labels",
    ),
)

HEAD = """# Divergences

<!-- Written by tools/divergences_page.py: change it there. -->

Student logits z and teacher logits v, both divided by their temperature; q and p their softmaxes,
lq and lp the logarithms of those, V columns. `kl(p, q)` is the sum of p (lp - lq) with 0 log 0 =
0. Gradients are with respect to z, that is T times those with respect to the student's logits. No
value carries a hidden T squared. The expressions below are evaluated against the kernels by
tests/test_divergences_page.py.
"""

PICTURE = """A kind of your own: [adding-a-divergence.md](adding-a-divergence.md).

## Gradient against the gap

![gradients](divergences.png)

T dD/dz of one of two columns over q - p, for p = 0.3, beside that of forward KL (grey): how hard
a kind pulls at a column that is too small (left of 0) or too large. With two columns DKD is its
first part alone, ULD compares the larger of q with the larger of p, and standardised rows are
always the same; labels are the column's own.
"""

COMMON = """## What holds for all of them

- **Columns.** A logit of -inf is a column without mass: where both sides have it, it adds
  nothing. Where p > 0 and q = 0 the value is what the formula says, +inf for forward KL. A NaN or
  +inf makes its row's value and all of the row's gradient NaN.
- **Sums and shifts.** The gradient of a divergence of probabilities sums to 0 over a row, and a
  constant that is added to a side's logits changes nothing.
- **Near p = q** values are summed as terms that are >= 0, near 0 by their Taylor series: a KL of
  5e-7 between float32 rows is right to 1e-4, and equal rows give exactly 0.
- **Teacher's gradient.** Where the table says so, `ops.divergence` differentiates the teacher,
  too. It is the student's gradient of the kind with the sides exchanged.
- **Statistics.** `return_stats=True` gives acceptance = sum min(p, q), top-1 agreement, both
  entropies, both log-sum-exps, and `student_below` = sum of q where q < p, of the same pass.
  TAID's are those of its target, StandardizedKL's of the standardised rows. ULD has only what
  belongs to one side, CrossEntropy only the student's: the others are NaN.
- **Reductions elsewhere.** torch's `batchmean` divides by all rows, padding included; TRL by the
  tokens that count. `ops.divergence` leaves it to you, `ops.divergence_loss` divides by the sum
  of weights or by the `denominator` that it is given. Liger pads a smaller vocabulary with logits
  of 0, which have mass; ours reads `vocab_size` columns.
"""


SPARSE = """## Sparse teachers

`ops.SparseTeacher` knows the probabilities p of some columns S, and by its `tail` what is taken to
be so of the others; r is what p leaves of 1, q_r what the student has outside S:

| tail | outcomes that are compared | of forward KL: value | gradient in S | elsewhere |
|---|---|---|---|---|
| `bucket` | S, the others as one | sum_S p log(p / q) + r log(r / q_r) | q - p | q (1 - r / q_r) |
| `renormalize` | the same, p scaled to sum 1 and r = 0 | sum_S p log(p / q) | q - p | q |
| `uniform` | all columns, r / (V - k) in each other one | sum p log(p / q) | q - p | q - p |
| `drop` | S, p as it is | sum_S p log(p / q) | (1 - r) q - p | (1 - r) q |

q is the student's softmax over all columns in each of them. Other kinds go the same way: a kind h
of the outcomes has the gradient h - q H in S, and outside it G_r q / q_r with the gradient G_r of
the last outcome. q_r is summed over its own columns (1 - sum_S q would be 0 where it is small).

| kind | tails |
|---|---|
{tails}

Outcomes that are coarser are never further apart: with "bucket" an f-divergence (all of these but
`alpha_beta`) is at most the one of whole rows. "renormalize" wants q_r = 0, which is not what the
teacher said; `SparseTeacher.sample` is the unbiased way to a sparse teacher (its tail is "drop",
with r = 0).
"""


def sparse() -> str:
    """Sparse teachers, with the tails of each kind."""
    rows = [
        f"| `{name}` | {', '.join(kind.sparse_tails)} |"
        for name, kind in ops.KINDS.items()
        if kind.sparse_tails
    ]
    return SPARSE.format(tails="\n".join(rows))


def domain(kind: type[ops.Kind]) -> str:
    """Parameters with their defaults."""
    parts = []
    for field in fields(kind):
        default = "" if field.default is MISSING else f" = {field.default!r}"
        parts.append(f"{field.name}{default}")
    return ", ".join(parts)


def teacher_gradient(kind: type[ops.Kind]) -> str:
    """The kind that has it, by its name."""
    if not kind.needs_teacher:
        return "no teacher"
    try:
        return f"`{next(n for n, k in ops.KINDS.items() if k is kind.exchange(0.5, 0.5)[0])}`"
    except ValueError:
        return "none"


def section(row: Row) -> str:
    """One kind."""
    kind = type(row.kind)
    name = next(n for n, k in ops.KINDS.items() if k is kind)
    variant = f', of="{row.kind.of}"' if isinstance(row.kind, ops.MSELogits) else ""
    what = " ".join((kind.__doc__ or "").split())
    lines = [f"### `{name}`{variant}", "", what, ""]
    lines += [f"- `ops.{kind.__name__}({domain(kind)})`"]
    numbers = [field.name for field in fields(kind) if field.type not in ("bool", "str")]
    if numbers:
        lines += [f"- {' and '.join(numbers)} in {kind._interval}"]
    lines += [f"- value `{row.value}`", f"- gradient `{row.gradient}`"]
    lines += [f"- where `{symbol} = {meaning}`" for symbol, meaning in row.where]
    lines += [f"- teacher's gradient: {teacher_gradient(kind)}"]
    lines += [f"- used by: {row.used_by}"] if row.used_by else []
    lines += ["", row.note] if row.note else []
    return "\n".join(lines) + "\n"


def page() -> str:
    """The whole page."""
    missing = set(ops.KINDS.values()) - {type(row.kind) for row in ROWS}
    if missing:
        raise SystemExit(f"no formula for {', '.join(sorted(k.__name__ for k in missing))}")
    table = ["| kind | value | gradient | teacher |", "|---|---|---|---|"]
    for row in ROWS:
        kind = type(row.kind)
        name = next(n for n, k in ops.KINDS.items() if k is kind)
        mark = f" ({row.kind.of})" if isinstance(row.kind, ops.MSELogits) else ""
        cells = (f"`{name}`{mark}", f"`{row.value}`", f"`{row.gradient}`", teacher_gradient(kind))
        table.append("| " + " | ".join(cells) + " |")
    parts = [HEAD, "\n".join(table) + "\n", PICTURE, COMMON, sparse(), "## One by one\n"]
    return "\n".join([*parts, *(section(row) for row in ROWS)])


def draw() -> None:
    """The plot, by way of a rename."""
    import torch
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    p = torch.tensor([0.3, 0.7], dtype=torch.float64)
    first = torch.linspace(0.004, 0.996, 400, dtype=torch.float64)
    z = torch.stack([first, 1 - first], -1).log().requires_grad_()
    labels = torch.zeros(len(z), dtype=torch.int64)
    figure = Figure(figsize=(11, 9), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(5, 5, sharex=True, sharey=True).flat
    # Of two known columns SupportKL would be forward KL.
    shown = [row for row in ROWS if not isinstance(row.kind, ops.SupportKL)]
    for axis, row in zip(axes, shown, strict=True):
        value = ops.divergence(
            z,
            p.log().expand_as(z) if row.kind.needs_teacher else None,
            row.kind,
            labels=labels if row.kind.needs_labels else None,
        )
        (gradient,) = torch.autograd.grad(value.sum(), z)
        axis.plot(first - 0.3, first - 0.3, color="0.75", lw=1)
        axis.plot(first - 0.3, gradient[:, 0], lw=1.5)
        axis.axhline(0, color="0.85", lw=0.6)
        axis.set_title(repr(row.kind), fontsize=7)
        axis.set(ylim=(-1.1, 1.1))
    figure.supxlabel("q − p", fontsize=9)
    figure.supylabel("T dD/dz", fontsize=9)
    scratch = PLOT.with_suffix(".part")
    figure.savefig(scratch, format="png", dpi=110)
    scratch.replace(PLOT)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--check", action="store_true", help="fail where the page differs")
    options = parser.parse_args()
    text = page()
    if options.check:
        if not PAGE.exists() or PAGE.read_text() != text:
            print("docs/divergences.md differs: run tools/divergences_page.py", file=sys.stderr)
            return 1
        return 0
    scratch = PAGE.with_suffix(".part")
    scratch.write_text(text)
    scratch.replace(PAGE)
    draw()
    return 0


if __name__ == "__main__":
    sys.exit(main())
