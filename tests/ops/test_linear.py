"""Linear divergences against the dense ones on materialised logits, for every chunk size."""

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F

from stillhouse import ops
from stillhouse.ops import divergence_autograd

N, V = 21, 197
KINDS = [
    ops.ForwardKL(),
    ops.JSD(0.3),
    ops.TAID(0.4),
    ops.AdaptiveKL(),
    ops.ULD(),
    ops.CosineLogits(),
    ops.CrossEntropy(0.1),
    ops.DKD(),
]
CHUNKS = [1, 4, 16, 20, 1000, None]


class Problem:
    """Student and teacher as heads; `leaves` are what gets a gradient."""

    def __init__(self, dtype=torch.float64, bias=True, frozen=False, columns=V):
        self.hidden = torch.randn(N, 12, dtype=dtype).requires_grad_()
        self.weight = torch.randn(V, 12, dtype=dtype).requires_grad_(not frozen)
        self.bias = torch.randn(V, dtype=dtype).requires_grad_(not frozen) if bias else None
        teacher = (torch.randn(s, dtype=dtype) for s in ((N, 7), (columns, 7), (columns,)))
        self.teacher = ops.LinearTeacher(*teacher)
        self.labels = torch.randint(0, 150, (N,))
        self.labels[3] = -100

    @property
    def leaves(self):
        return [x for x in (self.hidden, self.weight, self.bias) if x is not None]

    @property
    def learning(self):
        return [x for x in self.leaves if x.requires_grad]

    def logits(self):
        student = F.linear(*(x.double() for x in self.leaves))
        t = self.teacher
        return student, F.linear(t.hidden.double(), t.weight.double(), t.bias.double())

    def of_kind(self, kind):
        """What labels and teacher the kind takes."""
        labels = {"labels": self.labels} if kind.needs_labels else {}
        return self.teacher if kind.needs_teacher else None, labels


def check(got, want, rtol=1e-9):
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=rtol, atol=rtol * b.abs().max().item())


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("kind", KINDS, ids=repr)
def test_both_forms_equal_the_dense_ones(kind, chunk, kernels):
    p = Problem()
    teacher, labels = p.of_kind(kind)
    z, t = p.logits()
    dense = (z, t if teacher is not None else None, kind)
    head = {"student_bias": p.bias, "chunk_rows": chunk}

    weight = torch.rand(N, dtype=torch.float64) - 0.3
    want, want_stats = ops.divergence(*dense, **labels, return_stats=True)
    want_gradients = torch.autograd.grad((want * weight).sum(), p.learning, retain_graph=True)
    got, stats = ops.linear_divergence(
        p.hidden, p.weight, teacher, kind, **head, **labels, return_stats=True
    )
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
    for a, b in zip(stats, want_stats, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12, equal_nan=True)
    check(torch.autograd.grad((got * weight).sum(), p.learning), want_gradients)

    weight = weight.abs() * (torch.arange(N) % 4 != 1)
    arguments = {"weight": weight, "denominator": 7.0, **labels}
    if kind.needs_teacher:
        arguments |= {"labels": p.labels, "label_weight": 0.3}
    want = ops.divergence_loss(*dense, **arguments)
    want_gradients = torch.autograd.grad(3 * want, p.learning)
    got = ops.linear_divergence_loss(p.hidden, p.weight, teacher, kind, **head, **arguments)
    check([got], [want])
    check(torch.autograd.grad(3 * got, p.learning), want_gradients)


ARGUMENTS = [
    {"temperature": 2.0, "teacher_temperature": 1.5},
    {"logit_softcap": (3.0, None), "logit_scale": 0.5},
    {"vocab_size": 150},
    {"mask": torch.arange(N) % 3 > 0},
    {"reduction": "sum"},
]


def placed(arguments):
    """Tensors where others are made now."""
    device = torch.get_default_device()
    return {k: v.to(device) if torch.is_tensor(v) else v for k, v in arguments.items()}


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=lambda a: "-".join(a))
@pytest.mark.parametrize("teacher", ["linear", "logits", "logits bf16"])
@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
def test_arguments(arguments, teacher, frozen, device):
    p, arguments = Problem(frozen=frozen), placed(arguments)
    z, t = p.logits()
    if teacher == "logits bf16":
        t = t.bfloat16()
    given = p.teacher if teacher == "linear" else t
    head = {"student_bias": p.bias, "chunk_rows": 8}
    want = ops.divergence_loss(z, t, "jsd", **arguments)
    want_gradients = torch.autograd.grad(want, p.learning)
    got = ops.linear_divergence_loss(p.hidden, p.weight, given, "jsd", **head, **arguments)
    check([got], [want])
    check(torch.autograd.grad(got, p.learning), want_gradients)
    if "reduction" in arguments:
        return
    z, _ = p.logits()
    want = ops.divergence(z, t, "jsd", **arguments)
    got = ops.linear_divergence(p.hidden, p.weight, given, "jsd", **head, **arguments)
    check([got], [want])
    check(
        torch.autograd.grad(got.square().sum(), p.learning),
        torch.autograd.grad(want.square().sum(), p.learning),
    )


def test_a_teacher_of_another_width_takes_vocab_size_or_uld(device):
    p = Problem(columns=V + 30)
    with pytest.raises(ValueError, match="pass vocab_size="):
        ops.linear_divergence(p.hidden, p.weight, p.teacher, student_bias=p.bias)
    z, t = p.logits()
    for kind, arguments in (("forward_kl", {"vocab_size": V}), ("uld", {})):
        want = ops.divergence(z, t, kind, **arguments)
        got = ops.linear_divergence(
            p.hidden, p.weight, p.teacher, kind, student_bias=p.bias, chunk_rows=8, **arguments
        )
        check([got], [want])


def test_leading_dimensions_and_empty_batches(device):
    p = Problem()
    hidden = p.hidden.view(3, 7, 12)
    teacher = ops.LinearTeacher(p.teacher.hidden.view(3, 7, 7), *(p.teacher.weight, p.teacher.bias))
    got, stats = ops.linear_divergence(
        hidden, p.weight, teacher, student_bias=p.bias, return_stats=True
    )
    want = ops.divergence(*p.logits())
    assert got.shape == stats.acceptance.shape == (3, 7)
    check([got.flatten()], [want])
    none = ops.LinearTeacher(teacher.hidden[:0], teacher.weight, teacher.bias)
    loss = ops.linear_divergence_loss(hidden[:0], p.weight, none, student_bias=p.bias)
    gradients = torch.autograd.grad(loss, p.learning)
    assert loss == 0
    assert all(g.eq(0).all() for g in gradients)
    assert ops.linear_divergence(hidden[:0], p.weight, none, student_bias=p.bias).shape == (0, 7)


def test_rows_that_do_not_count_are_not_read(device):
    p = Problem()
    mask = torch.arange(N) % 2 == 0
    p.hidden.data[~mask] = torch.nan
    p.teacher.hidden[~mask] = torch.nan
    head = {"student_bias": p.bias, "chunk_rows": 4}
    want = Problem.logits(p)
    want = ops.divergence(want[0][mask].detach(), want[1][mask])
    loss = ops.linear_divergence_loss(p.hidden, p.weight, p.teacher, mask=mask, **head)
    rows = ops.linear_divergence(p.hidden, p.weight, p.teacher, mask=mask, **head)
    check([loss, rows[mask]], [want.mean(), want])
    assert rows[~mask].eq(0).all()
    for value in (loss, rows.sum()):
        gradients = torch.autograd.grad(value, p.learning)
        assert all(g.isfinite().all() for g in gradients)
        assert gradients[0][~mask].eq(0).all()


@pytest.mark.parametrize("chunk", [4, None])
def test_a_shared_head_gets_the_students_gradient_alone(chunk, device):
    hidden, other = torch.randn(N, 12).requires_grad_(), torch.randn(N, 12)
    head = torch.randn(V, 12).requires_grad_()
    teacher = ops.LinearTeacher(other, head)
    loss = ops.linear_divergence_loss(hidden, head, teacher, chunk_rows=chunk)
    rows = ops.linear_divergence(hidden, head, teacher, chunk_rows=chunk)
    with torch.no_grad():
        t = other @ head.t()
    want = torch.autograd.grad(ops.divergence(hidden @ head.t(), t).mean(), (hidden, head))
    for value in (loss, rows.mean()):
        check(torch.autograd.grad(value, (hidden, head)), [w.double() for w in want], 2e-5)


def test_tied_embeddings(device):
    table = torch.nn.Embedding(V, 12, dtype=torch.float64)
    ids, t = torch.randint(0, V, (N,)), torch.randn(N, V, dtype=torch.float64)
    want = ops.divergence_loss(table(ids).tanh() @ table.weight.t(), t)
    want = torch.autograd.grad(want, table.weight)
    got = ops.linear_divergence_loss(table(ids).tanh(), table.weight, t, chunk_rows=8)
    check(torch.autograd.grad(got, table.weight), want)


TOLERANCE = {torch.float32: 3e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("chunk", [2, None])
def test_precision_against_float64(dtype, chunk, device):
    torch.manual_seed(1)
    p = Problem()
    exact = [x.detach().to(dtype).double().requires_grad_() for x in p.leaves]
    low = [x.detach().to(dtype).requires_grad_() for x in exact]
    t = (x.to(dtype) for x in (p.teacher.hidden, p.teacher.weight, p.teacher.bias))
    teacher = ops.LinearTeacher(*t)
    t = F.linear(*(x.double() for x in (teacher.hidden, teacher.weight, teacher.bias)))
    want = ops.divergence_loss(F.linear(*exact), t, "jsd")
    want_gradients = torch.autograd.grad(want, exact)
    got = ops.linear_divergence_loss(
        low[0], low[1], teacher, "jsd", student_bias=low[2], chunk_rows=chunk
    )
    assert got.dtype == torch.float32
    gradients = torch.autograd.grad(got, low)
    assert [g.dtype for g in gradients] == [dtype] * 3
    check([got, *gradients], [want, *want_gradients], TOLERANCE[dtype])


def test_the_weights_gradient_is_summed_in_float32(device):
    # 256 chunks of equal gradients: in bfloat16 the sum would stop growing at 256 times one.
    hidden = torch.ones(1024, 1, dtype=torch.bfloat16)
    weight = torch.zeros(4, 1, dtype=torch.bfloat16).requires_grad_()
    t = torch.tensor([[3.0, 0, 0, 0]]).expand(1024, 4)
    loss = ops.linear_divergence_loss(hidden, weight, t, chunk_rows=1, reduction="sum")
    (got,) = torch.autograd.grad(loss, weight)
    want = 1024 * (0.25 - t[0].softmax(-1))
    torch.testing.assert_close(got[:, 0].float(), want, rtol=6e-3, atol=0)


@pytest.mark.parametrize("form", ["loss", "rows"])
def test_autocast_makes_the_products_in_its_own_dtype(form, device):
    p = Problem(torch.float32)
    with torch.autocast(device, torch.bfloat16):
        if form == "loss":
            got = ops.linear_divergence_loss(
                p.hidden, p.weight, p.teacher, student_bias=p.bias, chunk_rows=4
            )
        else:
            got = ops.linear_divergence(
                p.hidden, p.weight, p.teacher, student_bias=p.bias, chunk_rows=4
            ).mean()
        z = F.linear(*p.leaves)
        t = F.linear(p.teacher.hidden, p.teacher.weight, p.teacher.bias)
    assert z.dtype == torch.bfloat16
    want = ops.divergence(z, t).mean()
    assert got.dtype == torch.float32
    gradients = torch.autograd.grad(got, p.learning)
    assert [g.dtype for g in gradients] == [torch.float32] * 3
    want = [want, *torch.autograd.grad(want, p.learning)]
    check([got, *gradients], [w.double() for w in want], 1e-2)


def test_a_device_without_kernels_makes_whole_logits_and_says_so(monkeypatch):
    p = Problem()
    head = {"student_bias": p.bias}
    mask = torch.arange(N) % 3 > 0
    want = ops.linear_divergence_loss(p.hidden, p.weight, p.teacher, "jsd", mask=mask, **head)
    want = [want, *torch.autograd.grad(want, p.learning)]
    monkeypatch.setattr(divergence_autograd, "devices", set())
    with pytest.warns(UserWarning, match="no divergence kernel for cpu"):
        loss = ops.linear_divergence_loss(p.hidden, p.weight, p.teacher, "jsd", mask=mask, **head)
    with pytest.warns(UserWarning, match="no divergence kernel for cpu"):
        rows = ops.linear_divergence(p.hidden, p.weight, p.teacher, "jsd", mask=mask, **head)
    for got in (loss, rows.sum() / mask.sum()):
        check([got, *torch.autograd.grad(got, p.learning)], want)


def test_rows_that_nobody_asks_for_have_no_gradient(device):
    p = Problem(frozen=True)
    p.teacher.hidden[2] = torch.nan
    rows = ops.linear_divergence(p.hidden, p.weight, p.teacher, student_bias=p.bias)
    (gradient,) = torch.autograd.grad(rows[[0, 1, 3]].sum(), p.hidden)
    assert gradient.isfinite().all()
    assert gradient[2].eq(0).all()


@pytest.mark.parametrize("layout", ["transposed", "expanded", "strided"])
def test_memory_that_is_not_contiguous(layout, device):
    p = Problem(bias=False)
    hidden, weight, t = p.hidden, p.weight, F.linear(p.teacher.hidden, p.teacher.weight)
    if layout == "transposed":
        weight = weight.detach().t().contiguous().t().requires_grad_()
    elif layout == "expanded":
        hidden, t = hidden.detach()[:1].expand(N, 12).requires_grad_(), t[:1].expand(N, V)
    else:
        hidden = torch.stack([hidden, hidden], 1).detach()[:, 1].requires_grad_()
        t = torch.stack([t, t], 1)[:, 1]
    want = 3 * ops.divergence_loss(hidden @ weight.t(), t)
    want_gradients = torch.autograd.grad(want, (hidden, weight))
    for chunk in (8, None):
        got = 3 * ops.linear_divergence_loss(hidden, weight, t, chunk_rows=chunk)
        check([got, *torch.autograd.grad(got, (hidden, weight))], [want, *want_gradients])


def test_only_the_bias_learns(device):
    p = Problem()
    p.hidden.requires_grad_(False), p.weight.requires_grad_(False)
    want = torch.autograd.grad(ops.divergence(*p.logits()).mean(), p.bias)
    arguments = (p.hidden, p.weight, p.teacher)
    for chunk in (8, None):
        head = {"student_bias": p.bias, "chunk_rows": chunk}
        loss = ops.linear_divergence_loss(*arguments, **head)
        rows = ops.linear_divergence(*arguments, **head)
        for got in (loss, rows.mean()):
            check(torch.autograd.grad(got, p.bias), want)


def test_float16_gradients_survive_until_they_are_scaled(device):
    # As with a loss scale: what a row weighs alone would be lost in float16.
    p = Problem(torch.float32, bias=False)
    exact = [p.hidden.detach().half().double(), p.weight.detach().half().double()]
    exact = [x.requires_grad_() for x in exact]
    t = torch.randn(N, V)
    scale, denominator = 2.0**14, 1e6
    loss = ops.divergence_loss(F.linear(*exact), t, denominator=denominator)
    want = torch.autograd.grad(scale * loss, exact)
    for chunk in (8, None):
        low = [x.detach().half().requires_grad_() for x in exact]
        loss = ops.linear_divergence_loss(*low, t, denominator=denominator, chunk_rows=chunk)
        gradients = torch.autograd.grad(scale * loss, low)
        assert [g.dtype for g in gradients] == [torch.float16] * 2
        check(gradients, want, 4e-3)


def test_autocast_leaves_float64_alone_side_by_side(device):
    p = Problem(torch.float32)
    double = ops.LinearTeacher(*(x.double() for x in (p.teacher.hidden, p.teacher.weight)))
    with torch.autocast(device, torch.bfloat16):
        got = ops.linear_divergence(p.hidden.bfloat16(), p.weight, double, student_bias=p.bias)
    z = F.linear(*(x.bfloat16() for x in p.leaves))
    want = ops.divergence(z, F.linear(double.hidden, double.weight))
    assert got.dtype == torch.float64
    check([got], [want], 1e-6)


def test_a_teachers_own_bias_is_not_the_shared_heads():
    p = Problem(bias=False)
    bias = torch.randn(V, dtype=torch.float64).requires_grad_()
    with pytest.raises(ValueError, match="no gradient to the teacher"):
        ops.linear_divergence(
            p.hidden, p.weight, ops.LinearTeacher(p.hidden.detach(), p.weight, bias)
        )


def test_results_do_not_depend_on_threads():
    p = Problem(torch.float32)
    threads, found = torch.get_num_threads(), []
    for count in (1, 2):
        torch.set_num_threads(count)
        arguments = (p.hidden, p.weight, p.teacher, "jsd")
        loss = ops.linear_divergence_loss(*arguments, student_bias=p.bias, chunk_rows=8)
        found.append([loss, *torch.autograd.grad(loss, p.learning)])
    torch.set_num_threads(threads)
    # torch's products may differ in the last place.
    check(found[0], [x.double() for x in found[1]], 1e-5)


# --- autograd and the compiler --------------------------------------------------------------------


def test_second_passes_and_second_derivatives_raise(device):
    p = Problem(bias=False)
    loss = ops.linear_divergence_loss(p.hidden, p.weight, p.teacher)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="compute the loss again"):
        loss.backward()
    for frozen in (False, True):
        p = Problem(bias=False, frozen=frozen)
        for value in (
            ops.linear_divergence_loss(p.hidden, p.weight, p.teacher),
            ops.linear_divergence(p.hidden, p.weight, p.teacher).square().sum(),
        ):
            (gradient,) = torch.autograd.grad(value, p.hidden, create_graph=True)
            with pytest.raises(RuntimeError, match="no gradient of its own"):
                gradient.sum().backward()


def test_the_row_form_can_be_passed_twice(device):
    p = Problem(bias=False)
    rows = ops.linear_divergence(p.hidden, p.weight, p.teacher, chunk_rows=8)
    first = torch.autograd.grad(rows.sum(), p.learning, retain_graph=True)
    check(torch.autograd.grad(rows.sum(), p.learning), first)


def test_without_gradients_nothing_is_kept(device):
    p = Problem()
    with torch.no_grad():
        loss = ops.linear_divergence_loss(p.hidden, p.weight, p.teacher, student_bias=p.bias)
        rows = ops.linear_divergence(p.hidden, p.weight, p.teacher, student_bias=p.bias)
    assert not loss.requires_grad
    check([loss], [rows.mean()])


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compiles_without_breaks_or_recompilation(backend, device):
    def step(hidden, weight, other, head, mask, temperature):
        teacher = ops.LinearTeacher(other, head)
        rows = ops.linear_divergence(hidden, weight, teacher, "jsd", temperature=temperature)
        loss = ops.linear_divergence_loss(
            hidden, weight, teacher, mask=mask, temperature=temperature, chunk_rows=4
        )
        return rows.mean() + loss

    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    graphs = []
    for i in range(4):
        tensors = [torch.randn(s) for s in ((9 + i, 12), (V, 12), (9 + i, 7), (V, 7))]
        tensors[0].requires_grad_(), tensors[1].requires_grad_()
        rest = (torch.rand(9 + i) > 0.5, torch.tensor(1 + i / 4))
        got, want = compiled(*tensors, *rest), step(*tensors, *rest)
        torch.testing.assert_close(got, want)
        for a, b in zip(
            torch.autograd.grad(got, tensors[:2]),
            torch.autograd.grad(want, tensors[:2]),
            strict=True,
        ):
            torch.testing.assert_close(a, b)
        graphs.append(counter.frame_count)
    assert graphs[0] == graphs[-1] > 0


NUMBERS = torch.tensor([1.3, 0.7, 1, 1, 0, 0, 0.2, 0, 0.5, 0, 1], dtype=torch.float64)


def test_opcheck(kernels):
    S = divergence_autograd.kernels()
    p = Problem(torch.float32)
    t = p.teacher
    teacher = (t.hidden, t.weight, t.bias, None)
    common = (*p.leaves, *teacher, NUMBERS, p.labels, p.labels > 50, 3, 0, -1)
    for product in (None, torch.bfloat16):
        rows = (*common, product, product, 4)
        torch.library.opcheck(S.linear_divergence.default, (*rows, True, True))
        rows = (*(x.detach() if isinstance(x, torch.Tensor) else x for x in rows), torch.rand(N))
        torch.library.opcheck(S.linear_divergence_gradient.default, (*rows, True, True, True))
        torch.library.opcheck(S.linear_divergence_loss.default, (*rows, True, True, True, False))


def test_only_a_chunk_of_logits_exists_at_a_time():
    hidden, weight = torch.randn(512, 16).requires_grad_(), torch.randn(9000, 16)
    teacher = ops.LinearTeacher(torch.randn(512, 16), weight)
    with torch.profiler.profile(profile_memory=True) as profile:
        loss = ops.linear_divergence_loss(hidden, weight, teacher, chunk_rows=32)
        torch.autograd.grad(loss, hidden)
    largest = max(
        abs(event.cpu_memory_usage) for event in profile.events() if event.name == "aten::empty"
    )
    assert largest <= 32 * 9000 * 4  # 0 where the scratch of an earlier call is enough


# --- what a user can get wrong --------------------------------------------------------------------

X, W, T = torch.randn(4, 6), torch.randn(30, 6), torch.randn(4, 30)
ERRORS = [
    (TypeError, "student's hidden must be a tensor", lambda: ops.linear_divergence([1.0], W, T)),
    (ValueError, "must have one H", lambda: ops.linear_divergence(X, W[:, :5], T)),
    (ValueError, "must have one H", lambda: ops.LinearTeacher(X, W[:, :5])),
    (ValueError, r"bias must be \[30\]", lambda: ops.LinearTeacher(X, W, torch.randn(29))),
    (
        ValueError,
        r"bias must be \[30\]",
        lambda: ops.linear_divergence(X, W, T, student_bias=torch.randn(6)),
    ),
    (TypeError, "one dtype outside autocast", lambda: ops.linear_divergence(X.double(), W, T)),
    (
        TypeError,
        "LinearTeacher: hidden, weight and bias must have one dtype",
        lambda: ops.linear_divergence(X, W, ops.LinearTeacher(X.double(), W)),
    ),
    (
        ValueError,
        "same rows",
        lambda: ops.linear_divergence(X, W, ops.LinearTeacher(X[:3], W)),
    ),
    (ValueError, "pass vocab_size=", lambda: ops.linear_divergence(X, W, T[:, :20])),
    (
        ValueError,
        "no gradient to the teacher",
        lambda: ops.linear_divergence(X, W, T.clone().requires_grad_()),
    ),
    (
        ValueError,
        "no gradient to the teacher",
        lambda: ops.linear_divergence_loss(X, W, ops.LinearTeacher(X, W.clone().requires_grad_())),
    ),
    (TypeError, "weight must be float32", lambda: ops.linear_divergence(X, W.long(), T)),
    (ValueError, "chunk_rows must be", lambda: ops.linear_divergence(X, W, T, chunk_rows=0)),
    (ValueError, "needs labels", lambda: ops.linear_divergence_loss(X, W, T, label_weight=0.5)),
    (ValueError, "takes no labels", lambda: ops.linear_divergence(X, W, T, labels=torch.arange(4))),
    (ValueError, "mask must be", lambda: ops.linear_divergence(X, W, T, mask=torch.ones(3) > 0)),
    (
        RuntimeError,
        r"label 30 of row 3 is outside \[0, 30\)",
        lambda: ops.linear_divergence(
            X, W, None, "cross_entropy", labels=torch.tensor([-100, -100, -100, 30])
        ),
    ),
]


@pytest.mark.parametrize(("error", "message", "call"), ERRORS, ids=[m for _, m, _ in ERRORS])
def test_errors(error, message, call):
    with pytest.raises(error, match=message):
        call()
