"""A masked language model as encoder and decoder: gates, copies, cross-attention, bad inputs."""

import pytest
import torch

from stillhouse.methods.language.mlm_seq2seq import seq2seq_from_mlm

transformers = pytest.importorskip("transformers")


def batch():
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(23, (4, 6), generator=generator)
    mask = torch.ones_like(ids)
    labels = torch.randint(23, (4, 5), generator=generator)
    mask[0, 4:] = 0
    labels[0, 3:] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def electra():
    torch.manual_seed(0)
    config = transformers.ElectraConfig(
        vocab_size=23, embedding_size=16, hidden_size=16, num_hidden_layers=2,
        num_attention_heads=2, intermediate_size=24, max_position_embeddings=12,
    )  # fmt: skip
    return transformers.ElectraForMaskedLM(config).eval()


@pytest.mark.parametrize("name", ["bert", "electra"])
def test_gates_at_0_are_the_masked_model_whatever_the_source(bert, name):
    mlm, given = bert() if name == "bert" else electra(), batch()
    encoder, decoder = seq2seq_from_mlm(mlm)
    ids, mask = given["labels"].clamp(min=0), given["labels"] >= 0
    want = mlm(input_ids=ids, attention_mask=mask.long()).logits
    for source in (given["input_ids"], given["input_ids"].flip(1)):
        states = encoder(source, attention_mask=given["attention_mask"]).last_hidden_state
        found = decoder(ids, mask, states, given["attention_mask"].bool())
        assert torch.equal(found, want)
        with torch.no_grad():
            for cross in decoder.cross:
                cross.gate.fill_(0.5)
        assert not torch.allclose(decoder(ids, mask, states, mask[:, :1].expand(-1, 6)), want)
        with torch.no_grad():
            for cross in decoder.cross:
                cross.gate.zero_()


def test_the_halves_are_copies(bert):
    mlm = bert()
    encoder, decoder = seq2seq_from_mlm(mlm)
    own = {id(each) for each in mlm.parameters()}
    for half in (encoder, decoder):
        assert not own & {id(each) for each in half.parameters()}
    assert not hasattr(encoder, "cls")
    text = {id(each) for each in decoder.mlm.parameters()}
    assert not text & {id(each) for each in decoder.cross.parameters()}
    attention = mlm.bert.encoder.layer[1].attention
    cross = decoder.cross[1]
    for copied, of in (
        (cross.query, attention.self.query),
        (cross.key, attention.self.key),
        (cross.value, attention.self.value),
        (cross.output, attention.output.dense),
    ):
        assert torch.equal(copied.weight, of.weight)
        assert torch.equal(copied.bias, of.bias)


def test_cross_attention_of_the_text_itself_is_self_attention(bert):
    """With a gate of 1 and the block's own input as the source: what self-attention adds."""
    mlm = bert()
    _, decoder = seq2seq_from_mlm(mlm)
    block, cross = mlm.bert.encoder.layer[0].attention, decoder.cross[0]
    x = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]]).bool()
    added = block.output.dense(block.self(x, attention_mask=mask[:, None, None, :])[0])
    with torch.no_grad():
        cross.gate.fill_(1)
    assert torch.allclose(cross(x, x, mask), added, atol=1e-5)


def test_what_a_block_adds_comes_behind_its_attention(bert):
    """By hand, block by block, with gates of 0.5."""
    mlm, given = bert(), batch()
    encoder, decoder = seq2seq_from_mlm(mlm)
    ids, mask = given["labels"].clamp(min=0), given["labels"] >= 0
    source_mask = given["attention_mask"].bool()
    states = encoder(given["input_ids"], attention_mask=source_mask.long()).last_hidden_state
    x = mlm.bert.embeddings(ids)
    with torch.no_grad():
        for layer, cross in zip(mlm.bert.encoder.layer, decoder.cross, strict=True):
            cross.gate.fill_(0.5)
            x = layer.attention(x, attention_mask=mask[:, None, None, :])[0]
            x = x + cross(x, states, source_mask)
            x = layer.output(layer.intermediate(x), x)
        found = decoder(ids, mask, states, source_mask)
    assert torch.allclose(found[mask], mlm.cls(x)[mask], atol=1e-5)


def test_models_that_are_no_masked_ones(bert, llama):
    with pytest.raises(ValueError, match="LlamaDecoderLayer has not BERT's layout"):
        seq2seq_from_mlm(llama())
    with pytest.raises(ValueError, match="BertModel has no output head: pass a masked LM"):
        seq2seq_from_mlm(bert().bert)
    with pytest.raises(ValueError, match="this one has is_decoder=True"):
        seq2seq_from_mlm(bert(is_decoder=True))
