"""Recordings that Debian packages: telephone prompts, and a few sentences of an audiobook."""

from __future__ import annotations

import gzip
import os
import re
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from stillhouse.data.packages import DataUnavailable
from stillhouse.data.speech.waves import RATE, decode_g722, read_wav

SETS = {
    "en": "en_US_f_Allison",
    "es": "es_MX_f_Allison",
    "fr": "fr_CA_f_June",
    "it": "it_IT_m_Carlo",
    "ru": "ru_RU_f_IvrvoiceRU",
}


@dataclass(frozen=True)
class Clip:
    """One recording: its name within the set, what is said in it, and the file.

    text: as the set writes it, with capitals and punctuation; None where nothing is said (silence,
    tones).
    """

    name: str
    text: str | None
    path: Path

    def wave(self) -> Tensor:
        """The samples, float32 [S] at 16 kHz, read at each call."""
        if self.path.suffix == ".g722":
            return decode_g722(self.path.read_bytes())
        wave, rate = read_wav(self.path)
        if rate != RATE:
            raise ValueError(f"{self.path} is sampled at {rate} Hz: expected {RATE}")
        return wave


def prompts(language: str = "en", *, root: str | Path | None = None) -> list[Clip]:
    """The prompts of the telephone exchange Asterisk, read by one speaker a language, by name.

    English: 568 recordings of 25 minutes by Allison Smith, 551 of them speech; most take a second
    or two, the longest 73. They are CC-BY-SA-3.0 (Digium; the packages' copyright files name the
    speakers), and so is what is made of them and passed on.
    language: "en", "es", "fr", "it" or "ru". root: where the packages are unpacked; where it is
    None, the folder in STILLHOUSE_DEBIAN_ROOT (for `dpkg -x`), or else /.
    Raises ValueError for another language, DataUnavailable where recordings or texts are missing.
    """
    if language not in SETS:
        raise ValueError(f"no prompts in {language!r}: expected one of {', '.join(SETS)}")
    package, root = f"asterisk-core-sounds-{language}", _root(root)
    folder = root / "usr/share/asterisk/sounds" / SETS[language]
    files = sorted(folder.rglob("*.g722"))
    listed = root / f"usr/share/doc/{package}/core-sounds-{language}.txt.gz"
    if not files or not listed.exists():
        what = "recordings" if not files else f"texts ({listed.name})"
        raise DataUnavailable(f"no {what} in {root}: {_install(f'{package}-g722', package)}")
    texts = {}
    for line in gzip.decompress(listed.read_bytes()).decode("utf-8-sig").splitlines():
        name, colon, text = line.partition(":")
        if colon and not line.startswith(";"):
            texts[name.strip().removesuffix(".wav")] = _said(text)
    named = {path.relative_to(folder).with_suffix("").as_posix(): path for path in files}
    return [Clip(name, texts.get(name), named[name]) for name in sorted(named)]


def librivox(*, root: str | Path | None = None) -> list[Clip]:
    """Five sentences of Sense and Sensibility by a reader of LibriVox: 25 seconds of another voice,
    of the package pocketsphinx-testdata (BSD-2-Clause). root: as for `prompts`.

    Raises DataUnavailable where they are missing.
    """
    folder = _root(root) / "usr/share/pocketsphinx/test/data/librivox"
    listed = folder / "transcription"
    if not listed.exists():
        raise DataUnavailable(f"no {listed}: {_install('pocketsphinx-testdata')}")
    lines = re.findall(r"<s> (.+?) </s> \((\S+)\)", listed.read_text(encoding="utf-8"))
    return [Clip(name, text, folder / f"{name}.wav") for text, name in lines]


def _root(root: str | Path | None) -> Path:
    return Path(root if root is not None else os.environ.get("STILLHOUSE_DEBIAN_ROOT") or "/")


def _install(*packages: str) -> str:
    """Images for containers drop /usr/share/doc, where the texts are; unpacking keeps it."""
    names = " ".join(packages)
    return (
        f"apt-get install --no-install-recommends {names}; or apt-get download {names}, dpkg -x "
        "each FILE FOLDER, and set STILLHOUSE_DEBIAN_ROOT=FOLDER"
    )


def _said(text: str) -> str | None:
    """Without remarks: "at [@]" is "at", "(3 seconds of silence)" nothing."""
    return re.sub(r"\[.*?\]|\(.*?\)|<.*?>", "", text).strip() or None
