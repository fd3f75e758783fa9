"""With `pytest --device cuda`: losses on a GPU against the CPU, and the trainer there."""

import pytest
import torch

from stillhouse.methods import language
from stillhouse.methods.catalog import METHODS
from stillhouse.methods.language import standard
from stillhouse.train import LogitRows, RowIndex

ROWS, COLUMNS = 24, 50


def masked(loss, **options):
    """With a mask beside the logits."""

    def call(student, teacher):
        mask = torch.arange(len(student), device=student.device) % 3 > 0
        return loss(student, teacher, mask=mask, **options)

    return call


def labels(like):
    return torch.arange(len(like), device=like.device) * 7 % COLUMNS


def objective(make):
    """What it makes of the rows; a network of its own starts the same on both devices."""

    def call(student, teacher):
        row = torch.arange(len(student), device=student.device)
        index = RowIndex(row, labels(student), row // 6)
        return make()(LogitRows(student * 1, index), LogitRows(teacher, index), {})["loss"]

    return call


LOSSES = {
    "taid": masked(language.taid_loss, t=0.4),
    "sinkd": language.sinkhorn_kd,
    "sinkd, samples": language.sample_sinkhorn_kd,
    "mgsr, window": lambda s, t: language.clipped_kl(
        s, t, *(s.new_full((ROWS,), x) for x in (0.1, 0.9))
    ).mean(),
    "mgsr, spans": lambda s, t: language.span_correlation(s, t, [(0, 3), (5, 9)]),
    "multi-teacher-bert": lambda s, t: language.ensemble_kl(
        s, [t, t.flip(0)], weights="entropy"
    ).mean(),
    "TAIDLoss": objective(language.TAIDLoss),
    "FIRSTLoss": objective(lambda: language.FIRSTLoss(0.3)),
    "SinKDLoss": objective(language.SinKDLoss),
    "MGSRLoss": objective(lambda: language.MGSRLoss((1, 1, 0), features=16)),
    "CapacityGapLoss": objective(language.CapacityGapLoss),
    "gkd": masked(standard.gkd_loss),
    "distillm": masked(standard.distillm_loss),
    "abkd": masked(standard.abkd_loss),
    "akl": masked(standard.akl_loss),
    "dkd": lambda s, t: standard.dkd_loss(s, t, labels(s)),
    "uld": masked(standard.uld_loss),
    "standardised": masked(standard.standardized_kl_loss),
}


def of(name, device):
    """Value and gradient of a loss on a device, brought back."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(ROWS, COLUMNS, generator=generator) for _ in range(2))
    own = student.to(device).requires_grad_()
    value = LOSSES[name](own, teacher.to(device))
    value.backward()
    assert value.device.type == own.grad.device.type == torch.device(device).type
    return value.detach().cpu(), own.grad.cpu()


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_on_the_gpu_is_the_cpus(name, gpu):
    for there, here in zip(of(name, gpu), of(name, "cpu"), strict=True):
        torch.testing.assert_close(there, here, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_the_table_itself(name):
    value, gradient = of(name, "cpu")
    assert value.isfinite()
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize("method", [each.id for each in METHODS.values() if each.objective])
def test_the_trainer_on_the_gpu(method, gpu, request):
    pytest.importorskip("transformers")
    assert_learns = request.getfixturevalue("assert_learns")
    assert_learns(method, use_cpu="false", on_policy=0.5, max_new_tokens=4)
