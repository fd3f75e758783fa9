"""CodeGen2's transforms: nothing is lost, as much is hidden as was asked for, and where."""

import itertools

import numpy as np
import pytest
import torch

from stillhouse.methods.language import (
    CausalLM,
    FillInMiddle,
    Mixture,
    PrefixLM,
    Sentinels,
    SpanCorruption,
    restore,
)
from stillhouse.train.examples import Example, collate, pack

WORDS = Sentinels(masks=tuple(range(100, 120)), separator=120, end_of_span=121, end_of_text=99)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def documents(count=1000, longest=300):
    """Random documents of 2 .. 300 tokens below 99."""
    rng = np.random.default_rng(0)
    for _ in range(count):
        yield rng.integers(0, 99, rng.integers(2, longest))


def taken_apart(example):
    """Text with masks, and [(mask, span)], of one document that was corrupted."""
    ids = example.input_ids.tolist()
    at = ids.index(120)
    assert ids[at - 1] == 99
    text, rest, spans = ids[: at - 1], ids[at + 1 :], []
    while rest:
        end = rest.index(121)
        spans.append((rest[0], rest[1:end]))
        rest = rest[end + 1 :]
    return text, spans


def test_a_thousand_documents_come_back():
    transform, drawn = SpanCorruption(WORDS), generator()
    for ids in documents():
        example = transform(ids, generator=drawn)
        assert restore(example, WORDS).tolist() == ids.tolist()
        if len(ids) < 16:
            assert example.input_ids.tolist() == ids.tolist()
            assert example.prefix_length is None
            continue
        text, spans = taken_apart(example)
        assert len(example.input_ids) == len(ids) + 3 * len(spans) + 2
        assert example.prefix_length == len(text) + 2
        masks = [token for token in text if token >= 100]
        assert masks == list(range(100, 100 + len(spans))) == [mask for mask, _ in spans]
        # Between two spans a token stays: no mask follows another.
        assert all(a < 100 or b < 100 for a, b in itertools.pairwise(text))
        assert all(len(span) >= 1 for _, span in spans)


@pytest.mark.parametrize("ratio", [0.05, 0.15, 0.333, 0.5, 0.9])
def test_as_much_is_hidden_as_the_ratio_says(ratio):
    transform, drawn = SpanCorruption(WORDS, ratio=(ratio, ratio), minimum=2), generator()
    for ids in documents(200):
        example = transform(ids, generator=drawn)
        spans = taken_apart(example)[1] if 120 in example.input_ids else []
        assert sum(len(span) for _, span in spans) == round(ratio * len(ids))


def test_spans_have_the_length_and_the_places_that_were_asked_for():
    """Of 60 tokens 30, mean 5: six spans; each token is hidden about half of the time."""
    transform = SpanCorruption(WORDS, ratio=(0.5, 0.5), mean_span=(5, 5))
    drawn, hidden, n = generator(), np.zeros(60), 4000
    lengths = []
    for _ in range(n):
        spans = transform._spans(60, drawn)
        assert len(spans) == 6
        for start, stop in spans:
            hidden[start:stop] += 1
            lengths.append(stop - start)
    assert np.mean(lengths) == 5
    # A composition of 30 into 6: a part is 1 with probability 5 / 29.
    assert np.mean(np.asarray(lengths) == 1) == pytest.approx(5 / 29, abs=0.01)
    # The same from both ends: four deviations of a difference of two halves.
    assert np.abs(hidden - hidden[::-1]).max() / n < 4 * (0.5 / n) ** 0.5
    assert hidden.sum() == 30 * n


def test_mean_lengths_are_log_uniform():
    """Half of the means lie below the geometric middle of 2 and 32: more than 12 spans of 96."""
    transform = SpanCorruption(WORDS, ratio=(0.96, 0.96), mean_span=(2, 32), max_spans=20)
    drawn = generator()
    many = [len(transform._spans(1000, drawn)) for _ in range(50)]
    assert max(many) == 20  # capped
    few = SpanCorruption(WORDS, ratio=(0.5, 0.5), mean_span=(8, 32))
    counts = [len(few._spans(256, drawn)) for _ in range(2000)]
    assert np.mean(np.asarray(counts) > 8) == pytest.approx(0.5, abs=0.05)
    assert (min(counts), max(counts)) == (4, 16)


def test_masks_run_out_before_spans_do():
    words = Sentinels(masks=(100, 101), separator=120, end_of_span=121, end_of_text=99)
    drawn = generator()
    for transform in (
        SpanCorruption(words, ratio=(0.5, 0.5), mean_span=(1, 1)),
        SpanCorruption(WORDS, ratio=(0.5, 0.5), mean_span=(1, 1), max_spans=2),
    ):
        _, spans = taken_apart(transform(np.arange(90), generator=drawn))
        assert len(spans) == 2


def test_each_document_of_a_packed_sequence_is_rewritten_on_its_own():
    pieces = [np.arange(20), np.arange(20, 25), np.arange(30, 60)]
    (packed,) = pack(enumerate(p.tolist() for p in pieces), 64, keep_documents=True)
    example = SpanCorruption(WORDS)(packed.input_ids, packed.document_ids, generator=generator())
    assert restore(example, WORDS).tolist() == np.concatenate(pieces).tolist()
    streams = [example.input_ids[example.document_ids == number] for number in range(3)]
    for stream, piece in zip(streams, pieces, strict=True):
        alone = Example(stream, stream >= 0)
        assert restore(alone, WORDS).tolist() == piece.tolist()
    assert streams[1].tolist() == pieces[1].tolist()  # too short
    assert example.loss_mask[example.document_ids == 1].all()
    for number in (0, 2):
        assert 100 in streams[number]  # numbered from 1 in each
    assert example.prefix_length is None
    assert (np.diff(example.document_ids) >= 0).all()


@pytest.mark.parametrize("loss_on", ["targets", "all"])
def test_where_the_loss_is(loss_on):
    example = SpanCorruption(WORDS, loss_on=loss_on)(np.arange(80), generator=generator())
    at = example.prefix_length
    assert example.loss_mask[:at].all() == (loss_on == "all")
    assert example.loss_mask[:at].any() == (loss_on == "all")
    after, given = example.input_ids[at:], ~example.loss_mask[at:]
    # Only what opens a span is given: the masks, and none but them.
    assert (given == ((after >= 100) & (after < 120))).all()
    assert given.sum() == len(taken_apart(example)[1])
    labels = collate([example])["labels"][0]
    assert (labels != -100).sum() == example.loss_mask[1:].sum()


def test_fill_in_middle_is_prefix_middle_and_suffix():
    transform, drawn = FillInMiddle(WORDS), generator()
    cuts = np.zeros((7, 7))
    for _ in range(2000):
        example = transform(np.arange(6), generator=drawn)
        text, spans = taken_apart(example)
        assert restore(example, WORDS).tolist() == list(range(6))
        ((mask, middle),) = spans
        assert mask == 100
        assert text == [*range(middle[0]), 100, *range(middle[-1] + 1, 6)]
        cuts[middle[0], middle[-1] + 1] += 1
    # Two of seven cuts: 21 pairs, each about 95 times.
    assert (cuts > 0).sum() == 21
    assert abs(cuts[cuts > 0] - 2000 / 21).max() < 4.5 * (2000 / 21) ** 0.5


def test_a_prefix_is_given_and_uniform():
    transform, drawn = PrefixLM(), generator()
    counts = np.zeros(6)
    for _ in range(3000):
        example = transform(np.arange(6), generator=drawn)
        counts[example.prefix_length] += 1
        assert example.loss_mask.tolist() == [i >= example.prefix_length for i in range(6)]
    assert counts[0] == 0
    assert abs(counts[1:] - 600).max() < 4 * 600**0.5
    example = transform(np.arange(3), [4, 4, 4], generator=drawn)
    assert example.document_ids.tolist() == [4, 4, 4]
    with pytest.raises(ValueError, match="a prefix is of one document, got 2"):
        transform(np.arange(3), [0, 0, 1], generator=drawn)


def test_a_mixture_draws_for_each_sequence():
    drawn, n = generator(), 3000
    mixture = Mixture([(0.3, CausalLM()), (0.7, FillInMiddle(WORDS))])
    filled = sum(len(mixture(np.arange(20), generator=drawn).input_ids) > 20 for _ in range(n))
    assert abs(filled / n - 0.7) < 3 * (0.3 * 0.7 / n) ** 0.5
    ids, documents = np.arange(4), [0, 0, 1, 1]
    assert CausalLM()(ids, documents).document_ids.tolist() == documents
    assert CausalLM()(ids).document_ids is None
    again = [mixture(np.arange(20), generator=generator(5)).input_ids.tolist() for _ in range(2)]
    assert again[0] == again[1]


def test_sentinels_of_a_tokenizer(tokenizer):
    with pytest.raises(ValueError, match="the tokenizer has no token <mask_1>: add it"):
        Sentinels.from_tokenizer(tokenizer, 2)
    names = ["<mask_1>", "<mask_2>", "<sep>", "<eom>", "<|endoftext|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": names})
    words = Sentinels.from_tokenizer(tokenizer, 2)
    every = [*words.masks, words.separator, words.end_of_span, words.end_of_text]
    assert tokenizer.convert_ids_to_tokens(every) == names
    with pytest.raises(ValueError, match="has no token <mask_3>"):
        Sentinels.from_tokenizer(tokenizer, 3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SpanCorruption(WORDS, ratio=(0.0, 0.5)), "0 < low <= high < 1 as ratio"),
        (lambda: SpanCorruption(WORDS, ratio=(0.5, 1.0)), "0 < low <= high < 1 as ratio"),
        (lambda: SpanCorruption(WORDS, mean_span=(0, 5)), "as mean_span"),
        (lambda: SpanCorruption(WORDS, max_spans=21), r"max_spans must lie in \[1, 20\]"),
        (lambda: SpanCorruption(WORDS, minimum=1), "minimum must be at least 2"),
        (lambda: SpanCorruption(WORDS, loss_on="prefix"), "loss_on must be"),
        (lambda: FillInMiddle(WORDS, loss_on="prefix"), "loss_on must be"),
        (lambda: Mixture([(0.5, CausalLM()), (0.4, CausalLM())]), "must add up to 1"),
        (lambda: Mixture([(1.5, CausalLM()), (-0.5, CausalLM())]), "must add up to 1"),
        (lambda: Mixture([]), "must add up to 1"),
        (lambda: Sentinels((), 1, 2, 3), "sentinels need a mask"),
        (lambda: Sentinels((1, 2), 2, 3, 4), "ids that differ"),
        (lambda: Sentinels((-1,), 2, 3, 4), "ids that differ"),
    ],
)
def test_options_that_cannot_be(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("ids", "documents", "message"),
    [
        ([3], None, r"at least two tokens, got shape \(1,\)"),
        ([[3, 4]], None, r"got shape \(1, 2\)"),
        ([3, 4], [0], r"\(2,\) ids and \(1,\) document_ids"),
        ([3, 105], None, "id 105 of the text is a sentinel"),
        ([3, 120], None, "id 120 of the text is a sentinel"),
        ([121, 3], None, "id 121 of the text is a sentinel"),
    ],
)
def test_text_that_cannot_be(ids, documents, message):
    for transform in (SpanCorruption(WORDS), FillInMiddle(WORDS)):
        with pytest.raises(ValueError, match=message):
            transform(ids, documents, generator=generator())


def test_a_result_that_is_too_long_is_not_cut():
    for transform in (SpanCorruption(WORDS, max_length=64), FillInMiddle(WORDS, max_length=64)):
        with pytest.raises(ValueError, match="60 tokens become 6[5-9]|60 tokens become [789]"):
            transform(np.arange(60), generator=generator())
        assert len(transform(np.arange(15), generator=generator()).input_ids) < 64


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([1, 100, 99, 120, 100, 2], "opens no whole span"),
        ([1, 100, 99, 120, 100, 2, 121, 100, 3, 121], "opens no whole span"),
        ([1, 100, 99, 120, 101, 2, 121], "the masks are .100. in the text and .101. after it"),
        ([1, 101, 99, 120, 101, 2, 121], "the masks are .101. in the text"),
        ([1, 100, 2], "the masks are .100. in the text and .. after it"),
        ([1, 100, 5, 120, 100, 2, 121], "the separator does not follow the end of a text"),
    ],
)
def test_what_no_transform_has_made(ids, message):
    ids = np.asarray(ids, dtype=np.int32)
    with pytest.raises(ValueError, match=message):
        restore(Example(ids, ids > 0), WORDS)
