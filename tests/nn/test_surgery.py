import pytest
import torch
from torch import nn

from stillhouse.nn.surgery import blocks, replace_modules_, take_layers, train_only


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


def test_replacing_modules(llama):
    model = llama(3)
    report = replace_modules_(model, "model.layers.*.mlp", lambda path, module: nn.Identity())
    assert [row.path for row in report] == [f"model.layers.{i}.mlp" for i in range(3)]
    assert {row[1:] for row in report} == {("LlamaMLP", "Identity", 3 * 32 * 48, 0)}
    assert all(isinstance(layer.mlp, nn.Identity) for layer in model.model.layers)
    assert not model.model.layers[0].mlp.training
    assert model(torch.arange(5)[None]).logits.isfinite().all()


def test_replacing_by_class_and_by_function():
    def model():
        return nn.Sequential(nn.Sequential(nn.ReLU(), nn.Linear(2, 2)), nn.ReLU())

    changed = model()
    # The outer one is replaced, the one within goes with it.
    report = replace_modules_(changed, _any_but_the_root, _mark)
    assert [row.path for row in report] == ["0", "1"]
    changed = model()
    assert [row.path for row in replace_modules_(changed, nn.ReLU, _mark)] == ["0.0", "1"]
    assert [row.path for row in replace_modules_(model(), ["0.1", "1"], _mark)] == ["0.1", "1"]


def _any_but_the_root(path, module):
    return path != "" and isinstance(module, (nn.Sequential, nn.ReLU))


def _mark(path, module):
    return nn.Identity()


def test_a_shared_module_is_replaced_once():
    shared = nn.Linear(2, 2)
    model = nn.ModuleDict({"a": shared, "b": shared})
    report = replace_modules_(model, nn.Linear, lambda path, module: nn.Linear(2, 2))
    assert [row.path for row in report] == ["a", "b"]
    assert model["a"] is model["b"]
    assert model["a"] is not shared


def test_nothing_to_replace():
    with pytest.raises(ValueError, match="no module of Linear matches 'mlp'"):
        replace_modules_(nn.Linear(1, 1), "mlp", _mark)
    with pytest.raises(ValueError, match="no module of Linear matches ReLU"):
        replace_modules_(nn.Linear(1, 1), nn.ReLU, _mark)
    with pytest.raises(ValueError, match="the model itself matches"):
        replace_modules_(nn.Linear(1, 1), nn.Linear, _mark)


def test_train_only(llama):
    model = llama(2, tie_word_embeddings=True)
    count = train_only(model, ["*.mlp.*", "model.norm.weight"])
    learning = {name for name, each in model.named_parameters() if each.requires_grad}
    assert count == 2 * 3 * 32 * 48 + 32
    assert len(learning) == 7
    assert all(".mlp." in name or name == "model.norm.weight" for name in learning)
    # Another name of the tied weight, and its numbers counted once.
    assert train_only(model, "lm_head.weight") == 259 * 32
    assert model.model.embed_tokens.weight.requires_grad
    assert train_only(model, "*") == sum(each.numel() for each in model.parameters())
    with pytest.raises(ValueError, match="no parameter of LlamaForCausalLM matches 'router'"):
        train_only(model, ["*", "router"])
