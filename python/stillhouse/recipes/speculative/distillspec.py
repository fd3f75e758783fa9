"""DistillSpec on a byte-level language model: how many more of its tokens does a target keep of a
draft model that was distilled from it, and does the divergence matter?

Target: 8 symbols of context, 256 hidden. Draft: 2 symbols, 16 hidden, 1,000 steps of fine-tuning
first; then 1,500 steps of 512 contexts with each divergence, or with more fine-tuning, from the
same draft on the same batches; or on what the draft has just written itself, 8 symbols behind each
of 64 contexts: that helps as well, though less than the text that the acceptance is measured on.
The acceptance rate is that on 4,000 held-out contexts; tokens a round are those of real speculative
decoding with 5 tokens a draft: 24 rounds behind 1,000 of the contexts, sampled, and 2 rounds behind
all of them, greedy: a byte model's greedy text soon goes round in circles, which any draft can
follow.
"""

from collections.abc import Sequence
from copy import deepcopy

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from stillhouse import ops
from stillhouse.methods.speculative import (
    DistillSpecLoss,
    acceptance_rate,
    block_efficiency,
    lenient_chain,
    lenient_law,
)
from stillhouse.recipes.language.byte_lm import (
    CONTEXT,
    ByteLM,
    ByteText,
    distill,
    label_loss,
    train,
)
from stillhouse.report import Report

TARGET_STEPS, TUNING_STEPS, STEPS = 2500, 1000, 1500
GAMMA = 5
SAMPLED, GREEDY = (1000, 24), (4000, 2)  # sequences and rounds
TUNED, CONTROL = "fine-tuning", "fine-tuning, as long"
FORWARD, REVERSE = "forward KL", "reverse KL"
OBJECTIVES = {
    FORWARD: lambda: DistillSpecLoss("forward_kl"),
    "JSD": lambda: DistillSpecLoss("jsd", beta=0.5),
    REVERSE: lambda: DistillSpecLoss("reverse_kl"),
    "TVD": lambda: DistillSpecLoss("tvd"),
    "-log acceptance": lambda: DistillSpecLoss("log_acceptance"),
}
OWN = {f"{name}, own text": OBJECTIVES[name] for name in (FORWARD, REVERSE)}  # on-policy
WRITTEN = 8  # symbols behind a context, of own text
TAILORED = ("JSD", REVERSE, "TVD")
EPSILONS = (1.0, 0.7, 0.5, 0.3, 0.1)


def run(report: Report, seeds: Sequence[int], budget: float) -> None:
    text = ByteText()
    target = ByteLM(context=8, width=16, hidden=256, seed=1)
    train(target, text, label_loss, steps=TARGET_STEPS, learning_rate=3e-3, seed=0)
    target.requires_grad_(False)

    rows, lossy = [], []
    for seed in report.within(budget, seeds):
        tuned = ByteLM(context=2, width=8, hidden=16, seed=10 + seed)
        options = dict(learning_rate=5e-3, decay=False, seed=seed)
        train(tuned, text, label_loss, steps=TUNING_STEPS, **options)
        drafts = {TUNED: tuned, CONTROL: deepcopy(tuned)}
        options = dict(steps=STEPS, learning_rate=5e-3, seed=100 + seed)
        train(drafts[CONTROL], text, label_loss, **options)
        for name, make in OBJECTIVES.items():
            drafts[name] = deepcopy(tuned)
            distill(drafts[name], target, text, make(), **options)
        for name, make in OWN.items():
            drafts[name] = deepcopy(tuned)
            distill(drafts[name], target, _OwnText(drafts[name], text), make(), **options)
        for name, draft in drafts.items():
            measured = _fidelity(draft, target, text) | _decoded(draft, target, text, seed)
            rows.append({"draft": name, "seed": seed, **measured})
        lossy += _leniences(drafts[REVERSE], target, text, seed)
    report.table("the draft and its target, held out", rows)
    report.table(f"lossy decoding, draft: {REVERSE}", lossy)
    names = list(dict.fromkeys(row["draft"] for row in rows))
    report.curve(
        "acceptance",
        {name: _of(rows, name, "acceptance") for name in names},
        {name: _of(rows, name, "tokens a round") for name in names},
        xlabel="acceptance rate, held out",
        ylabel=f"tokens a round, {GAMMA} drafted",
        points=True,
    )
    kinds = list(dict.fromkeys(row["lenience"] for row in lossy))
    first = [row for row in lossy if row["seed"] == report.seeds[0]]
    report.curve(
        "lenience",
        {kind: [row["kept"] for row in first if row["lenience"] == kind] for kind in kinds},
        {kind: [row["TVD"] for row in first if row["lenience"] == kind] for kind in kinds},
        xlabel="tokens kept",
        ylabel="distance of the text's law from the target's (TVD)",
    )
    _claims(report, rows, lossy)


class _OwnText:
    """Batches of contexts that the draft goes on to write, as it is at that step."""

    def __init__(self, draft: ByteLM, text: ByteText):
        self.draft, self.text = draft, text

    @torch.no_grad()
    def batch(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        contexts, _ = self.text.batch(generator)
        whole = contexts[: len(contexts) // WRITTEN]
        for _ in range(WRITTEN):
            logits = self.draft(whole[:, -CONTEXT:])
            token = ops.random.sample_categorical(logits, generator=generator)
            whole = torch.cat([whole, token[:, None]], 1)
        contexts = whole[:, :-1].unfold(1, CONTEXT, 1).flatten(0, 1)
        return contexts, whole[:, CONTEXT:].flatten()


def _claims(report: Report, rows: list[dict], lossy: list[dict]) -> None:
    def least(key: str, names: Sequence[str]) -> list[float]:
        return [min(each) for each in zip(*(_of(rows, name, key) for name in names), strict=True)]

    def most(key: str, names: Sequence[str]) -> list[float]:
        return [max(each) for each in zip(*(_of(rows, name, key) for name in names), strict=True)]

    report.claim(
        "the lowest acceptance of a distilled draft, against fine-tuning's",
        least("acceptance", list(OBJECTIVES)),
        _of(rows, TUNED, "acceptance"),
        margin=0.010,
    )
    report.claim(
        "the same, against fine-tuning's on as many batches",
        least("acceptance", list(OBJECTIVES)),
        _of(rows, CONTROL, "acceptance"),
    )
    for name in OWN:
        report.claim(
            f"acceptance of {name}, against fine-tuning's",
            _of(rows, name, "acceptance"),
            _of(rows, TUNED, "acceptance"),
            margin=0.005,
        )
    report.claim(
        "the best acceptance of JSD, reverse KL and TVD, against forward KL's",
        most("acceptance", TAILORED),
        _of(rows, FORWARD, "acceptance"),
        margin=0.005,
    )
    for name in (FORWARD, REVERSE):
        others = [other for other in (TUNED, CONTROL, *OBJECTIVES) if other != name]
        report.claim(
            f"{name} after training on it, against the lowest of all other drafts",
            _of(rows, name, name),
            least(name, others),
            relation="<=",
        )
    report.claim(
        "tokens a round, worst distilled draft against fine-tuning's",
        least("tokens a round", list(OBJECTIVES)),
        _of(rows, TUNED, "tokens a round"),
    )
    report.claim(
        "tokens a round, greedy, the best of JSD, reverse KL and TVD against fine-tuning's",
        most("tokens a round, greedy", TAILORED),
        _of(rows, TUNED, "tokens a round, greedy"),
    )
    report.claim(
        "tokens a round of the best of JSD, reverse KL and TVD, against forward KL's",
        most("tokens a round", TAILORED),
        _of(rows, FORWARD, "tokens a round"),
    )
    exact = [row for row in lossy if row["epsilon"] == 1]
    report.claim(
        "distance of lossless text's law from the target's",
        max(row["TVD"] for row in exact),
        1e-6,
        relation="<=",
        seeds=[report.seeds[0]],
    )
    half = [row for row in lossy if (row["lenience"], row["epsilon"]) == ("linear", 0.5)]
    report.claim(
        "tokens a round with linear lenience 0.5, against lossless decoding",
        [row["tokens a round"] for row in half],
        _of(rows, REVERSE, "tokens a round"),
        margin=0.2,
    )


def _of(rows: list[dict], name: str, key: str) -> list[float]:
    return [row[key] for row in rows if row["draft"] == name]


@torch.no_grad()
def _fidelity(draft: ByteLM, target: ByteLM, text: ByteText) -> dict[str, float]:
    contexts, labels = text.held_out
    pair = draft(contexts), target(contexts)
    alpha = acceptance_rate(*pair).item()
    return {
        "acceptance": alpha,
        "agreement": acceptance_rate(*pair, temperature=0).item(),
        FORWARD: ops.divergence(*pair, "forward_kl").mean().item(),
        REVERSE: ops.divergence(*pair, "reverse_kl").mean().item(),
        "cross-entropy": cross_entropy(pair[0], labels).item(),
        "tokens a round, if independent": block_efficiency(alpha, GAMMA),
    }


def _decoded(draft: ByteLM, target: ByteLM, text: ByteText, seed: int) -> dict[str, float]:
    """Tokens a round of exact speculative decoding, sampled at temperature 1 and greedy."""

    def exact(mode: str, temperature: float | None):
        def verify(tokens: Tensor, p: Tensor, q: Tensor, position: Tensor) -> ops.VerifyOut:
            parents = torch.arange(-1, GAMMA, dtype=torch.int32).repeat(len(tokens), 1)
            key = {"seed": seed, "position": position, "temperature": temperature}
            given = q if temperature else None
            return ops.tree_verify(tokens, ops.tree_build(parents), p, given, mode=mode, **key)

        return verify

    sampled = exact("multi_round", 1.0)
    return {
        "tokens a round": _tokens_per_round(draft, target, text, seed, sampled),
        "tokens a round, greedy": _tokens_per_round(
            draft, target, text, seed, exact("greedy", None), greedy=True
        ),
    }


@torch.no_grad()
def _tokens_per_round(
    draft: ByteLM, target: ByteLM, text: ByteText, seed: int, verify, *, greedy: bool = False
) -> float:
    """Of rounds behind held-out contexts: draft, verify, and go on behind what was committed."""
    generator = torch.Generator().manual_seed(seed)
    sequences, rounds = GREEDY if greedy else SAMPLED
    window = text.held_out[0][:sequences]
    place, accepted = torch.arange(sequences) * 2**20, 0
    for _ in range(rounds):
        whole, rows = window, []
        for _ in range(GAMMA):
            logits = draft(whole[:, -CONTEXT:])
            if greedy:
                token = logits.argmax(-1)
            else:
                token = ops.random.sample_categorical(logits, generator=generator)
            rows.append(logits)
            whole = torch.cat([whole, token[:, None]], 1)
        # Node 0 is the last committed symbol; row i is what a model says behind node i.
        contexts = whole.unfold(1, CONTEXT, 1)
        p = target(contexts.flatten(0, 1)).view(len(window), GAMMA + 1, -1)
        q = torch.stack([*rows, torch.zeros_like(rows[0])], 1)
        out = verify(whole[:, CONTEXT - 1 :].int(), p, q, place)
        accepted += out.n_accepted.sum().item()
        said = out.out_tokens.long()
        # The window behind the committed symbols, whose number differs from row to row.
        ends = out.n_accepted.long()[:, None] + 1 + torch.arange(CONTEXT)
        window = torch.cat([window, said], 1).gather(1, ends)
        place = place + out.n_accepted + 1
    return accepted / (rounds * sequences) + 1


def _leniences(draft: ByteLM, target: ByteLM, text: ByteText, seed: int) -> list[dict]:
    """What lossy decoding gains and what it costs: TVD of the emitted law from the target's."""
    contexts = text.held_out[0]
    with torch.no_grad():
        q, p = (model(contexts).double().softmax(-1) for model in (draft, target))
    rows = []
    for kind in ("linear", "exponential"):
        for epsilon in EPSILONS:
            law = lenient_law(p, q, epsilon, kind)

            def verify(
                tokens: Tensor, p: Tensor, q: Tensor, position: Tensor, e=epsilon, kind=kind
            ) -> ops.VerifyOut:
                return lenient_chain(tokens, p, q, e, kind, seed=seed, position=position)

            lenient = {"linear": p / epsilon, "exponential": p**epsilon}[kind]
            rows.append(
                {
                    "lenience": kind,
                    "epsilon": epsilon,
                    "seed": seed,
                    "kept": torch.minimum(q, lenient).sum(-1).mean().item(),
                    "TVD": (law - p).abs().sum(-1).mean().item() / 2,
                    "tokens a round": _tokens_per_round(draft, target, text, seed, verify),
                }
            )
    return rows
