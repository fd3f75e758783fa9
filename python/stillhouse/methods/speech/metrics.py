"""How much of the words, of the sound and of the phones is left: the measures of the speech papers.

Words by jiwer, intelligibility by pystoi (`pip install 'stillhouse[speech]'`), perceived quality by
pesq, if that is installed; the rest here.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from importlib import import_module

import torch
from torch import Tensor

SHORTEST = 0.4  # seconds: 30 windows of STOI


def wer(hypothesis: str | Sequence[str], reference: str | Sequence[str]) -> float:
    """Word error rate: substitutions, deletions and insertions of the best alignment over the
    reference's words, of several sentences in all. It can exceed 1.

    Words are what blanks separate; capitals and punctuation count (jiwer's default).
    Raises ValueError for unlike numbers of sentences, and where a reference is empty.

    Example:
        >>> from stillhouse.methods.speech import wer
        >>> wer("a x c d e", reference="a b c d")
        0.5
    """
    return float(_package("jiwer").wer(*_pair(hypothesis, reference)))


def wil(hypothesis: str | Sequence[str], reference: str | Sequence[str]) -> float:
    """Word information lost, 1 - (H / N)(H / P): H words are right, of N in the reference and P in
    the hypothesis; in [0, 1]. Arguments and errors as for `wer`.

    Example:
        >>> from stillhouse.methods.speech import wil
        >>> round(wil("a x c d e", reference="a b c d"), 6)
        0.55
    """
    return float(_package("jiwer").wil(*_pair(hypothesis, reference)))


def _pair(hypothesis, reference) -> tuple[list[str], list[str]]:
    """In jiwer's order: the reference first."""
    pair = [[each] if isinstance(each, str) else list(each) for each in (reference, hypothesis)]
    if len(pair[0]) != len(pair[1]):
        raise ValueError(f"{len(pair[1])} hypotheses for {len(pair[0])} references")
    if not pair[0] or not all(each.strip() for each in pair[0]):
        raise ValueError("a reference is empty: there is nothing to get right or wrong")
    return pair[0], pair[1]


def stoi(estimate: Tensor, reference: Tensor, sample_rate: int, *, extended: bool = False) -> float:
    """Short-time objective intelligibility, about 0 to 1 (taal2011; `extended`: jensen2016).

    estimate, reference: float [S] of one length, aligned in time, on the CPU. Frames where the
    reference is 40 dB below its loudest do not count, and 0.4 s must.
    Raises ValueError for shapes that do not fit, and for too little speech.

    Example:
        >>> import torch
        >>> from stillhouse.methods.speech import stoi
        >>> wave = torch.randn(16000, generator=torch.Generator().manual_seed(0))
        >>> round(stoi(wave, wave, 16000), 4)
        1.0
    """
    measure, waves = _package("pystoi").stoi, _waves(estimate, reference)
    seconds = len(reference) / sample_rate
    try:
        if seconds < SHORTEST:
            raise RuntimeWarning
        with warnings.catch_warnings():
            # It would return 1e-5, a value like any other.
            warnings.filterwarnings("error", message="Not enough STFT frames")
            return float(measure(*waves, sample_rate, extended=extended))
    except RuntimeWarning:
        raise ValueError(
            f"too little speech in {seconds:.2f} s: STOI needs {SHORTEST} s of it"
        ) from None


def pesq(estimate: Tensor, reference: Tensor, sample_rate: int, *, band: str = "wide") -> float:
    """Perceptual evaluation of speech quality, MOS-LQO, about 1 to 4.6 (ITU-T P.862).

    estimate, reference: float [S] in [-1, 1] on the CPU. band: "wide" (P.862.2, 16,000 Hz) or
    "narrow" (8,000 or 16,000 Hz). The package `pesq` is no part of any extra: it is compiled when
    it is installed, with Cython.
    Raises ValueError for shapes, rates and bands that do not fit, and where no speech is found.
    """
    rates = {"wide": (16_000,), "narrow": (8_000, 16_000)}
    if band not in rates or sample_rate not in rates[band]:
        known = "'wide' at 16000 Hz or 'narrow' at 8000 or 16000"
        raise ValueError(f"band is {known}, got {band!r} at {sample_rate}")
    package, waves = _package("pesq", "pip install pesq"), _waves(estimate, reference)
    if not all(wave.any() for wave in waves):
        raise ValueError("PESQ finds nothing to compare: a wave is silent")
    try:
        return float(package.pesq(sample_rate, *waves, f"{band[0]}b"))
    except package.PesqError as error:
        raise ValueError(f"PESQ finds nothing to compare: {error}") from None


def _waves(estimate: Tensor, reference: Tensor) -> list:
    """As arrays, the reference first, as both packages have it."""
    if estimate.shape != reference.shape or reference.ndim != 1:
        raise ValueError(
            f"expected two waves [S], got {list(estimate.shape)} and {list(reference.shape)}"
        )
    return [each.detach().double().numpy() for each in (reference, estimate)]


def _package(name: str, install: str = "pip install 'stillhouse[speech]'"):
    try:
        return import_module(name)
    except ImportError as error:
        raise ImportError(f"{name} is not installed: {install}") from error


def pnmi(codes: Tensor, phones: Tensor) -> float:
    """Phone-normalized mutual information I(phone; code) / H(phone), in [0, 1]: how much of the
    uncertainty about a frame's phone its code takes away (HuBERT, arXiv 2106.07447).

    codes, phones: integers >= 0 of one shape. It never falls when codes are split, so compare
    quantizers of one size on as many frames. 0 for phones that are all equal.
    Raises ValueError for shapes that differ, no frame, and anything but integers >= 0.

    Example:
        >>> import torch
        >>> from stillhouse.methods.speech import pnmi
        >>> phones = torch.tensor([0, 0, 1, 1])
        >>> pnmi(torch.tensor([5, 5, 7, 7]), phones), pnmi(torch.tensor([5, 7, 5, 7]), phones)
        (1.0, 0.0)
    """
    joint = _joint(codes, phones)
    of_phone, of_code, of_both = map(_entropy, (joint.sum(0), joint.sum(1), joint))
    if of_phone == 0:
        return 0.0
    # Rounding leaves [0, 1] by 1e-16.
    return min(max((of_phone + of_code - of_both) / of_phone, 0.0), 1.0)


def phone_purity(codes: Tensor, phones: Tensor) -> float:
    """Share of frames whose phone is the commonest of their code (arXiv 2106.07447): how often
    one is right who knows the codes. Arguments and errors as for `pnmi`.

    Example:
        >>> import torch
        >>> from stillhouse.methods.speech import phone_purity
        >>> phone_purity(torch.tensor([5, 5, 5, 7]), torch.tensor([0, 0, 1, 1]))
        0.75
    """
    return _joint(codes, phones).amax(1).sum().item()


def _joint(codes: Tensor, phones: Tensor) -> Tensor:
    """p(code, phone) of the codes and phones that occur, float64 [codes, phones]."""
    if codes.shape != phones.shape:
        raise ValueError(
            f"expected a phone for each code, got {list(codes.shape)} and {list(phones.shape)}"
        )
    for name, each in (("codes", codes), ("phones", phones)):
        if each.is_floating_point() or each.dtype == torch.bool or not each.numel():
            raise ValueError(
                f"{name} must be integers, at least one, got {each.dtype} {list(each.shape)}"
            )
        if each.min() < 0:
            raise ValueError(f"{name} must be >= 0 (leave out frames that have none)")
    pairs = [torch.unique(each.flatten(), return_inverse=True) for each in (codes, phones)]
    width = len(pairs[1][0])
    joint = (pairs[0][1] * width + pairs[1][1]).bincount(minlength=len(pairs[0][0]) * width)
    return joint.view(-1, width).double() / codes.numel()


def _entropy(probabilities: Tensor) -> float:
    return torch.special.entr(probabilities).sum().item()
