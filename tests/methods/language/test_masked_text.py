"""Masking by rarity, and embeddings for another tokenizer."""

import math

import pytest
import torch

from stillhouse.methods.language import rare_word_masking, retokenize_embeddings

MASK, SPECIAL, VOCABULARY = 3, (0, 1, 2), 60
COUNTS = torch.cat([torch.zeros(4), 10.0 ** torch.linspace(0, 4, 56)])


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def text(rows=8, length=40):
    """Ordinary tokens between [CLS] and [SEP], the last rows padded."""
    ids = torch.randint(4, VOCABULARY, (rows, length), generator=generator(1))
    ids[:, 0], ids[:, -1] = 1, 2
    ids[rows // 2 :, length // 2 :] = 0
    return ids


def masking(ids, **options):
    given = {"mask_id": MASK, "special_ids": SPECIAL, "generator": generator()} | options
    return rare_word_masking(ids, COUNTS, **given)


@pytest.mark.parametrize("prop", [0.01, 0.15, 0.5, 0.999])
def test_as_many_as_were_asked_for_and_none_that_is_special(prop):
    ids = text()
    new, masked = masking(ids, prop=prop)
    ordinary = ids > 3
    assert masked.sum() == math.ceil(prop * ordinary.sum())
    assert not masked[~ordinary].any()
    assert torch.equal(new[~masked], ids[~masked])
    assert (new[masked] >= 3).all()
    assert torch.equal(ids, text())  # not changed in place


def test_what_becomes_of_them():
    """80 / 10 / 10, a random token being the old one once in 56 times; three deviations."""
    ids = text(200, 100)
    new, masked = masking(ids, prop=0.5)
    was, now = ids[masked], new[masked]
    n = len(was)
    for share, p in (
        ((now == MASK).double().mean(), 0.8),
        ((now == was).double().mean(), 0.1 + 0.1 / 56),
        (((now != was) & (now != MASK)).double().mean(), 0.1 * 55 / 56),
    ):
        assert abs(share - p) < 3 * (p * (1 - p) / n) ** 0.5
    random = now[(now != was) & (now != MASK)]
    assert set(random.tolist()) == set(range(4, VOCABULARY))


def test_rare_words_come_first():
    stats = pytest.importorskip("scipy.stats")
    ids = text(200, 100)
    _, masked = masking(ids, prop=0.1)
    rate = torch.stack([masked[ids == token].double().mean() for token in range(4, VOCABULARY)])
    assert stats.spearmanr(COUNTS[4:].numpy(), rate.numpy()).statistic < -0.9
    even = masking(ids, prop=0.1, smoothing=0.0)[1]
    rate = torch.stack([even[ids == token].double().mean() for token in range(4, VOCABULARY)])
    assert abs(stats.spearmanr(COUNTS[4:].numpy(), rate.numpy()).statistic) < 0.4


def test_the_weights_are_powers_of_the_counts():
    """One token of three is drawn, again and again: 1 : 8^-.7 : 100^-.7, a count of 0 being 1."""
    ids, drawn = torch.tensor([[4, 5, 6]]), generator()
    counts = torch.tensor([9, 9, 9, 9, 0, 8, 100])
    hits = torch.zeros(3)
    for _ in range(4000):
        hits += rare_word_masking(ids, counts, mask_id=3, prop=0.3, generator=drawn)[1][0]
    weight = torch.tensor([1.0, 8**-0.7, 100**-0.7])
    torch.testing.assert_close(hits / 4000, weight / weight.sum(), atol=0.025, rtol=0)


@pytest.mark.parametrize(
    ("ids", "options", "message"),
    [
        (text(), {"prop": 0.0}, r"prop must lie in \(0, 1\), got 0.0"),
        (text(), {"prop": 1.0}, r"prop must lie in \(0, 1\), got 1.0"),
        (torch.tensor([[4, 60]]), {}, "within the 60 counts, up to 60"),
        (torch.tensor([[4, -1]]), {}, "within the 60 counts"),
        (torch.tensor([[0, 1, 2, 3]]), {}, "no ordinary token in the batch"),
    ],
)
def test_masking_refuses(ids, options, message):
    with pytest.raises(ValueError, match=message):
        masking(ids, **options)


# Another tokenizer --------------------------------------------------------------------------------


def words(vocabulary):
    from transformers import BertTokenizerFast

    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *vocabulary]
    return BertTokenizerFast(vocab={name: i for i, name in enumerate(names)})


@pytest.mark.parametrize("tied", [True, False])
def test_new_rows_are_means_of_old_ones(tied):
    from transformers import BertConfig, BertForMaskedLM

    old = words(["still", "##house", "house", "a"])
    new = words(["a", "stillhouse", "house", "##house", "q"])
    model = BertForMaskedLM(
        BertConfig(
            vocab_size=len(old),
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            tie_word_embeddings=tied,
        )
    )
    if not tied:
        torch.nn.init.normal_(model.get_output_embeddings().weight)
    torch.nn.init.normal_(model.get_output_embeddings().bias)
    tables = model.get_input_embeddings(), model.get_output_embeddings()
    before = [table.weight.detach().clone() for table in tables]
    bias = tables[1].bias.detach().clone()
    assert retokenize_embeddings(model, old, new) is model
    assert model.config.vocab_size == len(new)
    tables = model.get_input_embeddings(), model.get_output_embeddings()
    assert (tables[0].weight is tables[1].weight) == tied
    for table, was in zip(tables, before, strict=True):
        now = table.weight.detach()
        assert now.shape == (len(new), 8)
        torch.testing.assert_close(now[:5], was[:5])  # special tokens
        torch.testing.assert_close(now[5], was[8])
        torch.testing.assert_close(now[6], (was[5] + was[6]) / 2)
        torch.testing.assert_close(now[7], was[7])
        torch.testing.assert_close(now[8], was[6])  # the same piece, not its letters
        torch.testing.assert_close(now[9], was[1])  # unknown to the old one
    wanted = torch.stack([*bias[:5], bias[8], (bias[5] + bias[6]) / 2, bias[7], bias[6], bias[1]])
    torch.testing.assert_close(tables[1].bias.detach(), wanted)
    assert model(torch.tensor([[2, 6, 3]])).logits.shape == (1, 3, len(new))


def test_a_model_without_embeddings():
    with pytest.raises(ValueError, match="Linear has no input embeddings"):
        retokenize_embeddings(torch.nn.Linear(2, 2), None, None)
