"""One table: every kind x dtype x instruction set x path x awkward width x argument, against the
plain torch reference in float64, which test_reference.py holds against the definitions."""

import pytest
import torch

from stillhouse import ops
from stillhouse.ops import divergence_autograd
from stillhouse.ops.divergence_arguments import check_call
from stillhouse.ops.divergence_reference import reference

LEVELS = [*range(ops.cpu_level() + 1), "simt", "cuda"]
_device = "cpu"  # of what logits() makes; the reference runs on the CPU
KINDS = [
    ops.ForwardKL(),
    ops.ReverseKL(),
    ops.JSD(),
    ops.JSD(0.1),
    ops.SkewKL(),
    ops.SkewReverseKL(0.3),
    ops.TVD(),
    ops.TAID(0.0),
    ops.TAID(0.4),
    ops.TAID(1.0),
    ops.JSD(0.2, normalize=True),
    ops.SoftCrossEntropy(),
    ops.SymmetricKL(0.3),
    ops.Hellinger(),
    ops.Chi2(),
    ops.LogAcceptance(),
    ops.AlphaBeta(),
    ops.AlphaBeta(0.0, 0.6),
    ops.AlphaBeta(0.6, 0.0),
    ops.AlphaBeta(0.4, -0.4),
    ops.AlphaBeta(0.0, 0.0),
    ops.Amari(0.3),
    ops.Renyi(0.5),
    ops.Renyi(1.5),
    ops.MSELogits(),
    ops.MSELogits("centered"),
    ops.MSELogits("log_probs"),
    ops.CosineLogits(),
    ops.CosineProbs(),
    ops.StandardizedKL(),
    ops.AdaptiveKL(),
    ops.AdaptiveKL(0.9),
    ops.DKD(),
    ops.ULD(),
]
POWERS = (ops.AlphaBeta, ops.Amari, ops.Renyi, ops.Chi2)
WIDTHS = [1, 2, 7, 31, 49, 123, 252, 507, 1000, 2048, 2049, 5003]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
GRADIENT_ROUNDING = {
    torch.float32: 3e-6,
    torch.bfloat16: 4e-3,
    torch.float16: 1e-3,
    torch.float64: 1e-12,
}


@pytest.fixture(params=LEVELS, ids=lambda n: f"level{n}")
def level(request):
    """An instruction set of the CPU, or the CUDA kernels: on tests/simt's executor, on a GPU."""
    global _device
    if request.param == "simt":
        request.getfixturevalue("simt")
        yield "simt"
        return
    if request.param == "cuda":
        _device = "cuda"
        yield "cuda"
        _device = "cpu"
        return
    best = ops.cpu_level()
    ops.cpu_level(request.param)
    yield request.param
    ops.cpu_level(best)


@pytest.fixture(params=["resident", "streaming", "chosen"])
def path(request, monkeypatch):
    """Short rows are taken together only where the kernel chooses the path."""
    limit = {"resident": 1 << 30, "streaming": 0, "chosen": -1}[request.param]
    monkeypatch.setattr(divergence_autograd, "_resident_limit", limit)
    return request.param


def widths(level):
    # What the executor leaves out is awkward to vectors of a CPU, not to chunks of 16 bytes.
    return [1, 2, 31, 49, 252, 1000, 2048, 2049] if level == "simt" else WIDTHS


def logits(rows, width, dtype, scale=3.0):
    return (torch.randn(rows, width) * scale).to(_device, dtype)


def labels_for(kind, teacher, arguments):
    """Some of the teacher's own choice, if the kind wants any."""
    if not isinstance(kind, ops.DKD):
        return {}
    shown = teacher[..., : arguments.get("vocab_size", teacher.shape[-1])].cpu()
    labels = torch.randint(0, shown.shape[-1], shown.shape[:-1])
    return {"labels": torch.where(torch.rand(labels.shape) < 0.5, labels, shown.argmax(-1))}


def probabilities(call):
    """How many columns of the student are read, and the probabilities of both sides."""
    sides = []
    for i, x in enumerate((call.student.detach(), call.teacher)):
        temperature, scale, cap = call.numbers[[i, 2 + i, 4 + i]]
        x = scale * (x if call.vocab < 0 else x[..., : call.vocab])
        sides.append(torch.softmax((cap * torch.tanh(x / cap) if cap > 0 else x) / temperature, -1))
    return sides[0].shape[-1], *sides


def tied(q, p):
    """Columns whose partner of the same rank is as large, to rounding: ULD has them of any sign."""
    order = q.argsort(dim=-1, descending=True, stable=True)
    width = max(q.shape[-1], p.shape[-1])
    q, p = (
        torch.nn.functional.pad(x.sort(dim=-1, descending=True).values, (0, width - x.shape[-1]))
        for x in (q, p)
    )
    close = (q - p).abs() <= 3e-6 * (q + p)
    gap = -q.diff(dim=-1)  # neighbours may have changed places
    swapped = (gap > 0) & (gap <= 3e-6 * q[..., 1:])
    close[..., 1:] |= swapped
    close[..., :-1] |= swapped
    return torch.zeros(order.shape, dtype=torch.bool).scatter(
        -1, order, close[..., : order.shape[-1]]
    )


def compare(student, teacher, kind, mask=None, **arguments):
    """Value, statistics and student gradient of the op, against the reference in float64."""
    student = student.detach().requires_grad_()
    arguments = labels_for(kind, teacher, arguments) | arguments
    placed = {k: v.to(_device) if torch.is_tensor(v) else v for k, v in arguments.items()}
    on_device = None if mask is None else mask.to(_device)
    value, stats = ops.divergence(
        student, teacher, kind, mask=on_device, return_stats=True, **placed
    )
    with torch.no_grad():  # another kernel, on CUDA
        alone = ops.divergence(student, teacher, kind, mask=on_device, **placed)
    torch.testing.assert_close(alone, value, rtol=1e-5, atol=5e-7)
    upstream = torch.rand_like(value) + 0.5
    (gradient,) = torch.autograd.grad(value, student, upstream)

    value, upstream, gradient = value.cpu(), upstream.cpu(), gradient.cpu()
    stats = [s.cpu() for s in stats]
    exact = student.detach().cpu().double().requires_grad_()
    names = (
        "temperature",
        "teacher_temperature",
        "vocab_size",
        "logit_softcap",
        "logit_scale",
        "labels",
    )
    defaults = {"temperature": 1.0, "logit_scale": 1.0}
    call = check_call(
        exact,
        None if teacher is None else teacher.cpu().double(),
        kind,
        *(arguments.get(n, defaults.get(n)) for n in names),
        0.0,
    )
    expected, expected_stats = reference(call, mask, True)
    (expected_gradient,) = torch.autograd.grad(expected, exact, upstream.double())

    double = value.dtype == torch.float64
    rtol, atol = (1e-12, 1e-14) if double else (1e-5, 5e-7)
    torch.testing.assert_close(value.double(), expected, rtol=rtol, atol=atol)
    largest = expected_gradient.abs().amax().item()
    # Without fma (the baseline of x86-64) an exponent is rounded twice.
    rounding = GRADIENT_ROUNDING[student.dtype] * (3 if ops.cpu_level() == 0 else 1)
    assert gradient.dtype == student.dtype
    assert gradient.shape == student.shape
    if isinstance(kind, POWERS):  # an exponent of 20 has three times the rounding of one of 7
        rounding *= 3
    if largest > torch.finfo(student.dtype).max:
        assert gradient.isinf().any()
        return
    errors = (gradient.double() - expected_gradient).abs()
    if isinstance(kind, ops.ULD) and not double:
        read, q, p = probabilities(call)
        errors[..., :read][tied(q, p)] = 0
    error = errors.amax().item()
    # Where q - p cancels: 2.5 last places of a probability of 1, and float16's own last place.
    absolute = 3e-7 * upstream.max().item() + (6e-8 if student.dtype == torch.float16 else 0)
    assert error <= rounding * largest + absolute, (error, largest)
    # student_below jumps where p and q tie, so it is compared away from ties in test_properties.py
    got = torch.stack(stats)[:6].double()
    torch.testing.assert_close(got, expected_stats[:6], rtol=2e-6, atol=2e-6, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=repr)
def test_widths(kind, dtype, level, path):
    for width in widths(level):
        if width < 7 and isinstance(kind, ops.CosineLogits | ops.StandardizedKL | ops.DKD):
            continue  # a row of one has no variance, no direction, no rest
        rows = (9 if level == "simt" else 75) if width < 300 else 3
        compare(logits(rows, width, dtype), logits(rows, width, dtype), kind)


ARGUMENTS = {
    "temperature": {"temperature": 2.5},
    "teacher_temperature": {"temperature": 0.7, "teacher_temperature": 3.0},
    "softcap": {"logit_softcap": 4.0},
    "softcap_student": {"logit_softcap": (2.0, None), "temperature": 1.3},
    "scale": {"logit_scale": 0.25},
    "scale_pair": {"logit_scale": (0.5, 2.0), "logit_softcap": (None, 5.0)},
    "vocab_size": {"vocab_size": 200},
}


@pytest.mark.parametrize("arguments", ARGUMENTS.values(), ids=ARGUMENTS.keys())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=repr)
def test_arguments(kind, dtype, arguments, level, path):
    # Above 248 columns streaming is the kernel's own choice.
    once = level == "simt" and path == "streaming"
    for width in (252,) if once else (252, 2311):
        compare(logits(2, width, dtype), logits(2, width, dtype), kind, **arguments)


@pytest.mark.parametrize("teacher", DTYPES, ids=lambda d: f"teacher_{d}")
@pytest.mark.parametrize("student", DTYPES, ids=lambda d: f"student_{d}")
@pytest.mark.parametrize("kind", [ops.ForwardKL(), ops.JSD(), ops.TAID(0.4)], ids=repr)
def test_mixed_dtypes(kind, student, teacher, level, path):
    for width in (64, 507):
        compare(logits(2, width, student), logits(2, width, teacher), kind)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=repr)
def test_wider_teacher(kind, dtype, level):
    compare(logits(2, 130, dtype), logits(2, 192, dtype), kind, vocab_size=123)
    compare(logits(2, 192, dtype), logits(2, 130, dtype), kind, vocab_size=130)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=repr)
def test_masked_columns(kind, dtype, level, path):
    """-inf in both rows, whole blocks of them included, and far maxima beyond the first block."""
    student, teacher = logits(2, 5003, dtype), logits(2, 5003, dtype)
    hidden = (torch.rand(5003) < 0.3).to(_device)
    hidden[:2100] = True
    hidden[[4000, 4100, 4500]] = False
    student[:, hidden], teacher[:, hidden] = -torch.inf, -torch.inf
    student[:, 4000] += 60
    teacher[:, 4500] += 60
    compare(student, teacher, kind)
    # Beyond what float32 can hold relative to the first block: e^200.
    student[:, 4100], teacher[:, 4100] = 200, 200
    teacher[:, 4500] = 203
    if isinstance(kind, ops.Chi2 | ops.Renyi) and kind != ops.Renyi(0.5) and dtype.itemsize < 8:
        assert ops.divergence(student, teacher, kind).eq(torch.inf).all()  # e^100 and more
    else:
        compare(student, teacher, kind)
        # Far below zero, after a block of -inf alone.
        compare(student - 500, teacher - 500, kind)
    short_student, short_teacher = logits(40, 49, dtype), logits(40, 49, dtype)
    short_student[:, 5:20], short_teacher[:, 5:20] = -torch.inf, -torch.inf
    short_student[3, 30], short_teacher[4, 31] = 40, 40
    compare(short_student, short_teacher, kind)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", [ops.ForwardKL(), ops.SkewKL(), ops.TVD()], ids=repr)
def test_masked_teacher_columns(kind, dtype, level):
    """p = 0 where q > 0 is legal: that is what a top-k teacher looks like."""
    student, teacher = logits(2, 300, dtype), logits(2, 300, dtype)
    teacher[:, 17:] = -torch.inf
    compare(student, teacher, kind)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=repr)
def test_masked_rows_are_not_read(kind, dtype, level):
    for rows, width in ((4, 350), (75, 49)):
        scale = 1.0 if isinstance(kind, ops.Chi2) else 3.0  # float16 ends at 65,504
        student = logits(rows, width, dtype, scale)
        teacher = logits(rows, width, dtype, scale)
        mask = torch.rand(rows) < 0.6
        mask[:2] = torch.tensor([True, False])
        compare(student, teacher, kind, mask=mask)
        student[~mask], teacher[~mask] = torch.nan, torch.nan
        student.requires_grad_()
        labels = labels_for(kind, teacher, {}).get("labels")
        labels = labels if labels is None else labels.to(_device)
        value, stats = ops.divergence(
            student, teacher, kind, mask=mask.to(_device), labels=labels, return_stats=True
        )
        value.sum().backward()
        mask = mask.to(_device)
        assert value[~mask].eq(0).all()
        assert torch.stack(stats)[:, ~mask].eq(0).all()
        assert student.grad[~mask].eq(0).all()
        assert student.grad.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", [ops.ForwardKL(), ops.ReverseKL()], ids=repr)
def test_layouts(kind, dtype, level):
    """Leading dimensions, slices of longer sequences, transposes, one row, no row."""
    whole_student, whole_teacher = logits(12, 300, dtype), logits(12, 300, dtype)
    compare(whole_student.view(2, 6, 300)[:, :-1], whole_teacher.view(2, 6, 300)[:, 1:], kind)
    compare(whole_student.view(3, 4, 300).transpose(0, 1), whole_teacher.view(4, 3, 300), kind)
    compare(whole_student.t(), whole_teacher.t(), kind)
    compare(whole_student[0], whole_teacher[0], kind)
    compare(whole_student[:, 40:140], whole_teacher[:, 41:141], kind)
    empty = whole_student[:0].clone().requires_grad_()
    value = ops.divergence(empty, whole_teacher[:0], kind)
    value.sum().backward()
    assert value.shape == (0,)
    assert empty.grad.shape == (0, 300)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cross_entropy(dtype, smoothing, level, path):
    kind = ops.CrossEntropy(smoothing)
    for width in widths(level):
        labels = torch.randint(0, width, (4,))
        labels[2] = -100
        compare(logits(4, width, dtype), None, kind, labels=labels, temperature=1.5)
    compare(
        logits(4, 300, dtype), None, kind, labels=labels % 200, vocab_size=200, logit_softcap=3.0
    )


@pytest.mark.parametrize("width", [32, 512])
def test_bfloat16_rounds_ties_to_even(width, level):
    """Gradients w q with q = 2^-n exactly and w half way between two bfloat16 numbers."""
    z = torch.zeros(2, width, dtype=torch.bfloat16, device=_device, requires_grad=True)
    t = torch.full((2, width), -torch.inf, dtype=torch.bfloat16, device=_device)
    t[:, 0] = 0
    value = ops.divergence(z, t)
    value.backward(torch.tensor([1 + 1 / 256, 1 + 3 / 256], device=_device))
    assert (z.grad[0, 1:] * width).eq(1).all()
    assert (z.grad[1, 1:] * width).eq(1 + 1 / 64).all()


@pytest.mark.parametrize("width", [151_936, 262_144])
@pytest.mark.parametrize("kind", [ops.ForwardKL(), ops.JSD(), ops.TAID(0.4)], ids=repr)
def test_long_rows(kind, width, path):
    compare(logits(1, width, torch.float32), logits(1, width, torch.float32), kind)
    compare(logits(1, width, torch.bfloat16), logits(1, width, torch.bfloat16), kind)


def test_a_label_outside_makes_its_row_nan_on_cuda(simt):
    """To raise, the host would have to wait for the device."""
    value = ops.divergence(
        torch.randn(3, 49), None, "cross_entropy", labels=torch.tensor([48, 49, -7])
    )
    assert value.isnan().tolist() == [False, True, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [9_001, 32_001, 262_144])
def test_long_rows_on_the_executor(width, dtype, simt):
    """In shared memory up to 12,500 columns (float32) or 25,000, as on the smallest GPUs."""
    compare(logits(2, width, dtype), logits(2, width, dtype), ops.JSD())


@pytest.mark.parametrize("width", [7, 49, 300, 1003, 4099])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_guarded_rows(dtype, width, level):
    """NaN between the rows: it is neither read nor written over."""
    wide = torch.full((2, 3, width + 40), torch.nan, dtype=dtype, device=_device)
    student, teacher = wide[0, :, :width], wide[1, :, :width]
    student[:], teacher[:] = logits(3, width, dtype), logits(3, width, dtype)
    compare(student, teacher, ops.JSD())
    leaf = wide.clone().requires_grad_()
    ops.divergence_loss((leaf * 1)[0, :, :width], teacher, inplace_grad=True).backward()
    assert leaf.grad[0, :, :width].isfinite().all()
    inside = wide.clone()
    with torch.no_grad():
        numbers = torch.tensor([1, 1, 1, 1, 0, 0, 0, 0, 0.5, 0, 1], dtype=torch.float64)
        double = dtype == torch.float64
        weight = torch.ones(3, dtype=torch.float64 if double else torch.float32, device=_device)
        divergence_autograd._kernels.divergence_loss_(
            inside[0, :, :width], teacher, numbers, weight, None, ops.JSD.number
        )
    assert inside[0, :, width:].isnan().all()
    assert inside[0, :, :width].isfinite().all()


def test_a_row_beyond_the_allocation_is_not_touched():
    """Rows end where the tensor ends: guard values behind them stay, in place included."""
    memory = torch.randn(3 * 507 + 64)
    memory[3 * 507 :] = 7.0
    student = memory[: 3 * 507].view(3, 507).requires_grad_()
    z = student.view(3, 507)
    ops.divergence_loss(z, torch.randn(3, 507), inplace_grad=True).backward()
    assert memory[3 * 507 :].eq(7.0).all()
