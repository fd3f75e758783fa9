"""DM-Codec, scaled down to spectra: do codes keep more of the phones when text and speech models
have taught them, and what does that cost?

A codec of log-mel frames (80 bands, 20 ms; two convolutions, 4 stages of 128 codes, two
convolutions) on 17 minutes of Asterisk's English prompts, a fifth of the clips held out, three
times from one start: without a teacher; with a language model of the prompts' words (LM), its
states stretched over the words' times; and with that and Whisper tiny.en's encoder (SM). Both teach
stage 1. Phones are those of forced alignment; PNMI is the share of their entropy that a stage's
code takes away. There is no waveform, hence no discriminator and no word error rate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from stillhouse.methods.speech import dm_codec_loss, phone_purity, pnmi
from stillhouse.methods.speech.stages import stage_average
from stillhouse.nn import ResidualVQ
from stillhouse.recipes.speech.prompt_frames import PromptFrames
from stillhouse.report import Report

WIDTH, DIM, CODES, STAGES = 128, 64, 128, 4
STEPS, BATCH, LENGTH, RATE, DECAY = 600, 8, 128, 5e-3, 0.95
MARGINS = {"LM": 0.02, "LM+SM": 0.03}  # of PNMI; three seeds gave 0.032 to 0.047, 0.041 to 0.047
SHOWN = 250  # frames of held-out prompts in the picture
COMMIT, DISTILL = 0.2, 4.0  # against an L1 on log-mel spectra of weight 1
# By teacher: its share of the distillation.
ARMS: dict[str, dict[str, float]] = {
    "none": {},
    "LM": {"LM": 1.0},
    "LM+SM": {"LM": 0.5, "SM": 0.5},
}


def run(report: Report, seeds: Sequence[int], budget: float) -> None:
    frames = PromptFrames()
    report.table("data", [_of_data(frames)])
    rows, stages, heard = [], {}, {"recorded": frames.held_out.mel[:SHOWN]}
    for seed in report.within(budget, seeds):
        for arm, weights in ARMS.items():
            codec = MelCodec(frames.train.mel, seed)
            _train(codec, frames, weights, seed)
            found, information = _measure(codec, frames)
            rows.append({"seed": seed, "teachers": arm, **found})
            stages.setdefault(arm, information)
            with torch.no_grad():
                heard.setdefault(f"teachers: {arm}", codec(frames.held_out.mel[None, :SHOWN])[0][0])
    report.table("held-out prompts", rows)
    report.curve(
        "pnmi",
        range(1, STAGES + 1),
        stages,
        xlabel="stage of the quantizer",
        ylabel=f"PNMI of its codes, seed {report.seeds[0]}",
    )
    report.picture("spectrograms", heard, xlabel="seconds", ylabel="mel band", xstep=0.02)
    _claim(report, rows)


def _claim(report: Report, rows: Sequence[Mapping[str, float]]) -> None:
    of = {
        (arm, name): [row[name] for row in rows if row["teachers"] == arm]
        for arm in ARMS
        for name in ("PNMI", "L1")
    }
    for arm, margin in MARGINS.items():
        report.claim(
            f"PNMI of stage 1, {arm}, against none", of[arm, "PNMI"], of["none", "PNMI"], margin
        )
        ratio = [a / b for a, b in zip(of[arm, "L1"], of["none", "L1"], strict=True)]
        report.claim(f"reconstruction L1, {arm}, over none's", ratio, 1.1, relation="<=")


class MelCodec(nn.Module):
    """Log-mel frames [B, T, 80] to 4 codes a frame and back. mel: frames for its scale, [N, 80]."""

    def __init__(self, mel: Tensor, seed: int):
        super().__init__()
        self.register_buffer("mean", mel.mean(0))
        self.register_buffer("scale", mel.std())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.encoder = nn.Sequential(
                nn.Conv1d(80, WIDTH, 5, padding=2), nn.ELU(), nn.Conv1d(WIDTH, DIM, 3, padding=1)
            )
            self.decoder = nn.Sequential(
                nn.Conv1d(DIM, WIDTH, 3, padding=1), nn.ELU(), nn.Conv1d(WIDTH, 80, 5, padding=2)
            )
            self.towards = nn.ModuleDict({"SM": nn.Linear(DIM, 384), "LM": nn.Linear(DIM, 96)})
        self.quantizer = ResidualVQ(DIM, CODES, STAGES, decay=DECAY, seed=seed)

    def forward(self, mel: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(reconstruction, the first stage's codes with a gradient, codes [B, T, 4], commitment)"""
        encoded = self.encoder(((mel - self.mean) / self.scale).mT).mT
        if self.training:
            self.quantizer.initialize_(encoded)
        tables = self.quantizer.codebooks.clone()  # that give the codes: a step moves them
        quantized = self.quantizer(encoded)
        first = stage_average(encoded, quantized.codes, tables, 1, 1)
        decoded = self.decoder(quantized.out.mT).mT * self.scale + self.mean
        return decoded, first, quantized.codes, quantized.commit_loss.mean()


def _train(codec: MelCodec, frames: PromptFrames, weights: Mapping[str, float], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(codec.parameters(), lr=RATE, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    last = len(frames.train.mel) - LENGTH
    teachers = {"LM": frames.read, "SM": frames.heard}
    for _ in range(STEPS):
        at = torch.randint(last, (BATCH, 1), generator=generator) + torch.arange(LENGTH)
        mel = frames.train.mel[at]
        decoded, first, _, commitment = codec(mel)
        loss = (decoded - mel).abs().mean() + COMMIT * commitment
        if weights:
            stages = {name: codec.towards[name](first) for name in weights}
            given = {name: teachers[name][at] for name in weights}
            loss = loss + DISTILL * dm_codec_loss(stages, given, weights)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    codec.eval()


@torch.no_grad()
def _measure(codec: MelCodec, frames: PromptFrames) -> tuple[dict[str, float], list[float]]:
    """Of one codec, and the PNMI of each stage, on held-out prompts."""
    decoded, _, codes, _ = codec(frames.held_out.mel[None])
    information = [pnmi(codes[0, :, stage], frames.held_out.phones) for stage in range(STAGES)]
    _, _, of_reader, _ = codec(frames.reader.mel[None])
    return {
        "PNMI": information[0],
        "purity": phone_purity(codes[0, :, 0], frames.held_out.phones),
        "L1": (decoded[0] - frames.held_out.mel).abs().mean().item(),
        "PNMI, another speaker": pnmi(of_reader[0, :, 0], frames.reader.phones),
    }, information


def _of_data(frames: PromptFrames) -> dict[str, object]:
    return {
        "minutes": len(frames.train.mel) / 3000,
        "held out": len(frames.held_out.mel) / 3000,
        "phones": len(frames.phones),
        "share of frames with a word": (frames.read != 0).any(-1).float().mean().item(),
        "LM: nats a word": frames.lm_loss,
    }
