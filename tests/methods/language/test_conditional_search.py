"""Conditional search: plain beam search as transformers has it, modes by enumeration, and what q is
allowed to do."""

import itertools
import math

import pytest
import torch

from stillhouse.methods.language import conditional_beam_search, exact_length_mode

# Of the bigrams to A, B and the end: a text begins in the last row, and its mode is empty. Of two
# tokens the best is AB: 0.6 * 0.6 * 0.5 = 0.18.
BIGRAMS = torch.tensor([[0.1, 0.6, 0.3], [0.4, 0.1, 0.5], [0.6, 0.0, 0.4]], dtype=torch.float64)
END = 2


def bigrams(table):
    def step(ids):
        last = ids[:, -1] if ids.shape[1] else torch.full((len(ids),), END)
        return table.log()[last]

    return step


def random_table(columns, seed):
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(columns, columns, generator=generator).double()).softmax(-1)


def log_prob(step, text, eos):
    """Of a text and its end, token by token."""
    total = 0.0
    for place, token in enumerate([*text, eos]):
        ids = torch.tensor([text[:place]], dtype=torch.int64).view(1, place)
        total += step(ids)[0].log_softmax(-1)[token].item()
    return total


def ends_at(n, eos=END):
    """q of exactly n tokens, without a look-ahead: 1 for all that can still come to it."""

    def attribute(ids, tokens, hidden):
        return ((tokens == eos) == (ids.shape[1] == n)).double()

    return attribute


def test_the_unconditional_mode_is_empty_and_that_of_length_2_is_not():
    step = bigrams(BIGRAMS)
    best = conditional_beam_search(step, beam=3, max_length=6, eos=END)[0]
    assert best.ids.tolist() == []
    assert best.log_prob == pytest.approx(math.log(0.4))
    found = exact_length_mode(step, 2, eos=END)
    assert found.ids.tolist() == [0, 1]
    assert found.log_prob == pytest.approx(math.log(0.18))
    assert exact_length_mode(step, 0, eos=END).log_prob == pytest.approx(math.log(0.4))
    conditional = conditional_beam_search(step, ends_at(2), beam=3, max_length=3, eos=END)[0]
    assert conditional.ids.tolist() == [0, 1]
    assert conditional.score == conditional.log_prob == pytest.approx(math.log(0.18))


@pytest.mark.parametrize("n", [1, 3, 5])
@pytest.mark.parametrize("seed", range(6))
def test_the_mode_of_a_length_is_that_of_enumeration(n, seed):
    step = bigrams(random_table(4, seed))
    texts = list(itertools.product([0, 1, 3], repeat=n))  # 2 is the end
    values = [log_prob(step, list(text), 2) for text in texts]
    found = exact_length_mode(step, n, eos=2)
    assert found.log_prob == pytest.approx(max(values))
    assert tuple(found.ids.tolist()) == texts[values.index(max(values))]
    wide = conditional_beam_search(step, ends_at(n, 2), beam=243, max_length=n + 1, eos=2)
    assert tuple(wide[0].ids.tolist()) == texts[values.index(max(values))]
    # So wide a beam holds them all, the best first.
    assert [each.log_prob for each in wide[: len(texts)]] == pytest.approx(sorted(values)[::-1])


@pytest.mark.parametrize("attribute", [None, lambda ids, tokens, _: torch.ones(tokens.shape)])
@pytest.mark.parametrize(("beam", "length"), [(1, 5), (3, 8), (4, 12)])
def test_without_an_attribute_it_is_beam_search(llama, attribute, beam, length):
    """The same texts and scores as transformers finds, where some ends and some are cut off."""
    lm = llama(1, vocab_size=13).double()
    lm.config.eos_token_id = lm.generation_config.eos_token_id = 5
    with torch.no_grad():
        lm.lm_head.weight[5] *= 1.5
    prompt = torch.tensor([[3, 9, 1]])

    def step(ids):
        whole = torch.cat([prompt.expand(len(ids), -1), ids], 1)
        return lm(input_ids=whole, use_cache=False).logits[:, -1]

    out = lm.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        num_beams=beam,
        num_return_sequences=beam,
        max_new_tokens=length,
        length_penalty=0.0,
        do_sample=False,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
    )
    found = conditional_beam_search(step, attribute, beam=beam, max_length=length, eos=5)
    for each, row in zip(found, out.sequences[:, 3:].tolist(), strict=True):
        text = row[: row.index(5)] if 5 in row else row
        assert each.ids.tolist() == text
        assert each.finished == (5 in row)
    if beam > 1:
        scores = torch.tensor([each.score for each in found])
        torch.testing.assert_close(scores, out.sequences_scores.float(), rtol=1e-5, atol=1e-5)


def test_q_is_replaced_and_not_accumulated():
    """Of a finished text nothing of q is left, of a cut one that of its last token."""

    def falling(ids, tokens, hidden):
        q = torch.full(tokens.shape, 0.5 ** (ids.shape[1] + 1), dtype=torch.float64)
        return torch.where(tokens == END, 1.0, q)

    step = bigrams(BIGRAMS)
    for each in conditional_beam_search(step, falling, beam=4, max_length=3, eos=END):
        last = 0.0 if each.finished else 3 * math.log(0.5)
        assert each.score == pytest.approx(each.log_prob + last)
        if each.finished:
            assert each.log_prob == pytest.approx(log_prob(step, each.ids.tolist(), END))


def test_a_look_ahead_finds_what_a_narrow_beam_misses():
    """A begins better and can hardly end; B ends. The true q of `two tokens` knows."""
    table = torch.tensor([[0.98, 0.01, 0.01], [0.02, 0.08, 0.9], [0.7, 0.3, 0.0]]).double()
    step = bigrams(table)

    def truth(ids, tokens, hidden):
        # P(exactly 2 | prefix, token): one more token that is no end, and then the end.
        ends = table[:, END]
        later = table[:, :END] @ ends[:END]
        if ids.shape[1] == 0:
            return torch.where(tokens == END, 0.0, later[tokens])
        if ids.shape[1] == 1:
            return torch.where(tokens == END, 0.0, ends[tokens])
        return (tokens == END).double()

    narrow = conditional_beam_search(step, ends_at(2), beam=1, max_length=3, eos=END)[0]
    ahead = conditional_beam_search(step, truth, beam=1, max_length=3, eos=END)[0]
    assert narrow.ids.tolist() == [0, 0]
    assert ahead.ids.tolist() == [1, 1] == exact_length_mode(step, 2, eos=END).ids.tolist()


def test_it_goes_on_while_something_better_may_end():
    """Two texts have ended, with 0.3 and 0.7 * 0.2, when the best one has 0.7 * 0.8."""
    table = torch.tensor([[0.0, 0.8, 0.2], [0.1, 0.0, 0.9], [0.7, 0.0, 0.3]]).double()
    found = conditional_beam_search(bigrams(table), beam=2, max_length=9, eos=END)
    assert [each.ids.tolist() for each in found] == [[0, 1], []]
    assert [math.exp(each.log_prob) for each in found] == pytest.approx([0.504, 0.3])


def test_log_q_has_a_floor_and_0_rules_out():
    def search(q):
        def attribute(ids, tokens, hidden):
            return torch.full(tokens.shape, q).double().masked_fill(tokens == END, 0)

        return conditional_beam_search(bigrams(BIGRAMS), attribute, beam=2, max_length=2, eos=END)

    found = search(1e-30)
    assert [each.finished for each in found] == [False, False]
    assert [each.score for each in found] == pytest.approx([x.log_prob - 20 for x in found])
    assert search(0.0) == []


def test_few_tokens_are_tried_and_always_the_end():
    """Of the two likeliest other ones and the end, with what the step says of each prefix."""
    seen = []

    def step(ids):
        return random_table(6, 1)[ids[:, -1] if ids.shape[1] else [0]].log(), ids.sum(1)

    def attribute(ids, tokens, hidden):
        assert torch.equal(hidden, ids.sum(1))
        seen.append(tokens)
        return torch.ones(tokens.shape)

    conditional_beam_search(step, attribute, beam=2, max_length=3, eos=4, expand=2)
    assert all(tokens.shape[1] == 3 and (tokens == 4).any(1).all() for tokens in seen)
    row = random_table(6, 1)[0]
    row[4] = 0
    assert set(seen[0][0].tolist()) == {4, *row.topk(2).indices.tolist()}


@pytest.mark.parametrize(
    ("options", "attribute", "message"),
    [
        (dict(beam=0), None, "expected beam, max_length and expand >= 1, got 0, 4, None"),
        (dict(max_length=0), None, "got 2, 0, None"),
        (dict(expand=0), None, "got 2, 4, 0"),
        (dict(eos=3), None, "with a column for the end 3"),
        (dict(), lambda ids, t, h: torch.full(t.shape, 1.5), r"in \[0, 1\], got \(1, 3\) in \[1.5"),
        (dict(), lambda ids, t, h: torch.full(t.shape, math.nan), r"probabilities \(1, 3\)"),
        (
            dict(),
            lambda ids, t, h: torch.ones(1),
            r"probabilities \(1, 3\) in \[0, 1\], got \(1,\)",
        ),
        (dict(), lambda ids, t, h: torch.full(t.shape, 0.5), "0 or 1 at the end token"),
    ],
)
def test_bad_searches(options, attribute, message):
    options = dict(beam=2, max_length=4, eos=END) | options
    with pytest.raises(ValueError, match=message) as raised:
        conditional_beam_search(bigrams(BIGRAMS), attribute, **options)
    assert "\n" not in str(raised.value)


def test_bad_lengths():
    step = bigrams(BIGRAMS)
    with pytest.raises(ValueError, match="a length >= 0, got -1"):
        exact_length_mode(step, -1, eos=END)
    never = bigrams(torch.tensor([[0.5, 0.5, 0.0]] * 3).double())
    with pytest.raises(ValueError, match="every text of 3 tokens has probability 0"):
        exact_length_mode(never, 3, eos=END)
    with pytest.raises(ValueError, match=r"expected logits \[1, V\]"):
        exact_length_mode(lambda ids: torch.zeros(3), 1, eos=END)
