"""DistillSpec against closed forms and enumeration: losses, rates, lossy laws, the command."""

import itertools
from fractions import Fraction

import pytest
import torch

from stillhouse import ops
from stillhouse.methods.speculative import (
    DistillSpecLoss,
    acceptance_rate,
    block_efficiency,
    lenience,
    lenient_chain,
    lenient_law,
    speed_up,
    tvd_plus_plus,
)
from stillhouse.train import LogitRows, RowIndex, rollout, supervised_rows

P = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
Q = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)


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


# Lenience -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("epsilon", "kind", "accepted", "emitted"),
    [
        (1.0, "linear", 0.6, [0.6, 0.3, 0.1]),
        (0.5, "linear", 0.7, [0.5, 0.3, 0.2]),
        (0.5, "square", 0.9, [0.3, 0.3, 0.4]),
        (0.5, "exponential", 0.2 + 0.3 + 0.1**0.5, [0.5 - 0.1**0.5 + 0.2, 0.3, 0.1**0.5]),
    ],
)
def test_the_lossy_law_by_hand(epsilon, kind, accepted, emitted):
    law = lenient_law(P, Q, epsilon, kind)
    torch.testing.assert_close(law, torch.tensor(emitted, dtype=torch.float64))
    kept = torch.minimum(Q, lenience.LENIENCE[kind](P, epsilon)).sum().item()
    assert kept == pytest.approx(accepted)


def test_exponential_lenience_in_the_papers_digits():
    law = lenient_law(P, Q, 0.5, "exponential")
    assert [round(x, 4) for x in law.tolist()] == [0.3838, 0.3, 0.3162]
    assert (law - P).abs().sum().item() / 2 == pytest.approx(0.2162, abs=5e-5)


@pytest.mark.parametrize("kind", lenience.LENIENCE)
def test_less_epsilon_is_more_acceptance_and_another_law(kind):
    generator = torch.Generator().manual_seed(1)
    p, q = torch.randn(2, 50, 7, generator=generator, dtype=torch.float64).softmax(-1)
    steps = torch.linspace(1, 0.1, 10).tolist()
    distance = [(lenient_law(p, q, e, kind) - p).abs().sum(-1).mean() / 2 for e in steps]
    accepted = [torch.minimum(q, lenience.LENIENCE[kind](p, e)).sum(-1).mean() for e in steps]
    assert distance[0] < 1e-15
    assert sorted(distance) == distance
    assert sorted(accepted) == accepted
    # Everything is kept in the end: the law is the draft model's.
    torch.testing.assert_close(lenient_law(p, q, 1e-9, "linear"), q)


def test_equal_laws_have_no_residual():
    assert torch.equal(lenient_law(P, P, 1.0), P)


def enumerated(monkeypatch, verify, gamma=2):
    """Every draft and every coin of chains over three tokens, in one batch: the weights of its
    rows, what `verify` makes of them, and the laws by path. All probabilities are sixths, so coins
    in the middles of sixths give exact sums."""

    def law(path, numbers, step):
        turn = (sum(path) * step + len(path)) % 3
        return torch.tensor(numbers[turn:] + numbers[:turn], dtype=torch.float64) / 6

    laws = {
        path: (law(path, [1, 2, 3], 1), law(path, [3, 2, 1], 2))
        for length in range(gamma + 1)
        for path in itertools.product(range(3), repeat=length)
    }
    cases = list(itertools.product(*[range(3)] * gamma, *[range(6)] * (gamma + 1)))
    drafts = [case[:gamma] for case in cases]
    coins = (torch.tensor([case[gamma:] for case in cases]) + 0.5) / 6
    p, q = (
        torch.stack([torch.stack([laws[d[:i]][side] for i in range(gamma + 1)]) for d in drafts])
        for side in range(2)
    )
    weight = torch.ones(len(cases), dtype=torch.float64) / 6 ** (gamma + 1)
    for step in range(gamma):
        drawn = torch.tensor([d[step] for d in drafts])
        weight *= q[torch.arange(len(cases)), step, drawn]
    tokens = torch.tensor([(0, *d) for d in drafts], dtype=torch.int32)

    def uniform(seed, position, node, stream):
        position, node = torch.broadcast_tensors(position, torch.as_tensor(node))
        return coins[position, node - 1 if stream == 0 else torch.full_like(node, gamma)].double()

    monkeypatch.setattr(lenience, "philox_uniform", uniform)
    return weight, verify(tokens, p, q, torch.arange(len(cases))), laws


def emitted(weight, out, laws, gamma=2):
    """The law of the first gamma + 1 tokens, those that were not emitted drawn from the target."""
    whole = {path: 0.0 for path in itertools.product(range(3), repeat=gamma + 1)}
    for w, row in zip(weight.tolist(), out.out_tokens.tolist(), strict=True):
        said = tuple(token for token in row if token >= 0)
        for rest in itertools.product(range(3), repeat=gamma + 1 - len(said)):
            path, share = said + rest, w
            for place in range(len(said), gamma + 1):
                share *= laws[path[:place]][0][path[place]].item()
            whole[path] += share
    return whole


def test_a_lossless_chain_has_the_targets_law(monkeypatch):
    def verify(tokens, p, q, position):
        return lenient_chain(tokens, p, q, 1.0, seed=0, position=position, is_prob=True)

    weight, out, laws = enumerated(monkeypatch, verify)
    assert weight.sum() == pytest.approx(1, abs=1e-12)
    for path, share in emitted(weight, out, laws).items():
        exact = 1.0
        for place, token in enumerate(path):
            exact *= laws[path[:place]][0][token].item()
        assert share == pytest.approx(exact, abs=1e-12)


def test_a_lenient_chain_has_the_lossy_law(monkeypatch):
    def verify(tokens, p, q, position):
        return lenient_chain(tokens, p, q, 0.5, seed=0, position=position, is_prob=True)

    weight, out, laws = enumerated(monkeypatch, verify)
    first = torch.zeros(3, dtype=torch.float64).index_add(0, out.out_tokens[:, 0].long(), weight)
    torch.testing.assert_close(first, lenient_law(*laws[()], 0.5), atol=1e-12, rtol=0)
    assert (first - laws[()][0]).abs().max() > 0.1
    # The second token, given a first one that was kept.
    kept = (out.n_accepted > 0) & (out.out_tokens[:, 0] == 1)
    second = torch.zeros(3, dtype=torch.float64)
    second.index_add_(0, out.out_tokens[kept, 1].long(), weight[kept])
    law = lenient_law(*laws[1,], 0.5)
    torch.testing.assert_close(second / second.sum(), law, atol=1e-12, rtol=0)


def chains(batch=200, gamma=5, size=11, seed=0):
    generator = torch.Generator().manual_seed(seed)
    target, draft = 2 * torch.randn(2, batch, gamma + 1, size, generator=generator)
    tokens = torch.randint(size, (batch, gamma + 1), generator=generator, dtype=torch.int32)
    return tokens, target, draft


def test_at_epsilon_one_it_is_exact_verification():
    tokens, target, draft = chains()
    parents = torch.arange(-1, tokens.shape[1] - 1, dtype=torch.int32).expand(len(tokens), -1)
    links = ops.tree_build(parents.contiguous())
    key = {"seed": 7, "position": torch.arange(len(tokens))}
    exact = ops.tree_verify(
        tokens, links, target, draft, mode="multi_round", temperature=0.7, **key
    )
    lenient = lenient_chain(tokens, target, draft, 1.0, temperature=0.7, **key)
    assert torch.equal(lenient.n_accepted, exact.n_accepted)
    assert torch.equal(lenient.out_tokens, exact.out_tokens)
    assert torch.equal(lenient.path, exact.path)
    assert 0 < lenient.n_accepted.float().mean() < tokens.shape[1] - 1


def test_a_draft_from_the_target_itself_is_kept():
    tokens, target, _ = chains()
    out = lenient_chain(tokens, target, target, 1.0, seed=0)
    assert (out.n_accepted == tokens.shape[1] - 1).all()
    assert (out.accept_prob == 1).all()
    assert torch.equal(out.out_tokens[:, :-1], tokens[:, 1:])
    assert block_efficiency(1.0, tokens.shape[1] - 1) == tokens.shape[1]


def test_a_row_depends_on_its_seed_and_place_alone():
    tokens, target, draft = chains(batch=8)
    place = torch.arange(8)
    whole = lenient_chain(tokens, target, draft, 0.8, seed=place + 3, position=place)
    alone = lenient_chain(tokens[5:6], target[5:6], draft[5:6], 0.8, seed=8, position=5)
    for mine, other in zip(alone, whole, strict=True):
        assert torch.equal(mine[0], other[5])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(epsilon=0.0), r"epsilon in \(0, 1\], got 0.0"),
        (dict(epsilon=1.5), r"epsilon in \(0, 1\], got 1.5"),
        (dict(kind="log"), "no lenience 'log': expected one of linear, square, exponential"),
        (
            dict(draft=torch.zeros(2, 3, 5)),
            "4 columns, the draft model 5: they need one vocabulary",
        ),
        (dict(target=torch.zeros(2, 2, 4)), r"expected target \[2, 3\] x V, got \[2, 2, 4\]"),
        (dict(tokens=torch.full((2, 3), 4)), r"tokens in \[0, 4\)"),
        (dict(tokens=torch.zeros(3, dtype=torch.int32)), r"tokens \[B, T\]"),
        (dict(temperature=0.0), "a temperature > 0, got 0.0: verify greedily"),
        (dict(target=torch.full((2, 3, 4), torch.nan)), "target has rows that are no prob"),
        (dict(is_prob=True), "target has rows that are no probabilities: their sum is 1 off"),
    ],
)
def test_chains_that_are_refused(change, message):
    given = dict(
        tokens=torch.zeros(2, 3, dtype=torch.int32),
        target=torch.zeros(2, 3, 4),
        draft=torch.zeros(2, 3, 4),
        epsilon=0.5,
        seed=0,
    )
    with pytest.raises(ValueError, match=message):
        lenient_chain(**given | change)


def test_laws_that_are_refused():
    with pytest.raises(ValueError, match=r"one shape \[..., V\], got \[3\], \[2\]"):
        lenient_law(P, Q[:2], 0.5)
    with pytest.raises(ValueError, match="q has rows that are no probabilities"):
        lenient_law(P, 2 * Q, 0.5)


# The command --------------------------------------------------------------------------------------


def test_command_on_the_students_own_text(distilled):
    report = distilled("distillspec", on_policy=1, max_new_tokens=6, prompt_tokens=4)
    _, before, after = report.tables["held-out text"]
    assert report.values["seconds"]["responses"] > 0
    assert after["acceptance"] > before["acceptance"]


@pytest.mark.parametrize("options", [None, "kind=tvd++"])
def test_command_learns_from_text(assert_learns, options):
    assert_learns("distillspec", method_options=options)
