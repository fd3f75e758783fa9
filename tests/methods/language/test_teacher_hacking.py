"""Teacher hacking: distances of chains in closed form, the detector, the study."""

import functools
import itertools
import math

import pytest
import torch

from stillhouse.methods.language import HackingStudy, Trace, detect, sequence_kl, teacher_hacking
from stillhouse.recipes.language import teacher_hacking as recipe
from stillhouse.report import Report
from stillhouse.train import Responses, ResponseSource, rollout

# Transitions of two chains of three states; the reference's are multiples of a quarter.
MODEL = torch.tensor([[0.2, 0.3, 0.5], [0.6, 0.2, 0.2], [0.1, 0.1, 0.8]], dtype=torch.float64)
REFERENCE = torch.tensor(
    [[0.25, 0.5, 0.25], [0.5, 0.25, 0.25], [0.25, 0.25, 0.5]], dtype=torch.float64
)
LENGTH = 3


def chain(transitions):
    """A callable whose next token depends on the last one alone."""
    return lambda ids: transitions.log()[ids]


class Chain(torch.nn.Module):
    """The same with parameters."""

    def __init__(self, seed, size=6):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.logits = torch.nn.Parameter(torch.randn(size, size, generator=generator))

    def forward(self, ids):
        return self.logits[ids]


def analytic(start):
    """E sum_t KL of the rows that a chain from `start` visits."""
    row_kl = (REFERENCE * (REFERENCE / MODEL).log()).sum(1)
    visited = torch.eye(3, dtype=torch.float64)[start]
    total = 0.0
    for _ in range(LENGTH):
        total += float(visited @ row_kl)
        visited = visited @ REFERENCE
    return total


def test_distance_of_chains_by_enumeration():
    """Each sequence as often as its probability says: 64 times p."""
    rows = []
    for sequence in itertools.product(range(3), repeat=LENGTH):
        p, last = 1.0, 0
        for token in sequence:
            p, last = p * REFERENCE[last, token].item(), token
        rows += [list(sequence)] * round(64 * p)
    assert len(rows) == 64
    responses = Responses.of([[0]] * 64, rows)
    each, token, _ = sequence_kl(chain(MODEL), chain(REFERENCE), (), responses=responses)
    assert each == pytest.approx(analytic(0), rel=1e-12)
    assert token == pytest.approx(analytic(0) / LENGTH, rel=1e-12)


def test_distance_of_chains_by_sampling():
    prompts = [[0], [1], [2]] * 1000
    each, _, error = sequence_kl(
        chain(MODEL), chain(REFERENCE), prompts, max_new_tokens=LENGTH, seed=1
    )
    want = sum(map(analytic, range(3))) / 3
    assert abs(each - want) < 3 * error
    # Half of the standard error of log-ratios of the same samples: the rows' KL is exact.
    drawn = rollout(chain(REFERENCE), prompts, max_new_tokens=LENGTH, seed=1)
    ratio = (REFERENCE / MODEL).log()
    logs = [
        sum(ratio[a, b].item() for a, b in itertools.pairwise([*p.tolist(), *r.tolist()]))
        for p, r in zip(drawn.prompts(), drawn.responses(), strict=True)
    ]
    assert error < 0.5 * torch.tensor(logs).std().item() / len(logs) ** 0.5


def test_a_model_is_at_no_distance_from_itself(llama):
    model = llama()
    assert sequence_kl(model, model, [[3, 4], [5]], max_new_tokens=6) == (0, 0, 0)


def test_a_token_counts_as_much_in_a_long_response():
    responses = Responses.of([[0], [1]], [[1], [2, 0, 1]])
    row_kl = (REFERENCE * (REFERENCE / MODEL).log()).sum(1)
    sums = row_kl[0], row_kl[1] + row_kl[2] + row_kl[0]
    each, token, error = sequence_kl(chain(MODEL), chain(REFERENCE), (), responses=responses)
    assert each == pytest.approx(float(sum(sums)) / 2)
    assert token == pytest.approx(float(sum(sums)) / 4)
    assert error == pytest.approx(abs(float(sums[0] - sums[1])) / 2)


# The detector -------------------------------------------------------------------------------------

STEPS = [round(10 * 1.2**i) for i in range(30)]


def law(noise=0.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    factor = torch.exp(noise * torch.randn(30, generator=generator, dtype=torch.float64))
    return [2 * s**-0.5 * f for s, f in zip(STEPS, factor.tolist(), strict=True)]


def trace(proxy, golden=None, error=0.0):
    return Trace(STEPS, proxy, golden or proxy, [0.0] * 30, error)


@pytest.mark.parametrize("noise", [0.0, 0.01, 0.03])
def test_a_law_is_not_left(noise):
    found = [detect(trace(law(noise, seed))) for seed in range(100)]
    kept = [each for each in found if each["departure_step"] is None]
    # Three standard errors with seven degrees of freedom: one false alarm in a hundred.
    assert len(kept) >= (97 if noise else 100)
    assert {each["advice"] for each in kept} == {"the proxy follows its power law: go on"}
    assert all(abs(each["law"].b - 0.5) < 0.1 for each in kept)


@pytest.mark.parametrize("noise", [0.0, 0.01])
@pytest.mark.parametrize("at", [14, 20])
def test_a_plateau_and_a_rise_are_departures(noise, at):
    for power in (0.0, 0.4):
        proxy = [
            y * max(1, s / STEPS[at]) ** (0.5 + power)
            for s, y in zip(STEPS, law(noise), strict=True)
        ]
        found = detect(trace(proxy))
        assert STEPS[at - 1] <= found["departure_step"] <= STEPS[at + 5]
        assert f"stop at step {found['departure_step']}," in found["advice"]


def test_a_slower_slope_is_one_too():
    """Of a third of the law's, far below the law itself; a slope of two thirds is none."""
    for power, departure in ((0.34, STEPS[16]), (0.16, None)):
        slower = law()
        for i in range(15, 30):
            slower[i] *= math.exp(-3) * (STEPS[i] / STEPS[15]) ** power
        assert detect(trace(slower))["departure_step"] == departure


def test_a_drift_upwards_is_one_too():
    """With two thirds of the law's slope, which is not slow, but away from the law."""
    drifting = law()
    for i in range(15, 30):
        drifting[i] *= (STEPS[i] / STEPS[15]) ** 0.16
    assert detect(trace(drifting))["departure_step"] == STEPS[16]


def test_steps_of_warm_up_do_not_count():
    proxy = [1.0] * 8 + law()[8:]
    assert detect(trace(proxy), warmup=STEPS[7])["law"].b == pytest.approx(0.5)
    assert abs(detect(trace(proxy))["law"].b - 0.5) > 0.05


def test_with_the_oracle():
    falling, rising = law(), [0.1 + abs(i - 8) / 100 for i in range(30)]
    found = detect(trace(falling, rising))
    assert found["hacked"]
    assert found["u_shape"]
    assert found["rise"] == pytest.approx(0.21)
    assert not detect(trace(falling, rising, error=0.08))["hacked"]
    assert not detect(trace(falling, falling))["hacked"]
    # Away from both is no hacking; nor is a rise at the very end a U.
    both = detect(trace(rising, rising))
    assert not both["hacked"]
    late = detect(trace(falling, [*([0.2] * 29), 0.4]))
    assert late["hacked"]
    assert late["u_shape"]
    assert not detect(trace(falling, [*falling[:28], 0.0, 1.0]))["u_shape"]


@pytest.mark.parametrize(
    ("proxy", "options", "message"),
    [
        (law(), dict(warmup=STEPS[-5]), "at least 5 points"),
        (law(), dict(warmup=STEPS[-1]), "no evaluation after"),
        ([*law()[:3], 0.0, *law()[4:]], dict(), "of positive numbers"),
    ],
)
def test_what_cannot_be_fitted(proxy, options, message):
    with pytest.raises(ValueError, match=message):
        detect(trace(proxy), **options)


# The study ----------------------------------------------------------------------------------------

PROMPTS = [[0, 1], [2], [3, 4], [5]]
VALIDATION = [[1, 1], [4], [2, 2]]


def study(oracle=None, **options):
    models = oracle or Chain(0), Chain(1), Chain(2)
    return HackingStudy(*models, PROMPTS, validation=VALIDATION, max_new_tokens=5, **options)


def test_where_the_oracle_is_the_teacher_both_distances_are_one():
    teacher = Chain(1)
    both = HackingStudy(
        teacher, teacher, Chain(2), PROMPTS, validation=VALIDATION, max_new_tokens=5
    )
    found = both.run("online_teacher", steps=6, batch=4)
    assert found.proxy == found.golden
    assert both.golden_teacher == 0


def test_distances_are_of_the_same_responses_throughout():
    subject = study()
    options = dict(max_new_tokens=5, seed=0)
    found = subject.run("offline_teacher", steps=1, batch=4, optimizer=lambda p: torch.optim.SGD(p))
    again = subject.run(
        "online_student", steps=9, batch=4, optimizer=lambda p: torch.optim.SGD(p, lr=0.0)
    )
    for values, model in ((found.golden, subject.oracle), (found.proxy, subject.teacher)):
        drawn = rollout(model, VALIDATION, **options)
        want = sequence_kl(subject.student, model, (), responses=drawn)[1]
        assert values[0] == pytest.approx(want)
    assert set(again.golden) == {found.golden[0]}
    assert set(again.proxy) == {found.proxy[0]}


def test_a_run_leaves_the_student_and_measures_at_even_logarithms():
    subject = study()
    before = subject.student.logits.detach().clone()
    found = subject.run("online_teacher", steps=100, batch=2, evaluations=5)
    assert torch.equal(subject.student.logits, before)
    assert found.steps == [0, 1, 3, 10, 32, 100]
    assert math.isnan(found.loss[0])
    assert found.proxy[-1] < found.proxy[0]


def test_the_error_of_the_rise_is_that_of_pairs():
    """Of the differences between two students on the same responses."""
    options = dict(validation=VALIDATION, max_new_tokens=5)
    student = Chain(0)
    with torch.no_grad():
        student.logits += 0.2 * Chain(3).logits
    subject = HackingStudy(Chain(0), Chain(1), student, PROMPTS, **options)
    found = subject.run(
        "offline_teacher", steps=1, batch=4, optimizer=lambda p: torch.optim.SGD(p, lr=9.0)
    )
    assert found.golden[1] > found.golden[0] > 0
    trained = []

    def keeping(parameters):
        trained.extend(parameters)
        return torch.optim.SGD(trained, lr=9.0)

    subject.run("offline_teacher", steps=1, batch=4, optimizer=keeping)
    drawn = rollout(subject.oracle, VALIDATION, max_new_tokens=5, seed=0)
    students = [subject.student.logits.detach(), trained[0].detach()]
    oracle = subject.oracle.logits.detach().log_softmax(-1)
    sums = []
    for logits in students:
        row_kl = (oracle.exp() * (oracle - logits.log_softmax(-1))).sum(-1)
        visited = [drawn.ids[i, n - 1 : n + 4] for i, n in enumerate(drawn.prompt_length.tolist())]
        sums.append(torch.stack([row_kl[ids].sum() for ids in visited]))
    difference = sums[1] - sums[0]
    assert found.rise == pytest.approx(difference.sum().item() / 15, rel=1e-4)
    want = difference.std().item() / 3**0.5 / 5
    assert found.rise_stderr == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize(
    ("name", "generations", "count", "expected"),
    [
        ("offline_teacher", 3, 2, dict(model="teacher", online=False, generations=3, prompts=2)),
        ("online_teacher", 1, None, dict(model="teacher", online=True, generations=1, prompts=4)),
        ("online_student", 1, 1, dict(model="student", online=True, generations=1, prompts=1)),
    ],
)
def test_sources(name, generations, count, expected, monkeypatch):
    seen = []

    class Recording(ResponseSource):
        def __init__(self, prompts, **options):
            seen.append((prompts, options))
            super().__init__(prompts, **options)

    monkeypatch.setattr(teacher_hacking, "ResponseSource", Recording)
    subject = study()
    subject.run(name, generations=generations, count=count, steps=2, batch=3)
    ((prompts, options),) = seen
    model = {"teacher", "student"} & options.keys()
    assert model == {expected["model"]}
    if name == "online_student":
        # The copy in training, not the study's own.
        assert options["student"] is not subject.student
        assert not torch.equal(options["student"].logits, subject.student.logits)
    else:
        assert options["teacher"] is subject.teacher
    found = dict(online=options["online"], generations=options["generations"], prompts=len(prompts))
    assert found == {key: expected[key] for key in found}


def test_a_source_of_ones_own_and_another_divergence():
    subject, options = study(), dict(steps=30, batch=4)
    stored = ResponseSource(PROMPTS, dataset=[[1, 2, 3]] * 4)
    forward = subject.run(stored, **options)
    reverse = subject.run(
        ResponseSource(PROMPTS, dataset=[[1, 2, 3]] * 4), kind="reverse_kl", **options
    )
    assert forward.loss[-1] != reverse.loss[-1]
    assert forward.proxy[-1] < forward.proxy[0]


def test_language_models(llama):
    """Dropout is off while training, and every model is left in the mode that it was in."""
    models = llama(2, seed=1), llama(2, seed=2), llama(1, seed=3, attention_dropout=0.9)
    models[2].train()
    modes = [model.training for model in models]
    options = dict(validation=[[9, 8], [7]], max_new_tokens=6)
    subject = HackingStudy(*models, [[1, 2, 3], [4]], **options)
    adam = lambda parameters: torch.optim.Adam(parameters, lr=1e-2)  # noqa: E731
    runs = [subject.run("offline_teacher", steps=8, batch=4, optimizer=adam) for _ in range(2)]
    assert runs[0].golden == runs[1].golden
    assert runs[0].loss[-1] < runs[0].loss[1]
    assert [model.training for model in models] == modes
    assert all(each.requires_grad for model in models for each in model.parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(prompts=[]), "needs prompts to train on"),
        (dict(validation=[]), "and others for validation"),
        (dict(prompts=[[1], []]), "prompt 1 is empty"),
        (dict(validation=[[7, 7], [2]]), r"the validation prompt \(2,\) is one to train on, too"),
        (dict(max_new_tokens=0), "max_new_tokens must be at least 1"),
        (dict(teacher=Chain(1, size=7)), "7"),
        (dict(student=Chain(1, size=5)), "5"),
    ],
)
def test_studies_that_cannot_be(changes, message):
    options = dict(
        oracle=Chain(0),
        teacher=Chain(1),
        student=Chain(2),
        prompts=PROMPTS,
        validation=VALIDATION,
        max_new_tokens=5,
    )
    with pytest.raises(ValueError, match=message) as raised:
        HackingStudy(**(options | changes))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(source="dataset", steps=1), "no source 'dataset': expected one of offline_teacher"),
        (dict(source="offline_teacher", steps=0), "steps and evaluations >= 1, got 0"),
        (dict(source="offline_teacher", steps=1, evaluations=0), "got 1, 0"),
        (dict(source="offline_teacher", steps=1, generations=0), "generations=0"),
    ],
)
def test_runs_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        study().run(**options)


def test_distances_that_cannot_be():
    with pytest.raises(ValueError, match="it needs max_new_tokens="):
        sequence_kl(chain(MODEL), chain(REFERENCE), [[0]])
    empty = Responses.of([[0]], [[]])
    with pytest.raises(ValueError, match="no token to measure"):
        sequence_kl(chain(MODEL), chain(REFERENCE), (), responses=empty)
    with pytest.raises(ValueError, match="there is no prompt"):
        sequence_kl(chain(MODEL), chain(REFERENCE), [], max_new_tokens=2)


def test_tuning_prompts_that_come_again():
    with pytest.warns(UserWarning, match="2 tuning prompts are also prompts of the study"):
        study(tuning_prompts=[[9], [0, 1], [4]])


# The recipe ---------------------------------------------------------------------------------------


def test_recipe_in_a_few_steps(tmp_path, monkeypatch):
    for name in ("ORACLE_STEPS", "TEACHER_STEPS", "STUDENT_STEPS"):
        monkeypatch.setattr(recipe, name, 12)
    monkeypatch.setattr(recipe, "STEPS", 40)
    monkeypatch.setattr(recipe, "TUNING", 200)
    monkeypatch.setattr(recipe, "VALIDATION", 10)
    monkeypatch.setattr(recipe, "FITTED", (1, 40))
    # So few steps are too few for the window.
    monkeypatch.setattr(recipe, "detect", functools.partial(detect, share=0.5))
    report = Report("teacher-hacking", tmp_path)
    recipe.run(report, range(2), budget=math.inf)
    report.save()
    assert report.seeds == [0, 1]
    assert len(report.claims) == 6
    assert len(report.tables["distances in nats a token"]) == 5 + 3
    assert {path.stem for path in tmp_path.glob("*.png")} == {"plane", "proxy", "golden"}
