"""MEND: the identity distiller, what learns and what does not, candidates behind a prefix, batches,
and what is refused."""

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div

from stillhouse import ops
from stillhouse.methods.language import (
    ContextDistiller,
    build_icl_batch,
    context_distillation,
    context_distillation_loss,
    prefix_cache,
    score_candidates,
    split_for_pretraining,
)
from stillhouse.train import LogitRows, RowIndex, row_divergence

DEMOS = torch.randint(256, (2, 9), generator=torch.Generator().manual_seed(1))
QUERY = torch.randint(256, (2, 5), generator=torch.Generator().manual_seed(2))
DEMO_MASK = torch.tensor([[True] * 9, [True] * 6 + [False] * 3])
QUERY_MASK = torch.tensor([[True] * 3 + [False] * 2, [True] * 5])
ANSWER = torch.tensor([[False, True, True, False, False], [False, False, False, True, True]])
MASKS = dict(demo_mask=DEMO_MASK, query_mask=QUERY_MASK)


def gpt2(layers=2, width=32, positions=64, vocab=259):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(3)
    sizes = dict(n_embd=width, n_layer=layers, n_head=2, n_positions=positions)
    config = GPT2Config(vocab_size=vocab, bos_token_id=None, eos_token_id=None, **sizes)
    config.initializer_range = 0.3
    return GPT2LMHeadModel(config)


def local_attention():
    """A model whose first block sees four tokens."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(4)
    config = Qwen2Config(
        vocab_size=259,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        use_sliding_window=True,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention"],
        max_position_embeddings=64,
    )
    config.initializer_range = 0.3
    return Qwen2ForCausalLM(config).eval()


@pytest.fixture(params=["llama", "gpt2", "local"])
def lm(request, llama):
    return {"llama": llama, "gpt2": lambda: gpt2().eval(), "local": local_attention}[
        request.param
    ]()


def behind(lm, front, query):
    """float64 logits [Q, V] where a query's tokens are read behind `front`, ids or vectors."""
    embed = lm.get_input_embeddings()
    front = front if front.is_floating_point() else embed(front)
    return lm(inputs_embeds=torch.cat([front, embed(query)])[None]).logits[0, len(front) :].double()


def expected(lm, vectors, max_length=None, temperature=1.0):
    """kd and ce with whole logits, sequence by sequence."""
    kd, ce = [], []
    for row in range(2):
        demo, query = DEMOS[row][DEMO_MASK[row]], QUERY[row][QUERY_MASK[row]]
        if max_length is not None:
            demo = demo[max(len(demo) + len(query) - max_length, 0) :]
        teacher, student = behind(lm, demo, query), behind(lm, vectors[row], query)
        sides = ((z / temperature).log_softmax(-1) for z in (student, teacher))
        kd.append(kl_div(*sides, log_target=True, reduction="none").sum(-1))
        asked = ANSWER[row][QUERY_MASK[row]][1:]
        ce.append(cross_entropy(student[:-1][asked], query[1:][asked], reduction="none"))
    return torch.cat(kd).mean(), torch.cat(ce).mean()


# The loss -----------------------------------------------------------------------------------------


def test_the_identity_distiller_says_what_the_demonstrations_say(lm):
    vectors = lm.get_input_embeddings()(DEMOS).detach().requires_grad_()
    parts = context_distillation_loss(lm, vectors, DEMOS, QUERY, query_mask=QUERY_MASK)
    assert parts["kd"].abs() < 1e-6
    parts["loss"].backward()
    assert vectors.grad.abs().max() < 1e-5
    # The rows themselves, and the same model without what stands in front of the query.
    for row in range(2):
        ours, theirs = (behind(lm, front, QUERY[row]) for front in (vectors[row], DEMOS[row]))
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        want = lm(torch.cat([DEMOS[row], QUERY[row]])[None]).logits[0, 9:].double()
        torch.testing.assert_close(ours, want, rtol=1e-5, atol=1e-5)
    other = context_distillation_loss(lm, vectors.roll(1, 1), DEMOS, QUERY)
    assert other["kd"] > 1e-2


def test_no_demonstrations_and_no_vectors_are_the_same(lm):
    none = torch.zeros(2, 0, dtype=torch.int64)
    parts = context_distillation_loss(lm, torch.zeros(2, 0, 32), none, QUERY)
    assert parts["kd"].abs() < 1e-6


@pytest.mark.parametrize(("max_length", "temperature"), [(None, 1.0), (8, 1.0), (None, 2.5)])
def test_value_and_gradient_are_those_of_whole_logits(lm, max_length, temperature):
    lm = lm.double()
    vectors = torch.randn(2, 4, 32, dtype=torch.float64, requires_grad=True)
    options = dict(max_length=max_length, temperature=temperature, kd_weight=0.5, ce_weight=2.0)
    parts = context_distillation_loss(
        lm, vectors, DEMOS, QUERY, answer_mask=ANSWER, **MASKS, **options
    )
    kd, ce = expected(lm, vectors, max_length, temperature)
    torch.testing.assert_close(parts["kd"], kd.detach())
    torch.testing.assert_close(parts["ce"], ce.detach())
    torch.testing.assert_close(parts["loss"], 0.5 * kd + 2 * ce)
    (found,) = torch.autograd.grad(parts["loss"], vectors)
    (want,) = torch.autograd.grad(0.5 * kd + 2 * ce, vectors)
    torch.testing.assert_close(found, want, rtol=1e-6, atol=1e-9)


def test_one_loss_at_a_time(llama):
    lm, vectors = llama(), torch.randn(2, 4, 32)
    kd, ce = expected(lm, vectors)
    only_kd = context_distillation_loss(lm, vectors, DEMOS, QUERY, **MASKS)
    assert set(only_kd) == {"loss", "kd"}
    torch.testing.assert_close(only_kd["loss"].double(), kd, rtol=1e-5, atol=1e-5)
    only_ce = context_distillation_loss(
        lm, vectors, DEMOS, QUERY, answer_mask=ANSWER, kd_weight=0.0, ce_weight=1.0, **MASKS
    )
    assert set(only_ce) == {"loss", "ce"}
    torch.testing.assert_close(only_ce["loss"].double(), ce, rtol=1e-5, atol=1e-5)
    with_ce = context_distillation_loss(lm, vectors, DEMOS, QUERY, answer_mask=ANSWER, **MASKS)
    torch.testing.assert_close(with_ce["loss"], only_kd["loss"])
    torch.testing.assert_close(with_ce["ce"], only_ce["ce"])


def test_the_distiller_learns_and_the_model_does_not():
    """In training mode with dropout: the frozen model is read without it, and is left as it was."""
    lm = gpt2()
    lm.train()
    assert lm.transformer.drop.p > 0
    distiller = ContextDistiller(gpt2(1, width=16).transformer, 32, vectors=3)
    vectors = distiller(DEMOS, DEMO_MASK)
    options = dict(answer_mask=ANSWER, ce_weight=1.0, **MASKS)
    parts = context_distillation_loss(lm, vectors, DEMOS, QUERY, **options)
    parts["loss"].backward()
    assert all(parameter.grad is None for parameter in lm.parameters())
    assert all(parameter.requires_grad for parameter in lm.parameters())
    assert lm.training
    for name, parameter in distiller.named_parameters():
        if name != "encoder.wpe.weight":
            assert parameter.grad.abs().sum() > 0, name
    again = context_distillation_loss(lm, vectors.detach(), DEMOS, QUERY, **options)
    assert again["loss"] == parts["loss"].detach()


def test_what_stands_in_the_padding_does_not_matter(llama):
    lm, vectors = llama(), torch.randn(2, 4, 32)
    options = dict(ce_weight=1.0, **MASKS)
    want = context_distillation_loss(lm, vectors, DEMOS, QUERY, answer_mask=ANSWER, **options)
    query, demos = QUERY.masked_fill(~QUERY_MASK, 77), DEMOS.masked_fill(~DEMO_MASK, 78)
    # An answer in the padding is none.
    answer = ANSWER | ~QUERY_MASK
    found = context_distillation_loss(lm, vectors, demos, query, answer_mask=answer, **options)
    for name in want:
        torch.testing.assert_close(found[name], want[name], rtol=0, atol=0)
    wider = {name: torch.nn.functional.pad(mask, (0, 4)) for name, mask in MASKS.items()}
    demos, query, answer = (torch.nn.functional.pad(x, (0, 4)) for x in (DEMOS, QUERY, ANSWER))
    found = context_distillation_loss(
        lm, vectors, demos, query, answer_mask=answer, ce_weight=1.0, **wider
    )
    for name in want:
        torch.testing.assert_close(found[name], want[name], rtol=1e-6, atol=1e-6)


def test_no_logits_exist_and_the_head_is_one(llama, monkeypatch):
    lm, calls, forward = llama(), [], torch.nn.Linear.forward
    linear = ops.linear_divergence

    def no_head(self, x):
        assert self is not lm.lm_head, "logits were made"
        return forward(self, x)

    def watched(hidden, weight, teacher, kind, **options):
        calls.append((weight, teacher))
        return linear(hidden, weight, teacher, kind, **options)

    monkeypatch.setattr(ops, "linear_divergence", watched)
    monkeypatch.setattr(torch.nn.Linear, "forward", no_head)
    context_distillation_loss(lm, torch.randn(2, 4, 32), DEMOS, QUERY, answer_mask=ANSWER)
    (weight, teacher), (other, nobody) = calls
    assert weight.data_ptr() == teacher.weight.data_ptr() == other.data_ptr()
    assert nobody is None


def test_gradients_can_be_checkpointed(llama):
    lm, vectors = llama().requires_grad_(False), torch.randn(2, 4, 32, requires_grad=True)
    want = torch.autograd.grad(
        context_distillation_loss(lm, vectors, DEMOS, QUERY)["loss"], vectors
    )
    lm.gradient_checkpointing_enable({"use_reentrant": False})
    found = torch.autograd.grad(
        context_distillation_loss(lm, vectors, DEMOS, QUERY)["loss"], vectors
    )
    torch.testing.assert_close(found, want)


def test_both_sides_read_the_same_query():
    ids = torch.tensor([[5, 6, 1, 2, 3], [1, 2, 3, 0, 0]])
    rows = context_distillation._query_rows(ids, torch.tensor([2, 0]), torch.tensor([3, 3]))
    assert rows.row.tolist() == [2, 3, 4, 5, 6, 7]
    assert rows.target.tolist() == [2, 3, -100, 2, 3, -100]
    assert rows.sequence.tolist() == [0, 0, 0, 1, 1, 1]
    fewer = RowIndex(*(x[1:] for x in rows))
    with pytest.raises(ValueError, match="student has 6 supervised rows and teacher 5"):
        row_divergence(LogitRows(torch.zeros(6, 3), rows), LogitRows(torch.zeros(5, 3), fewer))
    shifted = context_distillation._query_rows(ids, torch.tensor([1, 0]), torch.tensor([3, 3]))
    with pytest.raises(ValueError, match="row 0 predicts token 2 in the student and 1 in the"):
        row_divergence(*(LogitRows(torch.zeros(6, 3), each) for each in (rows, shifted)))


ids = torch.zeros(2, 5, dtype=torch.int64)
BAD = [
    ({"temperature": 0.0}, "temperature must be positive, got 0.0"),
    ({"vectors": torch.zeros(2, 4, 31)}, r"vectors must be \[batch, vectors, 32\]"),
    ({"vectors": torch.zeros(4, 32)}, r"vectors must be \[batch, vectors, 32\]"),
    ({"vectors": torch.zeros(3, 4, 32)}, "3 rows of vectors for 2 queries"),
    ({"demo_ids": ids[:1], "demo_mask": None}, "1 rows of demonstrations for 2 queries"),
    ({"query_mask": ids[:, :4] > 0}, r"query_mask must be bool \(2, 5\)"),
    ({"query_mask": ids + 1}, r"query_mask must be bool \(2, 5\), like the ids, got torch.int64"),
    ({"query_mask": ids > 0}, "query 0 is empty: nothing to compare"),
    ({"query_mask": ~QUERY_MASK}, "query_mask has a gap: the padding of query_ids"),
    ({"query_ids": ids[0]}, r"query_ids must be \[batch, tokens\], got shape \(5,\)"),
    ({"max_length": 4}, "a query has 5 tokens, max_length is 4"),
    ({"ce_weight": 1.0}, "ce_weight needs an answer_mask"),
    ({"answer_mask": ANSWER[:, :4]}, r"answer_mask must be bool \(2, 5\), like the query"),
    ({"answer_mask": ids == 0}, "an answer begins at the query's first token"),
]


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_the_loss_refuses(llama, changes, message):
    given = dict(vectors=torch.zeros(2, 4, 32), demo_ids=DEMOS, query_ids=QUERY, **MASKS)
    with pytest.raises(ValueError, match=message) as raised:
        context_distillation_loss(llama(), **(given | changes))
    assert "\n" not in str(raised.value)


# The distiller ------------------------------------------------------------------------------------


@pytest.mark.parametrize("width_out", [16, 32])
def test_vectors_are_the_last_states_of_each_row_by_itself(width_out):
    encoder = gpt2(width=16).transformer.eval()
    distiller = ContextDistiller(encoder, width_out, vectors=4)
    found = distiller(DEMOS, DEMO_MASK)
    assert found.shape == (2, 4, width_out)
    for row in range(2):
        demo = encoder.wte(DEMOS[row][DEMO_MASK[row]])
        inputs = torch.cat([demo, distiller.placeholders])[None]
        want = encoder(inputs_embeds=inputs).last_hidden_state[0, -4:]
        if width_out != 16:
            want = torch.tanh(want @ distiller.projection.weight.T + distiller.projection.bias)
        torch.testing.assert_close(found[row], want, rtol=1e-5, atol=1e-5)
    assert (distiller.projection is None) == (width_out == 16)


def test_placeholders_begin_as_embeddings_of_tokens():
    encoder = gpt2(width=16).transformer
    one, same, other = (
        ContextDistiller(encoder, 8, 40, generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    )
    nearest = torch.cdist(one.placeholders, encoder.wte.weight).min(1)
    assert nearest.values.max() < 1e-3
    assert nearest.indices.min() >= 100
    assert len(nearest.indices.unique()) > 20
    for name, value in one.state_dict().items():
        torch.testing.assert_close(same.state_dict()[name], value, rtol=0, atol=0)
    assert not torch.equal(one.placeholders, other.placeholders)
    assert not torch.equal(one.projection.weight, other.projection.weight)
    # A model with a head gives its body.
    assert ContextDistiller(gpt2(), 8, 3).encoder.__class__.__name__ == "GPT2Model"


def test_demonstrations_that_do_not_fit():
    encoder = gpt2(width=16).transformer.eval()
    with pytest.raises(ValueError, match="of 9 tokens do not fit into the window of 10 with 3"):
        ContextDistiller(encoder, 16, 3, window=10)(DEMOS, DEMO_MASK)
    cut = ContextDistiller(encoder, 16, 3, window=10, truncate=True)
    whole = ContextDistiller(encoder, 16, 3)
    found = cut(DEMOS, DEMO_MASK)
    torch.testing.assert_close(found[:1], whole(DEMOS[:1, 2:]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[1:], whole(DEMOS[1:, :6]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vectors": 0}, r"vectors must lie in \[1, 63\], below the window: 0"),
        ({"vectors": 64}, r"vectors must lie in \[1, 63\]"),
        ({"vectors": 4, "first_id": 259}, r"first_id must lie in \[0, 259\), got 259"),
    ],
)
def test_the_distiller_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        ContextDistiller(gpt2().transformer, 32, **options)


# Candidates ---------------------------------------------------------------------------------------

CANDIDATES = [[7], [8, 9, 10], [200, 11]]


def test_scores_are_mean_log_probabilities_with_and_without_a_cache(lm):
    vectors = torch.randn(2, 6, 32)
    for row in range(2):
        query = QUERY[row][QUERY_MASK[row]]
        want = []
        for candidate in CANDIDATES:
            ids = torch.cat([query, torch.tensor(candidate)])
            logits = behind(lm, vectors[row], ids)[len(query) - 1 : -1]
            log_q = logits.log_softmax(-1)[torch.arange(len(candidate)), candidate]
            want.append(log_q.mean())
        want = torch.stack(want).float()
        cache = prefix_cache(lm, vectors[row : row + 1])
        for prefix in (vectors[row : row + 1], cache, cache):
            found = score_candidates(lm, prefix, query[None], CANDIDATES)
            torch.testing.assert_close(found[0], want, rtol=1e-5, atol=1e-5)
        assert cache.get_seq_length() == 6
        both = score_candidates(lm, vectors, QUERY, CANDIDATES, query_mask=QUERY_MASK)
        torch.testing.assert_close(both[row], want, rtol=1e-5, atol=1e-5)
    one = score_candidates(lm, vectors[:1], QUERY, CANDIDATES)
    each = [score_candidates(lm, vectors[:1], query[None], CANDIDATES) for query in QUERY]
    torch.testing.assert_close(one, torch.cat(each), rtol=1e-5, atol=1e-5)


def test_without_a_prefix_the_query_stands_alone(llama):
    lm = llama()
    found = score_candidates(lm, None, QUERY, [[3], [4]])
    want = lm(QUERY).logits[:, -1].log_softmax(-1)[:, 3:5]
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)


def test_a_candidate_that_is_certain_comes_first(llama):
    """A head that says 42 whatever it sees."""
    lm = llama()
    lm.lm_head = torch.nn.Linear(32, 259)
    with torch.no_grad():
        lm.lm_head.weight.zero_()
        lm.lm_head.bias.zero_()[42] = 80
    found = score_candidates(lm, torch.randn(1, 3, 32), QUERY, [[5], [42, 42], [42, 5], [6]])
    assert found.argmax(1).tolist() == [1, 1]
    assert found[:, 1].abs().max() < 1e-6
    assert found[:, 2].tolist() == pytest.approx([-40, -40])


def test_scoring_refuses(llama):
    lm, vectors = llama(), torch.zeros(2, 3, 32)
    for candidates in ([], [[3], []]):
        with pytest.raises(ValueError, match="at least one candidate, and a token in each"):
            score_candidates(lm, vectors, QUERY, candidates)
    with pytest.raises(ValueError, match="a query is empty"):
        score_candidates(lm, vectors, QUERY, [[3]], query_mask=QUERY < 0)
    with pytest.raises(ValueError, match="prefix has 2 rows for 1 queries: expected as many, or 1"):
        score_candidates(lm, vectors, QUERY[:1], [[3]])
    with pytest.raises(ValueError, match=r"vectors must be \[batch, vectors, 32\]"):
        prefix_cache(lm, torch.zeros(1, 3, 8))
    with pytest.raises(ValueError, match="l must be at least 1"):
        prefix_cache(lm, torch.zeros(1, 0, 32))


# Batches ------------------------------------------------------------------------------------------


def draws(seed=0):
    return torch.Generator().manual_seed(seed)


def test_a_passage_is_cut_at_four_fifths():
    first, rest = split_for_pretraining(torch.arange(11))
    assert (len(first), len(rest)) == (8, 3)
    first, rest = split_for_pretraining(torch.arange(20).view(2, 10), 0.7)
    assert torch.equal(torch.cat([first, rest], 1), torch.arange(20).view(2, 10))
    assert first.shape == (2, 7)
    with pytest.raises(ValueError, match="the first part is empty: 1 tokens cut at 0.8"):
        split_for_pretraining(torch.arange(1))
    with pytest.raises(ValueError, match="the query is empty: 2 tokens cut at 0.9999999999"):
        split_for_pretraining(torch.arange(2), 1 - 1e-10)
    for fraction in (0.0, 1.0, float("nan")):
        with pytest.raises(ValueError, match=r"fraction must lie in \(0, 1\)"):
            split_for_pretraining(torch.arange(9), fraction)


def test_demonstrations_are_others_of_the_querys_task():
    """Inputs are numbers of their own; an output says the task and how long the input is."""
    tasks = [
        [([base + i] * (1 + i % 3), [base, 1 + i % 3]) for i in range(1, 9)] for base in (100, 200)
    ]
    seen = set()
    batch = build_icl_batch(tasks, 5, size=60, generator=draws(), padding=9)
    for row in range(60):
        demo = batch["demo_ids"][row][batch["demo_mask"][row]].tolist()
        query = batch["query_ids"][row][batch["query_mask"][row]].tolist()
        assert batch["answer_mask"][row].nonzero().flatten().tolist() == [
            len(query) - 2,
            len(query) - 1,
        ]
        base = query[-2]
        seen.add(base)
        numbers = []
        while demo:
            number, count = demo[0], 1 + (demo[0] - base) % 3
            assert demo[: count + 2] == [number] * count + [base, count]
            numbers.append(number)
            demo = demo[count + 2 :]
        assert len(set(numbers)) == 5
        assert query[0] not in numbers
        assert query[:-2] == [query[0]] * query[-1]
    assert seen == {100, 200}
    assert (batch["demo_ids"][~batch["demo_mask"]] == 9).all()
    same = build_icl_batch(tasks, 5, size=60, generator=draws(), padding=9)
    assert all(torch.equal(same[name], batch[name]) for name in batch)
    alone = build_icl_batch(tasks, 0, size=2, generator=draws())
    assert alone["demo_ids"].shape == (2, 0)


@pytest.mark.parametrize(
    ("length", "kept"),
    [(99, 12), (12, 12), (11, 11), (10, 10), (9, 8), (8, 8), (7, 7), (5, 4), (3, 3), (1, 0)],
)
def test_a_demonstration_cut_in_two_keeps_its_output(length, kept):
    """Three examples of three tokens and one of output: of 9 tokens the two last ones, for of the
    first only its output would be left."""
    task = [([i, i + 1, i + 2], [i + 3]) for i in (10, 20, 30, 40)]
    whole = build_icl_batch([task], 3, generator=draws())["demo_ids"][0].tolist()
    batch = build_icl_batch([task], 3, generator=draws(), demo_length=length)
    found = batch["demo_ids"][0].tolist()
    assert len(found) == kept
    assert found == whole[len(whole) - kept :]
    assert batch["query_ids"].shape == (1, 4)


def test_long_inputs_lose_their_end():
    task = [(list(range(i, i + 6)), [i + 90, i + 91]) for i in (10, 20)]
    batch = build_icl_batch([task], 1, generator=draws(), example_length=5)
    for ids in (batch["demo_ids"][0].tolist(), batch["query_ids"][0].tolist()):
        i = ids[0]
        assert ids == [i, i + 1, i + 2, i + 90, i + 91]
    assert batch["answer_mask"].tolist() == [[False] * 3 + [True] * 2]


@pytest.mark.parametrize(
    ("tasks", "options", "message"),
    [
        ([], {}, "expected a task, k >= 0, size >= 1: got 0, 1 and 1"),
        ([[([1], [2])] * 2], {"k": -1}, "got 1, -1 and 1"),
        ([[([1], [2])] * 2], {"size": 0}, "got 1, 1 and 0"),
        ([[([1], [2])]], {}, "task 0 has 1 examples: k = 1 needs 2"),
        ([[([1], [])] * 2], {}, "an example has no output"),
        ([[([], [2])] * 2], {}, "the input of an example is empty: 1 tokens of output"),
        ([[([1, 2], [3, 4])] * 2], {"example_length": 2}, "at most 2 in all"),
    ],
)
def test_batches_refuse(tasks, options, message):
    with pytest.raises(ValueError, match=message):
        build_icl_batch(tasks, **({"k": 1} | options), generator=draws())
