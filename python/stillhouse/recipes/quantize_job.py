"""What `stillhouse quantize` does with its models: fit, teach, measure; each step kept on disk."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse import data
from stillhouse.errors import UsageError
from stillhouse.methods.compression import (
    Account,
    EntropyWeightedLoss,
    account,
    freeze_fdb_,
    quantize_fdb_,
)
from stillhouse.nn.fdb import FDBLinear
from stillhouse.nn.fdb_surgery import FDBLayer, has_fdb
from stillhouse.progress import Progress
from stillhouse.recipes.distill_job import resolve, split
from stillhouse.recipes.generation_speed import generation_speed
from stillhouse.report import write_atomically
from stillhouse.train import (
    DivergenceObjective,
    Stage,
    Taught,
    fidelity,
    mixtures,
    models,
    ramp,
    run_stages,
)
from stillhouse.train.examples import collate, encode

ORIGINAL, ROUNDED, FITTED = "original", "round to nearest", "least squares"
KD, DAD = "least squares, KD", "least squares, DAD"
OBJECTIVES = {KD: lambda: DivergenceObjective("forward_kl"), DAD: EntropyWeightedLoss}
FILES = {KD: "kd.pt", DAD: "dad.pt"}
SKIP = ("lm_head", "embed")  # heads and embeddings stay, as in the paper
SAVE_EVERY = 5  # steps
PROMPT = 16  # tokens


class Job:
    """The models of one run, in the order of `models`, and what was found of each.

    Models are kept as they are saved: dual-binary layers packed, all else in bfloat16.
    Raises UsageError for a model with other layers than `--group-size` divides.
    """

    def __init__(self, arguments: Any, folder: Path):
        self.arguments, self.folder = arguments, folder
        name = resolve(arguments.model)
        # Text is read before the model: a wrong path should not cost a minute of loading.
        records = data.read(arguments.data)
        other = None if arguments.eval_data is None else data.read(arguments.eval_data)
        self.device = torch.device("cpu")
        if torch.accelerator.is_available():
            self.device = torch.accelerator.current_accelerator()
        dense = models.load_student(name, None, "float32").eval()
        self._check(dense)
        self._dense = dense.to(self.device)
        self.tokenizer = models.load_tokenizer(models.source_of(name))
        models.check_vocabulary(dense, self.tokenizer)
        models.check_length(None, dense, arguments.max_length)
        numbers, held = split(arguments, records)
        length = arguments.max_length
        self.examples = encode(records, numbers, self.tokenizer, length).examples
        of, held = (records, held) if other is None else (other, range(len(other)))
        self.held = _first(encode(of, held, self.tokenizer, length).examples, arguments.eval_tokens)
        self.models: dict[str, nn.Module] = {}
        self.accounts: dict[str, Account] = {}
        self.layers: dict[str, list[FDBLayer]] = {}
        self.history: dict[str, list[dict[str, Any]]] = {}
        path = folder / "measured.json"
        known = arguments.resume and path.exists()
        self.measured: dict[str, dict[str, float]] = json.loads(path.read_text()) if known else {}
        weights, trained = account(dense).params, sum(map(_targets, self.examples))
        print(
            f"model: {arguments.model} ({weights / 1e6:.1f}M weights)\ndata: {arguments.data}, "
            f"{trained:,} tokens to train on, {sum(map(_targets, self.held)):,} held out",
            flush=True,
        )

    def _check(self, dense: nn.Module) -> None:
        if has_fdb(dense) or mixtures.has_mixtures(dense):
            raise UsageError(
                f"--model {self.arguments.model} has two-bit layers or experts already"
            )
        size = self.arguments.group_size
        columns = {path: each.in_features for path, each in _linears(dense).items()}
        if not columns:
            raise UsageError(f"--model {self.arguments.model} has no nn.Linear to quantize")
        wrong = next((path for path, count in columns.items() if count % size), None)
        if wrong is not None:
            common = math.gcd(*columns.values())
            raise UsageError(
                f"--group-size {size} does not divide the {columns[wrong]} columns of {wrong}: "
                f"take a divisor of {common}"
            )

    def run(self) -> None:
        """Make and measure all models."""
        self._keep(ORIGINAL, _halved(copy.deepcopy(self._dense)))
        rounded = copy.deepcopy(self._dense)
        self._quantize(ROUNDED, rounded, "paper")
        self._keep(ROUNDED, _packed(rounded))
        fitted, self._dense = self._dense, None
        self._quantize(FITTED, fitted, "ls")
        self._keep(FITTED, _packed(copy.deepcopy(fitted)))
        for name in OBJECTIVES if self.arguments.steps else ():
            student = copy.deepcopy(fitted)
            self.history[name] = self._teach(name, student)
            self._keep(name, _packed(student))

    @property
    def best(self) -> str:
        """The dual-binary model with the least perplexity."""
        names = [name for name in self.models if name != ORIGINAL]
        return min(names, key=lambda name: self.measured[name]["perplexity"])

    def linear_bits(self, name: str) -> float:
        """Bits a weight of the layers that are quantized."""
        return 16.0 if name == ORIGINAL else 2 + 32 / self.arguments.group_size

    def speed(self) -> tuple[dict[str, float], int]:
        """Tokens a second of each, going on from held-out text, and how many at a time."""
        prompt = torch.from_numpy(self.held[0].input_ids[:PROMPT].astype("int64"))
        return generation_speed(self.models, prompt[None].to(self.device))

    def _quantize(self, name: str, model: nn.Module, method: str) -> None:
        made = quantize_fdb_(model, self.arguments.group_size, skip=SKIP, method=method)
        self.layers[name] = made.layers

    def _keep(self, name: str, model: nn.Module) -> None:
        """Measure it, unless a run that was stopped has."""
        self.models[name], self.accounts[name] = model, account(model)
        if name not in self.measured:
            self.measured[name] = fidelity(model, self.models[ORIGINAL], self._held_out(name))
            text = json.dumps(self.measured, indent=1)
            write_atomically(self.folder / "measured.json", text.encode())
        print(f"{name}: perplexity {self.measured[name]['perplexity']:.4g}", flush=True)

    def _teach(self, name: str, student: nn.Module) -> list[dict[str, Any]]:
        steps, path = self.arguments.steps, self.folder / FILES[name]
        stage = Stage(
            name,
            _Halved(OBJECTIVES[name](), self.models[ORIGINAL]),
            steps,
            data=self._batch,
            lr=self.arguments.learning_rate,
            optimizer=lambda learning, lr: _optimizer(learning, lr, steps),
        )
        return run_stages(_Scales(student), [stage], resume=path, save_every=SAVE_EVERY)

    def _batch(self, step: int) -> dict[str, Tensor]:
        """Examples in an order that is drawn anew each time all have been seen."""
        count, size = len(self.examples), self.arguments.batch_size
        chosen = []
        for place in range(step * size, (step + 1) * size):
            epoch, position = divmod(place, count)
            generator = torch.Generator().manual_seed(self.arguments.seed + 1000 * epoch)
            order = torch.randperm(count, generator=generator)
            chosen.append(self.examples[order[position]])
        return self._on_device(collate(chosen))

    def _held_out(self, name: str) -> Iterator[dict[str, Tensor]]:
        # A forward of a packed model unpacks its weights: few large batches.
        size, progress = max(1, 4096 // self.arguments.max_length), Progress("examples")
        for start in range(0, len(self.held), size):
            yield self._on_device(collate(self.held[start : start + size]))
            progress(f"measuring {name}", min(start + size, len(self.held)), len(self.held))

    def _on_device(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: each.to(self.device) for name, each in batch.items()}


class _Halved(Taught):
    """Products in bfloat16, the loss and the scales in float32."""

    def __call__(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        with torch.autocast(batch["input_ids"].device.type, torch.bfloat16):
            return super().__call__(model.whole, batch)


class _Scales(nn.Module):
    """The scales of a model alone, so that checkpoints hold what changes: a tenth of its bytes."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.__dict__["whole"] = model  # no submodule: its weights are not ours
        layers = [each for each in model.modules() if isinstance(each, FDBLinear)]
        model.requires_grad_(False)
        self.change = nn.ParameterList(each.change for each in layers)
        for number, layer in enumerate(layers):
            self.register_buffer(f"initial_{number}", layer.initial)


def _optimizer(learning: Any, rate: float, steps: int) -> torch.optim.Optimizer:
    """AdamW whose rate rises for a tenth of the steps and then falls to 0, in straight lines,
    wherever a run goes on."""
    made = torch.optim.AdamW(learning, lr=rate, weight_decay=0.0)

    def move(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            step = int(optimizer.state.get(group["params"][0], {}).get("step", 0))
            rising = min(1.0, (step + 1) / max(1, steps // 10))
            group["lr"] = rising * ramp(step, steps, rate, 0.0)

    made.register_step_pre_hook(move)
    return made


def _linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The layers that `quantize_fdb_` takes."""
    return {
        path: each
        for path, each in model.named_modules()
        if type(each) is nn.Linear and not any(word in path for word in SKIP)
    }


def _packed(model: nn.Module) -> nn.Module:
    freeze_fdb_(model)
    return _halved(model)


def _halved(model: nn.Module) -> nn.Module:
    """Parameters in bfloat16; buffers, such as the angles of positions, keep their precision."""
    for each in model.parameters():
        each.data = each.data.bfloat16()
    return model.eval().requires_grad_(False)


def _first(examples: list[Any], tokens: int) -> list[Any]:
    """As many examples, from the first on, as have so many targets."""
    chosen, count = [], 0
    for each in examples:
        if count >= tokens:
            break
        chosen.append(each)
        count += _targets(each)
    return chosen


def _targets(example: Any) -> int:
    return int(example.loss_mask[1:].sum())
