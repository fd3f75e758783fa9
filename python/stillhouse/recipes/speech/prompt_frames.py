"""The prompts as frames of 20 ms: spectra, phones and the states of two teachers."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from stillhouse.data import speech
from stillhouse.methods.speech import align_text, log_mel
from stillhouse.recipes.speech.word_lm import kept_word_lm

HOP = 320
SHARE = 5  # one clip of so many is held out


@dataclass(frozen=True)
class Frames:
    """Clips one after another: log-mel spectra [N, 80], phones int64 [N]."""

    mel: Tensor
    phones: Tensor


class PromptFrames:
    """Frames of the prompts that can be aligned: for training, of a fifth of the clips, which is
    held out, and of another speaker, who reads something else.

    What the teachers say of the frames for training: `heard` [N, 384], Whisper's last encoder
    layer; `read` [N, 96], a language model of the training clips' texts at the word that is said,
    0 in pauses. Which clips are held out depends on their names alone. What takes long is kept in
    the user's cache.
    """

    def __init__(self) -> None:
        clips = speech.prompts()
        self.phones = [speech.SILENCE]
        aligned = speech.alignments(clips)
        clips = [clip for clip in clips if clip.name in aligned]
        held_out = [hashlib.sha256(clip.name.encode()).digest()[0] % SHARE == 0 for clip in clips]
        train, self.held_out_clips = (
            [clip for clip, held in zip(clips, held_out, strict=True) if held == wanted]
            for wanted in (False, True)
        )
        reader = speech.librivox()
        self.train = self._frames(train, aligned)
        self.held_out = self._frames(self.held_out_clips, aligned)
        self.reader = self._frames(reader, speech.alignments(reader))
        states = speech.encoder_states(train, layer=4)
        self.heard = torch.cat(list(states.values())).float()
        self.read = self._text(train, aligned)

    def _frames(self, clips: Sequence[speech.Clip], aligned: dict[str, speech.Alignment]) -> Frames:
        mels, phones = [], []
        for clip in clips:
            wave = clip.wave()
            wave = pad(wave, (0, -len(wave) % HOP))
            mels.append(log_mel(wave[None], speech.RATE, n_fft=1024, hop=HOP, n_mels=80)[0])
            for label in speech.frame_labels(aligned[clip.name].phones, len(mels[-1])):
                if label not in self.phones:
                    self.phones.append(label)
                phones.append(self.phones.index(label))
        return Frames(torch.cat(mels), torch.tensor(phones))

    def _text(self, clips: Sequence[speech.Clip], aligned: dict[str, speech.Alignment]) -> Tensor:
        words = [
            [word for word in aligned[clip.name].words if word.label != speech.SILENCE]
            for clip in clips
        ]
        lm, self.lm_loss = kept_word_lm([[word.label for word in clip] for clip in words])
        stretched = []
        for clip, said in zip(clips, words, strict=True):
            spans = torch.tensor([[[word.start, word.end] for word in said]])
            states = lm.read([word.label for word in said])[None]
            frames = -(-len(clip.wave()) // HOP)
            stretched.append(align_text(states, frames, align="stretch", spans=spans))
        rows, masks = zip(*stretched, strict=True)
        said = torch.cat(masks, 1)[0]
        return _white(torch.cat(rows, 1)[0], said) * said[:, None]


def _white(states: Tensor, counts: Tensor) -> Tensor:
    """Rows along their principal directions, each of mean 0 and variance 1 over those that count:
    the loss has a term a column, and the columns of this model differ little."""
    mean = states[counts].mean(0)
    _, sizes, directions = torch.linalg.svd(states[counts] - mean, full_matrices=False)
    return (states - mean) @ directions.T / (sizes / counts.sum().sqrt())
