"""Drawing responses: the law of what is drawn, the cache and padding, and what ends a response."""

import pytest
import torch

from stillhouse.train import Responses, rollout, supervised_rows
from stillhouse.train.responses import _Draw

PROMPTS = [[5, 9, 3], [7], [200, 13, 40, 41, 42], [5, 9]]


@pytest.fixture(scope="module")
def gpt2():
    """One with learned absolute positions, for which padding could matter."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(1)
    config = GPT2Config(vocab_size=259, n_positions=64, n_embd=32, n_layer=2, n_head=4)
    config.initializer_range, config.eos_token_id, config.bos_token_id = 0.3, 258, None
    return GPT2LMHeadModel(config).eval()


def without_cache(model):
    """The same model as a plain callable: whole sequences, padded on the right."""
    return lambda ids: model(input_ids=ids, use_cache=False).logits


def chain(transitions):
    """A callable whose next token depends on the last one alone."""
    return lambda ids: transitions.log()[ids]


def said(responses):
    return [each.tolist() for each in responses.responses()]


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("which", ["llama", "gpt2"])
def test_cache_and_padding_change_nothing(which, temperature, llama, gpt2):
    model = llama() if which == "llama" else gpt2
    options = dict(max_new_tokens=12, temperature=temperature, seed=3, eos_token_id=())
    found = rollout(model, PROMPTS, **options)
    assert said(found) == said(rollout(without_cache(model), PROMPTS, **options))
    assert [each.tolist() for each in found.prompts()] == PROMPTS
    assert found.mask.sum(1).tolist() == [12] * 4
    assert len({token for row in said(found) for token in row}) > 10


def test_what_is_drawn_has_the_model_s_law():
    transitions = torch.tensor([[0.1, 0.2, 0.7], [0.5, 0.0, 0.5], [0.3, 0.3, 0.4]]).double()
    drawn = rollout(chain(transitions), [[0]] * 20_000, max_new_tokens=3, seed=0)
    counts = torch.zeros(3, 3, 3).double()
    for a, b, c in said(drawn):
        counts[a, b, c] += 1
    first = transitions[0]
    law = first[:, None, None] * transitions[:, :, None] * transitions[None]
    error = (law * (1 - law) / len(drawn)).sqrt()
    assert ((counts / len(drawn) - law).abs() <= 4.5 * error).all()
    assert counts[1, 1].sum() == 0


@pytest.mark.parametrize(("uniform", "token"), [(0.0, 1), (0.26, 3), (1 - 2**-53, 3)])
def test_no_column_of_probability_zero_is_drawn(uniform, token):
    """Columns 0, 2 and 4 have none; a quarter of the mass is column 1."""
    p = torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0]])
    uniform = torch.tensor([[uniform]], dtype=torch.float64)
    assert _Draw(uniform, 1.0, None, None)(p.log(), 0).tolist() == [token]


def test_temperature_top_k_and_top_p(llama):
    """Frequencies of one token against probabilities that are put together by hand."""
    model = llama()
    logits = model(input_ids=torch.tensor([PROMPTS[0]])).logits[0, -1].double()
    p = (logits / 2).softmax(-1)
    ranked, order = p.sort(descending=True)
    top = ranked[:5] / ranked[:5].sum()
    kept = top[(top.cumsum(0) - top) < 0.8]
    assert 1 < len(kept) < 5
    drawn = rollout(
        model,
        [PROMPTS[0]] * 4000,
        max_new_tokens=1,
        temperature=2.0,
        top_k=5,
        top_p=0.8,
        seed=1,
    )
    share = torch.bincount(torch.cat(drawn.responses()), minlength=259) / 4000
    expected = torch.zeros(259).double().scatter(0, order[: len(kept)], kept / kept.sum())
    error = (expected * (1 - expected) / 4000).sqrt()
    assert ((share - expected).abs() <= 4.5 * error).all()


def test_a_seed_decides_everything_and_touches_nothing(llama):
    model, options = llama(), dict(max_new_tokens=8, eos_token_id=())
    state = torch.get_rng_state()
    first = said(rollout(model, PROMPTS, seed=0, **options))
    assert torch.equal(torch.get_rng_state(), state)
    assert first == said(rollout(model, PROMPTS, seed=0, **options))
    other = said(rollout(model, PROMPTS, seed=1, **options))
    assert all(a != b for a, b in zip(first, other, strict=True))
    # Neither the batch around a row nor the room it is given has a say.
    assert first[:2] == said(rollout(model, PROMPTS[:2], seed=0, **options))
    longer = said(rollout(model, PROMPTS, seed=0, max_new_tokens=11, eos_token_id=()))
    assert first == [row[:8] for row in longer]
    seeds = torch.tensor([4, 5, 6, 7])
    each = said(rollout(model, PROMPTS, seed=seeds, **options))
    order = [2, 0, 3, 1]
    moved = rollout(model, [PROMPTS[i] for i in order], seed=seeds[order], **options)
    assert said(moved) == [each[i] for i in order]


def test_each_submodule_gets_its_mode_back(llama):
    options = dict(max_new_tokens=6, seed=0)
    quiet = llama(attention_dropout=0.9)
    expected = said(rollout(quiet, PROMPTS, **options))
    quiet.train()
    quiet.model.layers[1].eval()
    modes = [each.training for each in quiet.modules()]
    assert said(rollout(quiet, PROMPTS, **options)) == expected
    assert [each.training for each in quiet.modules()] == modes


def test_the_model_s_own_sampling_options_do_not_count(llama):
    model, options = llama(), dict(max_new_tokens=6, temperature=0.0, seed=0)
    expected = said(rollout(model, PROMPTS, **options))
    config = model.generation_config
    config.repetition_penalty, config.suppress_tokens = 9.0, [expected[0][0]]
    assert said(rollout(model, PROMPTS, **options)) == expected
    assert model.generation_config is config


def test_adapters(llama):
    """Of a model with adapters, too, the config is back in every place it was in."""
    peft = pytest.importorskip("peft")
    model, options = llama(), dict(max_new_tokens=6, seed=0, eos_token_id=())
    config = model.generation_config
    config.repetition_penalty = 9.0
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear"))
    torch.nn.init.normal_(next(p for n, p in adapted.named_parameters() if "lora_B" in n))
    found = said(rollout(adapted, PROMPTS, **options))
    assert found == said(rollout(without_cache(adapted), PROMPTS, **options))
    assert found != said(rollout(llama(), PROMPTS, **options))
    assert adapted.generation_config is model.generation_config is config


def test_a_response_ends_with_its_first_end_of_text(llama):
    model = llama()
    free = said(rollout(model, PROMPTS, max_new_tokens=10, seed=0, eos_token_id=()))
    ends = [free[0][3], free[2][0]]
    for each in (model, without_cache(model)):
        found = rollout(each, PROMPTS, max_new_tokens=10, seed=0, eos_token_id=ends)
        for whole, row in zip(free, said(found), strict=True):
            places = [i for i, token in enumerate(whole) if token in ends]
            assert row == whole[: places[0] + 1 if places else None]
        assert len(said(found)[0]) <= 4
        assert said(found)[2] == free[2][:1]
    # The model's own, where nothing is said.
    model.generation_config.eos_token_id = free[0][3]
    assert said(rollout(model, PROMPTS[:1], max_new_tokens=10, seed=0)) == [free[0][:4]]


def test_layout_and_batch():
    responses = Responses.of([[1, 2], [3]], [[4], [5, 6, 7]])
    assert responses.ids.tolist() == [[1, 2, 4, 0], [3, 5, 6, 7]]
    assert responses.mask.int().tolist() == [[0, 0, 1, 0], [0, 1, 1, 1]]
    assert responses.prompt_length.tolist() == [2, 1]
    assert responses.length.tolist() == [3, 4]
    batch = responses.batch()
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1] * 4]
    index = supervised_rows(batch["labels"])
    assert index.target.tolist() == [4, 5, 6, 7]
    assert index.row.tolist() == [1, 4, 5, 6]
    first = responses.part(slice(0, 1))
    assert first.ids.tolist() == [[1, 2, 4]]
    assert first.mask.tolist() == [[False, False, True]]
    assert said(responses.part(torch.tensor([1, 0]))) == [[5, 6, 7], [4]]
    assert Responses.of([[1]], [[]]).mask.sum() == 0
    assert len(responses.to("cpu")) == 2


@pytest.fixture(scope="module")
def t5():
    """A random T5 that starts with token 0."""
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(2)
    config = T5Config(vocab_size=259, d_model=16, d_ff=32, num_layers=2, num_heads=2, d_kv=8)
    config.decoder_start_token_id, config.eos_token_id = 0, 258
    config.initializer_factor, config.num_beams, config.dropout_rate = 4.0, 3, 0.5
    return T5ForConditionalGeneration(config)


@pytest.fixture(scope="module")
def bart():
    """One whose encoder has learned positions."""
    from transformers import BartConfig, BartForConditionalGeneration

    torch.manual_seed(2)
    each = {"layers": 1, "ffn_dim": 32, "attention_heads": 2}
    sizes = {f"{half}_{name}": n for half in ("encoder", "decoder") for name, n in each.items()}
    config = BartConfig(
        vocab_size=259, d_model=16, max_position_embeddings=32, dropout=0.5, init_std=1.0, **sizes
    )
    config.forced_eos_token_id = None
    return BartForConditionalGeneration(config)


@pytest.fixture(scope="module")
def encoder_decoder():
    from stillhouse.methods.language import EncoderDecoder, EncoderDecoderConfig

    sizes = dict(width=16, heads=2, kv_heads=1, head_size=8, ffn=32, dropout=0.5)
    layers = dict(encoder_layers=2, decoder_layers=2)
    return EncoderDecoder(EncoderDecoderConfig(259, eos_token_id=258, **layers, **sizes), seed=5)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("which", ["t5", "bart", "encoder_decoder"])
def test_encoder_decoders_respond_to_what_they_encode(which, temperature, request):
    """Against the decoder's own rows, source by source and without a cache or padding."""
    model = request.getfixturevalue(which).train()
    options = dict(max_new_tokens=12, temperature=temperature, top_k=50, eos_token_id=())
    seeds = torch.arange(len(PROMPTS))
    found = rollout(model, PROMPTS, seed=seeds, **options)
    assert model.training
    assert [each.tolist() for each in found.prompts()] == PROMPTS
    model.eval()
    for number, prompt in enumerate(PROMPTS):
        source = torch.tensor([prompt])

        def decoder(ids, source=source):
            return model(input_ids=source, decoder_input_ids=ids).logits

        alone = rollout(
            decoder, [[model.config.decoder_start_token_id]], seed=seeds[number, None], **options
        )
        assert said(alone) == [said(found)[number]]
    if temperature:
        assert len({token for row in said(found) for token in row}) > 10


def test_an_encoder_decoder_s_response_ends_as_its_config_says(encoder_decoder):
    model, config = encoder_decoder, encoder_decoder.generation_config
    free = rollout(model, PROMPTS, max_new_tokens=8, seed=0, eos_token_id=())
    end = said(free)[0][2]
    config.eos_token_id = end
    try:
        ended = rollout(model, PROMPTS, max_new_tokens=8, seed=0)
    finally:
        config.eos_token_id = 258
    for whole, cut in zip(said(free), said(ended), strict=True):
        assert cut == whole[: whole.index(end) + 1 if end in whole else None]
    assert len(said(ended)[0]) == 3
    assert model.generation_config is config


def test_an_encoder_decoder_has_positions_for_each_side(bart):
    assert len(said(rollout(bart, [[5] * 32], max_new_tokens=31, seed=0, eos_token_id=()))[0]) == 31
    with pytest.raises(ValueError, match="a prompt of 33 and a response of 2 tokens are more"):
        rollout(bart, [[5] * 33], max_new_tokens=2, seed=0)


def test_an_encoder_decoder_without_a_start_token_is_refused(t5):
    config, own = t5.config, t5.generation_config
    before = config.decoder_start_token_id, own.decoder_start_token_id
    config.decoder_start_token_id = own.decoder_start_token_id = None
    try:
        with pytest.raises(ValueError, match="T5ForConditionalGeneration has no decoder_start"):
            rollout(t5, [[1]], max_new_tokens=2, seed=0)
    finally:
        config.decoder_start_token_id, own.decoder_start_token_id = before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(prompts=[[1], []]), "prompt 1 is empty"),
        (dict(prompts=[]), "there is no prompt"),
        (dict(prompts=[[[1]]]), r"one sequence \[n\]"),
        (dict(max_new_tokens=0), "max_new_tokens must be at least 1, got 0"),
        (dict(max_new_tokens=127), "a prompt of 2 and a response of 127 tokens"),
        (dict(temperature=-1.0), "temperature must be"),
        (dict(top_k=0), "top_k must be at least 1"),
        (dict(top_p=1.5), r"top_p must be in \(0, 1\]"),
        (dict(seed=torch.tensor([1, 2, 3])), "seed must be an int or one for each of 1 prompts"),
        (dict(model=lambda ids: torch.full((*ids.shape, 4), torch.nan)), "are not finite at token"),
        (dict(model=lambda ids: torch.zeros(4)), r"must give logits \[B, T, V\]"),
        (dict(model=lambda ids: None), "got NoneType"),
    ],
)
def test_bad_input(changes, message, llama):
    options = dict(model=llama(), prompts=[[1, 2]], max_new_tokens=2, seed=0) | changes
    with pytest.raises(ValueError, match=message) as raised:
        rollout(**options)
    assert "\n" not in str(raised.value)


def test_prompts_without_a_response():
    with pytest.raises(ValueError, match="2 prompts and 1 responses"):
        Responses.of([[1], [2]], [[3]])
