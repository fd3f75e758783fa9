"""Words, intelligibility and phone information against closed forms and other packages."""

import doctest
import math
import sys

import pytest
import torch

from stillhouse.methods.speech import metrics, phone_purity, pnmi, stoi, wer, wil


def test_examples():
    for package in ("jiwer", "pystoi"):
        pytest.importorskip(package)
    assert doctest.testmod(metrics).failed == 0


def test_word_errors_by_hand():
    pytest.importorskip("jiwer")
    # Three right, one replaced, one put in: (1 + 1) / 4 and 1 - (3/4)(3/5).
    assert wer("a x c d e", "a b c d") == pytest.approx(0.5)
    assert wil("a x c d e", "a b c d") == pytest.approx(0.55)
    # The other way round it is one of five left out: the order of arguments matters.
    assert wer("a b c d", "a x c d e") == pytest.approx(0.4)
    assert wer("a b c d e", "a") == pytest.approx(4.0)
    assert (wer("a b", "a b"), wil("a b", "a b")) == (0, 0)
    assert (wer("", "a b"), wil("", "a b")) == (1, 1)
    assert wer("A b", "a b") == pytest.approx(0.5)


def test_several_sentences_are_one_text():
    pytest.importorskip("jiwer")
    heard, said = ["a x c d", "e"], ["a b c d", "e f"]
    assert wer(heard, said) == pytest.approx(2 / 6)
    assert wil(heard, said) == pytest.approx(1 - (4 / 6) * (4 / 5))


def test_words_that_cannot_be_compared():
    pytest.importorskip("jiwer")
    for measure in (wer, wil):
        with pytest.raises(ValueError, match="2 hypotheses for 1 references"):
            measure(["a", "b"], ["a"])
        for empty in ("", " ", [], ["a", ""]):
            with pytest.raises(ValueError, match="a reference is empty"):
                measure(empty if isinstance(empty, str) else ["a"] * len(empty), empty)


def test_intelligibility_falls_with_noise():
    measure = pytest.importorskip("pystoi").stoi
    generator = torch.Generator().manual_seed(0)
    envelope = (torch.arange(32_000) / 16_000 * 2 * math.pi * 4).sin() + 1.2
    wave = torch.randn(32_000, generator=generator) * envelope
    noise = torch.randn(32_000, generator=generator)
    scores = [stoi(wave + share * noise, wave, 16_000) for share in (0, 0.5, 2, 8)]
    assert scores[0] == pytest.approx(1, abs=1e-6)
    assert scores == sorted(scores, reverse=True)
    # The scale of the estimate does not matter, and which one is the reference does.
    assert stoi(0.1 * (wave + noise), wave, 16_000) == pytest.approx(
        stoi(wave + noise, wave, 16_000), abs=1e-6
    )
    reference_first = measure(wave.double().numpy(), (wave + noise).double().numpy(), 16_000)
    assert stoi(wave + noise, wave, 16_000) == pytest.approx(reference_first, abs=1e-9)
    other_way = stoi(wave, wave + noise, 16_000)
    assert other_way != pytest.approx(reference_first, abs=1e-3)
    theirs = measure(wave.numpy(), (wave + noise).numpy(), 16_000, extended=True)
    assert stoi(wave + noise, wave, 16_000, extended=True) == pytest.approx(theirs, abs=1e-5)


def test_waves_that_cannot_be_compared():
    pytest.importorskip("pystoi")
    with pytest.raises(ValueError, match=r"expected two waves \[S\], got \[8\] and \[9\]"):
        stoi(torch.zeros(8), torch.zeros(9), 16_000)
    with pytest.raises(ValueError, match="got \\[2, 8\\] and \\[2, 8\\]"):
        stoi(torch.zeros(2, 8), torch.zeros(2, 8), 16_000)
    short = torch.randn(4800, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="too little speech in 0.30 s"):
        stoi(short, short, 16_000)
    for samples in (0, 1, 300):
        with pytest.raises(ValueError, match="too little speech in 0.0"):
            stoi(short[:samples], short[:samples], 16_000)
    mostly_silent = torch.cat([short, torch.zeros(32_000)])
    with pytest.raises(ValueError, match="too little speech in 2.30 s"):
        stoi(mostly_silent, mostly_silent, 16_000)


def test_phone_information_by_hand():
    phones = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2])
    codes = torch.tensor([3, 3, 3, 9, 9, 9, 9, 9])
    # H(phone) = 1.5 bits. Code 3 knows it, of code 9's five frames 1, 2, 2 have each phone.
    left = 5 / 8 * -(0.2 * math.log2(0.2) + 2 * 0.4 * math.log2(0.4))
    assert pnmi(codes, phones) == pytest.approx(1 - left / 1.5, abs=1e-12)
    assert phone_purity(codes, phones) == pytest.approx((3 + 2) / 8)
    assert (pnmi(phones, phones), phone_purity(phones, phones)) == (1.0, 1.0)
    assert pnmi(torch.zeros(8, dtype=torch.int64), phones) == 0
    assert phone_purity(torch.zeros(8, dtype=torch.int64), phones) == 0.5
    assert pnmi(codes, torch.ones(8, dtype=torch.int64)) == 0
    assert phone_purity(codes, torch.ones(8, dtype=torch.int64)) == 1
    # Which numbers name codes and phones does not matter, nor does the shape.
    assert pnmi(100 - codes.view(2, 4), 7 * phones.view(2, 4)) == pytest.approx(pnmi(codes, phones))


def test_phone_information_of_many_frames():
    scores = pytest.importorskip("sklearn.metrics")
    generator = torch.Generator().manual_seed(0)
    phones = torch.randint(40, (20_000,), generator=generator)
    codes = (phones * 3 + torch.randint(30, (20_000,), generator=generator)) % 128
    shared = scores.mutual_info_score(phones, codes)
    entropy = scores.mutual_info_score(phones, phones)
    assert pnmi(codes, phones) == pytest.approx(shared / entropy, abs=1e-9)
    # A split code never knows less.
    assert pnmi(2 * codes + (phones < 9), phones) > pnmi(codes, phones)


def test_codes_that_cannot_be_compared():
    good = torch.tensor([0, 1])
    for measure in (pnmi, phone_purity):
        for codes, message in (
            (torch.tensor([0, 1, 2]), r"expected a phone for each code, got \[3\] and \[2\]"),
            (torch.tensor([0.0, 1.0]), "codes must be integers"),
            (torch.tensor([-1, 1]), "codes must be >= 0"),
        ):
            with pytest.raises(ValueError, match=message):
                measure(codes, good)
        with pytest.raises(ValueError, match="phones must be >= 0"):
            measure(good, -good)
        with pytest.raises(ValueError, match="at least one"):
            measure(good[:0], good[:0])


def test_pesq():
    """P.862.2 and P.862.1 map a perfect score of 4.5 to these."""
    pytest.importorskip("pesq")
    generator = torch.Generator().manual_seed(0)
    wave = 0.1 * torch.randn(32_000, generator=generator)
    assert metrics.pesq(wave, wave, 16_000) == pytest.approx(4.644, abs=1e-3)
    assert metrics.pesq(wave, wave, 16_000, band="narrow") == pytest.approx(4.549, abs=1e-3)
    noise = 0.1 * torch.randn(32_000, generator=generator)
    scores = [metrics.pesq(wave + share * noise, wave, 16_000) for share in (0, 0.1, 1)]
    assert scores == sorted(scores, reverse=True)
    with pytest.raises(ValueError, match="PESQ finds nothing"):
        metrics.pesq(torch.zeros(32_000), torch.zeros(32_000), 16_000)


def test_what_pesq_refuses():
    wave = torch.zeros(100)
    for options in (dict(sample_rate=8_000), dict(sample_rate=16_000, band="full")):
        with pytest.raises(ValueError, match="band is 'wide' at 16000 Hz"):
            metrics.pesq(wave, wave, **options)


def test_packages_that_are_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "jiwer", None)
    with pytest.raises(ImportError, match="jiwer is not installed: pip install"):
        wer("a", "a")
