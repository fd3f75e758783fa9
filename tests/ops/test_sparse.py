"""Teachers that are known at a few columns: the kernels against plain torch in float64, and
against the dense kernels where every column is known."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from stillhouse import ops
from stillhouse.ops import divergence_autograd
from stillhouse.ops.divergence_arguments import check_call
from stillhouse.ops.divergence_reference import reference

KINDS = [
    ops.ForwardKL(),
    ops.ReverseKL(),
    ops.JSD(0.3),
    ops.SkewKL(),
    ops.SkewReverseKL(),
    ops.TVD(),
    ops.SoftCrossEntropy(),
    ops.SymmetricKL(0.3),
    ops.Hellinger(),
    ops.Chi2(),
    ops.LogAcceptance(),
    ops.AlphaBeta(),
    ops.AlphaBeta(0.4, -0.4),
    ops.Amari(0.3),
    ops.Renyi(0.5),
    ops.SupportKL(),
]
PAIRS = [(kind, tail) for kind in KINDS for tail in kind.sparse_tails]
ROUNDING = {
    torch.float32: 3e-6,
    torch.bfloat16: 4e-3,
    torch.float16: 1e-3,
    torch.float64: 1e-11,
}


def pair(rows=5, width=300, scale=2.0, gap=1.0):
    t = torch.randn(rows, width, dtype=torch.float64) * scale
    return t + gap * torch.randn(rows, width, dtype=torch.float64), t


def ragged(teacher, row=1):
    """With two columns fewer in one row."""
    ids, log_probs = teacher.ids.clone(), teacher.log_probs.clone()
    ids[row, 1:3], log_probs[row, 1:3] = -1, -torch.inf
    return dataclasses.replace(teacher, ids=ids, log_probs=log_probs, log_rest=None)


def compare(z, teacher, kind, dtype, inplace=True, absolute=1e-7, **arguments):
    """Value, statistics and gradients of every form against the reference."""
    low = z.to(dtype)
    exact = low.double().requires_grad_()
    rest = None if teacher.log_rest is None else teacher.log_rest.double()
    double = dataclasses.replace(teacher, log_probs=teacher.log_probs.double(), log_rest=rest)
    call = check_call(
        exact,
        double,
        kind,
        arguments.get("temperature", 1.0),
        arguments.get("teacher_temperature"),
        arguments.get("vocab_size"),
        arguments.get("logit_softcap"),
        arguments.get("logit_scale", 1.0),
        None,
        0.0,
    )
    value, stats = reference(call, arguments.get("mask"), True)
    upstream = torch.rand(len(z), dtype=torch.float64) + 0.5
    (gradient,) = torch.autograd.grad((value * upstream).sum(), exact)

    leaf = low.clone().requires_grad_()
    got, got_stats = ops.divergence(leaf, teacher, kind, return_stats=True, **arguments)
    (got_gradient,) = torch.autograd.grad((got * upstream.to(got.dtype)).sum(), leaf)
    loose = 30 if isinstance(kind, (ops.AlphaBeta, ops.Chi2)) else 1
    tolerance = loose * (1e-11 if dtype == torch.float64 else 2e-5)
    torch.testing.assert_close(got.double(), value.detach(), rtol=tolerance, atol=tolerance)
    for a, b in zip(got_stats, stats, strict=True):
        torch.testing.assert_close(a.double(), b.detach(), rtol=tolerance, atol=tolerance)
    size = gradient.abs().amax(-1, keepdim=True)
    slack = loose * ROUNDING[dtype] * size + (absolute if dtype != torch.float64 else 0)
    assert ((got_gradient.double() - gradient).abs() <= slack).all()

    product = leaf * 1
    loss = ops.divergence_loss(
        product, teacher, kind, weight=upstream, reduction="sum", inplace_grad=inplace, **arguments
    )
    (of_loss,) = torch.autograd.grad(loss, leaf)
    torch.testing.assert_close(
        loss.double(), (value * upstream).sum().detach(), rtol=tolerance, atol=tolerance
    )
    assert ((of_loss.double() - gradient).abs() <= slack).all()


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize(
    ("kind", "tail"), PAIRS, ids=lambda x: x if isinstance(x, str) else repr(x)
)
def test_against_plain_torch(kind, tail, dtype, level):
    for width, k in ((300, 7), (33, 1), (2100, 40)):
        z, t = pair(width=width)
        teacher = ops.SparseTeacher.from_logits(t, k=k, tail=tail)
        compare(z, ragged(teacher) if k > 2 else teacher, kind, dtype)


ARGUMENTS = [
    {"temperature": 2.0, "teacher_temperature": 1.0},
    {"logit_softcap": 3.0, "logit_scale": 0.7},
    {"vocab_size": 280},
    {"mask": torch.tensor([True, False, True, True, False])},
]


def placed(arguments):
    """Tensors where others are made now."""
    device = torch.get_default_device()
    return {k: v.to(device) if torch.is_tensor(v) else v for k, v in arguments.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("arguments", ARGUMENTS, ids=lambda a: "-".join(a))
@pytest.mark.parametrize("tail", ops.SparseTeacher.TAILS)
def test_arguments(tail, arguments, dtype, level):
    (z, t), arguments = pair(), placed(arguments)
    teacher = ops.SparseTeacher.from_logits(
        t[:, : arguments.get("vocab_size", 300)], k=9, tail=tail
    )
    for kind in (ops.ForwardKL(), ops.SupportKL(), *([ops.JSD()] if tail != "drop" else [])):
        compare(z, teacher, kind, dtype, inplace=False, **arguments)


@pytest.mark.parametrize("tail", ["renormalize", "uniform"])
def test_a_temperature_that_is_undone(tail, level):
    # Of "uniform" the whole row is known; of "renormalize" what the known columns have.
    z, t = pair()
    teacher = ops.SparseTeacher.from_logits(t, k=9, temperature=2.0, tail=tail)
    compare(z, teacher, ops.ForwardKL(), torch.float32, temperature=1.5)
    if tail == "renormalize":
        want = ops.SparseTeacher.from_logits(t, k=9, temperature=1.5, tail=tail)
        torch.testing.assert_close(
            ops.divergence(z, teacher, temperature=1.5), ops.divergence(z, want, temperature=1.5)
        )


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize(
    ("kind", "tail"), PAIRS, ids=lambda x: x if isinstance(x, str) else repr(x)
)
def test_all_columns_known_is_the_dense_divergence(kind, tail, dtype, level):
    """The master test."""
    dense = ops.ForwardKL() if isinstance(kind, ops.SupportKL) else kind
    z, t = (x.to(dtype) for x in pair(width=2100, gap=0.5))
    z, other = z.requires_grad_(), z.clone().detach().requires_grad_()
    order = torch.randperm(2100)
    log_probs = t.double().log_softmax(-1)
    if dtype != torch.float64:
        log_probs = log_probs.float()
    ids = order.int().expand(5, -1)
    teacher = ops.SparseTeacher(ids, log_probs[:, order], 2100, tail=tail)
    want, got = ops.divergence(other, t, dense), ops.divergence(z, teacher, kind)
    loose = 30 if isinstance(kind, (ops.AlphaBeta, ops.Chi2)) else 1
    tolerance = loose * (1e-12 if dtype == torch.float64 else 2e-6)
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
    (a,), (b,) = torch.autograd.grad(got.sum(), z), torch.autograd.grad(want.sum(), other)
    error = (a.double() - b.double()).abs().amax(-1)
    # Log-probabilities in float32 are themselves rounded.
    slack = 0 if dtype == torch.float64 else 5e-8
    assert (error <= loose * (ROUNDING[dtype] * b.double().abs().amax(-1) + slack)).all()


def test_equal_sides_have_no_divergence_and_no_gradient(level):
    # Of probabilities that float32 holds exactly: a half, a quarter, ...
    p = 0.5 ** torch.arange(1.0, 9)
    p[-1] *= 2
    z = p.log().expand(3, 8).clone().requires_grad_()
    teacher = ops.SparseTeacher(torch.arange(5).expand(3, 5), p[:5].log().expand(3, 5), 8)
    for kind in (ops.ForwardKL(), ops.ReverseKL(), ops.JSD(), ops.Hellinger()):
        value = ops.divergence(z, teacher, kind)
        (gradient,) = torch.autograd.grad(value.sum(), z)
        assert value.abs().max() < 1e-12
        assert gradient.abs().max() < 1e-7


@pytest.mark.parametrize("offset", [0.0, -1e4, 2e4])
@pytest.mark.parametrize("gap", [12.0, 60.0, 200.0])
def test_the_tail_is_accurate(gap, offset, level):
    """What the student leaves for the other columns: 1 - sum of the known would be 0."""
    z = torch.zeros(1, 5000, dtype=torch.float64)
    z[0, 3], z[0, 4500] = gap, gap - 1
    z += offset + 0.1 * torch.arange(5000).remainder(7)
    z = z.float().double()
    teacher = ops.SparseTeacher(
        torch.tensor([[4500, 3]]), torch.tensor([[0.25, 0.7]]).log().double(), 5000
    )
    exact = z.clone().requires_grad_()
    reference_value, _ = reference(
        check_call(exact, teacher, "forward_kl", 1.0, None, None, None, 1.0, None, 0.0), None, False
    )
    (want,) = torch.autograd.grad(reference_value.sum(), exact)
    leaf = z.float().requires_grad_()
    low = dataclasses.replace(teacher, log_probs=teacher.log_probs.float())
    value = ops.divergence(leaf, low)
    (got,) = torch.autograd.grad(value.sum(), leaf)
    torch.testing.assert_close(value.double(), reference_value.detach(), rtol=3e-6, atol=0)
    torch.testing.assert_close(got.double(), want, rtol=3e-6, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("gap", [10.0, 30.0, 80.0])
@pytest.mark.parametrize("tail", ["bucket", "uniform"])
def test_a_confident_teachers_tail_is_accurate(tail, gap, dtype, level):
    """1 - sum of the known would be rounding, or 0, for which reverse KL is infinite."""
    t = 0.1 * torch.randn(4, 300, dtype=torch.float64)
    t[:, 7] += gap
    z = 2 * torch.randn(4, 300, dtype=torch.float64)
    teacher = ops.SparseTeacher.from_logits(t.to(dtype), k=2, tail=tail)
    for kind in (ops.ReverseKL(), ops.SymmetricKL(), ops.ForwardKL(), ops.AlphaBeta(0.4, -0.4)):
        if gap < 80 or not isinstance(kind, ops.AlphaBeta):  # powers of e^88
            # Logarithms of this size are rounded at this size.
            compare(z, teacher, kind, dtype, absolute=4e-8 * gap)
    exact = ops.SparseTeacher.from_logits(t, k=2)
    want = t.scatter(-1, exact.ids.long(), -torch.inf).logsumexp(-1) - t.logsumexp(-1)
    torch.testing.assert_close(exact.log_rest, want, rtol=1e-9, atol=1e-12)


def test_without_its_mass_a_tail_is_not_below_what_rounding_hides(level):
    z = torch.randn(2, 300).requires_grad_()
    ids = torch.tensor([[3, 5]]).expand(2, 2)
    for logs in ([-1e-9, -25.0], [math.log(0.5)] * 2):
        teacher = ops.SparseTeacher(ids, torch.tensor([logs]).expand(2, 2), 300)
        for kind in ("reverse_kl", "symmetric_kl"):
            value = ops.divergence(z, teacher, kind)
            (gradient,) = torch.autograd.grad(value.sum(), z)
            assert value.isfinite().all()
            assert gradient.isfinite().all()


@pytest.mark.parametrize(
    ("kind", "tail", "arguments"),
    [
        ("support_kl", "bucket", {"teacher_temperature": 0.5}),
        ("support_kl", "bucket", {}),
        ("forward_kl", "renormalize", {"teacher_temperature": 0.25}),
        ("forward_kl", "uniform", {"teacher_temperature": 0.25}),
    ],
)
def test_known_probabilities_may_all_be_small(kind, tail, arguments, level):
    z, _ = pair()
    ids = torch.tensor([[3, 5, 200]]).expand(5, 3)
    logs = torch.tensor([[-60.0, -61.0, -60.5]]).expand(5, 3) * (1 if arguments else 1.6)
    compare(
        z,
        ops.SparseTeacher(ids, logs, 300, tail=tail),
        ops.as_kind(kind),
        torch.float32,
        **arguments,
    )


def test_a_row_that_knows_nothing(level):
    z, t = pair()
    teacher = ops.SparseTeacher.from_logits(t, k=4)
    ids, logs = teacher.ids.clone(), teacher.log_probs.clone()
    ids[2], logs[2] = -1, -torch.inf
    for tail, kind in (("bucket", "forward_kl"), ("drop", "forward_kl"), ("bucket", "support_kl")):
        leaf = z.clone().requires_grad_()
        value = ops.divergence(leaf, ops.SparseTeacher(ids, logs, 300, tail=tail), kind)
        (gradient,) = torch.autograd.grad(value.sum(), leaf)
        torch.testing.assert_close(value[2].item(), 0.0, rtol=0, atol=1e-12)
        assert gradient[2].abs().max() < 1e-12
        assert value[[0, 1, 3, 4]].ne(0).all()
    nothing = ops.divergence(z, ops.SparseTeacher(ids, logs, 300, tail="renormalize"))
    assert nothing.isnan().tolist() == [i == 2 for i in range(5)]


def test_only_known_columns_have_a_gradient_under_support_kl(level):
    z, t = pair()
    leaf = z.float().requires_grad_()
    teacher = ops.SparseTeacher.from_logits(t, k=6)
    (gradient,) = torch.autograd.grad(ops.divergence(leaf, teacher, "support_kl").sum(), leaf)
    known = torch.zeros(5, 300, dtype=torch.bool).scatter(-1, teacher.ids.long(), True)
    assert (gradient != 0).equal(known)


@pytest.mark.parametrize("kind", ["forward_kl", "support_kl", "jsd"])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_label_mix(kind, softcap, dtype, level):
    z, t = pair()
    z = z.to(dtype)
    teacher = ops.SparseTeacher.from_logits(t.float(), k=6)
    labels = torch.tensor([3, -100, 0, 299, int(teacher.ids[4, 0])])
    exact = z.double().requires_grad_()
    capped = exact if softcap is None else softcap * torch.tanh(exact / softcap)
    rows = ops.divergence(exact, teacher, kind, temperature=1.0, logit_softcap=softcap)
    ce = F.cross_entropy(capped, labels, reduction="none", ignore_index=-100)
    want = (0.7 * rows + 0.3 * ce).sum()
    (want_gradient,) = torch.autograd.grad(want, exact)
    leaf = z.clone().requires_grad_()
    got = ops.divergence_loss(
        leaf * 1,
        teacher,
        kind,
        labels=labels,
        label_weight=0.3,
        reduction="sum",
        logit_softcap=softcap,
        inplace_grad=True,
    )
    (gradient,) = torch.autograd.grad(got, leaf)
    tolerance = 1e-6 if dtype == torch.float64 else 4e-3
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient.double(), want_gradient, rtol=tolerance, atol=tolerance)


def test_rows_in_higher_dimensions_and_strides(level):
    z, t = pair(rows=12)
    want = ops.divergence(z, ops.SparseTeacher.from_logits(t, k=6))
    z, t = (x.view(3, 4, 300).transpose(0, 1) for x in (z, t))
    got = ops.divergence(z, ops.SparseTeacher.from_logits(t, k=6))
    torch.testing.assert_close(got, want.view(3, 4).t())


@pytest.mark.parametrize("path", [0, 1 << 30])
def test_rows_that_do_not_stay_in_cache(path, monkeypatch, level):
    monkeypatch.setattr(divergence_autograd, "_resident_limit", path)
    z, t = pair(width=5000)
    for tail in ("bucket", "uniform"):
        teacher = ops.SparseTeacher.from_logits(t, k=9, tail=tail)
        for dtype in (torch.float32, torch.bfloat16):
            compare(z, teacher, ops.JSD(), dtype)


def test_a_far_larger_logit_late_in_the_row(level):
    z, t = pair(width=5000)
    z[:, 4900], z[:, 2500] = 300.0, 200.0
    teacher = ops.SparseTeacher.from_logits(t, k=9)
    compare(z, teacher, ops.ForwardKL(), torch.float32)
    teacher.ids[:, 0], teacher.ids[:, 1] = 4900, 2500
    compare(z, teacher, ops.ForwardKL(), torch.float32)


def test_masked_vocabulary(level):
    z, t = pair()
    z[:, 200:], t[:, 200:] = -torch.inf, -torch.inf
    for kind in (ops.ForwardKL(), ops.JSD(), ops.ReverseKL()):
        compare(z, ops.SparseTeacher.from_logits(t, k=9), kind, torch.float32)


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("tail", ops.SparseTeacher.TAILS)
def test_nan_reaches_its_whole_row_alone(tail, known, level):
    z, t = pair()
    teacher = ops.SparseTeacher.from_logits(t, k=9, tail=tail)
    unknown = next(j for j in range(300) if j not in teacher.ids[2].tolist())
    z[2, int(teacher.ids[2, 0]) if known else unknown] = torch.nan
    leaf = z.float().requires_grad_()
    for kind in ("forward_kl", *(["jsd"] if tail != "drop" else [])):
        value = ops.divergence(leaf, teacher, kind)
        (gradient,) = torch.autograd.grad(value.sum(), leaf)
        assert value.isnan().tolist() == [False, False, True, False, False]
        for reduce in (torch.any, torch.all):
            assert reduce(gradient.isnan(), -1).tolist() == [False, False, True, False, False]


def test_linear_divergences_take_them(device):
    _, t = pair(rows=21, width=90)
    hidden = torch.randn(21, 12, dtype=torch.float64).requires_grad_()
    weight = torch.randn(90, 12, dtype=torch.float64).requires_grad_()
    mask = torch.arange(21) % 4 != 1
    teacher = ops.SparseTeacher.from_logits(t, k=5)
    for kind in ("forward_kl", "support_kl"):
        want = ops.divergence_loss(hidden @ weight.t(), teacher, kind, mask=mask)
        want_gradients = torch.autograd.grad(want, (hidden, weight))
        loss = ops.linear_divergence_loss(hidden, weight, teacher, kind, mask=mask, chunk_rows=8)
        rows = ops.linear_divergence(hidden, weight, teacher, kind, mask=mask, chunk_rows=8)
        for got in (loss, rows.sum() / mask.sum()):
            torch.testing.assert_close(got, want)
            for a, b in zip(
                torch.autograd.grad(got, (hidden, weight)), want_gradients, strict=True
            ):
                torch.testing.assert_close(a, b)


# --- the teacher itself ---------------------------------------------------------------------------


def test_the_largest_probabilities(device):
    t = torch.randn(3, 4, 50)
    teacher = ops.SparseTeacher.from_logits(t, k=6, temperature=2.0)
    want, columns = (t / 2).double().log_softmax(-1).sort(-1, descending=True)
    assert teacher.ids.dtype == torch.int32
    assert teacher.ids.equal(columns[..., :6].int())
    torch.testing.assert_close(teacher.log_probs.double(), want[..., :6], rtol=1e-6, atol=1e-7)


def test_as_many_as_reach_a_mass(device):
    t = torch.randn(20, 500) * 3
    p = t.softmax(-1)
    for k in (None, 30):
        teacher = ops.SparseTeacher.from_logits(t, p=0.9, k=k)
        for row in range(20):
            ordered = p[row].sort(descending=True).values.double()
            count = int((ordered.cumsum(0) < 0.9).sum()) + 1
            assert int((teacher.ids[row] >= 0).sum()) == min(count, k or 500)
        present = teacher.ids >= 0
        assert teacher.log_probs[~present].eq(-torch.inf).all()
        assert present[:, 0].all()
    flat = ops.SparseTeacher.from_logits(torch.zeros(2, 500), p=1.0)
    assert (flat.ids >= 0).sum() == 1000


def test_dense_again(device):
    t = torch.randn(6, 50, dtype=torch.float64)
    log_p = t.log_softmax(-1)
    for tail in ops.SparseTeacher.TAILS:
        whole = ops.SparseTeacher.from_logits(t, k=50, tail=tail)
        torch.testing.assert_close(whole.to_dense(), log_p)
        some = ops.SparseTeacher.from_logits(t, k=5, tail=tail).to_dense().exp()
        columns = t.topk(5).indices
        known, rest = log_p.exp().gather(-1, columns), some.scatter(-1, columns, 0)
        scale = known.sum(-1, keepdim=True) if tail == "renormalize" else 1
        torch.testing.assert_close(some.gather(-1, columns), known / scale)
        if tail in ("bucket", "uniform"):
            want = (1 - known.sum(-1, keepdim=True)) / 45
            torch.testing.assert_close(rest[rest > 0].view(6, 45), want.expand(6, 45))
        else:
            assert rest.eq(0).all()


def test_draws_are_unbiased(device):
    t = torch.randn(4, 12, dtype=torch.float64) * 2
    generator = torch.Generator(device).manual_seed(3)
    rows = t.repeat(4000, 1)
    teacher = ops.SparseTeacher.sample(rows, 8, generator=generator)
    counts = torch.where(teacher.ids >= 0, teacher.log_probs.exp() * 8, 0)
    if device == "cuda":  # whose exp of a log misses by a last place
        counts = counts.round(decimals=4)
    assert torch.equal(counts.sum(-1), torch.full((16000,), 8.0))
    dense = teacher.to_dense().exp().view(4000, 4, 12)
    p = t.softmax(-1)
    sigma = (p * (1 - p) / (8 * 4000)).sqrt()
    assert ((dense.double().mean(0) - p).abs() < 4.5 * sigma).all()
    # So is the gradient: q - p on average.
    z = torch.randn(4, 12, dtype=torch.float64).repeat(4000, 1).requires_grad_()
    (gradient,) = torch.autograd.grad(ops.divergence(z, teacher).sum(), z)
    want = z[:4].detach().softmax(-1) - p
    assert ((gradient.view(4000, 4, 12).mean(0) - want).abs() < 4.5 * sigma).all()
    assert teacher.tail == "drop"


# --- autograd, compiler, errors -------------------------------------------------------------------


def test_opcheck(kernels):
    S = divergence_autograd.kernels()
    z, t = (x.float() for x in pair(width=40))
    teacher = ops.SparseTeacher.from_logits(t, k=4)
    numbers = [1.3, 1, 1, 1, 0, 0, 0, 0, 0.5, 0, 1]
    numbers = torch.tensor(numbers, dtype=torch.float64, device="cpu")
    sparse = (-1, teacher.ids)
    for kind, tail in ((1, 0), (3, 0), (1, 1), (25, 0)):
        student = z.clone().requires_grad_()
        torch.library.opcheck(
            S.divergence.default,
            (student, teacher.log_probs, numbers, None, None, kind, -1, True, *sparse, tail),
        )
        rows = (teacher.log_probs, numbers, torch.rand(5), None, kind, -1)
        torch.library.opcheck(S.divergence_gradient.default, (z, *rows, *sparse, tail))
        torch.library.opcheck(S.divergence_loss.default, (z, *rows, True, *sparse, tail))
        torch.library.opcheck(S.divergence_loss_.default, (z.clone(), *rows, True, *sparse, tail))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles(backend, device):
    def step(hidden, weight, ids, log_probs):
        z = hidden @ weight.t()
        teacher = ops.SparseTeacher(ids, log_probs, 70)
        rows = ops.divergence(z, teacher, "jsd")
        linear = ops.linear_divergence_loss(hidden, weight, teacher)
        return rows.mean() + linear + ops.divergence_loss(z * 1, teacher, inplace_grad=True)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=backend)
    for rows in (4, 6):
        hidden = torch.randn(rows, 16).requires_grad_()
        weight = torch.randn(70, 16).requires_grad_()
        teacher = ops.SparseTeacher.from_logits(torch.randn(rows, 70), k=5)
        arguments = (hidden, weight, teacher.ids, teacher.log_probs)
        got, want = compiled(*arguments), step(*arguments)
        torch.testing.assert_close(got, want)
        for a, b in zip(
            torch.autograd.grad(got, (hidden, weight)),
            torch.autograd.grad(want, (hidden, weight)),
            strict=True,
        ):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


Z, T = torch.randn(4, 30), torch.randn(4, 30)
IDS, LOGS = torch.arange(3).expand(4, 3), torch.full((4, 3), -2.0)
TEACHER = ops.SparseTeacher(IDS, LOGS, 30)
ERRORS = [
    (TypeError, "ids must be an int32 or int64", lambda: ops.SparseTeacher(LOGS, LOGS, 30)),
    (TypeError, "log_probs must be a floating", lambda: ops.SparseTeacher(IDS, IDS, 30)),
    (ValueError, r"both be \[..., k\]", lambda: ops.SparseTeacher(IDS[:, :2], LOGS, 30)),
    (ValueError, "k = 3 columns are more than the 2", lambda: ops.SparseTeacher(IDS, LOGS, 2)),
    (ValueError, "id 30 of row 0 is outside", lambda: ops.SparseTeacher(IDS + 28, LOGS, 30)),
    (ValueError, "id 2 comes twice in row 3", lambda: ops.SparseTeacher(_twice(), LOGS, 30)),
    (ValueError, "row 0 add up to 3", lambda: ops.SparseTeacher(IDS, 0 * LOGS, 30)),
    (
        ValueError,
        "tail must be one of bucket, renormalize, uniform, drop, got 'zero'",
        lambda: ops.SparseTeacher(IDS, LOGS, 30, tail="zero"),
    ),
    (ValueError, "temperature must be", lambda: ops.SparseTeacher(IDS, LOGS, 30, temperature=0.0)),
    (ValueError, "needs k= ", lambda: ops.SparseTeacher.from_logits(T)),
    (ValueError, r"k must lie in \[1, 30\]", lambda: ops.SparseTeacher.from_logits(T, k=31)),
    (ValueError, r"p must lie in \(0, 1\]", lambda: ops.SparseTeacher.from_logits(T, p=0.0)),
    (TypeError, "logits must be a floating", lambda: ops.SparseTeacher.from_logits(IDS, k=1)),
    (
        ValueError,
        "temperature must be",
        lambda: ops.SparseTeacher.from_logits(T, k=1, temperature=0.0),
    ),
    (
        ValueError,
        r"log_rest must be floating-point \(4,\)",
        lambda: ops.SparseTeacher(IDS, LOGS, 30, log_rest=LOGS),
    ),
    (ValueError, "draws must be", lambda: ops.SparseTeacher.sample(T, 0)),
    (ValueError, "same rows", lambda: ops.divergence(Z[:3], TEACHER)),
    (ValueError, "pass vocab_size=30", lambda: ops.divergence(torch.randn(4, 32), TEACHER)),
    (
        ValueError,
        "vocab_size must be the sparse",
        lambda: ops.divergence(Z, TEACHER, vocab_size=29),
    ),
    (
        ValueError,
        "the student only 28",
        lambda: ops.divergence(torch.randn(4, 28), TEACHER, vocab_size=30),
    ),
    (
        ValueError,
        'DKD cannot be taken to a SparseTeacher with tail="bucket" or any other',
        lambda: ops.divergence(Z, TEACHER, "dkd", labels=torch.arange(4)),
    ),
    (
        ValueError,
        'tail="renormalize", only with bucket, uniform',
        lambda: ops.divergence(Z, dataclasses.replace(TEACHER, tail="renormalize"), "reverse_kl"),
    ),
    (
        ValueError,
        "made at temperature 1 cannot be used at 2",
        lambda: ops.divergence(Z, TEACHER, temperature=2.0),
    ),
    (
        RuntimeError,
        "at its own temperature alone",
        lambda: ops.divergence(Z, TEACHER, temperature=torch.tensor(2.0)),
    ),
    (
        ValueError,
        "has probabilities, no logits",
        lambda: ops.divergence(Z, TEACHER, logit_scale=(1.0, 2.0)),
    ),
    (ValueError, "SupportKL compares the columns", lambda: ops.divergence(Z, T, "support_kl")),
    (
        ValueError,
        "SparseTeacher has no gradient",
        lambda: ops.divergence(Z, ops.SparseTeacher(IDS, LOGS.clone().requires_grad_(), 30)),
    ),
]


def _twice():
    ids = IDS.clone()
    ids[3, 0] = 2
    return ids


@pytest.mark.parametrize(("error", "message", "call"), ERRORS, ids=[m for _, m, _ in ERRORS])
def test_errors(error, message, call):
    with pytest.raises(error, match=message):
        call()


def test_ids_that_nobody_checked_make_their_row_nan(level):
    # As on an accelerator, where the values are not looked at beforehand.
    z, t = pair(width=40)
    teacher = ops.SparseTeacher.from_logits(t, k=4)
    teacher.ids[1, 2], teacher.ids[3, 0], teacher.ids[4, 1] = 40, teacher.ids[3, 1], -7
    leaf = z.float().requires_grad_()
    wrong = [False, True, False, True, True]
    for kind, tail in (("forward_kl", "bucket"), ("jsd", "uniform"), ("support_kl", "drop")):
        value = ops.divergence(leaf, dataclasses.replace(teacher, tail=tail, _trusted=True), kind)
        (gradient,) = torch.autograd.grad(value.sum(), leaf)
        assert value.isnan().tolist() == wrong
        assert gradient.isnan().all(-1).tolist() == wrong
    # Logits instead of their log-softmax.
    logits = dataclasses.replace(
        teacher, log_probs=teacher.log_probs + 9, log_rest=None, _trusted=True
    )
    assert ops.divergence(leaf, logits).isnan().all()


def test_ids_of_64_bits_are_not_cut():
    ids = torch.tensor([[2**32 + 5]])
    with pytest.raises(ValueError, match="is outside"):
        ops.SparseTeacher(ids, torch.zeros(1, 1), 30)
    assert ops.SparseTeacher(ids, torch.zeros(1, 1), 30, _trusted=True).ids.item() == 30
