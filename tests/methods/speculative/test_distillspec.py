"""DistillSpec against closed forms: its losses, the rates they are for, the command."""

from fractions import Fraction

import pytest
import torch

from stillhouse import ops
from stillhouse.methods.speculative import (
    DistillSpecLoss,
    acceptance_rate,
    block_efficiency,
    speed_up,
    tvd_plus_plus,
)
from stillhouse.train import LogitRows, RowIndex, rollout, supervised_rows


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(0)
    draft, target = 2 * torch.randn(2, 2, 5, 17, generator=generator, dtype=torch.float64)
    return draft.requires_grad_(), target


def rows(draft, target):
    position = torch.arange(len(draft))
    index = RowIndex(row=position, target=torch.zeros_like(position), sequence=position)
    return LogitRows(draft, index), LogitRows(target, index)


def gradient(loss, draft):
    return torch.autograd.grad(loss, draft)[0]


# The losses ---------------------------------------------------------------------------------------


def plain(kind, draft, target):
    """The divergences once more, in plain torch."""
    q, p = draft.softmax(-1), target.softmax(-1)
    middle = 0.3 * p + 0.7 * q
    return {
        "forward_kl": (p * (p / q).log()).sum(-1),
        "reverse_kl": (q * (q / p).log()).sum(-1),
        "jsd": (0.3 * p * (p / middle).log() + 0.7 * q * (q / middle).log()).sum(-1),
        "tvd": (p - q).abs().sum(-1) / 2,
        "log_acceptance": -torch.minimum(p, q).sum(-1).log(),
    }[kind].mean()


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd", "tvd", "log_acceptance"])
def test_divergences_and_their_gradients(logits, kind):
    draft, target = (x.flatten(0, 1) for x in logits)
    expected = plain(kind, draft, target)
    objective = DistillSpecLoss(kind, **({"beta": 0.3} if kind == "jsd" else {}))
    # Rows that are given may be written over.
    parts = objective(*rows(draft * 1, target), {})
    torch.testing.assert_close(parts["loss"], expected, atol=1e-7, rtol=1e-6)
    torch.testing.assert_close(
        gradient(parts["loss"], logits[0]), gradient(expected, logits[0]), atol=1e-7, rtol=1e-5
    )
    accepted = torch.minimum(draft.softmax(-1), target.softmax(-1)).sum(-1).mean()
    assert parts["acceptance"].item() == pytest.approx(accepted.item(), abs=1e-6)


def test_reverse_kl_is_the_default():
    assert DistillSpecLoss().kind == ops.ReverseKL()


@pytest.mark.parametrize(("beta", "kind"), [(0, "forward_kl"), (1, "reverse_kl")])
def test_jsd_at_its_ends_is_a_kl(logits, beta, kind):
    draft, target = (x.flatten(0, 1) for x in logits)
    at_the_end = DistillSpecLoss("jsd", beta=beta)(*rows(draft * 1, target), {})
    assert at_the_end["loss"] == DistillSpecLoss(kind)(*rows(draft * 1, target), {})["loss"]


def policy_gradient(draft, target):
    """-E_q[(r - m) / sigma log q], whose gradient is TVD++'s, in plain torch."""
    p, log_q = target.softmax(-1), draft.log_softmax(-1)
    q = log_q.exp().detach()
    reward = (p > q).double()
    m = (q * reward).sum(-1).mean()
    advantage = (reward - m) / (m * (1 - m)).sqrt()
    return -(q * advantage * log_q).sum(-1).mean()


def test_tvd_plus_plus_is_the_standardised_policy_gradient(logits):
    draft, target = logits
    mine = gradient(tvd_plus_plus(draft, target), draft)
    torch.testing.assert_close(mine, gradient(policy_gradient(draft, target), draft))
    loss = DistillSpecLoss("tvd++")(*rows(draft.flatten(0, 1) * 1, target.flatten(0, 1)), {})
    torch.testing.assert_close(gradient(loss["loss"], draft), mine)
    torch.testing.assert_close(loss["loss"], loss["tvd"] / loss["sigma"])


def test_tvd_plus_plus_counts_masked_rows_only(logits):
    draft, target = logits
    mask = torch.tensor([[True] * 3 + [False] * 2, [False] * 5])
    loss = tvd_plus_plus(draft, target, mask=mask)
    torch.testing.assert_close(loss, tvd_plus_plus(draft[0, :3], target[0, :3]))
    assert gradient(loss, draft)[~mask].abs().max() == 0
    assert tvd_plus_plus(draft, target, mask=torch.zeros_like(mask)) == 0


def test_where_all_rewards_are_alike_nothing_pulls():
    same = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    loss = tvd_plus_plus(same, same.detach())
    assert loss == 0
    assert gradient(loss, same).abs().max() == 0


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(kind="jsd", beta=1.5), ValueError, r"beta must lie in \(0, 1\), got 1.5"),
        (dict(kind="cross_entropy"), ValueError, "of draft model and target, got CrossEntropy"),
        (dict(kind="dkd"), ValueError, "of draft model and target, got DKD"),
        (dict(kind="tvdd"), ValueError, "unknown divergence 'tvdd'"),
        (dict(kind="tvd", beta=0.5), TypeError, "beta"),
        (dict(kind="tvd++", label_weight=0.1), ValueError, "does not mix with a label_weight"),
    ],
)
def test_what_no_loss_can_be_made_of(arguments, error, message):
    with pytest.raises(error, match=message):
        DistillSpecLoss(**arguments)


def test_different_vocabularies_are_named(logits):
    draft, target = logits
    with pytest.raises(ValueError, match="16"):
        tvd_plus_plus(draft, target[..., :16])
    with pytest.raises(ValueError, match="16"):
        acceptance_rate(draft, target[..., :16])


# Which rows ---------------------------------------------------------------------------------------

EOS = 3


class Says:
    """A language model that says what is written, whatever the prompt."""

    def __init__(self, words):
        self.words = torch.tensor(words)

    def __call__(self, ids):
        said = self.words[(torch.arange(ids.shape[1]) - 1).clamp(0, len(self.words) - 1)]
        return 50 * torch.nn.functional.one_hot(said, 6).double().expand(len(ids), -1, -1)


@pytest.mark.parametrize(
    ("words", "stops", "targets"),
    [
        ([5, EOS, EOS, 5], [EOS], [5, EOS]),  # padding is the same token
        ([5, 4, 5, EOS], [EOS, 4], [5, 4]),  # the first of several
        ([5, 5, 5, 5], [EOS], [5, 5, 5, 5]),  # until there is no room left
        ([EOS, 5, 5, 5], [EOS], [EOS]),
    ],
)
def test_rows_are_the_response_with_its_end(words, stops, targets):
    drawn = rollout(Says(words), [[1, 2]], max_new_tokens=4, seed=0, eos_token_id=stops)
    index = supervised_rows(drawn.batch()["labels"])
    assert index.target.tolist() == targets
    # The first of these rows is the prompt's last token, which predicts the response's first.
    assert index.row.tolist() == list(range(1, 1 + len(targets)))


# Rates --------------------------------------------------------------------------------------------


def test_acceptance_is_one_minus_total_variation(logits):
    draft, target = (x.detach() for x in logits)
    for temperature in (1.0, 0.5):
        q, p = ((x / temperature).softmax(-1) for x in (draft, target))
        expected = 1 - (p - q).abs().sum(-1).mean() / 2
        torch.testing.assert_close(
            acceptance_rate(draft, target, temperature=temperature).double(), expected
        )
    greedy = (draft.argmax(-1) == target.argmax(-1)).double().mean()
    assert acceptance_rate(draft, target, temperature=0) == greedy
    assert acceptance_rate(target, target) == pytest.approx(1)
    mask = torch.zeros(2, 5, dtype=torch.bool)
    mask[0, 1] = True
    assert acceptance_rate(draft, target, mask) == acceptance_rate(draft[0, 1:2], target[0, 1:2])
    with pytest.raises(ValueError, match="at least one"):
        acceptance_rate(draft, target, torch.zeros_like(mask))
    with pytest.raises(ValueError, match="temperature >= 0, got -1"):
        acceptance_rate(draft, target, temperature=-1)


@pytest.mark.parametrize(
    ("alpha", "gamma", "tokens"), [(".8", 5, 3.68928), (".6", 5, 2.38336), (".9", 7, 5.69533)]
)
def test_block_efficiency(alpha, gamma, tokens):
    exact = Fraction(alpha)
    exact = (1 - exact ** (gamma + 1)) / (1 - exact)
    assert block_efficiency(float(alpha), gamma) == pytest.approx(float(exact), abs=1e-12)
    assert float(exact) == pytest.approx(tokens, abs=5e-6)
    several = block_efficiency(torch.tensor([0.0, float(alpha), 1.0]), gamma)
    torch.testing.assert_close(several, torch.tensor([1.0, float(exact), gamma + 1.0]))
    assert speed_up(float(alpha), gamma, cost=0) == pytest.approx(tokens, abs=5e-6)
    assert speed_up(1.0, gamma, cost=1) == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: block_efficiency(0.5, 0), "gamma, the drafted tokens of a round, >= 1, got 0"),
        (lambda: block_efficiency(1.5, 5), r"acceptance rate, in \[0, 1\], got 1.5"),
        (lambda: block_efficiency(torch.tensor([-0.5]), 5), "acceptance rate"),
        (lambda: speed_up(0.5, 5, cost=-1), "a ratio of times, >= 0, got -1"),
    ],
)
def test_rates_out_of_range(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# The command --------------------------------------------------------------------------------------


def test_command_on_the_students_own_text(distilled):
    report = distilled("distillspec", on_policy=1, max_new_tokens=6, prompt_tokens=4)
    _, before, after = report.tables["held-out text"]
    assert report.values["seconds"]["responses"] > 0
    assert after["acceptance"] > before["acceptance"]


@pytest.mark.parametrize("options", [None, "kind=tvd++"])
def test_command_learns_from_text(assert_learns, options):
    assert_learns("distillspec", method_options=options)
