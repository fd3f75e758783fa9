"""opcheck of every op, and torch.compile without graph breaks or recompilation."""

import pytest
import torch

from stillhouse import ops
from stillhouse.ops import divergence_autograd

NUMBERS = torch.tensor([1.3, 0.7, 1, 1, 0, 0, 0.2, 0, 0.5, 0, 1], dtype=torch.float64)
DTYPES = [torch.float32, torch.bfloat16, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype, kernels):
    S = divergence_autograd.kernels()
    z = torch.randn(3, 5, 20).to(dtype)
    t = torch.randn(3, 5, 20).to(dtype)
    labels = torch.randint(0, 17, (3, 5))
    result = torch.float64 if dtype == torch.float64 else torch.float32
    weight = torch.rand(3, 5, dtype=result)
    mask = torch.rand(3, 5) > 0.3
    for kind in (20, 21, 22):
        torch.library.opcheck(
            S.divergence.default,
            (z.clone().requires_grad_(), t, NUMBERS, mask, labels, kind),
        )
    for kind in (1, 3):
        for student, teacher in ((z.requires_grad_(), t), (z, t.clone().requires_grad_())):
            torch.library.opcheck(
                S.divergence.default, (student, teacher, NUMBERS, mask, None, kind, -1, True)
            )
    z = z.detach()
    torch.library.opcheck(
        S.divergence.default, (z.clone().requires_grad_(), None, NUMBERS, None, labels, 0)
    )
    torch.library.opcheck(S.divergence_gradient.default, (z, t, NUMBERS, weight, labels, 1))
    torch.library.opcheck(S.divergence_loss.default, (z, t, NUMBERS, weight, labels, 1, 17, True))
    torch.library.opcheck(
        S.divergence_loss_.default, (z.clone(), t, NUMBERS, weight, labels, 1, -1, True)
    )
    torch.library.opcheck(S.scale_.default, (z.clone(), torch.tensor(0.5, dtype=result)))


def count_compilations(step):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    return counter, torch.compile(step, fullgraph=True, dynamic=True, backend=counter)


def labels(z):
    return torch.arange(z.shape[0], device=z.device)


@pytest.mark.parametrize("kind", ["adaptive_kl", "dkd", "uld"])
def test_kinds_beyond_sums_of_columns_compile(kind, device):
    arguments = {"labels": labels} if kind == "dkd" else {}

    def step(z, t):
        with_labels = {name: make(z) for name, make in arguments.items()}
        return ops.divergence_loss(z * 1, t, kind, inplace_grad=True, **with_labels)

    _, compiled = count_compilations(step)
    z, t = torch.randn(4, 60).requires_grad_(), torch.randn(4, 60 if kind != "uld" else 90)
    (got,) = torch.autograd.grad(compiled(z, t), z)
    (want,) = torch.autograd.grad(step(z, t), z)
    torch.testing.assert_close(got, want)


def test_numbers_that_change_do_not_recompile(device):
    def step(z, t, weight, temperature):
        per_row = ops.divergence(z, t, ops.TAID(weight), temperature=temperature)
        per_row = per_row + ops.divergence(z, t, ops.AlphaBeta(weight, temperature))
        per_row = per_row + ops.divergence(z, t, ops.DKD(weight, temperature), labels=labels(z))
        return per_row.mean() + ops.divergence(z, t, "jsd", temperature=temperature).mean()

    counter, compiled = count_compilations(step)
    graphs = []  # compiled so far, after each step
    for i in range(12):
        z, t = torch.randn(3 + i, 50 + i).requires_grad_(), torch.randn(3 + i, 50 + i)
        arguments = (torch.tensor(i / 11), torch.tensor(1 + i / 4))
        loss = compiled(z, t, *arguments)
        (got,) = torch.autograd.grad(loss, z)
        expected = step(z, t, *arguments)
        (want,) = torch.autograd.grad(expected, z)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(got, want)
        graphs.append(counter.frame_count)
    assert len(set(graphs)) == 1


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("inplace", [False, True], ids=["fresh", "inplace"])
def test_the_loss_form_compiles(backend, inplace, device):
    def step(hidden, head, t, weight, temperature):
        z = hidden @ head.t()
        capped = 5 * torch.tanh(z / 5)
        return ops.divergence_loss(
            capped, t, ops.TAID(weight), temperature=temperature, inplace_grad=inplace
        )

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=backend)
    for i in range(3):
        hidden = torch.randn(4 + i, 16).requires_grad_()
        head = torch.randn(70, 16).requires_grad_()
        arguments = (torch.randn(4 + i, 70), torch.tensor(0.2 + i / 4), torch.tensor(1 + i / 4))
        loss = compiled(hidden, head, *arguments)
        loss.backward()

        def plain(hidden, head, t, weight, temperature):
            capped = 5 * torch.tanh(hidden @ head.t() / 5)
            return ops.divergence(capped, t, ops.TAID(weight), temperature=temperature).mean()

        expected = plain(hidden, head, *arguments)
        want = torch.autograd.grad(expected, (hidden, head))
        torch.testing.assert_close(loss, expected, rtol=3e-6, atol=3e-6)
        for got, target in zip((hidden.grad, head.grad), want, strict=True):
            torch.testing.assert_close(got, target, rtol=3e-6, atol=3e-6)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_a_logsumexp_before_raises_under_compile_too(backend, device):
    def step(hidden, head, t):
        z = hidden @ head.t()
        penalty = 1e-2 * z.logsumexp(-1).square().mean()
        return ops.divergence_loss(z, t, inplace_grad=True) + penalty

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    hidden, head, t = torch.randn(4, 16).requires_grad_(), torch.randn(70, 16), torch.randn(4, 70)
    with pytest.raises(Exception, match="modified by an inplace operation"):
        compiled(hidden, head, t).backward()
