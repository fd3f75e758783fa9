"""What `stillhouse speculate` does: models and drafters, rounds in turns, what was found."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stillhouse import data
from stillhouse.errors import UsageError
from stillhouse.methods.speculative import (
    Drafter,
    DraftState,
    DraftTree,
    GenerationStats,
    LanguageModelDrafter,
    MCTSDrafter,
    NGramDrafter,
    TrigramTable,
    generate,
)
from stillhouse.progress import Progress
from stillhouse.recipes.distill_job import resolve
from stillhouse.recipes.speculate_prompts import OWN, corpus, plain, texts
from stillhouse.train import models
from stillhouse.train.forward import evaluating

PLAIN = "none: generate()"
ALONE = "none: ours"  # the loop of trees with roots alone: what it gains without any draft
DEPTH = 8  # of the drafts of a tri-gram table
WINDOW = 16  # tokens in which a table sees the text that it follows


@dataclass
class Found:
    """One drafter's round over the prompts of one kind."""

    seconds: float = 0.0
    tokens: int = 0
    written: list[list[int]] = field(default_factory=list)
    trace: list[tuple[float, int]] = field(default_factory=list)  # of the first prompt
    stats: list[GenerationStats] = field(default_factory=list)
    same_text: str = "–"

    def _sum(self, name: str) -> float:
        return sum(getattr(each, name) for each in self.stats)

    def _a_round(self, name: str) -> float | None:
        return self._sum(name) / self._sum("rounds") if self.stats else None

    @property
    def histogram(self) -> dict[int, int]:
        counts = sum((Counter(each.histogram) for each in self.stats), Counter())
        return {count: counts[count] for count in range(max(counts, default=0) + 1)}

    @property
    def tokens_per_round(self) -> float:
        return self._sum("n_accepted") / self._sum("rounds") + 1 if self.stats else 1.0

    @property
    def acceptance_rate(self) -> float | None:
        possible = sum(count for each in self.stats for row in each.drafted for count in row)
        return self._sum("n_accepted") / possible if possible else None

    @property
    def nodes_per_round(self) -> float | None:
        return self._a_round("nodes")

    @property
    def draft_milliseconds(self) -> float | None:
        return 1e3 * self._a_round("draft_seconds") if self.stats else None

    @property
    def round_milliseconds(self) -> float | None:
        return 1e3 * self._a_round("target_seconds") if self.stats else None


class Job:
    """The target, the prompts by kind, the drafters by name, and what each round has found."""

    def __init__(self, arguments: Any):
        self.arguments = arguments
        self.texts = texts()
        if arguments.prompts is not None:
            self.texts[OWN] = [plain(record) for record in data.read(arguments.prompts)]
        target = resolve(arguments.target)
        device = torch.device("cpu")
        if torch.accelerator.is_available():
            device = torch.accelerator.current_accelerator()
        self.target = models.load_model(target, arguments.dtype).eval().to(device)
        self.tokenizer = models.load_tokenizer(target)
        models.check_vocabulary(self.target, self.tokenizer)
        self.prompts = {
            kind: [self._ids(text)[: arguments.prompt_tokens] for text in each]
            for kind, each in self.texts.items()
        }
        self.drafters: dict[str, Callable[[Tensor], Drafter]] = {ALONE: lambda _: _NoDraft()}
        if arguments.draft is not None:
            self._add_model(resolve(arguments.draft))
        for name in named(arguments):
            getattr(self, f"_add_{name}")()
        self.rounds: list[dict[tuple[str, str], Found]] = []

    def run(self) -> None:
        """One round to warm up, then as many as are asked for, in turns."""
        arguments = self.arguments
        print(
            f"target: {arguments.target}, drafters: {', '.join(list(self.drafters)[1:])}, "
            f"{arguments.max_new_tokens} tokens behind {sum(map(len, self.prompts.values()))} "
            f"prompts, {arguments.repeats} rounds and one to warm up",
            flush=True,
        )
        names = (PLAIN, *self.drafters)
        progress = Progress("turns")
        total, done = (arguments.repeats + 1) * len(self.prompts) * len(names), 0
        for number in range(arguments.repeats + 1):
            found = {}
            for kind, prompts in self.prompts.items():
                for name in names:
                    found[name, kind] = self._turn(name, prompts, arguments.seed + number)
                    done += 1
                    progress("speculate", done, total)
                if not arguments.temperature:
                    _compare(found, kind, names)
            if number:
                self.rounds.append(found)

    def rate(self, name: str, kind: str) -> float:
        """Tokens a second, the median of the rounds."""
        each = (found[name, kind] for found in self.rounds)
        return statistics.median(found.tokens / found.seconds for found in each)

    def last(self, name: str, kind: str) -> Found:
        return self.rounds[-1][name, kind]

    def continuations(self) -> dict[str, list[str]]:
        """What was written behind each prompt, by the target alone."""
        return {
            kind: [self.tokenizer.decode(each) for each in self.last(PLAIN, kind).written]
            for kind in self.prompts
        }

    def _turn(self, name: str, prompts: list[Tensor], seed: int) -> Found:
        found = Found()
        for number, prompt in enumerate(prompts):
            # What a drafter has learnt of one text must not help it with the same one again.
            drafter = None if name == PLAIN else self.drafters[name](prompt)
            trace = [(0.0, 0)]
            since = time.perf_counter()

            def note(_: int, tokens: list[int], trace=trace, since=since) -> None:
                trace.append((time.perf_counter() - since, trace[-1][1] + len(tokens)))

            if drafter is None:
                written = self._plain(prompt, seed)
                note(0, written)
            else:
                ids, stats = generate(
                    self.target,
                    drafter,
                    [prompt],
                    max_new_tokens=self.arguments.max_new_tokens,
                    mode=self.arguments.mode,
                    temperature=self.arguments.temperature,
                    top_p=self.arguments.top_p,
                    seed=seed,
                    eos_token_id=(),
                    on_tokens=note,
                    max_nodes=self.arguments.max_nodes,
                )
                written = ids[0].tolist()
                found.stats.append(stats)
            found.seconds += time.perf_counter() - since
            found.tokens += len(written)
            found.written.append(written)
            if number == 0:
                found.trace = trace
        return found

    def _plain(self, prompt: Tensor, seed: int) -> list[int]:
        """`generate` of transformers, which draws with the global generator."""
        from transformers import GenerationConfig

        arguments = self.arguments
        options: dict[str, Any] = {"do_sample": False}
        if arguments.temperature:
            options = {"do_sample": True, "temperature": arguments.temperature, "top_k": 0}
            options |= {} if arguments.top_p is None else {"top_p": arguments.top_p}
        own, self.target.generation_config = self.target.generation_config, GenerationConfig()
        ids = prompt[None].to(self.target.device)
        try:
            with torch.random.fork_rng(), evaluating(self.target):
                torch.manual_seed(seed)
                written = self.target.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=arguments.max_new_tokens,
                    pad_token_id=0,
                    **options,
                )
        finally:
            self.target.generation_config = own
        return written[0, len(prompt) :].tolist()

    def _add_model(self, name: str) -> None:
        model = models.load_model(name, self.arguments.dtype).eval().to(self.target.device)
        # A folder without a tokenizer is taken to have the target's.
        if models.has_tokenizer(name):
            tokenizer = models.load_tokenizer(name)
            models.check_tokenizers(tokenizer, self.tokenizer, ("--draft", "--target"))
        drafter = LanguageModelDrafter(model, length=self.arguments.draft_length)
        self.drafters[f"model {Path(name).parent.name or name}"] = lambda prompt: drafter

    def _add_ngram(self) -> None:
        self.drafters["ngram"] = lambda prompt: NGramDrafter()

    def _add_aded(self) -> None:
        table = TrigramTable(vocab_size=models.head_width(self.target))
        table.build(self._ids(text) for text in corpus(self.arguments.corpus))
        folder = tempfile.TemporaryDirectory(prefix="stillhouse-")
        self._folder = folder  # until the job is gone
        path = Path(folder.name, "table")
        table.save(path)

        def fresh(prompt: Tensor) -> Drafter:
            table = TrigramTable.load(path)
            for end in range(3, len(prompt) + 1):  # as if the prompt had been written, too
                table.update(prompt[max(0, end - WINDOW) : end])
            return MCTSDrafter(table, depth=DEPTH)

        self.drafters["aded"] = fresh

    def _add_fspad(self) -> None:
        from stillhouse.methods.speculative import DynamicTreeDrafter, FSPADHead

        head = FSPADHead.load(self.arguments.head)
        head = head.eval().to(self.target.device, next(self.target.parameters()).dtype)
        drafter = DynamicTreeDrafter(head, self.target, total=self.arguments.max_nodes + 1)
        self.drafters["fspad"] = lambda prompt: drafter

    def _ids(self, text: str) -> Tensor:
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if not ids:
            raise UsageError("a text of --prompts or --corpus has no tokens")
        return torch.tensor(ids)


class _NoDraft:
    """Plain decoding as a drafter."""

    def draft(self, state: DraftState) -> DraftTree:
        return DraftTree.chain([int(state.ids[-1])])

    def accept(self, ids: Tensor) -> None:
        pass


def named(arguments: Any) -> list[str]:
    """What --drafter lists."""
    return [] if arguments.drafter is None else arguments.drafter.split(",")


def _compare(found: dict[tuple[str, str], Found], kind: str, names: tuple[str, ...]) -> None:
    """Whether each wrote what the target alone did."""
    wanted = found[PLAIN, kind].written
    for name in names[1:]:
        found[name, kind].same_text = "yes" if found[name, kind].written == wanted else "no"
