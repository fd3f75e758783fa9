import doctest

import numpy as np
import pytest
import torch

from stillhouse.train import calibration, ece, reliability

CONFIDENCE, CORRECT = [0.95, 0.95, 0.85, 0.65, 0.65], [1, 0, 1, 1, 0]


def test_five_predictions_by_hand():
    """(.65, .65) one of two right, .85 right, (.95, .95) one of two: .4 .15 + .2 .15 + .4 .45."""
    bars = reliability(CONFIDENCE, CORRECT)
    assert bars.count.tolist() == [0] * 6 + [2, 0, 1, 2]
    assert bars.accuracy[[6, 8, 9]].tolist() == [0.5, 1.0, 0.5]
    torch.testing.assert_close(
        bars.confidence[[6, 8, 9]], torch.tensor([0.65, 0.85, 0.95]), check_dtype=False
    )
    assert bars.accuracy[:6].isnan().all()
    assert ece(CONFIDENCE, CORRECT) == pytest.approx(0.27, abs=1e-7)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_an_edge_belongs_to_the_bin_below_it(dtype):
    edges = (torch.arange(0, 11, dtype=torch.float64) / 10).to(dtype)
    count = reliability(edges, torch.ones(11, dtype=torch.bool)).count
    assert count.tolist() == [2] + [1] * 9
    above = torch.nextafter(edges[1:10].float(), torch.tensor(1.0)).to(dtype)
    if dtype != torch.bfloat16:  # the next float32 is the same bfloat16
        assert reliability(above, torch.ones(9)).count.tolist() == [0] + [1] * 9


def test_one_bin_is_the_difference_of_means():
    generator = torch.Generator().manual_seed(0)
    confidence = torch.rand(500, generator=generator, dtype=torch.float64)
    correct = torch.rand(500, generator=generator) < 0.3
    want = (confidence.mean() - correct.double().mean()).abs().item()
    assert ece(confidence, correct, bins=1) == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("n", [1000, 100_000])
def test_a_calibrated_model_tends_to_zero_as_the_root_of_n(n):
    """E sum_m n_m / n |error of a mean of n_m| < sum_m sqrt(n_m) / 2n <= sqrt(bins / n) / 2."""
    generator = torch.Generator().manual_seed(1)
    confidence = torch.rand(n, generator=generator, dtype=torch.float64)
    correct = torch.rand(n, generator=generator, dtype=torch.float64) < confidence
    assert 0 < ece(confidence, correct) < 0.5 * (10 / n) ** 0.5


def test_it_is_the_sum_over_bins_written_out():
    rng = np.random.default_rng(2)
    confidence, correct = rng.random(300), rng.random(300) < 0.5
    total = 0.0
    for m in range(1, 8):
        within = ((m - 1) / 7 < confidence) & (confidence <= m / 7)
        if within.any():
            total += within.mean() * abs(correct[within].mean() - confidence[within].mean())
    assert ece(confidence, correct, bins=7) == pytest.approx(total, rel=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], []), r"\[n\] with n >= 1, got \(0,\)"),
        (([0.5], [1, 0]), r"got \(1,\) and \(2,\)"),
        (([[0.5]], [[1]]), r"got \(1, 1\)"),
        (([0.5], [1], 0), "bins must be at least 1, got 0"),
        (([0.5, 1.2], [1, 0]), r"probability in \[0, 1\], got 1.2"),
        (([-0.1], [1]), r"probability in \[0, 1\], got -0.1"),
        (([float("nan")], [1]), r"probability in \[0, 1\], got nan"),
        (([0.5], [2]), "correct must be bool, or 0 and 1"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        ece(*arguments)


def test_examples_run():
    outcome = doctest.testmod(calibration)
    assert outcome.failed == 0
    assert outcome.attempted == 4
