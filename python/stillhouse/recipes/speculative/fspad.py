"""FSPAD on a language model of Python's documentation: what do a gate for features and a split
output add to a draft head?

Target: a Llama of 4 blocks of width 128 with 512 tokens, trained for half a minute. Heads: all
four combinations of fusion and output, each trained on the same features with the same batches and
noise; linear fusion and one output is EAGLE's head. Drafts are judged behind 200 held-out prompts
that the target has gone on from, greedily and sampled: the target accepts a deterministic tree as
far as it holds the text that the target goes on to write, so what it wrote tells what it would
have accepted. EAGLE's head with an MLP so wide that it has FSPAD's parameters is the control.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from stillhouse import data
from stillhouse.methods.speculative import (
    DraftTree,
    DynamicTreeDrafter,
    FSPADHead,
    generate,
    target_features,
    train_draft_head,
)
from stillhouse.methods.speculative.draft_head import HeadCache
from stillhouse.methods.speculative.dynamic_tree_drafter import grow, trees_of
from stillhouse.recipes.language.byte_pairs import byte_pairs
from stillhouse.recipes.language.small_lm import small_llama, train_on_windows
from stillhouse.report import Report
from stillhouse.train import rollout

VOCABULARY, WIDTH, FFN, HEADS, LENGTH = 512, 128, 384, 4, 96
TARGET_STEPS, TARGET_BATCH, TARGET_RATE = 300, 16, 4e-3
STEPS, BATCH, RATE = 160, 16, 3e-3
NOISE = 0.2 * LENGTH / 512  # 0.1 either way, which longer texts have at the default
PROMPTS, PROMPT, WRITTEN = 200, 32, 30
PLACES = (36, 42, 48, 54)  # of the roots, within what was written
TOTAL, DEPTH, TOP_K = 30, 5, 8
SHOWN, TOKENS = 16, 60  # prompts and tokens of plain generation
TEMPERATURES = (0.0, 1.0)
EAGLE, FULL = "linear, one output (EAGLE)", "gated, split (FSPAD)"
ARMS = {
    EAGLE: dict(fusion="linear", split=False),
    "linear, split": dict(fusion="linear", split=True),
    "gated, one output": dict(fusion="gated", split=False),
    FULL: dict(fusion="gated", split=True),
}
WIDE = "EAGLE, as large as FSPAD"  # of the first seed only
WIDE_FFN = 896


def run(report: Report, seeds: Sequence[int], budget: float) -> None:
    stream, prompts = _text()
    target = _target(stream)
    ids = stream[: len(stream) // LENGTH * LENGTH].view(-1, LENGTH)
    features = torch.cat([target_features(target, {"input_ids": part}) for part in ids.split(64)])
    trees, chains, first = [], [], {}

    def measure(
        name: str, head: FSPADHead, seed: int, written: list[tuple[Tensor, Tensor]]
    ) -> None:
        _train(target, head, ids, features, seed)
        accepted = (_accepted(head, target, *each) for each in written)
        trees.append(
            {"head": name, "seed": seed, "parameters": sum(map(torch.numel, head.parameters()))}
            | {_key(t): each + 1 for t, each in zip(TEMPERATURES, accepted, strict=True)}
        )
        shares = _depths(head, target, *written[0])
        depths = {f"depth {number}": share for number, share in enumerate(shares, 1)}
        chains.append({"head": name, "seed": seed} | depths)

    for seed in report.within(budget, seeds):
        written = [_written(target, prompts, temperature, seed) for temperature in TEMPERATURES]
        for name, options in ARMS.items():
            head = _head(seed, FFN, **options)
            measure(name, head, seed, written)
            first.setdefault(name, head)
    # What is of one seed alone comes last: another seed is worth more.
    seed = report.seeds[0]
    written = [_written(target, prompts, temperature, seed) for temperature in TEMPERATURES]
    measure(WIDE, _head(seed, WIDE_FFN, **ARMS[EAGLE]), seed, written)
    _generate(report, {name: first[name] for name in (EAGLE, FULL)}, target, prompts)
    series = {row["head"]: list(row.values())[2:] for row in chains if row["seed"] == seed}
    report.curve(
        "depth",
        range(1, DEPTH + 1),
        series,
        xlabel="depth of the draft",
        ylabel="share of right tokens, greedy",
    )
    report.table("tokens a round, trees of 30", trees)
    report.table("share of right tokens in chains, greedy", chains)
    _claims(report, trees, chains)


def _key(temperature: float) -> str:
    return f"tokens a round, T = {temperature:g}"


def _claims(report: Report, trees: list[dict], chains: list[dict]) -> None:
    def of(name: str, key: str) -> list[float]:
        return [row[key] for row in trees if row["head"] == name]

    def decay(name: str) -> list[float]:
        """What the share of right tokens loses behind the first, on average over depths."""
        rows = [list(row.values())[2:] for row in chains if row["head"] == name]
        return [first - sum(later) / len(later) for first, *later in rows]

    for temperature, margin in zip(TEMPERATURES, (0.2, 0.05), strict=True):
        key = _key(temperature)
        report.claim(f"{key}: FSPAD against EAGLE", of(FULL, key), of(EAGLE, key), margin=margin)
        differences = [a - b for a, b in zip(of(FULL, key), of(EAGLE, key), strict=True)]
        report.value(f"FSPAD - EAGLE, {key}", differences)
    report.claim(
        f"{_key(0.0)}: FSPAD against EAGLE with as many parameters",
        of(FULL, _key(0.0))[:1],
        of(WIDE, _key(0.0)),
        seeds=report.seeds[:1],
    )
    for fusion in ("linear", "gated"):
        one, split = f"{fusion}, one output", f"{fusion}, split"
        names = [next(each for each in ARMS if each.startswith(name)) for name in (split, one)]
        report.claim(
            f"{_key(0.0)}, fusion {fusion}: split against one output",
            *(of(name, _key(0.0)) for name in names),
        )
    report.claim(
        f"fall of the share of right tokens from depth 1 to 2 to {DEPTH}: FSPAD against EAGLE",
        decay(FULL),
        decay(EAGLE),
        relation="<=",
    )


def _generate(
    report: Report, heads: dict[str, FSPADHead], target: nn.Module, prompts: Tensor
) -> None:
    """What the heads are for, with the target's verification: the text is the target's own."""
    chosen = list(prompts[:: PROMPTS // SHOWN][:SHOWN])
    options = dict(max_new_tokens=TOKENS, eos_token_id=())
    plain = rollout(target, chosen, temperature=0, seed=0, **options).responses()
    rows, same = [], []
    for name, head in heads.items():
        drafter = DynamicTreeDrafter(head, target, total=TOTAL, depth=DEPTH, top_k=TOP_K)
        row: dict[str, object] = {"head": name}
        for temperature in TEMPERATURES:
            drafted = dict(temperature=temperature, max_nodes=TOTAL - 1, adaptive=False)
            ids, stats = generate(target, drafter, chosen, **options, **drafted)
            row[_key(temperature)] = stats.tokens_per_round
            if temperature == 0:
                pairs = zip(ids, plain, strict=True)
                same.append(sum(torch.equal(a, b) for a, b in pairs) / len(ids))
        rows.append(row)
    report.table(f"generation behind {SHOWN} prompts, {TOKENS} tokens", rows)
    report.claim(
        "share of greedy texts that are the target's, token for token",
        min(same),
        1.0,
        seeds=report.seeds[:1],
    )


def _head(seed: int, ffn: int, **options) -> FSPADHead:
    generator = torch.Generator().manual_seed(seed)
    return FSPADHead(WIDTH, ffn, heads=HEADS, generator=generator, **options)


def _train(target: nn.Module, head: FSPADHead, ids: Tensor, features: Tensor, seed: int) -> None:
    def batch(step: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed * 100_003 + step)
        rows = torch.randint(len(ids), (BATCH,), generator=generator)
        return {"input_ids": ids[rows], "features": features[rows]}

    train_draft_head(target, head, batch, steps=STEPS, lr=RATE, noise=NOISE, seed=seed)
    head.eval().requires_grad_(False)


@functools.cache
def _text() -> tuple[Tensor, Tensor]:
    """Tokens of nine tenths of the documents, and 200 prompts of 32 tokens from the others."""
    documents = data.stdlib_docs()
    train = [each for number, each in enumerate(documents) if number % 10]
    tokenizer = byte_pairs(train, VOCABULARY)
    stream = torch.tensor([token for each in tokenizer.encode_batch(train) for token in each.ids])
    other = [token for each in tokenizer.encode_batch(documents[::10]) for token in each.ids]
    starts = torch.linspace(0, len(other) - PROMPT, PROMPTS).long()
    return stream, torch.tensor(other)[starts[:, None] + torch.arange(PROMPT)]


def _target(stream: Tensor) -> nn.Module:
    lm = small_llama(VOCABULARY, 4, 128, seed=0, width=WIDTH, ffn=FFN)
    options = dict(batch=TARGET_BATCH, steps=TARGET_STEPS, rate=TARGET_RATE)
    return train_on_windows(lm, stream, length=LENGTH, seed=0, **options)


def _written(
    target: nn.Module, prompts: Tensor, temperature: float, seed: int
) -> tuple[Tensor, Tensor]:
    """What the target writes behind the prompts, with them, and its features of that."""
    options = dict(max_new_tokens=WRITTEN, temperature=temperature, seed=seed, eos_token_id=())
    ids = rollout(target, list(prompts), **options).ids
    return ids, target_features(target, {"input_ids": ids})


@torch.no_grad()
def _accepted(head: FSPADHead, target: nn.Module, ids: Tensor, features: Tensor) -> float:
    """Draft tokens that the target accepts of a tree, on average over prompts and places."""
    embedding, cache = target.get_input_embeddings(), HeadCache()
    outputs = head(features[:, :-1], embedding(ids[:, 1:]), cache=cache)
    found = 0
    for root in reversed(PLACES):
        cache.truncate(root)
        last = (each[:, root - 1] for each in outputs)
        options = dict(depth=DEPTH, top_k=TOP_K)
        candidates = grow(head, embedding, target.lm_head, *last, cache, **options)
        trees = trees_of(candidates, ids[:, root], TOTAL)
        for tree, text in zip(trees, ids[:, root + 1 :].tolist(), strict=True):
            found += _depth_of(tree, text)
    return found / (len(ids) * len(PLACES))


def _depth_of(tree: DraftTree, text: list[int]) -> int:
    """How far the tree holds this text."""
    tokens, parents = tree.tokens.tolist(), tree.parents.tolist()
    children = {
        (parent, token): node
        for node, (parent, token) in enumerate(zip(parents, tokens, strict=True))
    }
    node = depth = 0
    for token in text:
        node = children.get((node, token), -1)
        if node < 0:
            break
        depth += 1
    return depth


@torch.no_grad()
def _depths(head: FSPADHead, target: nn.Module, ids: Tensor, features: Tensor) -> list[float]:
    """Share of the target's tokens that the likeliest draft is, at depth 1, 2, …, where the tokens
    before are right and the features the head's own."""
    embedding, cache = target.get_input_embeddings(), HeadCache()
    outputs = head(features[:, :-1], embedding(ids[:, 1:]), cache=cache)
    right = torch.zeros(DEPTH)
    for root in reversed(PLACES):
        cache.truncate(root)
        for_logits, for_feedback = (each[:, root - 1 : root] for each in outputs)
        for depth in range(DEPTH):
            truth = ids[:, root + 1 + depth : root + 2 + depth]
            right[depth] += (target.lm_head(for_logits).argmax(-1) == truth).float().mean()
            for_logits, for_feedback = head(for_feedback, embedding(truth), cache=cache)
    return (right / len(PLACES)).tolist()
