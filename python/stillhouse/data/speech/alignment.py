"""When each word and phone of a known text is said: forced alignment by PocketSphinx."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from stillhouse.data.packages import DataUnavailable

SILENCE = "SIL"
FRAME = 0.01  # seconds
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


class Segment(NamedTuple):
    """`label` from `start` up to `end`, in seconds."""

    label: str
    start: float
    end: float


class Alignment(NamedTuple):
    """Words as in the text and phones of the CMU dictionary without stress, pauses as "SIL"; each
    row covers the clip without gaps or overlaps, in steps of 10 ms."""

    words: list[Segment]
    phones: list[Segment]


def words_of(text: str) -> list[str]:
    """The words that are said, lower case: punctuation off, hyphens split, single digits spelt.

    Raises ValueError for numbers of several digits, which can be read in several ways.

    Example:
        >>> words_of("Press 1, or re-enter ...")
        ['press', 'one', 'or', 're', 'enter']
    """
    found = re.findall(r"[^\W_]+(?:'[^\W_]+)*", text.lower().replace("’", "'"))
    numbers = [word for word in found if re.search(r"\d", word) and len(word) > 1]
    if numbers:
        raise ValueError(f"how {numbers[0]!r} is read cannot be told: write it out")
    return [DIGITS[int(word)] if word.isdecimal() else word for word in found]


def align(wave: Tensor, text: str) -> Alignment:
    """Times of the words and phones of `text` in `wave`, float [S] at 16 kHz.

    The English model and dictionary come in the package pocketsphinx (BSD-2-Clause); a second of
    speech takes some 20 ms. What is found depends on this clip alone.
    Raises DataUnavailable without the package, ValueError for a wave of another shape, where the
    text has no words, has words that the dictionary lacks (named), and where the wave has no room
    for it.
    """
    if wave.ndim != 1 or not wave.is_floating_point():
        raise ValueError(f"expected float samples [S], got {wave.dtype} {list(wave.shape)}")
    words, decoder = words_of(text), _decoder()
    unknown = [word for word in words if decoder.lookup_word(word) is None]
    if unknown or not words:
        reason = f"not in the dictionary: {', '.join(unknown)}" if unknown else "no word in it"
        raise ValueError(f"cannot align {text!r}: {reason}")
    samples = (wave.clamp(-1, 1) * 32767).round().short().numpy().tobytes()
    try:
        # The scorer begins with what was likely in the frame before: a second of silence makes
        # that the same for every clip.
        decoder.set_align_text("a")
        _decode(decoder, bytes(32_000))
        decoder.set_align_text(" ".join(words))
        _decode(decoder, samples)
        # The first pass finds the words, the second the phones in them.
        decoder.set_alignment()
        _decode(decoder, samples)
        aligned = [(word, list(word)) for word in decoder.get_alignment()]
    except RuntimeError:
        aligned = []
    said = [_label(word.name) for word, _ in aligned]
    if [label for label in said if label != SILENCE] != words:
        raise ValueError(f"cannot align {text!r} to {len(wave) / 16_000:.1f} s: no path through it")
    return Alignment(
        [_segment(word, len(wave)) for word, _ in aligned],
        [_segment(phone, len(wave)) for _, phones in aligned for phone in phones],
    )


def frame_labels(segments: Sequence[Segment], frames: int, rate: float = 50.0) -> list[str]:
    """The label at the middle of each of `frames` frames, `rate` a second; "SIL" outside.

    Example:
        >>> frame_labels([Segment("AH", 0.0, 0.03), Segment("T", 0.03, 0.06)], 4)
        ['AH', 'T', 'T', 'SIL']
    """
    labels, number = [], 0
    for frame in range(frames):
        time = (frame + 0.5) / rate
        while number < len(segments) and segments[number].end <= time:
            number += 1
        inside = number < len(segments) and segments[number].start <= time
        labels.append(segments[number].label if inside else SILENCE)
    return labels


@functools.cache
def _decoder() -> Any:
    try:
        from pocketsphinx import Decoder
    except ImportError:
        raise DataUnavailable(
            "phones are aligned by pocketsphinx: pip install pocketsphinx"
        ) from None
    # Best paths through the lattice have words too short for their phones (a frame is 10 ms).
    return Decoder(lm=None, bestpath=False, loglevel="FATAL")


def _decode(decoder: Any, samples: bytes) -> None:
    decoder.start_utt()
    decoder.process_raw(samples, full_utt=True)
    decoder.end_utt()


def _label(name: str) -> str:
    """ "the(2)" is a pronunciation of "the"; "<sil>", "</s>" and noises are pauses."""
    return SILENCE if name[0] in "<[+" else name.partition("(")[0]


def _segment(entry: Any, samples: int) -> Segment:
    ends = (entry.start * FRAME, (entry.start + entry.duration) * FRAME)
    return Segment(_label(entry.name), *(round(min(end, samples / 16_000), 4) for end in ends))
