"""Vocabularies in parts: two and three processes against whole rows in one."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from stillhouse import ops
from stillhouse.distributed import vocab_parallel_divergence, vocab_parallel_divergence_loss
from stillhouse.ops.kinds import KINDS as NAMES

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
    ops.MSELogits("log_probs"),
    ops.TAID(0.3),
    ops.TAID(0.0),
    ops.TAID(1.0),
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


LOSS_KINDS = ["jsd", "log_acceptance", ops.Renyi(0.5), "chi2", ops.TAID(0.4)]
LOSS_OPTIONS = [
    {"mask": torch.arange(ROWS) != 3},
    {"weight": torch.arange(ROWS).float(), "mask": torch.arange(ROWS) != 3},
    {"mask": torch.arange(ROWS) != 3, "denominator": 2.5, "temperature": 2.0},
    {"mask": torch.arange(ROWS) != 3, "denominator": torch.tensor([2.5])},
    {"mask": torch.zeros(ROWS, dtype=torch.bool)},
]


def loss_logits():
    """Row 3 is left out: half of it nobody's, where sides meet nowhere, or all of it NaN."""
    for broken in (False, True):
        z, t = logits(torch.float32)
        z[3, : COLUMNS // 2], t[3, COLUMNS // 2 :] = -torch.inf, -torch.inf
        if broken:
            z[3] = torch.nan
        yield z, t


def each_loss():
    for kind in LOSS_KINDS:
        for options in LOSS_OPTIONS:
            for z, t in loss_logits():
                yield kind, options, z, t


def work(rank, world, store, queue):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{store}", world_size=world, rank=rank)

    def own(*whole, widths=WIDTHS[world], place=rank):
        z, t = (x.split(widths, -1)[place].clone() for x in whole)
        return z.requires_grad_(), t

    results = []
    for kind, dtype, options in each_case():
        z, t = own(*logits(dtype))
        value = vocab_parallel_divergence(z, t, kind, **options)
        (value * upstream().to(value)).sum().backward()
        results.append((value.detach(), z.grad))
    for kind, options, *whole in each_loss():
        z, t = own(*whole)
        loss = vocab_parallel_divergence_loss(z, t, kind, **options)
        loss.backward()
        results.append((loss.detach(), z.grad))
    none = [each[:0] for each in logits(torch.float32)]  # no row
    z, t = own(*none)
    value = vocab_parallel_divergence(z, t, "jsd")
    value.sum().backward()
    results.append((value.detach(), z.grad))
    results.append(of_a_group(rank, world, own))
    results = [(v.float() if v.dtype == torch.bfloat16 else v, g) for v, g in results]
    results = [
        (v.numpy(), (g.float() if g.dtype == torch.bfloat16 else g).numpy()) for v, g in results
    ]
    queue.put((rank, dist.get_world_size(), results))
    dist.barrier()
    dist.destroy_process_group()


def of_a_group(rank, world, own):
    """All columns with the first two processes; the third is refused."""
    group = dist.new_group([0, 1])
    z, t = own(*logits(torch.float32), widths=WIDTHS[2], place=min(rank, 1))
    value, gradient = torch.empty(ROWS), torch.empty(ROWS, 0)
    if rank == 2:
        with pytest.raises(ValueError, match="this process is not in the group"):
            vocab_parallel_divergence(z, t, "jsd", group)
    else:
        value = vocab_parallel_divergence(z, t, "jsd", group)
        value.sum().backward()
        gradient = z.grad
    values = [torch.empty(ROWS) for _ in range(world)]
    dist.all_gather(values, value.detach())
    return values[0], gradient


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
    """Each that says so is in the list, and no other."""
    tested = {type(ops.as_kind(kind)) for kind in KINDS} - {ops.TAID}
    defaults = [ops.as_kind(name) for name in NAMES if name not in ("taid", "mse_logits")]
    assert tested == {type(k) for k in defaults if k.sums_over_columns} | {ops.MSELogits}


def test_value_and_gradient_equal_those_of_whole_rows(found):
    tolerance = {torch.float32: 2e-5, torch.float64: 1e-9, torch.bfloat16: 1e-2}
    cases = list(each_case())
    for (kind, dtype, options), (value, gradient) in zip(cases, found[: len(cases)], strict=True):
        z, t = logits(dtype)
        z.requires_grad_()
        want = ops.divergence(z, t, kind, **options)
        (want * upstream().to(want)).sum().backward()
        label = f"{kind} {dtype} {options}"
        rtol = min(tolerance[dtype], 2e-5)
        # TAID's target is rounded to float32: of a row with an offset of 1,000 to 3e-5.
        atol = 5e-5 if isinstance(kind, ops.TAID) and dtype != torch.float64 else rtol / 10
        torch.testing.assert_close(value, want, rtol=rtol, atol=atol, msg=label, equal_nan=True)
        scale = max(1.0, float(z.grad.float().nan_to_num(0, 0, 0).abs().max()))
        torch.testing.assert_close(
            gradient,
            z.grad.to(gradient.dtype),
            rtol=tolerance[dtype],
            atol=max(atol, scale * tolerance[dtype] / 10),
            equal_nan=True,
            msg=label,
        )


def test_the_loss_form(found):
    """As `ops.divergence_loss`; rows that do not count have the gradient 0, whatever they hold."""
    start = len(list(each_case()))
    for number, (kind, options, z, t) in enumerate(each_loss(), start):
        z.requires_grad_()
        want = ops.divergence_loss(z, t, kind, **options)
        want.backward()
        loss, gradient = found[number]
        label = f"{kind} {options}"
        torch.testing.assert_close(loss, want.detach(), rtol=1e-5, atol=1e-6, msg=label)
        torch.testing.assert_close(gradient, z.grad, rtol=1e-4, atol=1e-6, msg=label)
        assert (gradient[3] == 0).all()


def test_no_row_and_a_group_of_some(found):
    value, gradient = found[-2]
    assert value.shape == (0,)
    assert gradient.shape == (0, COLUMNS)
    z, t = logits(torch.float32)
    z.requires_grad_()
    want = ops.divergence(z, t, "jsd")
    want.sum().backward()
    torch.testing.assert_close(found[-1][0], want.detach(), rtol=2e-5, atol=2e-6, equal_nan=True)
    torch.testing.assert_close(found[-1][1], z.grad, rtol=2e-5, atol=2e-6, equal_nan=True)


@pytest.mark.parametrize(
    "kind",
    [
        "uld",
        "adaptive_kl",
        "mse_logits",
        "standardized_kl",
        "cosine_logits",
        "cosine_probs",
        "dkd",
        "cross_entropy",
        "support_kl",
    ],
)
def test_kinds_that_look_at_whole_rows(kind):
    z, t = torch.randn(2, 5), torch.randn(2, 5)
    with pytest.raises(ValueError, match="cannot be split over the vocabulary"):
        vocab_parallel_divergence(z, t, kind)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.randn(2, 5), torch.randn(2, 6)), ValueError, "the same columns of both"),
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


@pytest.fixture
def alone(tmp_path):
    """A group of this process."""
    dist.init_process_group("gloo", f"file://{tmp_path / 'store'}", world_size=1, rank=0)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"denominator": 0}, ValueError, "denominator must be"),
        ({"denominator": -2.0}, ValueError, "denominator must be"),
        ({"weight": torch.ones(2, dtype=torch.bool)}, TypeError, "a bool is a mask"),
        ({"weight": torch.ones(3)}, ValueError, "weight must"),
        ({"weight": [1.0, 2.0]}, TypeError, "weight must be"),
        ({"weight": torch.ones(2, requires_grad=True)}, ValueError, "not differentiable"),
        ({"mask": torch.ones(2)}, TypeError, "mask must be"),
    ],
)
def test_bad_weights(alone, options, error, message):
    with pytest.raises(error, match=message):
        vocab_parallel_divergence_loss(torch.randn(2, 5), torch.randn(2, 5), **options)


def test_a_second_derivative_raises(alone):
    z, t = (x.clone() for x in logits(torch.float32))
    value = vocab_parallel_divergence(z.requires_grad_(), t, "jsd")
    (gradient,) = torch.autograd.grad(value.sum(), z, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        (gradient.square().sum() + z.sum()).backward()
