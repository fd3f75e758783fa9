"""Sound files: 16-bit WAV by the standard library, G.722 by the package of that name."""

from __future__ import annotations

import os
import wave as wave_module
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from stillhouse.data.packages import DataUnavailable

RATE = 16_000  # of all speech here, Hz


def read_wav(path: str | Path) -> tuple[Tensor, int]:
    """Samples of a WAV file, float32 [S] in [-1, 1), and their rate in Hz.

    Raises ValueError for a file that is no WAV, is not 16-bit PCM or has several channels.
    """
    try:
        with wave_module.open(os.fspath(path), "rb") as file:
            channels, width = file.getnchannels(), file.getsampwidth()
            rate, content = file.getframerate(), file.readframes(file.getnframes())
    except (wave_module.Error, EOFError) as error:
        raise ValueError(f"cannot read {path}: {error or 'the file is too short'}") from None
    if channels != 1 or width != 2:
        raise ValueError(
            f"{path} has {channels} channels of {8 * width} bits: expected one of 16 bits"
        )
    return _from_int16(np.frombuffer(content, "<i2")), rate


def write_wav(path: str | Path, wave: Tensor, rate: int = RATE) -> None:
    """Writes float samples [S] in [-1, 1] as 16-bit mono; what `read_wav` gave comes back exactly.

    1.0 becomes the largest sample, 1 - 2^-15. The file appears whole or not at all.
    Raises ValueError for another shape and for samples that are not finite or beyond [-1, 1].
    """
    if wave.ndim != 1 or not wave.is_floating_point():
        raise ValueError(f"expected float samples [S], got {wave.dtype} {list(wave.shape)}")
    samples = wave.detach().cpu().double()
    peak = samples.abs().max().item() if len(samples) else 0.0
    if not peak <= 1:  # NaN, too
        raise ValueError(f"samples reach {peak:.3g}: scale them into [-1, 1] first")
    path = Path(path)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with wave_module.open(str(partial), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(rate)
            file.writeframes((samples * 32768).round().clamp(max=32767).numpy().astype("<i2"))
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def decode_g722(content: bytes) -> Tensor:
    """ITU-T G.722 at 64 kbit/s: two samples at 16 kHz a byte, float32 [2 * bytes].

    Raises DataUnavailable where the decoder is missing.
    """
    try:
        from G722 import G722
    except ImportError:
        raise DataUnavailable("the prompts are coded in G.722: pip install G722") from None
    # The decoder has a state, so every file gets one of its own.
    return _from_int16(np.asarray(G722(RATE, 64_000).decode(content), dtype=np.int16))


def _from_int16(samples: np.ndarray) -> Tensor:
    return torch.from_numpy(samples.astype(np.float32) / 32768)
