"""Does an encoder-decoder learn more from a decoder-only teacher than from labels, and is it faster
than a decoder-only model of its size?

From summaries of Debian packages to their sections, in subwords. Teacher: decoder-only, 4 layers of
width 128, 250 steps of 64 of 30,000 pairs, some of the students' among them. Students, 361,000
parameters in 6 layers of width 64: six epochs of the same 1,500 pairs, alone, or with the teacher
on the stored answers, or for the second half on the student's own. Speed: 12 layers of width 256,
sources of 512 tokens, 8 new ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from stillhouse.methods.language import (
    CrossArchitectureLoss,
    EncoderDecoder,
    EncoderDecoderConfig,
    Seq2SeqRows,
    layer_split,
)
from stillhouse.progress import Progress
from stillhouse.recipes.language.debian_sections import END, START, VOCABULARY, Pairs, Sections
from stillhouse.recipes.language.decoder_only import DecoderOnly, parameters
from stillhouse.recipes.language.decoding_speed import compare
from stillhouse.report import Report
from stillhouse.train import DivergenceObjective, Responses, rollout, supervised_rows
from stillhouse.train.forward import RowForward, evaluating

TEACHER_PAIRS, TEACHER_STEPS, TEACHER_BATCH = 30_000, 250, 64
PAIRS, EPOCHS, BATCH = 1500, 6, 32
LEARNING_RATE, WARMUP = 3e-3, 20
LAYERS, SPLITS = 6, (1 / 2, 2 / 3, 5 / 6)
SAMPLING = dict(temperature=0.9, top_k=128)  # the authors'
PLAIN = "decoder-only, labels"
LABELS = "encoder-decoder, labels"
STORED = "encoder-decoder, teacher on stored answers"
OWN = "encoder-decoder, teacher on stored, then own answers"


def sizes(width: int, layers: int, encoder_fraction: float = 2 / 3) -> EncoderDecoderConfig:
    """Heads of 16 features, or of 64 in models of width 256; two of them share their keys."""
    encoder, decoder = layer_split(layers, encoder_fraction)
    heads = 4
    return EncoderDecoderConfig(
        VOCABULARY,
        width=width,
        encoder_layers=encoder,
        decoder_layers=decoder,
        heads=heads,
        kv_heads=heads // 2,
        head_size=width // heads,
        ffn=4 * width,
        decoder_start_token_id=START,
        eos_token_id=END,
    )


def decoder_only(config: EncoderDecoderConfig, seed: int) -> DecoderOnly:
    """As many layers and parameters: what cross-attention takes goes to the MLPs."""
    layers = config.encoder_layers + config.decoder_layers
    spare = 3 * config.width**2 * config.decoder_layers // (2 * config.width * layers)
    return DecoderOnly(replace(config, ffn=config.ffn + spare), layers, seed=seed)


def run(report: Report, seeds: Sequence[int], budget: float) -> None:
    task = Sections()
    teacher = DecoderOnly(sizes(128, 6), 4, seed=1)
    pool = task.train(TEACHER_PAIRS, seed=2**31)
    batches = _batches(len(pool), TEACHER_BATCH, TEACHER_STEPS, seed=0)
    _train(teacher, pool, batches, _on_labels(teacher), seed=0, name="teacher")
    found = [{"model": "teacher", "seed": 0, **_score(teacher, task)}]
    splits: list[dict[str, float]] = []
    for seed in report.within(budget, seeds):
        pairs = task.train(PAIRS, seed)
        plain = decoder_only(sizes(64, LAYERS), seed)
        _fit(plain, pairs, _on_labels(plain), seed, "decoder-only")
        found.append({"model": PLAIN, "seed": seed, **_score(plain, task)})
        for name in (LABELS, STORED, OWN):
            student = EncoderDecoder(sizes(64, LAYERS), seed=seed)
            _fit(student, pairs, _across(student, teacher, name, task.longest, seed), seed, name)
            found.append({"model": name, "seed": seed, **_score(student, task)})
        if len(report.seeds) == 1:
            splits = _splits(task, pairs, found, seed)
    report.table("accuracy on 2,000 other summaries", found)
    report.table(f"{LABELS}, {LAYERS} layers shared out otherwise", splits)
    speed = compare(
        EncoderDecoder(sizes(256, 12), seed=0).eval(), decoder_only(sizes(256, 12), 0).eval()
    )
    report.table("512 tokens read, 8 written, 4 at a time", speed)
    _plot(report, found, splits)
    _claims(report, found, speed)


def _splits(task: Sections, pairs: Pairs, found: list[dict], seed: int) -> list[dict]:
    rows = []
    for fraction in SPLITS:
        config = sizes(64, LAYERS, fraction)
        if fraction == 2 / 3:
            accuracy = next(row["accuracy"] for row in found if row["model"] == LABELS)
        else:
            student = EncoderDecoder(config, seed=seed)
            loss = _across(student, None, LABELS, task.longest, seed)
            _fit(student, pairs, loss, seed, f"encoder's share {fraction:.2f}")
            accuracy = _score(student, task)["accuracy"]
        layers = {"encoder": config.encoder_layers, "decoder": config.decoder_layers}
        rows.append({**layers, "encoder's share": fraction, "accuracy": accuracy})
    return rows


Loss = Callable[[Pairs, int, int], Tensor]  # of a batch, the step and the number of steps


def _on_labels(model: DecoderOnly) -> Loss:
    """Cross-entropy of the sections behind the summaries."""
    objective, forward = DivergenceObjective("cross_entropy"), RowForward(model)

    def loss(pairs: Pairs, step: int, steps: int) -> Tensor:
        batch = Responses.of(pairs.prompts, pairs.target).batch()
        rows = forward(model, batch, supervised_rows(batch["labels"]))
        return objective(rows, None, {})["loss"]

    return loss


def _across(
    student: EncoderDecoder, teacher: DecoderOnly | None, name: str, longest: int, seed: int
) -> Loss:
    """What the student learns from: labels, or the teacher on stored answers, or from the middle of
    the training on on its own."""
    objective = CrossArchitectureLoss(0.0 if name == LABELS else 0.9)
    rows = Seq2SeqRows(student, None if name == LABELS else teacher)

    def loss(pairs: Pairs, step: int, steps: int) -> Tensor:
        answers, gold = pairs.target, None
        if name == OWN and step >= steps // 2:
            options = dict(max_new_tokens=longest, seed=seed * steps + step, **SAMPLING)
            answers, gold = rollout(student, pairs.source, **options).responses(), pairs.target
        prompts = dict(teacher_prefix=pairs.prompts)
        return objective(*rows(pairs.source, answers, gold=gold, **prompts))["loss"]

    return loss


def _batches(count: int, batch: int, steps: int, seed: int) -> list[Tensor]:
    """Row numbers, epoch by epoch, each in an order of its own."""
    generator = torch.Generator().manual_seed(seed)
    drawn: list[Tensor] = []
    while len(drawn) < steps:
        drawn += torch.randperm(count, generator=generator).split(batch)
    return drawn[:steps]


def _fit(model: nn.Module, pairs: Pairs, loss: Loss, seed: int, name: str) -> None:
    steps = EPOCHS * -(-len(pairs) // BATCH)
    _train(model, pairs, _batches(len(pairs), BATCH, steps, seed), loss, seed=seed, name=name)


def _train(
    model: nn.Module, pairs: Pairs, batches: list[Tensor], loss: Loss, *, seed: int, name: str
) -> None:
    """AdamW with the authors' betas, decay and clipping; the rate rises, then falls linearly."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01
    )
    progress, steps = Progress("steps"), len(batches)
    model.train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # of dropout
        for step, numbers in enumerate(batches):
            rate = LEARNING_RATE * min(1, (step + 1) / WARMUP) * (1 - step / steps)
            optimizer.param_groups[0]["lr"] = rate
            value = loss(pairs.part(numbers), step, steps)
            optimizer.zero_grad()
            value.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            progress(name, step + 1, steps)


def _score(model: nn.Module, task: Sections) -> dict[str, float]:
    """The share of sections that are written without a mistake, by the likeliest tokens."""
    test = task.test
    asks = isinstance(model, DecoderOnly)
    prompts, right = test.prompts if asks else test.source, 0
    with torch.no_grad(), evaluating(model):
        writer = (lambda ids: model(ids).logits) if asks else model
        order = sorted(range(len(test)), key=lambda number: len(prompts[number]))
        for start in range(0, len(order), 250):
            numbers = order[start : start + 250]
            options = dict(max_new_tokens=task.longest, temperature=0.0, eos_token_id=END, seed=0)
            said = rollout(writer, [prompts[number] for number in numbers], **options).responses()
            pairs = zip(numbers, said, strict=True)
            right += sum(torch.equal(each, test.target[number]) for number, each in pairs)
    return {"parameters": parameters(model), "accuracy": right / len(test)}


def _plot(report: Report, found: list[dict], splits: list[dict]) -> None:
    names = dict.fromkeys(row["model"] for row in found)
    of = {name: [row for row in found if row["model"] == name] for name in names}
    report.curve(
        "accuracy",
        {name: [row["seed"] for row in rows] for name, rows in of.items()},
        {name: [row["accuracy"] for row in rows] for name, rows in of.items()},
        xlabel="seed",
        ylabel="accuracy",
        points=True,
    )
    report.curve(
        "splits",
        [row["encoder's share"] for row in splits],
        {LABELS: [row["accuracy"] for row in splits]},
        xlabel="share of the layers in the encoder",
        ylabel="accuracy",
    )


def _claims(report: Report, found: list[dict], speed: list[dict]) -> None:
    def accuracy(name: str) -> list[float]:
        return [row["accuracy"] for row in found if row["model"] == name]

    for name in (STORED, OWN):
        report.claim(
            f"accuracy, {name}, against labels", accuracy(name), accuracy(LABELS), margin=0.01
        )
    ours, theirs = speed
    key = "tokens/s after the first"
    report.claim("new tokens a second, against decoder-only's", ours[key] / theirs[key], 1.5)
    key = "cache bytes a new token"
    report.claim(
        "cache of a new token / decoder-only's", ours[key] / theirs[key], 0.5, relation="<="
    )
