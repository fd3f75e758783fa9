"""Quantizers with a narrow space in each stage against the definition written out."""

import pytest
import torch
from torch.nn.functional import normalize

from stillhouse import ops
from stillhouse.ops import rvq_autograd

DOUBLE = torch.float64


def problem(n=50, wide=20, narrow=4, k=30, q=3, dtype=DOUBLE):
    generator = torch.Generator("cpu").manual_seed(0)

    def draw(*shape):
        drawn = torch.randn(*shape, generator=generator, dtype=DOUBLE, device="cpu")
        return drawn.to(torch.get_default_device(), dtype)

    into = draw(q, narrow, wide) / wide**0.5, draw(q, narrow) * 0.3
    out_of = draw(q, wide, narrow) * 0.7, draw(q, wide) * 0.2
    return draw(n, wide), draw(q, k, narrow), into, out_of


def written_out(x, tables, into, out_of, metric="cosine", depth=None, detached=False):
    """Stage by stage on residuals that are formed, gradients as the modes say."""
    (a, bias_in), (b, bias_out) = into, out_of
    residual, out, codes, errors = x, 0, [], []
    for stage, table in enumerate(tables):
        z = residual @ a[stage].T + (0 if bias_in is None else bias_in[stage])
        unit = normalize(table, dim=-1) if metric == "cosine" else table
        near = z @ unit.T - (0 if metric == "cosine" else table.square().sum(-1) / 2)
        code = near.argmax(-1)
        chosen = table[code]
        errors.append((z - chosen.detach()).square().sum(-1))
        errors[-1] = errors[-1] + (z.detach() - chosen).square().sum(-1)
        through = z + (chosen - z).detach()
        step = through @ b[stage].T + (0 if bias_out is None else bias_out[stage])
        deep = torch.ones(len(x)) if depth is None else (depth > stage).to(x.dtype)
        out = out + deep[:, None].to(x.dtype) * step
        errors[-1] = errors[-1] * deep
        codes.append(torch.where(deep > 0, code, -1))
        residual = residual - (step.detach() if detached else step)
    return out, torch.stack(codes, -1), torch.stack(errors, -1)


@pytest.mark.parametrize("metric", ["cosine", "l2"])
@pytest.mark.parametrize("biased", [True, False])
def test_codes_and_outputs(metric, biased, level):
    x, tables, into, out_of = problem(n=700)
    if not biased:
        into, out_of = (into[0], None), (out_of[0], None)
    found = ops.projected_rvq(x, tables, into, out_of, metric=metric)
    out, codes, errors = written_out(x, tables, into, out_of, metric)
    assert torch.equal(found.codes, codes)
    torch.testing.assert_close(found.out, out)
    torch.testing.assert_close(found.error, errors / 2)
    few = ops.projected_rvq(x[:3], tables, into, out_of, metric=metric)
    assert torch.equal(few.codes, codes[:3])


@pytest.mark.parametrize("n", [50, 150])
def test_spaces_that_are_not_narrow(n, level):
    """Which tensor cores search."""
    problem_of = dict(n=n, wide=60, narrow=36, k=300, q=2)
    x, tables, into, out_of = problem(**problem_of, dtype=torch.float32)
    found = ops.projected_rvq(x, tables, into, out_of)
    out, codes, _ = written_out(*problem(**problem_of))
    same = (found.codes == codes).all(-1)
    assert same.float().mean() > 0.98  # float32 decides near ties as it likes
    torch.testing.assert_close(found.out[same], out[same].float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_and_shapes(dtype, level):
    x, tables, into, out_of = problem(n=60, dtype=torch.float32)
    rows = x.to(dtype).reshape(3, 20, -1)
    found = ops.projected_rvq(rows, tables, into, out_of)
    assert found.codes.shape == (3, 20, 3)
    assert found.out.dtype == torch.float32
    out, codes, _ = written_out(rows.flatten(0, 1).float(), tables, into, out_of)
    same = (found.codes.flatten(0, 1) == codes).all(-1)
    assert same.float().mean() > 0.95  # float32 decides near ties as it likes
    torch.testing.assert_close(found.out.flatten(0, 1)[same], out[same])
    with torch.autocast(rows.device.type, dtype=torch.bfloat16):
        assert torch.equal(ops.projected_rvq(rows, tables, into, out_of).codes, found.codes)


@pytest.mark.parametrize("grad", ["ste", "stage_sum"])
@pytest.mark.parametrize("shared", [False, True])
def test_gradients(grad, shared, level):
    x, tables, into, out_of = problem()
    depth = torch.arange(len(x)) % 4
    if shared:
        tables = tables[:1]
    given = [x, tables, *into, *out_of]

    def run(quantize):
        own = [part.clone().requires_grad_() for part in given]
        table = own[1].expand(3, -1, -1) if shared else own[1]
        out, _, error = quantize(own[0], table, tuple(own[2:4]), tuple(own[4:6]))
        weight = torch.linspace(0.5, 2, out.numel(), dtype=DOUBLE).view_as(out)
        ((out * weight).sum() + (error * torch.arange(1.0, 4)).sum()).backward()
        return [part.grad for part in own]

    ours = run(lambda *args: ops.projected_rvq(*args, num_quantizers=depth, metric="l2", grad=grad))
    theirs = run(lambda *args: written_out(*args, "l2", depth=depth, detached=grad == "stage_sum"))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other)


def test_the_jacobian():
    """I - prod_s (I - B_s A_s), and the sum of B_s A_s."""
    x, tables, (a, _), (b, _) = problem(n=1, wide=6)
    identity, product = torch.eye(6, dtype=DOUBLE), torch.eye(6, dtype=DOUBLE)
    for stage in range(3):
        product = (identity - b[stage] @ a[stage]) @ product

    def of(grad):
        def out(row):
            return ops.projected_rvq(row, tables, (a, None), (b, None), grad=grad).out[0]

        return torch.autograd.functional.jacobian(out, x)[:, 0]

    torch.testing.assert_close(of("ste"), identity - product)
    torch.testing.assert_close(of("stage_sum"), sum(b[s] @ a[s] for s in range(3)))


def test_depth_masks_and_fewer_stages(level):
    x, tables, into, out_of = problem(n=40)
    for stages in (1, 2):
        found = ops.projected_rvq(x, tables, into, out_of, num_quantizers=stages)
        part = [tuple(half[:stages] for half in side) for side in (into, out_of)]
        out, codes, errors = written_out(x, tables[:stages], *part)
        assert torch.equal(found.codes, codes)
        torch.testing.assert_close(found.out, out)
        torch.testing.assert_close(found.error, errors / 2)
    masked = ops.projected_rvq(x, tables, into, out_of, mask=torch.arange(40) < 7)
    assert (masked.codes[7:] == -1).all()
    assert (masked.out[7:] == 0).all()
    fewer = ops.projected_rvq(x, tables.clone().requires_grad_(), into, out_of, num_quantizers=2)
    fewer.error.sum().backward()


def test_rows_that_are_not_finite(level):
    x, tables, into, out_of = problem(n=5)
    x[1, 3], x[3, 0] = torch.nan, torch.inf
    found = ops.projected_rvq(x, tables, into, out_of)
    assert (found.codes[[1, 3]] == -1).all()
    assert found.out[[1, 3]].isnan().all()
    assert torch.equal(
        found.codes[[0, 2, 4]], ops.projected_rvq(x[[0, 2, 4]], tables, into, out_of).codes
    )


def test_the_reference_says_the_same(monkeypatch):
    x, tables, into, out_of = problem()
    options = dict(num_quantizers=torch.arange(50) % 4, sizes=torch.tensor([30, 11, 20]))
    ours = ops.projected_rvq(x, tables, into, out_of, **options)
    assert ours.codes[:, 1].max() < 11
    monkeypatch.setattr(rvq_autograd, "has_kernel", lambda x: False)
    plain = ops.projected_rvq(x, tables, into, out_of, **options)
    for mine, other in zip(ours, plain, strict=True):
        torch.testing.assert_close(mine, other)


def test_compiled():
    x, tables, into, out_of = problem(dtype=torch.float32)

    def loss(x):
        found = ops.projected_rvq(x, tables, into, out_of)
        return found.out.square().sum() + found.error.sum()

    gradients = []
    for function in (loss, torch.compile(loss, fullgraph=True)):
        row = x.clone().requires_grad_()
        function(row).backward()
        gradients.append(row.grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(codebooks=torch.zeros(3, 4)), r"codebooks must be \[Q, K, d\]"),
        (dict(into=(torch.zeros(3, 4, 19), None)), r"into must be a weight \(3, 4, 20\)"),
        (dict(out_of=(torch.zeros(3, 20, 4), torch.zeros(3, 4))), r"bias \(3, 20\)"),
        (dict(num_quantizers=4), "from 1 to 3"),
        (dict(num_quantizers=0), "from 1 to 3"),
        (dict(grad="rotation"), "grad must be one of ste, stage_sum"),
    ],
)
def test_bad_input(change, words):
    x, tables, into, out_of = problem()
    call = dict(x=x, codebooks=tables, into=into, out_of=out_of) | change
    with pytest.raises(ValueError, match=words):
        ops.projected_rvq(**call)
