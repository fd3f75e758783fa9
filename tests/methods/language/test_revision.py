"""The correction of responses, and phrases."""

import functools

import pytest
import torch

from stillhouse.methods.language import phrase_spans, revise
from stillhouse.methods.language.phrases import token_spans
from stillhouse.methods.language.revision import error_positions
from stillhouse.train import Responses, ResponseSource, rollout

PROMPTS = [[5, 9, 3], [7], [200, 13, 40, 41, 42], [5, 9]]
OPTIONS = dict(seed=4, eos_token_id=())


@pytest.fixture(scope="module")
def pair(llama):
    """Student and teacher."""
    return llama(1, seed=1), llama(2, seed=2)


@pytest.fixture(scope="module")
def drawn(pair):
    return rollout(pair[0], PROMPTS, max_new_tokens=10, **OPTIONS)


def texts(responses):
    return [each.tolist() for each in responses.responses()]


def errors_by_hand(student, teacher, responses, score="kl"):
    """(place, teacher's token) of each response, from whole float64 rows, one at a time."""
    result = []
    for prompt, said in zip(responses.prompts(), responses.responses(), strict=True):
        ids = torch.cat([prompt, said])[None]
        q, p = (model(input_ids=ids).logits[0].double().softmax(-1) for model in (student, teacher))
        best, found = -1.0, (-1, None)
        for i, token in enumerate(said.tolist()):
            row = len(prompt) + i - 1
            likeliest = int(p[row].argmax())
            if token == likeliest:
                continue
            value = float((p[row] * (p[row] / q[row]).log()).sum())
            if score == "teacher_nll":
                value = -float(p[row, token].log())
            if value > best:
                best, found = value, (i, likeliest)
        result.append(found)
    return result


@torch.no_grad()
@pytest.mark.parametrize("score", ["kl", "teacher_nll"])
def test_the_error_is_the_worst_token_that_differs(pair, drawn, score):
    places, tokens = error_positions(*pair, drawn, score=score)
    want = errors_by_hand(*pair, drawn, score)
    assert places.tolist() == [place for place, _ in want]
    assert tokens.tolist() == [token for _, token in want]
    assert places.max() > 0


@torch.no_grad()
def test_the_two_scores_are_not_one(pair, drawn):
    ways = [error_positions(*pair, drawn, score=score)[0] for score in ("kl", "teacher_nll")]
    assert not torch.equal(*ways)


@torch.no_grad()
def test_a_token_that_is_the_teacher_s_own_is_no_error(pair):
    """Whatever the KL is there: the first two tokens of each are made the teacher's likeliest."""
    student, teacher = pair
    greedy = rollout(teacher, PROMPTS, max_new_tokens=2, temperature=0, **OPTIONS)
    begun = [torch.cat(both) for both in zip(greedy.prompts(), greedy.responses(), strict=True)]
    rest = rollout(student, begun, max_new_tokens=5, **OPTIONS)
    said = [torch.cat(both) for both in zip(greedy.responses(), rest.responses(), strict=True)]
    responses = Responses.of(PROMPTS, said)
    assert error_positions(*pair, responses)[0].min() >= 2
    assert error_positions(*pair, responses)[0].tolist() == [
        place for place, _ in errors_by_hand(*pair, responses)
    ]


@torch.no_grad()
def test_before_at_and_after_the_error(pair, drawn):
    """The prefix stays, the token is the teacher's, and the student goes on from there."""
    revised = revise(*pair, drawn, temperature=0, **OPTIONS)
    assert [each.tolist() for each in revised.prompts()] == PROMPTS
    for prompt, before, after, (place, token) in zip(
        PROMPTS, texts(drawn), texts(revised), errors_by_hand(*pair, drawn), strict=True
    ):
        assert after[:place] == before[:place]
        assert after[place] == token
        assert len(after) == 10
        ids = [*prompt, *after[: place + 1]]
        while len(ids) < len(prompt) + 10:
            ids.append(int(pair[0](input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        assert after == ids[len(prompt) :]


@torch.no_grad()
def test_rounds_follow_one_another(pair, drawn):
    once = revise(*pair, drawn, rounds=1, temperature=0, **OPTIONS)
    twice = revise(*pair, once, rounds=1, temperature=0, **OPTIONS)
    assert texts(revise(*pair, drawn, rounds=2, temperature=0, **OPTIONS)) == texts(twice)
    assert texts(revise(*pair, drawn, rounds=0, **OPTIONS)) == texts(drawn)
    assert texts(twice) != texts(once)


def test_a_student_that_is_its_teacher_has_nothing_to_revise(pair):
    student, _ = pair
    greedy = rollout(student, PROMPTS, max_new_tokens=8, temperature=0, **OPTIONS)
    assert error_positions(student, student, greedy)[0].tolist() == [-1] * 4
    assert texts(revise(student, student, greedy, rounds=3, **OPTIONS)) == texts(greedy)


def test_what_is_new_is_decided_by_the_seed(pair, drawn):
    state = torch.get_rng_state()
    first = texts(revise(*pair, drawn, **OPTIONS))
    assert torch.equal(torch.get_rng_state(), state)
    assert first == texts(revise(*pair, drawn, **OPTIONS))
    assert first != texts(revise(*pair, drawn, seed=5, eos_token_id=()))
    assert first != texts(revise(*pair, drawn, temperature=0, **OPTIONS))
    # Rows have random numbers of their own, and whatever is beside them keep them.
    same = Responses.of([PROMPTS[0]] * 2, [drawn.responses()[0]] * 2)
    twins = texts(revise(*pair, same, **OPTIONS))
    assert twins[0] != twins[1]
    assert twins[0] == texts(revise(*pair, same.part(slice(0, 1)), **OPTIONS))[0] == first[0]


def steps(*step):
    """A model that says the next number but one, say, of ten; `step` by the last token."""

    def model(ids):
        table = torch.tensor(step * 10)[:10]
        return 20.0 * torch.nn.functional.one_hot((ids + table[ids]) % 10, 10).float()

    return model


def test_a_response_that_ends():
    student, teacher = steps(2), steps(1)
    # 0 -> 2 4 6 8 of the student; the teacher would say 1 at once, and that ends it.
    said = Responses.of([[0]], [[2, 4, 6, 8]])
    options = dict(seed=0, temperature=0)
    assert texts(revise(student, teacher, said, eos_token_id=1, **options)) == [[1]]
    # The student's own end: 1, 3, 5.
    assert texts(revise(student, teacher, said, eos_token_id=5, **options)) == [[1, 3, 5]]
    assert texts(revise(student, teacher, said, **options)) == [[1, 3, 5, 7]]
    longer = revise(student, teacher, said, max_new_tokens=6, **options)
    assert texts(longer) == [[1, 3, 5, 7, 9, 1]]
    # An error at the last place: nothing follows.
    last = Responses.of([[0]], [[1, 2, 3, 5]])
    assert texts(revise(student, teacher, last, **options)) == [[1, 2, 3, 4]]
    # Others are longer: what is left of the room is each row's own.
    both = Responses.of([[0], [0]], [[1, 2, 3, 5], [2]])
    assert texts(revise(student, teacher, both, **options)) == [[1, 2, 3, 4], [1, 3, 5, 7]]


def test_models_are_left_as_they_were(llama, drawn):
    student, teacher = llama(1, seed=1, attention_dropout=0.9), llama(2, seed=2)
    student.train()
    expected = revise(llama(1, seed=1), teacher, drawn, **OPTIONS)
    assert texts(revise(student, teacher, drawn, **OPTIONS)) == texts(expected)
    assert student.training
    assert not teacher.training
    assert all(each.requires_grad for each in student.parameters())


def test_a_source_revises(pair):
    student, teacher = pair
    source = ResponseSource(
        PROMPTS,
        student=student,
        revise=functools.partial(revise, student, teacher, eos_token_id=()),
        max_new_tokens=6,
        eos_token_id=(),
    )
    raw = ResponseSource(PROMPTS, student=student, max_new_tokens=6, eos_token_id=())
    revised, before = texts(source.batch(4)), texts(raw.batch(4))
    assert all(a != b for a, b in zip(revised, before, strict=True))


def test_chunks_of_rows_are_one(pair, drawn, monkeypatch):
    whole = error_positions(*pair, drawn)
    monkeypatch.setattr("stillhouse.methods.language.revision.ROWS", 3)
    for a, b in zip(whole, error_positions(*pair, drawn), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(rounds=-1), "rounds must be at least 0, got -1"),
        (dict(score="nll"), "score must be 'kl' or 'teacher_nll', got 'nll'"),
        (dict(responses=Responses.of([[1], [2]], [[3], []])), "without a token has nothing to rev"),
        (dict(teacher=lambda ids: torch.zeros(*ids.shape, 11)), "11"),
    ],
)
def test_bad_input(changes, message):
    options = dict(student=steps(1), teacher=steps(2), responses=Responses.of([[1]], [[2]]), seed=0)
    with pytest.raises(ValueError, match=message):
        revise(**(options | changes))


# Phrases ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "phrases"),
    [
        ("a cat sat on the warm mat", ["cat sat", "warm mat"]),
        ("Wash-backs, stills; casks", ["Wash-backs", "stills", "casks"]),
        ("two\nlines here", ["two", "lines here"]),
        ("snake_case names: x1 + y_2", ["snake_case names", "x1", "y_2"]),
        ("don't stop  now", ["don't stop  now"]),
        ("of the and, ...", []),
        ("", []),
        ("der alte Ofen", ["der alte Ofen"]),
    ],
)
def test_phrases(text, phrases):
    spans = phrase_spans(text)
    assert [text[start:end] for start, end in spans] == phrases


def test_tokens_of_phrases():
    """A token belongs to where its first character that is not blank is."""
    pieces = ["The", " old", " ki", "ln", " of", " mal", "t,", " tw", "ice"]
    assert token_spans(pieces) == [(1, 4), (5, 7), (7, 9)]
    # A token that holds the end of one phrase and the beginning of another is the first one's.
    assert token_spans(["old kiln. New", " still"]) == [(0, 1), (1, 2)]
    assert token_spans(["a", "b", "", "c"], lambda text: [(0, 3)]) == [(0, 4)]
    assert token_spans(["old", " kiln", ".", "new"]) == [(0, 2), (3, 4)]
    assert token_spans([]) == []
