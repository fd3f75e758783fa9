"""Real speech from installed packages: recordings with their texts, times of words and phones, and
the states of a small recognizer. Everything is mono at 16 kHz, float32 in [-1, 1)."""

from stillhouse.data.speech.alignment import (
    SILENCE,
    Alignment,
    Segment,
    align,
    frame_labels,
    words_of,
)
from stillhouse.data.speech.clips import Clip, librivox, prompts
from stillhouse.data.speech.corpus import alignments, encoder_states, user_cache
from stillhouse.data.speech.recognizer import hypotheses, transcribe, whisper_states
from stillhouse.data.speech.waves import RATE, read_wav, write_wav

__all__ = [
    "RATE",
    "SILENCE",
    "Alignment",
    "Clip",
    "Segment",
    "align",
    "alignments",
    "encoder_states",
    "frame_labels",
    "hypotheses",
    "librivox",
    "prompts",
    "read_wav",
    "transcribe",
    "user_cache",
    "whisper_states",
    "words_of",
    "write_wav",
]
