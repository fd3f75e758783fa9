"""Training in stages: other parameters, another loss and other data in each, to be gone on with."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.nn.surgery import train_only
from stillhouse.progress import Progress


@dataclass(frozen=True)
class Stage:
    """One stage of `run_stages`.

    name: of the stage, in the history. loss: `loss(model, batch)` gives a scalar, or a dict whose
    "loss" is the total; its own `parameters` learn, too, its `state_dict` is kept, and `update(row,
    step, steps)` is called after each step, where it has them. steps: of the optimiser, at least 1.
    parameters: the patterns of `nn.surgery.train_only`. data: a function of the step (0, 1, ...),
    or batches, which begin again when they end; None where the loss needs none. lr: None is the
    optimiser's own. prepare: changes the model in place before the stage. optimizer: makes one of
    parameters, and of `lr`.

    Defaults: AdamW as torch has it.
    """

    name: str
    loss: Callable[[nn.Module, Any], Tensor | Mapping[str, Tensor]]
    steps: int
    parameters: str | Iterable[str] = "*"
    data: Callable[[int], Any] | Iterable[Any] | None = None
    lr: float | None = None
    prepare: Callable[[nn.Module], Any] | None = None
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW


def run_stages(
    model: nn.Module,
    stages: Sequence[Stage],
    *,
    resume: str | Path | None = None,
    save_every: int | None = None,
) -> list[dict[str, Any]]:
    """Train `model` in place, stage after stage; what learns afterwards is what did before.

    Returns a row for each step: `stage`, `step` (from 1) and the parts of the loss as floats.
    resume: a file; where it exists the run goes on from there, and after each stage, and every
    `save_every` steps, what a later call needs is written to it. A run that goes on repeats the
    one that was not interrupted where a loss draws no random numbers of its own; batches are
    skipped, functions of the step are asked for the next one.
    Raises ValueError without a stage, for equal names, a stage without a step, data that end at
    once, a loss that is not finite, and for a file of other stages.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from stillhouse.train import Stage, run_stages
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
        >>> def loss(model, batch):
        ...     return (model(batch) - 1).square().mean()
        >>> first = Stage("head", loss, 2, parameters="1.*", data=[torch.ones(3, 2)])
        >>> history = run_stages(model, [first, Stage("all", loss, 1, data=[torch.ones(3, 2)])])
        >>> [(row["stage"], row["step"]) for row in history]
        [('head', 1), ('head', 2), ('all', 1)]
    """
    stages = list(stages)
    _check(stages, save_every)
    plan = [[stage.name, stage.steps] for stage in stages]
    path = None if resume is None else Path(resume)
    state = _read(path, plan) if path is not None and path.exists() else {"stage": 0, "step": 0}
    history: list[dict[str, Any]] = state.get("history", [])
    learned = {id(parameter): parameter.requires_grad for parameter in model.parameters()}
    was_training = model.training

    def save(number: int, step: int, optimizer: torch.optim.Optimizer | None) -> None:
        if path is None:
            return
        done = {"plan": plan, "stage": number, "step": step, "history": history}
        done["model"] = model.state_dict()
        if optimizer is not None:
            done["optimizer"] = optimizer.state_dict()
        done["losses"] = [
            stage.loss.state_dict() if hasattr(stage.loss, "state_dict") else None
            for stage in stages
        ]
        _write(path, done)

    try:
        begun = state["stage"] + (state["step"] > 0)
        for stage in stages[:begun]:
            if stage.prepare is not None:
                stage.prepare(model)
        if "model" in state:
            model.load_state_dict(state["model"])
            for stage, loss_state in zip(stages, state["losses"], strict=True):
                if loss_state is not None:
                    stage.loss.load_state_dict(loss_state)
        for number in range(state["stage"], len(stages)):
            stage = stages[number]
            first = state["step"] if number == state["stage"] else 0
            if first == 0 and stage.prepare is not None:
                stage.prepare(model)
            model.train()
            optimizer = _optimizer(model, stage)
            if first:
                optimizer.load_state_dict(state["optimizer"])
            batches, progress = _batches(stage, first), Progress("steps", first)
            for step in range(first, stage.steps):
                history.append(_step(model, stage, optimizer, next(batches), step))
                if hasattr(stage.loss, "update"):
                    stage.loss.update(history[-1], step + 1, stage.steps)
                progress(stage.name, step + 1, stage.steps)
                if save_every and (step + 1) % save_every == 0 and step + 1 < stage.steps:
                    save(number, step + 1, optimizer)
            save(number + 1, 0, None)
    finally:
        model.train(was_training)
        for parameter in model.parameters():
            parameter.requires_grad_(learned.get(id(parameter), True))
    return history


def _check(stages: list[Stage], save_every: int | None) -> None:
    if not stages:
        raise ValueError("no stage was given: at least one is needed")
    names = [stage.name for stage in stages]
    if len(set(names)) < len(names):
        raise ValueError(f"stages need names of their own, got {', '.join(names)}")
    for stage in stages:
        if stage.steps < 1:
            raise ValueError(f"stage {stage.name} has {stage.steps} steps: at least 1 is needed")
    if save_every is not None and save_every < 1:
        raise ValueError(f"save_every must be at least 1, got {save_every}")


def _optimizer(model: nn.Module, stage: Stage) -> torch.optim.Optimizer:
    train_only(model, stage.parameters)
    learning = [each for each in model.parameters() if each.requires_grad]
    if hasattr(stage.loss, "parameters"):
        learning += [each for each in stage.loss.parameters() if each.requires_grad]
    options = {} if stage.lr is None else {"lr": stage.lr}
    return stage.optimizer(learning, **options)


def _batches(stage: Stage, first: int) -> Iterator[Any]:
    """The batches of the steps `first`, `first` + 1, ..."""
    step = 0
    if stage.data is None or callable(stage.data):
        for step in range(first, stage.steps):
            yield None if stage.data is None else stage.data(step)
        return
    while True:
        before = step
        for batch in stage.data:
            if step >= first:
                yield batch
            step += 1
        if step == before:
            raise ValueError(f"the data of stage {stage.name} ended after {step} batches for good")


def _step(
    model: nn.Module, stage: Stage, optimizer: torch.optim.Optimizer, batch: Any, step: int
) -> dict[str, Any]:
    found = stage.loss(model, batch)
    parts = found if isinstance(found, Mapping) else {"loss": found}
    row = {name: float(part.detach()) for name, part in parts.items()}
    if not math.isfinite(row["loss"]):
        raise ValueError(f"the loss of stage {stage.name} is {row['loss']} at step {step + 1}")
    optimizer.zero_grad()
    parts["loss"].backward()
    optimizer.step()
    return {"stage": stage.name, "step": step + 1, **row}


def _read(path: Path, plan: list[list[Any]]) -> dict[str, Any]:
    state = torch.load(path, map_location="cpu", weights_only=True)
    if state["plan"] != plan:
        raise ValueError(f"{path} is of the stages {state['plan']}, this run has {plan}")
    return state


def _write(path: Path, state: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    torch.save(state, partial)
    os.replace(partial, path)
