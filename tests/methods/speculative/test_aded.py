"""ADED with a target: its text is the target's own, whatever the table knows."""

import pytest
import torch

from stillhouse.methods.speculative import (
    BeamDrafter,
    Drafter,
    MCTSDrafter,
    NGramDrafter,
    TrigramTable,
    generate,
)

pytest.importorskip("transformers")

TOKENS = 40


@pytest.fixture(scope="module")
def target():
    """Two blocks in float64 and 30 tokens: greedy text soon repeats itself."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=30,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).double().eval()


@pytest.fixture(scope="module")
def prompts():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(30, (n,), generator=generator) for n in (1, 2, 9)]


def plain(target, prompt) -> list[int]:
    """Greedy text without speculation."""
    ids = prompt[None]
    with torch.no_grad():
        for _ in range(TOKENS):
            ids = torch.cat([ids, target(ids).logits[:, -1:].argmax(-1)], 1)
    return ids[0, len(prompt) :].tolist()


def random_table(seed: int) -> TrigramTable:
    """What it says has nothing to do with the target."""
    table = TrigramTable()
    table.add(torch.randint(30, (20_000,), generator=torch.Generator().manual_seed(seed)))
    return table


def opposed_table(target, prompts) -> TrigramTable:
    """After each pair of the target's text a token that is wrong."""
    table = TrigramTable()
    for prompt in prompts:
        text = [*prompt.tolist(), *plain(target, prompt)]
        for a, b, c in zip(text, text[1:], text[2:], strict=False):
            table.add([a, b, (c + 1) % 30])
    return table


@pytest.mark.parametrize("table", ["empty", "random", "opposed"])
@pytest.mark.parametrize("make", [MCTSDrafter, BeamDrafter])
def test_greedy_text_is_the_targets(table, make, target, prompts):
    made = {
        "empty": TrigramTable,
        "random": lambda: random_table(0),
        "opposed": lambda: opposed_table(target, prompts),
    }[table]()
    drafter = make(made)
    assert isinstance(drafter, Drafter)
    expected = [plain(target, prompt) for prompt in prompts]
    ids, stats = generate(target, drafter, prompts, max_new_tokens=TOKENS, adaptive=False)
    assert [each.tolist() for each in ids] == expected
    assert stats.n_accepted + stats.rounds == TOKENS * len(prompts)


def test_a_table_that_knows_nothing_costs_one_call_a_token(target, prompts):
    drafter = MCTSDrafter(TrigramTable(), adapt=False)
    options = dict(max_new_tokens=TOKENS, adaptive=False)
    _, stats = generate(target, drafter, prompts[:1], **options)
    assert stats.n_accepted == stats.nodes == 0
    # The prompt's own forward does not write: each of the tokens takes a call.
    assert stats.calls == TOKENS


def test_text_that_repeats_itself_is_drafted_without_a_corpus(target, prompts):
    """Greedy text of a small model goes round in circles, which one round behind is learnt."""
    for drafter in (MCTSDrafter(TrigramTable()), NGramDrafter()):
        options = dict(max_new_tokens=200, adaptive=False)
        ids, stats = generate(target, drafter, prompts[1:2], **options)
        assert stats.tokens_per_round > 2
        assert len(ids[0]) == 200
        assert stats.calls < 100


def test_the_same_seed_gives_the_same_text_and_drafts(target, prompts):
    def run(seed):
        drafter = MCTSDrafter(random_table(1))
        options = dict(max_new_tokens=30, temperature=1.0, adaptive=False, seed=seed)
        ids, stats = generate(target, drafter, prompts, **options)
        return [each.tolist() for each in ids], stats.accepted

    assert run(3) == run(3)
    assert run(3) != run(4)


def test_a_vocabulary_other_than_the_targets_is_one_line(target, prompts):
    table = TrigramTable()
    table.add([*prompts[1].tolist(), 99])
    with pytest.raises(ValueError, match="below the 30 of the target, got 99"):
        generate(target, MCTSDrafter(table), prompts[1:2], max_new_tokens=5)
