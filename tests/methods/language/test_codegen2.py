"""CodeGen2: who sees whom under its masks, its prompt, filling in, and pass@k."""

import itertools

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from stillhouse.methods.language import (
    CausalLM,
    FillInMiddle,
    Mixture,
    Sentinels,
    SpanCorruption,
    document_mask,
    infill,
    infill_prompt,
    pass_at_k,
    prefix_lm_mask,
    truncate_completion,
)
from stillhouse.recipes.language import codegen2 as recipe
from stillhouse.train import LogitRows, row_divergence, supervised_rows
from stillhouse.train.examples import Example, collate

WORDS = Sentinels(masks=(60, 61, 62), separator=63, end_of_span=64, end_of_text=65)


def tensor(*numbers):
    return torch.tensor(numbers)


def model(seed=0, layers=2):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=70,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


# Masks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", [0, 1])
def test_without_a_prefix_it_is_causal(prefix):
    mask = prefix_lm_mask(tensor(5), tensor(prefix), 5)
    assert mask.shape == (1, 1, 5, 5)
    assert torch.equal(mask[0, 0], torch.ones(5, 5).tril().bool())


def test_a_whole_prefix_sees_everything():
    assert prefix_lm_mask(tensor(5), tensor(5), 5).all()


def test_rows_by_hand():
    mask = prefix_lm_mask(tensor(5, 3), tensor(3, 2), 5)
    assert mask[0, 0, 0].int().tolist() == [1, 1, 1, 0, 0]
    assert mask[0, 0, 3].int().tolist() == [1, 1, 1, 1, 0]
    assert mask[1, 0].int().tolist() == [
        [1, 1, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 0, 0],
    ]


@pytest.mark.parametrize(
    ("lengths", "prefix", "message"),
    [
        (tensor(6), tensor(1), r"lengths must lie in \[1, 5\], got \[6\]"),
        (tensor(0), tensor(0), r"lengths must lie in \[1, 5\]"),
        (tensor(4), tensor(5), r"prefixes \[5\] are not within \[4\] tokens"),
        (tensor(4), tensor(-1), "are not within"),
        (tensor(4, 4), tensor(1), "are not within"),
    ],
)
def test_prefixes_that_cannot_be(lengths, prefix, message):
    with pytest.raises(ValueError, match=message):
        prefix_lm_mask(lengths, prefix, 5)


@pytest.mark.parametrize("prefix", range(7))
def test_what_a_model_sees_under_the_mask(prefix):
    """Another token 2 reaches position 0 if it is in the prefix; another token behind the prefix
    reaches no position before it."""
    lm, ids = model(), tensor([1, 2, 3, 4, 5, 6])
    mask = prefix_lm_mask(tensor(6), tensor(prefix), 6)

    def changed(position):
        other = ids.clone()
        other[0, position] = 50
        with torch.no_grad():
            out = [lm(input_ids=x, attention_mask=mask).logits[0] for x in (ids, other)]
        return [not torch.equal(a, b) for a, b in zip(*out, strict=True)]

    assert changed(2)[0] == (prefix > 2)
    for position in range(prefix, 6):
        assert not any(changed(position)[:position])
        assert changed(position)[position]


def test_documents_do_not_see_each_other():
    lm = model()
    ids, documents = tensor([1, 2, 3, 4, 5]), tensor([0, 0, 1, 1, -1])
    mask = document_mask(documents)
    with torch.no_grad():
        packed = lm(input_ids=ids, attention_mask=mask).logits[0]
        other = ids.clone()
        other[0, 1] = 50
        assert torch.equal(lm(input_ids=other, attention_mask=mask).logits[0, 2:], packed[2:])
        # Rotary positions are relative: a document is what it is alone.
        alone = lm(input_ids=ids[:, 2:4]).logits[0]
    torch.testing.assert_close(packed[2:4], alone, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"document_ids must be \[B, T\], got \(5,\)"):
        document_mask(documents[0])


# Filling in ---------------------------------------------------------------------------------------


def test_the_prompt_is_the_model_cards(tokenizer):
    names = ["<mask_1>", "<sep>", "<eom>", "<|endoftext|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": names})
    words = Sentinels.from_tokenizer(tokenizer, 1)
    prefix, suffix = "def hello_world():\n    ", "    return name"
    ids = infill_prompt([tokenizer(text)["input_ids"] for text in (prefix, suffix)], words)
    assert tokenizer.decode(ids) == prefix + "<mask_1>" + suffix + "<|endoftext|><sep><mask_1>"


def test_the_prompt_is_how_training_examples_begin():
    example = FillInMiddle(WORDS)(range(9), generator=torch.Generator().manual_seed(3))
    ids = example.input_ids.tolist()
    hole = ids.index(60)
    segments = [ids[:hole], ids[hole + 1 : ids.index(65)]]
    assert infill_prompt(segments, WORDS) == ids[: example.prefix_length + 1]


def test_prompts_of_several_holes_hold_the_answers():
    segments = [[1], [2], [3]]
    assert infill_prompt(segments, WORDS) == [1, 60, 2, 61, 3, 65, 63, 60]
    assert infill_prompt(segments, WORDS, [[8, 9]]) == [
        *[1, 60, 2, 61, 3, 65, 63],
        *[60, 8, 9, 64, 61],
    ]


@pytest.mark.parametrize(
    ("segments", "answers", "message"),
    [
        ([[1]], [], "0 holes: expected 1 to 3"),
        ([[1]] * 5, [], "4 holes: expected 1 to 3"),
        ([[1], [2]], [[3]], "1 answers for 1 holes"),
    ],
)
def test_prompts_that_cannot_be(segments, answers, message):
    with pytest.raises(ValueError, match=message):
        infill_prompt(segments, WORDS, answers)


def greedy(lm, prompt, limit):
    """Token by token, without a cache, up to <eom>."""
    ids = list(prompt)
    for _ in range(limit):
        with torch.no_grad():
            best = int(lm(input_ids=tensor(ids)).logits[0, -1].argmax())
        if best == 64:
            break
        ids.append(best)
    return ids[len(prompt) :]


def test_holes_are_filled_one_after_the_other():
    lm, segments = model(seed=3), [[1, 2], [3], [4, 5]]
    first = greedy(lm, infill_prompt(segments, WORDS), 6)
    second = greedy(lm, infill_prompt(segments, WORDS, [first]), 6)
    assert infill(lm, *segments, sentinels=WORDS, max_new_tokens=6) == [first, second]


def test_an_answer_ends_before_the_end_of_the_span():
    lm = model()
    with torch.no_grad():  # <eom> from every state
        lm.lm_head.weight.zero_()
        lm.lm_head.weight[7] = lm.model.norm.weight * 0
    outputs = itertools.chain([7, 7, 64], itertools.repeat(7))

    def forced(_module, _inputs, output):
        output.logits = torch.full_like(output.logits, -9.0)
        output.logits[..., next(outputs)] = 9.0
        return output

    handle = lm.register_forward_hook(forced)
    assert infill(lm, [1], [2], sentinels=WORDS, max_new_tokens=9) == [[7, 7]]
    handle.remove()


def test_samples_depend_on_the_seed_alone():
    lm, state = model(), torch.random.get_rng_state()
    lm.train()

    def sampled(seed):
        options = dict(max_new_tokens=8, temperature=1.0, seed=seed)
        return infill(lm, [1], [2], sentinels=WORDS, **options)

    assert sampled(1) == sampled(1) != sampled(2)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert lm.training
    with pytest.raises(ValueError, match="temperature must be at least 0"):
        infill(lm, [1], [2], sentinels=WORDS, temperature=-1.0)
    with pytest.raises(ValueError, match="0 holes"):
        infill(lm, [1], sentinels=WORDS)


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("x = 1\n\n# next\ny", "x = 1"),
        ("x = 1\n# same block\ny\n\n\nz", "x = 1\n# same block\ny"),
        ("x\n'''doc'''\n\n# b", "x\n"),
        ("x = '''text'''\n    # in\n", "x = '''text'''\n    # in\n"),
        ("", ""),
    ],
)
def test_completions_end_where_a_function_does(text, kept):
    assert truncate_completion(text) == kept


# Distillation and scores --------------------------------------------------------------------------


def test_a_divergence_is_taken_on_the_targets_alone():
    mixture = Mixture([(0.5, CausalLM()), (0.5, SpanCorruption(WORDS, minimum=2))])
    drawn = torch.Generator().manual_seed(0)
    batch = collate([mixture(range(20), generator=drawn) for _ in range(6)])
    assert (batch["prefix_length"] > 0).any()
    assert (batch["prefix_length"] == 0).any()
    index = supervised_rows(batch["labels"])
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        student, teacher = (model(seed)(**inputs).logits for seed in (1, 2))
    rows = [LogitRows(x.flatten(0, 1)[index.row], index) for x in (student, teacher)]
    found = row_divergence(*rows)
    p, q = (x.log_softmax(-1) for x in (teacher, student))
    whole = (p.exp() * (p - q)).sum(-1)
    wanted = whole[:, :-1][batch["labels"][:, 1:] != -100]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("n", "c", "k", "chance"),
    [(5, 2, 1, 0.4), (5, 2, 2, 0.7), (5, 0, 3, 0.0), (5, 3, 3, 1.0), (1, 1, 1, 1.0)],
)
def test_pass_at_k_by_hand(n, c, k, chance):
    assert pass_at_k(n, c, k) == pytest.approx(chance, abs=1e-12)


def test_pass_at_k_counts_all_choices():
    right = [True, True, True, False, False, False, False]
    choices = list(itertools.combinations(right, 4))
    assert pass_at_k(7, 3, 4) == pytest.approx(sum(map(any, choices)) / len(choices))


@pytest.mark.parametrize(("n", "c", "k"), [(5, 6, 1), (5, -1, 1), (5, 2, 0), (5, 2, 6)])
def test_pass_at_k_refuses(n, c, k):
    with pytest.raises(ValueError, match="expected 0 <= c <= n and 1 <= k <= n"):
        pass_at_k(n, c, k)


# The recipe's model -------------------------------------------------------------------------------


def test_the_recipes_model_sees_both_sides_and_nothing_that_is_to_come():
    """Of a document 1 .. n: what is before a symbol, what is behind its hole; and no context
    changes with the tokens that come after it."""
    end = recipe.LENGTH + 1
    document, drawn = np.arange(1, end, dtype=np.int32), torch.Generator().manual_seed(0)
    for _ in range(20):
        example = recipe._corruption()(document, generator=drawn)
        contexts, targets = recipe._rows([example])
        first = int(targets[0])
        before = [recipe.NOTHING] * 6 + list(range(1, first))
        behind = [*range(first + 3, end), recipe.WORDS.end_of_text] + [recipe.NOTHING] * 6
        for count, row in enumerate(contexts.tolist()):
            left = [*before, *range(first, first + count)][-6:]
            assert row == [*left, *behind[:6], count]
        start = int(example.prefix_length) + 1
        for count in range(len(targets)):
            ids = example.input_ids.copy()
            ids[start + count :] = 40
            other = recipe._rows([Example(ids, example.loss_mask)])[0]
            assert torch.equal(other[: count + 1], contexts[: count + 1])
    contexts, targets = recipe._rows([CausalLM()(document)])
    assert contexts[9].tolist() == [5, 6, 7, 8, 9, 10] + [recipe.NOTHING] * 7
    assert targets.tolist() == list(range(2, end))
