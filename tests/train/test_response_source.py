"""Where responses come from: stored, drawn once, drawn anew, in shares, replayed, revised."""

import pytest
import torch

from stillhouse.train import Replay, Responses, ResponseSource

PROMPTS = [[1, 2], [3], [4, 5, 6], [7], [8], [9, 1]]


class Says:
    """A model whose every token is drawn evenly from a range; it counts its calls."""

    def __init__(self, low, high):
        self.logits, self.calls = torch.full((40,), -torch.inf), 0
        self.logits[low:high] = 0.0

    def __call__(self, ids):
        self.calls += 1
        return self.logits.expand(*ids.shape, 40)


def teacher():
    return Says(10, 20)


def student():
    return Says(20, 30)


def said(responses):
    pairs = zip(responses.prompts(), responses.responses(), strict=True)
    return [(tuple(prompt.tolist()), tuple(response.tolist())) for prompt, response in pairs]


def epochs(source, count, n=3):
    """What is said in each of `count` epochs of the six prompts."""
    return [
        [said(source.batch(n)) for _ in range(len(PROMPTS) * source.generations // n)]
        for _ in range(count)
    ]


def flat(batches):
    return [each for batch in batches for each in batch]


def of(responses):
    """Whose each response is, by its first token."""
    names = "dataset", "teacher", "student", "revised"
    return [names[response[0] // 10] for _, response in said(responses)]


DATASET = [[0, i] for i in range(6)]


def test_stored_responses_follow_their_prompts():
    source = ResponseSource(PROMPTS, dataset=DATASET)
    first, second = epochs(source, 2)
    expected = sorted((tuple(p), tuple(r)) for p, r in zip(PROMPTS, DATASET, strict=True))
    assert sorted(flat(first)) == sorted(flat(second)) == expected
    assert first != second
    assert source.epoch == 2
    still = ResponseSource(PROMPTS, dataset=DATASET, shuffle=False)
    assert flat(epochs(still, 1)[0]) == [
        (tuple(p), tuple(r)) for p, r in zip(PROMPTS, DATASET, strict=True)
    ]


def test_a_batch_may_cross_an_epoch():
    source = ResponseSource(PROMPTS, dataset=DATASET, shuffle=False)
    assert [row[1] for _, row in said(source.batch(8))] == [0, 1, 2, 3, 4, 5, 0, 1]


def test_offline_is_the_same_each_epoch_and_online_never():
    options = dict(max_new_tokens=6, shuffle=False)
    offline = epochs(ResponseSource(PROMPTS, teacher=teacher(), online=False, **options), 3)
    assert offline[0] == offline[1] == offline[2]
    online = epochs(ResponseSource(PROMPTS, teacher=teacher(), **options), 3)
    drawn = [response for epoch in online for batch in epoch for _, response in batch]
    assert len(set(drawn)) == len(drawn) == 18


def test_offline_draws_once():
    model = teacher()
    source = ResponseSource(PROMPTS, teacher=model, online=False, max_new_tokens=6)
    epochs(source, 3)
    assert model.calls == 6


def test_generations_are_different_responses_to_each_prompt():
    source = ResponseSource(
        PROMPTS, teacher=teacher(), online=False, generations=3, max_new_tokens=6
    )
    first, second = (flat(epoch) for epoch in epochs(source, 2))
    assert sorted(first) == sorted(second)
    assert len(set(first)) == 18
    assert all(sum(prompt == tuple(p) for prompt, _ in first) == 3 for p in PROMPTS)


@pytest.mark.parametrize("online", [True, False])
def test_a_response_is_to_its_prompt(online):
    def echo(ids):
        return 50 * torch.nn.functional.one_hot(ids, 40).float()

    options = dict(online=online, generations=1 if online else 2, max_new_tokens=1)
    source = ResponseSource(PROMPTS, teacher=echo, **options)
    assert all(response == prompt[-1:] for prompt, response in said(source.batch(12)))


def test_online_follows_the_student():
    model = student()
    source = ResponseSource(PROMPTS, student=model, max_new_tokens=2)
    assert set(of(source.batch(6))) == {"student"}
    model.logits = teacher().logits
    assert set(of(source.batch(6))) == {"teacher"}


@pytest.mark.parametrize("per", ["batch", "row"])
@pytest.mark.parametrize(
    ("sources", "names"),
    [
        (dict(student=student(), dataset=DATASET), ("student", "dataset")),
        (dict(student=student(), teacher=teacher()), ("student", "teacher")),
        (dict(teacher=teacher(), dataset=DATASET), ("teacher", "dataset")),
    ],
)
def test_shares(per, sources, names):
    source = ResponseSource(PROMPTS, share=0.3, per=per, max_new_tokens=1, **sources)
    batches = [of(source.batch(4)) for _ in range(400)]
    whole = [len(set(batch)) == 1 for batch in batches]
    assert all(whole) if per == "batch" else not all(whole)
    rows = flat(batches)
    assert set(rows) == set(names)
    # Independent draws: 400 of batches, 1600 of rows.
    error = (0.3 * 0.7 / (400 if per == "batch" else 1600)) ** 0.5
    assert abs(rows.count(names[0]) / len(rows) - 0.3) < 4 * error
    source.share = 0.0
    assert set(of(source.batch(20))) == {names[1]}


def test_rows_keep_the_order_of_their_prompts():
    source = ResponseSource(
        PROMPTS, student=student(), dataset=DATASET, share=0.5, per="row", max_new_tokens=1
    )
    source.shuffle = False
    batch = source.batch(6)
    assert [prompt for prompt, _ in said(batch)] == [tuple(p) for p in PROMPTS]
    assert set(of(batch)) == {"student", "dataset"}


def test_replay_gives_back_what_was_drawn():
    replay, model = Replay(capacity=5, share=0.0), student()
    source = ResponseSource(PROMPTS, student=model, replay=replay, max_new_tokens=4)
    drawn = flat(said(source.batch(3)) for _ in range(3))
    held = [(tuple(p.tolist()), tuple(r.tolist())) for p, r in replay.held]
    assert held == drawn[-5:]
    calls, replay.share = model.calls, 1.0
    again = flat(said(source.batch(3)) for _ in range(20))
    assert model.calls == calls
    assert set(again) == set(held)
    replay.share = 0.5
    for _ in range(200):
        source.batch(2)
    assert 70 < (model.calls - calls) / 4 < 130  # four tokens a batch


def test_revised_responses_are_used_and_kept():
    seeds, replay = [], Replay(share=0.0)

    def revise(responses, seed):
        seeds.append(seed)
        return Responses.of(responses.prompts(), [[30 + len(seeds)]] * len(responses))

    source = ResponseSource(
        PROMPTS, student=student(), revise=revise, replay=replay, max_new_tokens=4
    )
    assert set(of(source.batch(3))) | set(of(source.batch(3))) == {"revised"}
    assert [response.tolist() for _, response in replay.held] == [[31]] * 3 + [[32]] * 3
    assert len(set(seeds)) == 2


def test_a_seed_decides_everything():
    def batches(seed):
        source = ResponseSource(
            PROMPTS, student=student(), dataset=DATASET, share=0.5, seed=seed, max_new_tokens=3
        )
        return epochs(source, 2)

    state = torch.get_rng_state()
    assert batches(3) == batches(3)
    assert batches(3) != batches(4)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("online", [True, False])
def test_a_run_goes_on_where_it_was(online, tmp_path):
    def make():
        return ResponseSource(
            PROMPTS,
            student=student(),
            dataset=DATASET,
            share=0.7,
            per="row",
            online=online,
            replay=Replay() if online else None,
            max_new_tokens=3,
        )

    source, other = make(), make()
    source.share = 0.4
    for _ in range(5):
        source.batch(4)
    if not online:
        # What was drawn stays, whatever the student has become.
        other._sources["student"] = teacher()
    torch.save(source.state_dict(), tmp_path / "source.pt")
    expected = [said(source.batch(4)) for _ in range(5)]
    other.load_state_dict(torch.load(tmp_path / "source.pt"))
    assert [said(other.batch(4)) for _ in range(5)] == expected


def test_any_language_model_is_a_source(llama):
    source = ResponseSource(PROMPTS, teacher=llama(), max_new_tokens=4, eos_token_id=())
    batch = source.batch(5)
    assert batch.mask.sum(1).tolist() == [4] * 5
    assert [prompt.tolist() for prompt in batch.prompts()] != PROMPTS[:5]


MODEL = dict(student=Says(0, 9), max_new_tokens=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(), "one or two of student, teacher and dataset, got none"),
        (dict(teacher=Says(0, 9), dataset=DATASET) | MODEL, "got student and teacher and dataset"),
        (dict(student=Says(0, 9)), "models need max_new_tokens="),
        (dict(dataset=DATASET[:2]), "6 prompts and 2 stored responses"),
        (dict(share=0.5) | MODEL, "1 where there is one source"),
        (dict(share=1.5, dataset=DATASET) | MODEL, r"share must be in \[0, 1\]"),
        (dict(per="token") | MODEL, "per must be 'batch' or 'row', got 'token'"),
        (dict(generations=2) | MODEL, "generations=2: at least 1, and more only"),
        (dict(generations=0, online=False) | MODEL, "generations=0"),
        (dict(dataset=DATASET, replay=Replay()), "replay and revise are for the responses of"),
        (dict(replay=Replay(), online=False) | MODEL, "replay is for responses that are drawn"),
        (dict(prompts=[]) | MODEL, "at least one prompt"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(ValueError, match=message):
        ResponseSource(**(dict(prompts=PROMPTS) | options))


def test_a_batch_of_nothing_and_an_impossible_replay():
    with pytest.raises(ValueError, match="at least one prompt, got 0"):
        ResponseSource(PROMPTS, dataset=DATASET).batch(0)
    with pytest.raises(ValueError, match="expected capacity >= 1"):
        Replay(capacity=0)
