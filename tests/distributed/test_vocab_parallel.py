"""Vocabularies in parts: two and three processes against whole rows in one."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from stillhouse import ops
from stillhouse.distributed import vocab_parallel_divergence, vocab_parallel_divergence_loss
from stillhouse.distributed.vocab_parallel import _SPLIT

KINDS = [
    "forward_kl",
    "reverse_kl",
    ops.JSD(0.3),
    ops.JSD(0.1, normalize=True),
    ops.SkewKL(0.2),
    ops.SkewReverseKL(0.2),
    "tvd",
    "soft_cross_entropy",
    ops.SymmetricKL(0.3),
    "hellinger",
    "chi2",
    "log_acceptance",
    ops.AlphaBeta(),
    ops.AlphaBeta(0.4, -0.4),
    ops.Amari(0.3),
    ops.Renyi(0.5),
]
DTYPES = [torch.float32, torch.float64, torch.bfloat16]
OPTIONS = [
    {},
    {"temperature": 2.0, "teacher_temperature": 1.5},
    {"logit_softcap": (5.0, None), "logit_scale": (0.5, 1.5)},
]
ROWS, COLUMNS = 6, 700
WIDTHS = {2: (450, 250), 3: (1, 300, 399)}  # of the parts


def logits(dtype):
    generator = torch.Generator().manual_seed(5)
    z = 3 * torch.randn(ROWS, COLUMNS, generator=generator)
    t = z + torch.randn(ROWS, COLUMNS, generator=generator)
    t[1] = z[1]  # equal rows
    t[2, : COLUMNS // 2] = -torch.inf
    z[3] += 1000.0
    z[4, -1] = 90.0
    return z.to(dtype), t.to(dtype)


def upstream():
    return torch.linspace(-1, 2, ROWS)


def each_case():
    for kind in KINDS:
        for dtype in DTYPES:
            for options in OPTIONS:
                yield kind, dtype, options


def work(rank, world, store, queue):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{store}", world_size=world, rank=rank)
    results = []
    for kind, dtype, options in each_case():
        z, t = (x.split(WIDTHS[world], -1)[rank].clone() for x in logits(dtype))
        z.requires_grad_()
        value = vocab_parallel_divergence(z, t, kind, **options)
        (value * upstream().to(value)).sum().backward()
        results.append((value.detach(), z.grad))
    z, t = (x.split(WIDTHS[world], -1)[rank].clone() for x in logits(torch.float32))
    z.requires_grad_()
    weight, mask = torch.arange(ROWS).float(), torch.arange(ROWS) != 3
    loss = vocab_parallel_divergence_loss(z, t, "jsd", weight=weight, mask=mask)
    loss.backward()
    results.append((loss.detach(), z.grad))
    queue.put((rank, dist.get_world_size(), [(v.numpy(), g.float().numpy()) for v, g in results]))
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=WIDTHS)
def found(request, tmp_path_factory):
    """Value of each case, and the gradient put together from all processes."""
    world = request.param
    context, store = mp.get_context("spawn"), tmp_path_factory.mktemp("store") / "store"
    queue = context.Queue()
    workers = [context.Process(target=work, args=(r, world, store, queue)) for r in range(world)]
    for worker in workers:
        worker.start()
    try:
        parts = dict((rank, rest) for rank, *rest in (queue.get(timeout=120) for _ in workers))
    finally:
        for worker in workers:
            worker.join(timeout=30)
            worker.kill()
    assert [parts[rank][0] for rank in range(world)] == [world] * world
    cases = []
    for each in zip(*(parts[rank][1] for rank in range(world)), strict=True):
        values = [torch.from_numpy(value) for value, _ in each]
        for value in values[1:]:
            assert torch.equal(value.nan_to_num(7.0), values[0].nan_to_num(7.0))
        cases.append((values[0], torch.cat([torch.from_numpy(g) for _, g in each], -1)))
    return cases


def test_the_kinds_are_those_that_can_be_split():
    assert {ops.as_kind(kind).kernel_number for kind in KINDS} <= set(_SPLIT)


def test_value_and_gradient_equal_those_of_whole_rows(found):
    tolerance = {torch.float32: 2e-5, torch.float64: 2e-6, torch.bfloat16: 1e-2}
    for (kind, dtype, options), (value, gradient) in zip(each_case(), found[:-1], strict=True):
        z, t = logits(dtype)
        z.requires_grad_()
        want = ops.divergence(z, t, kind, **options)
        (want * upstream().to(want)).sum().backward()
        label = f"{kind} {dtype} {options}"
        rtol = min(tolerance[dtype], 2e-5)
        torch.testing.assert_close(value, want, rtol=rtol, atol=2e-6, msg=label, equal_nan=True)
        scale = max(1.0, float(z.grad.float().nan_to_num(0, 0, 0).abs().max()))
        torch.testing.assert_close(
            gradient,
            z.grad.float(),
            rtol=tolerance[dtype],
            atol=scale * tolerance[dtype] / 10,
            equal_nan=True,
            msg=label,
        )


def test_the_loss_form(found):
    z, t = logits(torch.float32)
    z.requires_grad_()
    weight, mask = torch.arange(ROWS).float(), torch.arange(ROWS) != 3
    want = ops.divergence_loss(z, t, "jsd", weight=weight, mask=mask)
    want.backward()
    loss, gradient = found[-1]
    torch.testing.assert_close(loss, want.detach(), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(gradient, z.grad, rtol=1e-4, atol=1e-7)
    assert (gradient[0] == 0).all()
    assert (gradient[3] == 0).all()


@pytest.mark.parametrize("kind", ["uld", "adaptive_kl", "mse_logits", "standardized_kl"])
def test_kinds_that_look_at_whole_rows(kind):
    z, t = torch.randn(2, 5), torch.randn(2, 5)
    with pytest.raises(ValueError, match="cannot be split over the vocabulary"):
        vocab_parallel_divergence(z, t, kind)
    with pytest.raises(ValueError, match="cannot be split"):
        vocab_parallel_divergence(z, t, ops.TAID(0.3))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.randn(2, 5), torch.randn(2, 6)), ValueError, "student has 5 columns"),
        ((torch.randn(2, 5), torch.randn(3, 5)), ValueError, "must have the same rows"),
        ((torch.randn(2, 5), torch.randn(2, 5, requires_grad=True)), ValueError, "detach"),
        (
            (torch.randn(2, 5), ops.SparseTeacher(torch.zeros(2, 1).int(), torch.zeros(2, 1), 5)),
            TypeError,
            "teacher_shard must be logits",
        ),
        ((torch.randn(2, 5), torch.randn(2, 5)), RuntimeError, "no process group"),
    ],
)
def test_bad_input(arguments, error, message):
    with pytest.raises(error, match=message):
        vocab_parallel_divergence(*arguments)


def test_a_second_derivative_raises(tmp_path):
    dist.init_process_group("gloo", f"file://{tmp_path / 'store'}", world_size=1, rank=0)
    try:
        z, t = (x.clone() for x in logits(torch.float32))
        value = vocab_parallel_divergence(z.requires_grad_(), t, "jsd")
        (gradient,) = torch.autograd.grad(value.sum(), z, create_graph=True)
        with pytest.raises(RuntimeError, match="second derivative"):
            (gradient.square().sum() + z.sum()).backward()
    finally:
        dist.destroy_process_group()
