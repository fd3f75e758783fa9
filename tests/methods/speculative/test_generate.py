"""Speculative generation end to end on tiny models: the target's text, whatever is drafted."""

import itertools

import numpy as np
import pytest
import torch
from scipy.stats import chi2
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from stillhouse.methods.speculative import (
    DraftTree,
    LanguageModelDrafter,
    MCTSDrafter,
    NGramDrafter,
    TrigramTable,
    generate,
)
from stillhouse.methods.speculative.tree import IID

V = 40
DRAWS = 500
BEFORE = [3, 1, 2, 3, 1]  # an n-gram drafter knows how it may go on
PROMPTS = [[1, 2, 3, 4, 5], [7], [9, 8, 7, 9, 8, 7, 1, 2, 3]]


class Guesses:
    """Random trees of random tokens: nearly always wrong, and of any shape."""

    def __init__(self, vocabulary=V, most=12):
        self.generator, self.vocabulary, self.most = np.random.default_rng(0), vocabulary, most

    def draft(self, state):
        count = self.generator.integers(1, min(self.most, state.room) + 2)
        tokens = self.generator.integers(0, self.vocabulary, count)
        tokens[0] = state.ids[-1]
        parents = [-1, *(self.generator.integers(0, node) for node in range(1, count))]
        return DraftTree.of(tokens, parents)

    def accept(self, ids):
        pass


@pytest.fixture(scope="module")
def target(llama):
    return llama(vocab_size=V)


@pytest.fixture(scope="module")
def other(llama):
    return llama(layers=1, vocab_size=V, seed=1)


@pytest.fixture
def drafters(target, other):
    return {
        "random": Guesses(),
        "ngram": NGramDrafter(),
        "model": LanguageModelDrafter(other, branching=(3, 2, 1)),
        "itself": LanguageModelDrafter(target, length=3),
        "itself, a tree": LanguageModelDrafter(target, branching=(2, 2, 1)),
    }


def greedy(model, prompt, count=24, **options):
    ids = torch.tensor([prompt])
    written = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        do_sample=False,
        pad_token_id=0,
        **{"eos_token_id": None} | options,
    )
    return written[0, len(prompt) :].tolist()


def lists(ids):
    return [each.tolist() for each in ids]


@pytest.mark.parametrize("adaptive", [True, False])
@pytest.mark.parametrize("name", ["random", "ngram", "model", "itself", "itself, a tree"])
def test_greedy_text_is_the_targets(target, drafters, name, adaptive):
    options = dict(max_new_tokens=24, eos_token_id=(), adaptive=adaptive)
    wanted = [greedy(target, prompt) for prompt in PROMPTS]
    ids, stats = generate(target, drafters[name], PROMPTS, **options)
    assert lists(ids) == wanted
    for prompt, alone in zip(PROMPTS, wanted, strict=True):
        ids, one = generate(target, drafters[name], [prompt], **options)
        assert lists(ids) == [alone]
        assert one.calls == one.rounds
    assert stats.tokens == 72
    assert stats.rounds <= 72
    if name.startswith("itself") and not adaptive:
        assert stats.acceptance_rate > 0.9
        assert stats.calls < 12


def test_a_round_without_a_draft_keeps_its_features(target):
    """A drafter that drafted nothing gets them again, with the next ones."""
    rows = []

    class NowAndThen(LanguageModelDrafter):
        needs_features = True

        def draft(self, state):
            rows.append((len(state.ids), len(state.hidden)))
            last = [int(state.ids[-1])]
            return DraftTree.chain(last) if state.step % 3 else super().draft(state)

    drafter = NowAndThen(target, length=2)
    options = dict(max_new_tokens=9, eos_token_id=(), adaptive=False)
    generate(target, drafter, [PROMPTS[2]], **options)
    assert rows == [(9, 8), (12, 3), (13, 4), (14, 5), (17, 3)]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_positions_that_are_learnt_and_both_attentions(attention):
    config = GPT2Config(
        vocab_size=V, n_embd=32, n_layer=2, n_head=4, n_positions=34, initializer_range=0.3
    )
    config._attn_implementation = attention
    model = GPT2LMHeadModel(config).eval()
    drafter = LanguageModelDrafter(model, branching=(3, 2, 2))
    # The last positions are used up: a tree may not reach beyond them.
    ids, stats = generate(model, drafter, PROMPTS, max_new_tokens=25, adaptive=False)
    assert lists(ids) == [greedy(model, prompt, 25) for prompt in PROMPTS]
    assert stats.n_accepted > 40


def test_bfloat16(llama):
    model = llama(vocab_size=V).bfloat16()
    drafter = LanguageModelDrafter(model, branching=(2, 1, 1))
    ids, _ = generate(model, drafter, PROMPTS, max_new_tokens=16, eos_token_id=())
    assert [len(each) for each in ids] == [16] * 3
    ids, sampled = generate(
        model, drafter, PROMPTS, max_new_tokens=16, eos_token_id=(), temperature=1.0, adaptive=False
    )
    assert [len(each) for each in ids] == [16] * 3
    # Forwards of other shapes round differently, so that q is not quite p.
    assert sampled.acceptance_rate > 0.8


def law_of(model, prompt, count, temperature, top_k=None):
    """P of all continuations of `count` tokens, float64 [V, V, …], from uncached forwards."""
    vocabulary = model.config.vocab_size
    law = np.ones([1])
    for length in range(count):
        prefixes = list(itertools.product(range(vocabulary), repeat=length))
        ids = torch.tensor([[*prompt, *each] for each in prefixes])
        with torch.no_grad():
            logits = model(ids).logits[:, -1].double() / temperature
        if top_k is not None:
            smallest = logits.topk(top_k).values[:, -1:]
            logits = logits.masked_fill(logits < smallest, -torch.inf)
        law = (law[:, None] * logits.softmax(-1).numpy()).reshape(-1)
    return law


def p_value(counts, law):
    """Of Pearson's test; cells that expect fewer than five are one."""
    expected = law * counts.sum()
    assert not counts[law == 0].any()
    small = expected < 5
    observed = np.append(counts[~small], counts[small].sum())
    expected = np.append(expected[~small], expected[small].sum())
    observed, expected = observed[expected > 0], expected[expected > 0]
    return chi2.sf(((observed - expected) ** 2 / expected).sum(), len(expected) - 1)


def trigram_counts(target, drafter, draws, seed=0, **options):
    ids, stats = generate(
        target,
        drafter,
        [BEFORE] * draws,
        max_new_tokens=3,
        eos_token_id=(),
        seed=seed,
        adaptive=False,
        **options,
    )
    tokens = torch.stack(ids).numpy()
    size = target.config.vocab_size
    counts = np.bincount(tokens @ [size**2, size, 1], minlength=size**3)
    return counts, stats


SAMPLED = {
    "random": lambda target, other: Guesses(5, most=4),
    "ngram": lambda target, other: NGramDrafter(),
    "chain": lambda target, other: LanguageModelDrafter(other, length=2),
    "tree": lambda target, other: LanguageModelDrafter(other, branching=(2, 2)),
    "iid": lambda target, other: LanguageModelDrafter(other, branching=(2, 2), proposal="iid"),
    "greedy_draft": lambda target, other: LanguageModelDrafter(
        other, branching=(2, 2), proposal="greedy_draft"
    ),
    "top": lambda target, other: LanguageModelDrafter(other, branching=(2, 2), proposal="top"),
    "cool": lambda target, other: LanguageModelDrafter(other, length=2, temperature=0.5),
    "itself": lambda target, other: LanguageModelDrafter(target, length=2),
}


@pytest.fixture(scope="module")
def five(llama):
    """A target and another model of five tokens."""
    return llama(vocab_size=5), llama(layers=1, vocab_size=5, seed=1)


@pytest.mark.parametrize("name", SAMPLED)
def test_sampled_text_has_the_targets_law(five, name):
    target, other = five
    counts, stats = trigram_counts(target, SAMPLED[name](target, other), DRAWS, temperature=1.3)
    assert p_value(counts, law_of(target, BEFORE, 3, 1.3)) > 1e-4
    assert stats.n_accepted > 20


@pytest.mark.parametrize("mode", ["target", "multi_round", "traversal"])
def test_the_law_in_each_mode_and_with_top_k(five, mode):
    target, other = five
    drafter = LanguageModelDrafter(other, branching=(2, 1))
    counts, _ = trigram_counts(target, drafter, DRAWS, temperature=1.3, top_k=3, mode=mode)
    assert p_value(counts, law_of(target, BEFORE, 3, 1.3, top_k=3)) > 1e-4


def test_the_lossy_mode_accepts_more(five):
    target, other = five
    drafter = LanguageModelDrafter(other, branching=(3, 2), proposal="top")
    _, exact = trigram_counts(target, drafter, 100, temperature=1.3, mode="target")
    counts, lossy = trigram_counts(target, drafter, 100, temperature=1.3, mode="typical")
    assert lossy.n_accepted > exact.n_accepted
    assert p_value(counts, law_of(target, BEFORE, 3, 1.3)) < 1e-4


def test_a_draft_that_lies_about_its_law_is_noticed(five):
    """The power of the test above: tokens of one law verified as if they were of another."""
    target, other = five

    class Liar(LanguageModelDrafter):
        def draft(self, state):
            tree = super().draft(state)
            even = torch.full_like(tree.log_probs, -np.log(5)) if len(tree) > 1 else None
            return DraftTree(tree.tokens, tree.parents, tree.kind, even)

    counts, _ = trigram_counts(target, Liar(other, length=2), DRAWS, temperature=1.3)
    assert p_value(counts, law_of(target, BEFORE, 3, 1.3)) < 1e-6


def test_a_draft_of_the_target_itself_is_accepted_whole(target):
    for options in (dict(length=4), dict(branching=(2, 1, 1)), dict(length=3, proposal="iid")):
        drafter = LanguageModelDrafter(target, **options)
        _, stats = generate(
            target,
            drafter,
            PROMPTS,
            max_new_tokens=20,
            temperature=1.0,
            eos_token_id=(),
            adaptive=False,
        )
        assert stats.acceptance_rate == 1.0


def counter(vocabulary=5):
    """A Llama that counts: what comes behind a token is the next number, then 0 again."""
    sizes = dict(hidden_size=8, intermediate_size=8, num_attention_heads=2, num_hidden_layers=1)
    config = LlamaConfig(vocab_size=vocabulary, max_position_embeddings=512, **sizes)
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    layer = model.model.layers[0]
    for weight in (layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight):
        weight.zero_()
    model.model.embed_tokens.weight.copy_(torch.eye(vocabulary, 8))
    model.lm_head.weight.copy_(torch.eye(vocabulary, 8).roll(1, 0))
    return model


@pytest.mark.parametrize("drafts", ["chain", "ngram", "search"])
def test_drafts_are_no_deeper_than_what_is_verified(drafts):
    """64 levels, whatever a drafter could do."""
    target, vocabulary = counter(), 5
    table = TrigramTable()
    table.add(list(range(vocabulary)) * 3)
    drafter = {
        "chain": lambda: LanguageModelDrafter(target, length=70),
        "ngram": lambda: NGramDrafter(length=100, max_nodes=128),
        "search": lambda: MCTSDrafter(table, iterations=2000, depth=63, keep=100, max_nodes=100),
    }[drafts]()
    options = dict(max_new_tokens=150, max_nodes=120, eos_token_id=(), adaptive=False)
    prompt = [number % vocabulary for number in range(80)]
    ids, stats = generate(target, drafter, [prompt], **options)
    assert ids[0].tolist() == [number % vocabulary for number in range(80, 230)]
    assert max(stats.drafted[0]) == 64


def test_a_sequences_numbers_do_not_depend_on_the_batch(target, other):
    options = dict(max_new_tokens=12, temperature=1.0, eos_token_id=(), adaptive=False)
    seeds = torch.tensor([5, 6, 7])
    drafter = LanguageModelDrafter(other, branching=(2, 2))
    together = lists(generate(target, drafter, PROMPTS, seed=seeds, **options)[0])
    alone = [
        generate(target, drafter, [prompt], seed=seed[None], **options)[0][0].tolist()
        for prompt, seed in zip(PROMPTS, seeds, strict=True)
    ]
    assert together == alone
    assert lists(generate(target, drafter, PROMPTS, seed=seeds, **options)[0]) == together
    assert lists(generate(target, drafter, PROMPTS, seed=3, **options)[0]) != together
    # Of one seed each row has its own numbers, those of a larger batch too.
    same = lists(generate(target, drafter, [[1, 2]] * 3, seed=3, **options)[0])
    assert same[0] != same[1]
    assert lists(generate(target, drafter, [[1, 2]] * 2, seed=3, **options)[0]) == same[:2]


def test_stop_tokens_end_a_sequence_and_the_others_go_on(target):
    whole = [greedy(target, prompt) for prompt in PROMPTS]
    ends = [whole[0][5], whole[2][9]]

    def cut(row):
        places = [place for place, token in enumerate(row) if token in ends]
        return row[: places[0] + 1] if places else row

    wanted = [cut(row) for row in whole]
    assert len({len(each) for each in wanted}) > 1
    drafter = LanguageModelDrafter(target, length=7)
    options = dict(max_new_tokens=24, adaptive=False)
    ids, _ = generate(target, drafter, PROMPTS, eos_token_id=ends, **options)
    assert lists(ids) == wanted
    only = [row[: row.index(ends[0]) + 1] if ends[0] in row else row for row in whole]
    assert lists(generate(target, drafter, PROMPTS, eos_token_id=ends[0], **options)[0]) == only
    # None: what the model's own configuration says.
    target.generation_config.eos_token_id = ends
    try:
        assert lists(generate(target, drafter, PROMPTS, **options)[0]) == wanted
    finally:
        target.generation_config.eos_token_id = None


def test_tokens_are_handed_over_as_they_are_committed(target):
    calls = []
    ids, stats = generate(
        target,
        LanguageModelDrafter(target, length=3),
        PROMPTS,
        max_new_tokens=10,
        eos_token_id=(),
        adaptive=False,
        on_tokens=lambda row, tokens: calls.append((row, tokens)),
    )
    assert [row for row, _ in calls] == [0, 1, 2] * (len(calls) // 3)
    for row, written in enumerate(lists(ids)):
        assert [each for number, tokens in calls if number == row for each in tokens] == written
    assert [len(tokens) for row, tokens in calls if row == 0] == [4, 4, 2]
    assert stats.accepted == [[3, 3, 1]] * 3  # the last round has room for no more
    assert stats.histogram == {0: 0, 1: 3, 2: 0, 3: 6}
    assert stats.tokens_per_round == 21 / 9 + 1
    assert stats.calls == 3


def test_what_a_drafter_is_told(target):
    states, accepted = [], []

    class Watching(LanguageModelDrafter):
        needs_features = True

        def draft(self, state):
            states.append(state)
            return super().draft(state)

        def accept(self, ids):
            accepted.extend(ids.tolist())

    prompt = PROMPTS[2]
    drafter = Watching(target, branching=(2, 2, 1))
    ids, stats = generate(
        target, drafter, [prompt], max_new_tokens=11, eos_token_id=(), seed=4, adaptive=False
    )
    assert accepted == ids[0].tolist()
    assert [state.step for state in states] == list(range(len(states)))
    assert [state.position for state in states] == [len(state.ids) for state in states]
    assert states[0].depth == 10
    written = torch.tensor([[*prompt, *ids[0]]])
    with torch.no_grad():
        hidden = target.model(written).last_hidden_state[0]
    end = 0
    for state in states:
        assert state.ids.tolist() == written[0, : len(state.ids)].tolist()
        rows = hidden[end : len(state.ids) - 1]
        torch.testing.assert_close(state.hidden, rows, rtol=1e-4, atol=1e-4)
        end = len(state.ids) - 1
    assert len(states) == stats.calls < 8


def test_one_drafter_for_each_prompt(target, other):
    drafters = [Guesses(), LanguageModelDrafter(target), LanguageModelDrafter(other)]
    ids, _ = generate(target, drafters, PROMPTS, max_new_tokens=10, eos_token_id=())
    assert lists(ids) == [greedy(target, prompt, 10) for prompt in PROMPTS]


def test_the_model_is_left_as_it_was(target):
    target.train()
    try:
        before = {name: each.clone() for name, each in target.state_dict().items()}
        ids, _ = generate(target, NGramDrafter(), [[1, 2]], max_new_tokens=5, eos_token_id=())
        assert target.training
        assert not target.lm_head._forward_pre_hooks
        for name, each in target.state_dict().items():
            assert torch.equal(each, before[name])
        assert not ids[0].is_inference()
    finally:
        target.eval()


def test_logits_that_are_no_numbers(llama):
    model = llama(vocab_size=V)
    model.lm_head.weight.data[3] = float("nan")
    with pytest.raises(ValueError, match="a row has NaN"):
        generate(model, NGramDrafter(), [[1, 2]], max_new_tokens=4)


class Fixed:
    """Always the same tree."""

    def __init__(self, tokens, parents, **options):
        self.tree = DraftTree.of(tokens, parents, **options)

    def draft(self, state):
        return self.tree

    def accept(self, ids):
        pass


def test_errors(target, llama, other):
    drafter = NGramDrafter()
    for options, words in (
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"max_nodes": -1}, "max_nodes must be 0"),
        ({"temperature": -1.0}, "temperature must be"),
        ({"temperature": float("nan")}, "temperature must be"),
        ({"top_p": 0.0}, "top_p must be"),
        ({"top_k": 0}, "top_k must be"),
        ({"mode": "target"}, "needs a temperature above 0"),
        ({"mode": "best"}, "mode must be auto or one of"),
        ({"prompts": []}, "no prompt"),
        ({"prompts": [[1], []]}, "prompt 1 is empty"),
        ({"prompts": [[1, V]]}, "another tokenizer"),
        ({"max_new_tokens": 128}, "more than the model's 128 positions"),
        ({"drafter": [drafter]}, "one for each of 3 prompts"),
        ({"drafter": LanguageModelDrafter(llama(vocab_size=41))}, "41 tokens and the target 40"),
        ({"drafter": Fixed([3, 4], [-1, 0])}, "root of a draft to be the last token, 5, got 3"),
        ({"drafter": Fixed([5, V], [-1, 0])}, "below the 40 of the target"),
        ({"seed": torch.tensor([1])}, "one for each of 3 prompts"),
    ):
        arguments = dict(drafter=drafter, prompts=PROMPTS, max_new_tokens=4, adaptive=False)
        arguments |= options
        with pytest.raises(ValueError, match=words):
            generate(target, **arguments)
    with pytest.raises(TypeError, match="draft and accept"):
        generate(target, [object()] * 3, PROMPTS, max_new_tokens=4)
    with pytest.raises(TypeError, match="causal language model"):
        generate(torch.nn.Linear(2, 2), drafter, PROMPTS, max_new_tokens=4)
    rows = torch.zeros(5, V)
    many = Fixed([5, 1, 2, 3, 4], [-1, 0, 0, 0, 0], kind=IID, log_probs=rows)
    with pytest.raises(ValueError, match="at most 3 sampled nodes, got 4"):
        generate(target, many, [[5]], max_new_tokens=4, temperature=1.0, max_nodes=3)


def test_models_that_cannot_read_trees(target):
    sizes = dict(hidden_size=32, intermediate_size=48, num_attention_heads=4)
    sizes |= dict(num_key_value_heads=2)
    config = MistralConfig(vocab_size=V, num_hidden_layers=1, sliding_window=8, **sizes)
    with pytest.raises(ValueError, match="full attention in every layer"):
        generate(MistralForCausalLM(config), NGramDrafter(), PROMPTS, max_new_tokens=4)
    attention = target.config._attn_implementation
    target.config._attn_implementation = "flex_attention"
    try:
        with pytest.raises(ValueError, match="sdpa or eager"):
            generate(target, NGramDrafter(), PROMPTS, max_new_tokens=4)
    finally:
        target.config._attn_implementation = attention
