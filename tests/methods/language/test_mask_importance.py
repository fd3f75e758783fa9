"""Importances of masks: by finite differences, by construction, and as an order for surgery."""

import math

import pytest
import torch

from stillhouse.methods.language import mask_importance
from stillhouse.nn.surgery import Keep, slice_channels, take_layers

IDS = torch.arange(40).view(2, 20)
BATCH = {"input_ids": IDS, "labels": IDS}


def masked_loss(model, kind, number, channel, value):
    """The loss with one mask at `value`, by scaling weights: another way to the same function."""
    with torch.no_grad():
        if kind == "heads":
            weight = model.model.layers[number].self_attn.o_proj.weight
            rows = weight[:, 8 * channel : 8 * channel + 8]
        elif kind == "ffn":
            rows = model.model.layers[number].mlp.down_proj.weight[:, channel]
        else:
            norms = [m for n, m in model.named_modules() if n.endswith("norm")]
            kept = [m.weight[channel].clone() for m in norms]
            for m in norms:
                m.weight[channel] *= value
            loss = model(**BATCH).loss.item()
            for m, weight in zip(norms, kept, strict=True):
                m.weight[channel] = weight
            return loss
        kept = rows.clone()
        rows *= value
        loss = model(**BATCH).loss.item()
        rows.copy_(kept)
    return loss


@pytest.mark.parametrize("kind", ["heads", "ffn", "hidden"])
def test_importances_are_finite_differences(llama, kind):
    model = llama(2).double()
    found = mask_importance(model, [BATCH]).importance[kind]
    channels = range(4) if kind == "heads" else range(0, found.shape[-1], 5)
    want = torch.zeros_like(found.view(-1, found.shape[-1]))
    for number in range(len(want)):
        for channel in range(found.shape[-1]):
            ends = [masked_loss(model, kind, number, channel, 1 + h) for h in (-1e-2, 1e-2)]
            want[number, channel] = abs(ends[1] - ends[0]) / 2e-2
    want = (want / want.norm(dim=-1, keepdim=True)).view_as(found)
    # The norms compute in float32.
    torch.testing.assert_close(
        found[..., list(channels)], want[..., list(channels)], rtol=0.02, atol=2e-3
    )


def test_what_does_not_count_has_importance_zero(llama):
    model = llama(2)
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight[:, 16:24] = 0
        model.model.layers[0].mlp.down_proj.weight[:, 7] = 0
    ranking = mask_importance(model, [BATCH])
    assert ranking.importance["heads"][1, 2] == 0
    assert ranking.importance["ffn"][0, 7] == 0
    assert ranking.ffn[0, -1] == 7
    for kind in ("heads", "ffn", "hidden"):
        norms = ranking.importance[kind].norm(dim=-1)
        torch.testing.assert_close(norms, torch.ones_like(norms))
        count = ranking.importance[kind].shape[-1]
        assert torch.equal(
            getattr(ranking, kind).sort(-1).values[..., -1].unique(), torch.tensor([count - 1])
        )


def test_batches_count_by_absolute_value(llama):
    """Of two batches with opposite losses nothing cancels."""
    model = llama(2)
    sign = iter([1.0, -1.0])
    both = mask_importance(
        model, [BATCH, BATCH], loss=lambda network, batch: next(sign) * network(**batch).loss
    )
    one = mask_importance(model, [BATCH])
    torch.testing.assert_close(both.importance["ffn"], one.importance["ffn"])


def test_the_model_is_as_before(llama):
    model = llama(2).train()
    before = model(**BATCH).loss.item()
    mask_importance(model, [BATCH])
    assert model.training
    assert model(**BATCH).loss.item() == before
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(each._forward_hooks or each._forward_pre_hooks for each in model.modules())


def test_masks_of_ones_change_nothing(llama):
    model = llama(2)
    seen = []

    def loss(network, batch):
        out = network(**batch)
        seen.append(out.logits.detach())
        return out.loss

    mask_importance(model, [BATCH], loss=loss)
    assert torch.equal(seen[0], model(IDS).logits)


def test_a_ranking_is_an_order_for_surgery(llama):
    """Everything in order of importance computes the same; the first of it is the most important;
    what shares keys and values stays together."""
    model = llama(3)
    ranking = mask_importance(model, [BATCH])
    whole = slice_channels(model, ranking)
    torch.testing.assert_close(whole(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-4)
    heads = ranking.importance["heads"].view(3, 2, 2).sum(-1)
    assert torch.equal(ranking.heads[:, 0] // 2, heads.argmax(-1))
    best = ranking.importance["ffn"].gather(-1, ranking.ffn)
    assert bool((best.diff(dim=-1) <= 0).all())
    keep = ranking.first(hidden=24, heads=2, ffn=20)
    student = take_layers(slice_channels(model, keep), [0, 2])
    assert student(IDS).logits.shape == (2, 20, 259)
    assert (student.config.hidden_size, student.config.num_hidden_layers) == (24, 2)
    with pytest.raises(ValueError, match="cannot keep 33 of 32 hidden"):
        ranking.first(hidden=33)
    with pytest.raises(ValueError, match="group by group"):
        slice_channels(model, ranking.first(heads=3))


def test_the_important_units_are_worth_keeping(llama):
    """Without its least important half the feed-forward layer loses less than without its best."""
    model = llama(2)
    ranking = mask_importance(model, [BATCH])
    whole = model(**BATCH).loss.item()
    losses = []
    for order in (ranking.ffn, ranking.ffn.flip(-1)):
        small = slice_channels(model, Keep(ffn=order).first(ffn=36))
        losses.append(abs(small(**BATCH).loss.item() - whole))
    assert losses[0] < losses[1]


def test_bert_has_importances(sizes):
    from transformers import BertConfig, BertForMaskedLM

    wanted = {name: each for name, each in sizes.items() if name != "num_key_value_heads"}
    model = BertForMaskedLM(BertConfig(**wanted, num_hidden_layers=2, initializer_range=0.3)).eval()
    ranking = mask_importance(model, [BATCH])
    found = slice_channels(model, ranking)(IDS).logits
    torch.testing.assert_close(found, model(IDS).logits, rtol=1e-3, atol=1e-3)


def test_importance_of_nothing(llama):
    model = llama(2)
    with pytest.raises(ValueError, match="no batch was given"):
        mask_importance(model, [])
    with pytest.raises(ValueError, match="the loss of batch 0 is nan"):
        mask_importance(model, [BATCH], loss=lambda m, b: m(**b).loss * math.nan)
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=50)
    config.intermediate_size = 64
    other = GPT2LMHeadModel(config)
    with pytest.raises(ValueError, match="block 0 has not the output projections looked for"):
        mask_importance(other, [BATCH])
    assert not any(each._forward_hooks or each._forward_pre_hooks for each in other.modules())
