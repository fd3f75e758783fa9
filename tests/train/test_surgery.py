import pytest
import torch
from torch import nn

from stillhouse.nn.surgery import blocks, take_layers


def test_blocks(llama):
    path, stack = blocks(llama(3))
    assert path == "model.layers"
    assert len(stack) == 3
    plain = nn.Sequential(nn.ModuleList([nn.ModuleList([nn.Linear(1, 1)]) for _ in range(2)]))
    assert blocks(plain)[0] == "0"
    with pytest.raises(ValueError, match="found none"):
        blocks(nn.Linear(2, 2))
    two = nn.ModuleDict({"a": nn.ModuleList([nn.Identity()]), "b": nn.ModuleList([nn.Identity()])})
    with pytest.raises(ValueError, match="found a, b"):
        blocks(two)


def test_the_kept_blocks_are_the_old_ones(llama):
    model = llama(5)
    student = take_layers(model, [0, 3, 4])
    ids = torch.arange(12)[None]
    hidden, rotary = model.model.embed_tokens(ids), None
    rotary = model.model.rotary_emb(hidden, position_ids=ids)
    for layer in (0, 3, 4):
        # By hand, with the causal mask that the model itself would make.
        hidden = model.model.layers[layer](
            hidden, attention_mask=None, position_embeddings=rotary, position_ids=ids
        )
    expected = model.lm_head(model.model.norm(hidden))
    torch.testing.assert_close(student(ids).logits, expected)
    assert student.config.num_hidden_layers == 3
    assert model.config.num_hidden_layers == 5
    assert [layer.self_attn.layer_idx for layer in student.model.layers] == [0, 1, 2]
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1, 2, 3, 4]


def test_the_identity_is_a_copy(llama):
    model = llama(2, tie_word_embeddings=True)
    student = take_layers(model, [0, 1])
    ids = torch.arange(9)[None]
    torch.testing.assert_close(student(ids).logits, model(ids).logits, rtol=0, atol=0)
    assert student.lm_head.weight is student.model.embed_tokens.weight
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.zero_()
    assert all(parameter.abs().sum() > 0 for parameter in model.parameters())


def test_repeated_blocks_are_separate(llama):
    student = take_layers(llama(2), [1, 1])
    first, second = (layer.mlp.up_proj.weight for layer in student.model.layers)
    assert torch.equal(first, second)
    assert first is not second


def test_it_saves_and_generates(llama, tmp_path):
    from transformers import AutoModelForCausalLM

    student = take_layers(llama(4), [0, 2])
    student.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.arange(5)[None]
    options = dict(max_new_tokens=6, do_sample=False, attention_mask=torch.ones_like(ids))
    ours = student.generate(ids, pad_token_id=0, **options)
    theirs = loaded.generate(ids, pad_token_id=0, use_cache=False, **options)
    assert ours.tolist() == theirs.tolist()  # a wrong layer_idx would spoil the cache


def test_lists_with_one_entry_a_layer(sizes, tmp_path):
    from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(**sizes, num_hidden_layers=4, head_dim=8, sliding_window=3)
    model = Gemma2ForCausalLM(config).eval()
    assert len(set(config.layer_types)) == 2
    student = take_layers(model, [1, 2, 3])
    assert student.config.layer_types == config.layer_types[1:]
    student.save_pretrained(tmp_path)
    ids = torch.arange(10)[None]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(loaded(ids).logits, student(ids).logits)


def test_blocks_that_do_not_exist(llama):
    with pytest.raises(ValueError, match="layer 2 does not exist: the model has 2 blocks, 0 to 1"):
        take_layers(llama(2), [0, 2])
    with pytest.raises(ValueError, match="no layer was named"):
        take_layers(llama(2), [])


def test_configurations_with_another_name_for_the_depth():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_layer=3, n_embd=16, n_head=2, vocab_size=50, eos_token_id=[1, 2, 3])
    student = take_layers(GPT2LMHeadModel(config), [0, 2])
    assert student.config.num_hidden_layers == len(student.transformer.h) == 2
    assert student.config.eos_token_id == [1, 2, 3]


def test_a_pattern_of_layers_that_the_cut_would_break(sizes):
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        **sizes,
        moe_intermediate_size=8,
        num_hidden_layers=4,
        num_experts=2,
        num_experts_per_tok=1,
        mlp_only_layers=[0, 1],
    )
    model = Qwen3MoeForCausalLM(config)
    assert len(take_layers(model, [0, 1, 3]).model.layers) == 3
    with pytest.raises(ValueError, match="does not describe these layers"):
        take_layers(model, [0, 3])
