"""Slicing channels: the same model in another order, and the smaller one against masks by hand."""

import pytest
import torch
from torch import nn

from stillhouse.nn.surgery import Keep, replace_modules_, slice_channels, slice_linear

LAYERS, HIDDEN, HEADS, FFN = 3, 32, 4, 48
IDS = torch.arange(14)[None] * 5


def shuffled(n, seed=0):
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist()


def reordered(*, groups=1):
    """Every kind in another order, heads and inner units another one in each block."""
    size = HEADS // groups

    def heads(seed):
        inner = shuffled(size, seed)
        return [g * size + i for g in shuffled(groups, seed + 7) for i in inner]

    return Keep(
        hidden=shuffled(HIDDEN),
        heads=[heads(seed) for seed in range(LAYERS)],
        ffn=[shuffled(FFN, seed) for seed in range(LAYERS)],
    )


@pytest.fixture
def bert(sizes):
    """bert(kind): a random BERT in float64, its norms and biases not the trivial ones."""
    import transformers

    def make(kind="BertForMaskedLM", **options):
        wanted = {name: each for name, each in sizes.items() if name != "num_key_value_heads"}
        config = transformers.BertConfig(
            **wanted, num_hidden_layers=LAYERS, initializer_range=0.3, **options
        )
        return uneven(getattr(transformers, kind)(config).eval().double())

    return make


class ExactNorm(nn.Module):
    """Llama's norm in the type it is given: its own computes in float32."""

    def __init__(self, weight, eps):
        super().__init__()
        self.weight, self.eps = weight, eps

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)


def exact(model):
    """In float64 throughout."""

    def norm(path, module):
        return ExactNorm(module.weight, module.variance_epsilon)

    model = model.double()
    replace_modules_(model, lambda path, module: type(module).__name__ == "LlamaRMSNorm", norm)
    return model


def uneven(model):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.3 * torch.randn(parameter.shape, dtype=parameter.dtype)
    return model


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_an_order_alone_changes_nothing(llama, tied, bias):
    options = dict(tie_word_embeddings=tied, attention_bias=bias, mlp_bias=bias)
    model = uneven(exact(llama(LAYERS, **options)))
    other = slice_channels(model, reordered(groups=2))
    found = other(IDS).logits
    torch.testing.assert_close(found, model(IDS).logits, rtol=1e-11, atol=1e-11)
    assert not torch.equal(other.model.norm.weight, model.model.norm.weight)
    assert (other.lm_head.weight is other.model.embed_tokens.weight) == tied


@pytest.mark.parametrize(
    "kind", ["BertForMaskedLM", "BertModel", "BertForSequenceClassification", "BertLMHeadModel"]
)
def test_an_order_alone_changes_nothing_in_bert(bert, kind):
    options = dict(is_decoder=True) if kind == "BertLMHeadModel" else {}
    model = bert(kind, **options)
    other = slice_channels(model, reordered())
    mask = torch.ones_like(IDS)
    mask[:, -3:] = 0
    found, want = (each(IDS, attention_mask=mask)[0] for each in (other, model))
    if kind == "BertModel":
        want = want[..., shuffled(HIDDEN)]
    torch.testing.assert_close(found, want, rtol=1e-11, atol=1e-11)
    if kind == "BertForMaskedLM":
        assert other.cls.predictions.decoder.weight is other.bert.embeddings.word_embeddings.weight


def test_relatives_of_llama(sizes):
    """Norms within heads (Qwen3), biases of some projections (Qwen2), neither (Mistral)."""
    import transformers

    for kind in ("Qwen3", "Qwen2", "Mistral"):
        config = getattr(transformers, f"{kind}Config")(
            **sizes, num_hidden_layers=LAYERS, initializer_range=0.3, head_dim=8
        )
        model = uneven(getattr(transformers, f"{kind}ForCausalLM")(config).eval().double())
        found = slice_channels(model, reordered(groups=2))(IDS).logits
        # Their norms are in float32.
        torch.testing.assert_close(found, model(IDS).logits, rtol=1e-4, atol=1e-4)


def test_fewer_heads_and_inner_units_are_the_masked_ones(llama):
    model = uneven(exact(llama(LAYERS, mlp_bias=True)))
    heads = [[2, 3], [0, 1], [3, 2]]
    ffn = [shuffled(FFN, seed)[:20] for seed in range(LAYERS)]
    small = slice_channels(model, Keep(heads=heads, ffn=ffn))
    with torch.no_grad():
        for layer, kept, inner in zip(model.model.layers, heads, ffn, strict=True):
            gone = [head for head in range(HEADS) if head not in kept]
            layer.self_attn.o_proj.weight.view(HIDDEN, HEADS, 8)[:, gone] = 0
            layer.mlp.down_proj.weight[:, [i for i in range(FFN) if i not in inner]] = 0
    torch.testing.assert_close(small(IDS).logits, model(IDS).logits, rtol=1e-11, atol=1e-11)
    attention = small.model.layers[0].self_attn
    assert attention.k_proj.weight.shape == (8, HIDDEN)
    assert attention.num_key_value_groups == 2
    assert small.config.num_key_value_heads == 1
    assert small.config.intermediate_size == 20


def test_one_head_of_each_group(llama):
    """All keys and values stay, the heads that share them are fewer."""
    model = exact(llama(2))
    small = slice_channels(model, Keep(heads=[1, 2]))
    assert small.config.num_key_value_heads == small.config.num_attention_heads == 2
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.view(HIDDEN, HEADS, 8)[:, [0, 3]] = 0
    torch.testing.assert_close(small(IDS).logits, model(IDS).logits, rtol=1e-11, atol=1e-11)


def test_fewer_hidden_channels_are_the_masked_ones(llama):
    """With the others at 0 a norm divides by a mean over 32 instead of 20: its weight makes up."""
    model = exact(llama(LAYERS, tie_word_embeddings=True))
    kept = shuffled(HIDDEN)[:20]
    small = slice_channels(model, Keep(hidden=kept))
    gone = [i for i in range(HIDDEN) if i not in kept]
    share = 20 / HIDDEN
    with torch.no_grad():
        model.model.embed_tokens.weight[:, gone] = 0
        for name, module in model.named_modules():
            if name.endswith("norm"):
                module.weight *= share**0.5
                module.eps *= share
            if name.endswith(("o_proj", "down_proj")):
                module.weight[gone] = 0
    torch.testing.assert_close(small(IDS).logits, model(IDS).logits, rtol=1e-11, atol=1e-11)
    assert small.config.head_dim == 8
    assert small.model.layers[0].self_attn.q_proj.in_features == 20


def test_it_saves_and_loads(llama, bert, tmp_path):
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

    keep = Keep(hidden=range(16), heads=[2, 3], ffn=range(12))
    for loader, model in (
        (AutoModelForCausalLM, llama(2, tie_word_embeddings=True)),
        (AutoModelForMaskedLM, bert().float()),
    ):
        small = slice_channels(model, keep)
        small.save_pretrained(tmp_path / loader.__name__)
        loaded = loader.from_pretrained(tmp_path / loader.__name__).eval()
        torch.testing.assert_close(loaded(IDS).logits, small(IDS).logits)


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_the_old_model_stays_and_frozen_stays_frozen(llama, bert, kind):
    model = llama(2) if kind == "llama" else bert()
    model.requires_grad_(False)
    before = {name: each.clone() for name, each in model.state_dict().items()}
    small = slice_channels(model, Keep(ffn=range(8)))
    assert not any(parameter.requires_grad for parameter in small.parameters())
    for parameter in small.parameters():
        parameter.data.zero_()
    for name, each in model.state_dict().items():
        assert torch.equal(each, before[name])
    assert model.config.intermediate_size == FFN


def test_the_first_of_a_ranking():
    ranking = Keep(hidden=[3, 1, 2, 0], heads=[[1, 0], [0, 1]], ffn=torch.tensor([[4, 5], [5, 4]]))
    first = ranking.first(hidden=2, heads=1, ffn=1)
    assert first.hidden == [3, 1]
    assert first.heads == [[1], [0]]
    assert [row.tolist() for row in first.ffn] == [[4], [5]]
    with pytest.raises(ValueError, match="cannot keep 5 of 4 hidden"):
        ranking.first(hidden=5)
    with pytest.raises(ValueError, match="cannot keep 0 of 2 heads"):
        ranking.first(heads=0)
    with pytest.raises(ValueError, match="ffn has no order"):
        Keep().first(ffn=1)


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (dict(hidden=[32]), "hidden are 0 to 31, got 32"),
        (dict(hidden=[-1, 2]), "hidden are 0 to 31, got -1"),
        (dict(ffn=[]), "at least one of 48 ffn has to stay"),
        (dict(ffn=[1, 1]), "ffn to keep were named twice"),
        (dict(ffn=[[1], [1, 2], [3]]), "every block must keep as many ffn"),
        (dict(ffn=[[1], [2]]), "one for each of 3 blocks of ffn, got 2"),
        (dict(hidden=[[1], [2], [3]]), "expected one list of hidden"),
        (dict(heads=[0, 1, 2]), "in groups of 2: keep them group by group"),
        (dict(heads=[0, 2, 1, 3]), "in groups of 2: keep them group by group"),
        (dict(heads=[[0, 1], [0, 2], [0, 1]]), "does not describe these layers"),
    ],
)
def test_bad_input(llama, keep, message):
    with pytest.raises(ValueError, match=message) as raised:
        slice_channels(llama(LAYERS), Keep(**keep))
    assert "\n" not in str(raised.value)


def test_what_the_configuration_cannot_say(bert):
    with pytest.raises(ValueError, match="BertConfig does not describe these layers"):
        slice_channels(bert(), Keep(heads=[0, 1]))


def test_modules_of_unknown_roles(sizes):
    from transformers import Gemma2Config, Gemma2ForCausalLM

    # Its embeddings are multiplied by the root of the hidden size.
    config = Gemma2Config(**sizes, num_hidden_layers=1)
    with pytest.raises(ValueError, match="embed_tokens .* is not known"):
        slice_channels(Gemma2ForCausalLM(config), Keep())


def test_fused_projections():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=50, n_inner=32)
    config.intermediate_size = 32
    with pytest.raises(ValueError, match="is not known"):
        slice_channels(GPT2LMHeadModel(config), Keep())


def test_slice_linear():
    layer = nn.Linear(5, 4).requires_grad_(False)
    cut = slice_linear(layer, rows=[3, 0], columns=[1, 4, 2])
    assert torch.equal(cut.weight, layer.weight[[3, 0]][:, [1, 4, 2]])
    assert torch.equal(cut.bias, layer.bias[[3, 0]])
    assert not cut.weight.requires_grad
    assert (cut.in_features, cut.out_features) == (3, 2)
    assert slice_linear(nn.Linear(2, 2, bias=False)).bias is None
    with pytest.raises(ValueError, match="columns are 0 to 4, got 5"):
        slice_linear(layer, columns=[5])
