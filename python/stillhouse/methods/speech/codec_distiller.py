"""A codec, its teachers and its discriminators, step by step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.methods.speech.codec_losses import CodecWeights, codec_losses
from stillhouse.methods.speech.codec_teachers import States, checked_weights, dm_codec_loss
from stillhouse.methods.speech.seanet import CodecOutput, SpeechCodec
from stillhouse.methods.speech.stages import Stage, stage_range
from stillhouse.nn import discriminator_loss

Teacher = Callable[[Tensor], States]
PARTS = "loss", "time", "mel", "commit", "adversarial", "features", "distill", "discriminator"


class MultiTeacherCodecDistiller:
    """Trains a codec to resynthesise, and stages of its quantizer to say what teachers say.

    codec: a `SpeechCodec`, trained in place. teachers: by name, a callable of the wave [B, S] that
    gives states [B, T, D] (or a pair with a mask), or None where the states come with each batch.
    stages: by the teacher's name the stages it teaches, 1, "3" or "1:Q" (their mean). weights: by
    name, those of `dm_codec_loss`. discriminators: `codec_discriminators`' result, or None.
    widths: D of all teachers, or by name. Teachers of one width share a linear map from the codes,
    the identity where codes are as wide. loss_weights: those of the parts. total_steps: of the
    cosine from learning_rate to 0; None keeps it.

    `step(wave, states)` is one of the discriminators and one of the codec, on one call of it; it
    returns all parts, the teachers' by name, and `discriminator`, as detached scalars.
    `state_dict` has all that goes on: weights, tables, optimisers, the number of the step.
    Raises ValueError for a teacher with the name of another part, for stages, weights or widths
    that are not of these teachers, a stage that does not exist, states that are missing or unknown,
    a step beyond the last, and a loss that is not finite.

    Defaults: the released trainer's: Adam, 1e-4, betas (0.9, 0.99), no clipping and no decay;
    teachers 768 wide; the paper teaches stage 1 by text and the mean of all by speech. Its lambdas
    of 1/2 are `weights=None`.

    Example:
        >>> import torch
        >>> from stillhouse.methods.speech import (
        ...     CodecConfig, MultiTeacherCodecDistiller, SpeechCodec)
        >>> codec = SpeechCodec(CodecConfig.small())
        >>> trainer = MultiTeacherCodecDistiller(codec, {"text": None}, {"text": 1}, widths=16)
        >>> parts = trainer.step(torch.randn(2, 3200), {"text": torch.randn(2, 4, 16)})
        >>> sorted(parts)
        ['commit', 'distill', 'loss', 'mel', 'text', 'time']
    """

    def __init__(
        self,
        codec: SpeechCodec,
        teachers: Mapping[str, Teacher | None],
        stages: Mapping[str, Stage],
        weights: Mapping[str, float] | None = None,
        discriminators: nn.Module | None = None,
        *,
        widths: int | Mapping[str, int] = 768,
        axis: str = "feature",
        loss_weights: CodecWeights | None = None,
        learning_rate: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        total_steps: int | None = None,
        seed: int = 0,
    ):
        names = list(teachers)
        if taken := [name for name in names if name in PARTS]:
            raise ValueError(
                f"a teacher cannot be called {taken[0]!r}, which is a part of the loss"
            )
        if isinstance(widths, int):
            widths = dict.fromkeys(names, widths)
        for what, given in (("stages", stages), ("widths", widths)):
            if set(given) != set(names):
                raise ValueError(
                    f"{what} are of {', '.join(given) or 'no teacher'}, teachers are "
                    f"{', '.join(names) or 'none'}"
                )
        if min(widths.values(), default=1) < 1:
            raise ValueError(f"widths must be at least 1, got {dict(widths)}")
        for stage in stages.values():
            stage_range(stage, codec.config.num_quantizers)
        if total_steps is not None and total_steps < 1:
            raise ValueError(f"total_steps must be at least 1, got {total_steps}")
        self.codec, self.discriminators = codec, discriminators
        self.teachers, self.stages = dict(teachers), dict(stages)
        self.weights, self.widths, self.axis = checked_weights(names, weights), dict(widths), axis
        self.loss_weights = CodecWeights() if loss_weights is None else loss_weights
        self.learning_rate, self.total_steps, self.steps = learning_rate, total_steps, 0
        self.projections = nn.ModuleDict()
        device = next(codec.parameters()).device
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for width in sorted(set(self.widths.values())):
                same = width == codec.config.dim
                layer = nn.Identity() if same else nn.Linear(codec.config.dim, width)
                self.projections[str(width)] = layer.to(device)
        of_codec = [*codec.parameters(), *self.projections.parameters()]
        self.optimizers = [torch.optim.Adam(of_codec, learning_rate, betas)]
        if discriminators is not None:
            of_judges = discriminators.parameters()
            self.optimizers.append(torch.optim.Adam(of_judges, learning_rate, betas))

    def step(self, wave: Tensor, states: Mapping[str, States] | None = None) -> dict[str, Tensor]:
        """One step on a batch of waves [B, S], with the states of teachers that are None."""
        if self.steps == self.total_steps:
            raise ValueError(f"all {self.total_steps} steps are done: the learning rate is 0")
        states = self._states(wave, states or {})
        self.codec.train()
        self._set_rate()
        output = self.codec(wave, return_stages=tuple(dict.fromkeys(self.stages.values())))
        distillation = self._distillation(output, states)
        parts = {}
        if self.discriminators is not None:
            self.discriminators.train()
            parts["discriminator"] = self._judge(wave, output.audio.detach())
        # The discriminators' weights have no use for the gradients of the codec's step.
        with _frozen(self.discriminators):
            losses = codec_losses(
                wave,
                output,
                discriminators=self.discriminators,
                distillation=distillation.pop("loss", None),
                weights=self.loss_weights,
                sample_rate=self.codec.config.sample_rate,
            )
            self._learn(self.optimizers[0], losses["loss"])
        self.steps += 1
        return {name: part.detach() for name, part in (losses | distillation | parts).items()}

    def state_dict(self) -> dict[str, Any]:
        """All that a training goes on with, as tensors and numbers (`torch.load` with
        weights_only)."""
        judges = self.discriminators
        return {
            "steps": self.steps,
            "codec": self.codec.state_dict(),
            "projections": self.projections.state_dict(),
            "discriminators": None if judges is None else judges.state_dict(),
            "optimizers": [each.state_dict() for each in self.optimizers],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from where `state_dict` was taken, of a trainer made with the same arguments."""
        if (state["discriminators"] is None) != (self.discriminators is None):
            raise ValueError("this state and this trainer differ in having discriminators")
        self.codec.load_state_dict(state["codec"])
        self.projections.load_state_dict(state["projections"])
        if self.discriminators is not None:
            self.discriminators.load_state_dict(state["discriminators"])
        for optimizer, of_it in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(of_it)
        self.steps = state["steps"]

    @torch.no_grad()
    def _states(self, wave: Tensor, given: Mapping[str, States]) -> dict[str, States]:
        wanted = {name for name, teacher in self.teachers.items() if teacher is None}
        if set(given) != wanted:
            raise ValueError(
                f"this batch has states of {', '.join(sorted(given)) or 'no teacher'}, it needs "
                f"those of {', '.join(sorted(wanted)) or 'none'}"
            )
        return {
            name: given[name] if teacher is None else teacher(wave)
            for name, teacher in self.teachers.items()
        }

    def _distillation(self, output: CodecOutput, states: dict[str, States]) -> dict[str, Tensor]:
        if not states:
            return {}
        features = {
            name: self.projections[str(self.widths[name])](output.stages[stage])
            for name, stage in self.stages.items()
        }
        return dm_codec_loss(features, states, self.weights, axis=self.axis)

    def _judge(self, real: Tensor, fake: Tensor) -> Tensor:
        scores = [score.chunk(2) for score in self.discriminators(torch.cat([real, fake])).scores]
        loss = discriminator_loss([of[0] for of in scores], [of[1] for of in scores])
        self._learn(self.optimizers[1], loss)
        return loss

    def _learn(self, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
        if not math.isfinite(value := loss.item()):
            raise ValueError(f"the loss of step {self.steps + 1} is {value}")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def _set_rate(self) -> None:
        rate = self.learning_rate
        if self.total_steps is not None:
            rate *= (1 + math.cos(math.pi * self.steps / self.total_steps)) / 2
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate


@contextmanager
def _frozen(module: nn.Module | None) -> Iterator[None]:
    learning = [] if module is None else [p for p in module.parameters() if p.requires_grad]
    try:
        for parameter in learning:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)
