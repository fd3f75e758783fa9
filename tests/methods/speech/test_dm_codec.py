"""The codec's loss and its training: parts by hand, several teachers, steps of two players, and a
training that goes on where it stopped."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn.functional import l1_loss

from stillhouse.methods.speech import (
    CodecWeights,
    DiscriminatorConfig,
    MultiTeacherCodecDistiller,
    codec_discriminators,
    codec_losses,
    dm_codec_loss,
    feature_axis_distillation,
    log_mel,
)
from stillhouse.methods.speech.seanet import CodecOutput

DOUBLE = torch.float64
JUDGES = DiscriminatorConfig(periods=(2,), scales=0, share=1 / 32, windows=(64,), filters=4)


def features(*shape, seed=0):
    return torch.randn(*shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))


# ---- several teachers


def test_teachers_are_summed_by_their_weights():
    stages = {"text": features(2, 9, 4), "speech": features(2, 9, 4, seed=1)}
    teachers = {"speech": features(2, 9, 4, seed=2), "text": features(2, 5, 4, seed=3)}
    each = {name: feature_axis_distillation(stages[name], teachers[name]) for name in stages}
    found = dm_codec_loss(stages, teachers, {"text": 0.8, "speech": 0.2})
    torch.testing.assert_close(found["loss"], 0.8 * each["text"] + 0.2 * each["speech"])
    assert found.keys() == {"loss", "text", "speech"}
    torch.testing.assert_close(found["text"], each["text"])
    torch.testing.assert_close(dm_codec_loss(stages, teachers)["loss"], sum(each.values()) / 2)
    twice = dm_codec_loss(stages, teachers, {"text": 1.0, "speech": 1.0})
    torch.testing.assert_close(twice["loss"], sum(each.values()))
    by_time = dm_codec_loss(stages, teachers, axis="time")
    want = feature_axis_distillation(stages["text"], teachers["text"], axis="time")
    torch.testing.assert_close(by_time["text"], want)


def test_rows_of_a_teacher_that_do_not_count():
    student, states = features(2, 6, 4), features(2, 8, 4, seed=1)
    mask = torch.tensor([[True, False] * 4, [True] * 5 + [False] * 3])
    found = dm_codec_loss({"text": student}, {"text": (states, mask)})
    want = feature_axis_distillation(student, states, mask=mask[:, :6])
    torch.testing.assert_close(found["loss"], want)
    found = dm_codec_loss({"text": student}, {"text": (states[:, :4], mask[:, :4])})
    want = feature_axis_distillation(student[:, :4], states, mask=mask[:, :4])
    torch.testing.assert_close(found["loss"], want)


@pytest.mark.parametrize(
    ("teachers", "weights", "message"),
    [
        (("a",), None, "stages are for a, b, teachers are a"),
        ((), None, "teachers are none"),
        (("a", "loss"), None, "cannot be called 'loss'"),
        (("a", "b"), {"a": 1.0}, "weights are of a, teachers are a, b"),
        (("a", "b"), {"a": 0.0, "b": 0.0}, "positive sum"),
        (("a", "b"), {"a": -1.0, "b": 2.0}, "must be >= 0"),
        (("a", "b"), {"a": float("nan"), "b": 2.0}, "must be >= 0"),
    ],
)
def test_teachers_that_cannot_be(teachers, weights, message):
    x = torch.ones(1, 2, 3)
    stages = dict.fromkeys(teachers if "loss" in teachers else ("a", "b"), x)
    with pytest.raises(ValueError, match=message) as raised:
        dm_codec_loss(stages, dict.fromkeys(teachers, x), weights)
    assert "\n" not in str(raised.value)


# ---- the parts of a codec's loss


class Judges(nn.Module):
    """Two discriminators that can be followed by hand."""

    def forward(self, wave):
        from stillhouse.methods.speech.discriminators import Judged

        first = [2 * wave, wave.square()]
        second = [wave.abs()]
        return Judged([wave.mean(-1, keepdim=True), 3 * wave[:, :2]], [first, second])


def test_the_parts_by_hand():
    wave, audio = features(2, 900).requires_grad_(), features(2, 900, seed=1)
    audio[:, 300:] *= 1e-4  # where the floor of the spectra is
    commit = torch.tensor([0.5, 1.5], dtype=DOUBLE)
    output = CodecOutput(audio, torch.zeros(2, 3, 2).long(), commit, {})
    found = codec_losses(
        wave, output, discriminators=Judges(), distillation=torch.tensor(0.25, dtype=DOUBLE)
    )
    mel = torch.zeros((), dtype=DOUBLE)
    for n_fft, hop, weight in ((1024, 240, 45), (512, 120, 1), (256, 60, 1), (128, 30, 1)):
        sizes = dict(n_fft=n_fft, hop=hop, n_mels=80, scale="htk", norm="slaney")
        mel = mel + weight * l1_loss(log_mel(audio, 16000, **sizes), log_mel(wave, 16000, **sizes))
    want = {
        "time": (audio - wave).abs().mean(),
        "mel": mel,
        "commit": torch.tensor(1.0, dtype=DOUBLE),
        "adversarial": (1 - audio.mean(-1)).square().mean()
        + (1 - 3 * audio[:, :2]).square().mean(),
        "features": 2 * (audio - wave).abs().mean()
        + (audio.square() - wave.square()).abs().mean()
        + (audio.abs() - wave.abs()).abs().mean(),
        "distill": torch.tensor(0.25, dtype=DOUBLE),
    }
    factors = dict(time=500, mel=1, commit=10, adversarial=1, features=2, distill=120)
    want["loss"] = sum(factors[name] * part for name, part in want.items())
    assert found.keys() == want.keys()
    for name, part in want.items():
        torch.testing.assert_close(found[name], part, msg=name)
    # What is real stays as it is.
    assert torch.autograd.grad(found["features"], wave)[0].abs().max() == 0
    some = codec_losses(wave, output, weights=CodecWeights(time=1, mel=(0, 2.0), commit=0))
    sizes = dict(n_fft=512, hop=120, n_mels=80, norm="slaney")
    mel = 2 * l1_loss(log_mel(audio, 16000, **sizes), log_mel(wave, 16000, **sizes))
    torch.testing.assert_close(some["mel"], mel)
    torch.testing.assert_close(some["loss"], want["time"] + mel)
    assert some.keys() == {"loss", "time", "mel", "commit"}


def test_perfect_audio_loses_nothing_but_to_the_discriminators():
    wave = features(1, 900)
    output = CodecOutput(wave, torch.zeros(1, 3, 2).long(), torch.zeros(2, dtype=DOUBLE), {})
    found = codec_losses(wave, output, discriminators=Judges())
    assert float(found["time"]) == float(found["features"]) == 0
    assert float(found["mel"]) < 1e-12  # a transform may round by where its input lies
    torch.testing.assert_close(found["loss"], found["adversarial"])


def test_gradients_of_the_loss():
    """To the audio, past what is real; spectra of a size that is quickly gone through."""
    wave, audio = features(1, 60), features(1, 60, seed=1).requires_grad_()
    sizes = dict(n_fft=32, hop=8, n_mels=5, weights=CodecWeights(mel=(1.0, 1.0)))

    def loss(x):
        output = CodecOutput(x, torch.zeros(1, 1, 1).long(), x.new_zeros(1), {})
        return codec_losses(wave, output, discriminators=Judges(), **sizes)["loss"]

    assert torch.autograd.gradcheck(loss, audio)


def test_bad_input():
    output = CodecOutput(torch.zeros(1, 900), torch.zeros(1, 3, 2).long(), torch.zeros(2), {})
    with pytest.raises(ValueError, match=r"the wave is \(1, 901\) and the audio \(1, 900\)"):
        codec_losses(torch.zeros(1, 901), output)
    short = output._replace(audio=torch.zeros(1, 300))
    with pytest.raises(ValueError, match="samples are too few"):
        codec_losses(torch.zeros(1, 300), short)
    for bad in (dict(time=-1), dict(mel=(1.0, float("inf")))):
        with pytest.raises(ValueError, match="weights must be numbers >= 0"):
            CodecWeights(**bad)


# ---- steps


def teacher(width=5, seed=0):
    """A frozen net of six samples a frame."""
    matrix = torch.randn(6, width, generator=torch.Generator().manual_seed(seed))
    return lambda wave: torch.tanh(wave.unflatten(1, (-1, 6)) @ matrix)


@pytest.fixture
def trainer(tiny):
    """trainer(**changes): of a tiny codec, a speech teacher for its mean stage and text states,
    which come with the batch, for the first."""

    def make(judges=True, **changes):
        options = dict(
            teachers={"speech": teacher(), "text": None},
            stages={"speech": "1:Q", "text": 1},
            discriminators=codec_discriminators(JUDGES) if judges else None,
            widths=5,
            learning_rate=2e-3,
        )
        return MultiTeacherCodecDistiller(tiny(), **(options | changes))

    return make


def batch(waves, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return waves(2, 600, seed), {"text": torch.randn(2, 12, 5, generator=generator)}


def test_a_step_is_one_of_each_player(trainer, waves):
    """The loss is that of `codec_losses` and `dm_codec_loss` on one call of the codec, against
    discriminators that have just learnt."""
    ours = trainer(weights={"speech": 0.2, "text": 0.8})
    wave, states = batch(waves)
    ours.step(wave, states)  # tables begin
    learning = []
    ours.discriminators.register_forward_pre_hook(
        lambda module, _: learning.append([p.requires_grad for p in module.parameters()])
    )
    codec, judge = copy.deepcopy(ours.codec), copy.deepcopy(ours.discriminators)
    parts = ours.step(wave, states)
    assert parts.keys() == {
        "loss", "time", "mel", "commit", "adversarial", "features", "distill", "speech", "text",
        "discriminator",
    }  # fmt: skip
    assert all(not part.requires_grad and part.dim() == 0 for part in parts.values())
    output = codec(wave, return_stages=("1:Q", 1))
    scores = [judge(x).scores for x in (wave, output.audio)]
    want = sum((1 - r).square().mean() + f.square().mean() for r, f in zip(*scores, strict=True))
    torch.testing.assert_close(parts["discriminator"], want.detach(), rtol=1e-4, atol=1e-5)
    # Its own learning comes first.
    want = sum((1 - f).square().mean() for f in ours.discriminators(output.audio).scores)
    torch.testing.assert_close(parts["adversarial"], want.detach(), rtol=1e-4, atol=1e-5)
    want = 0.2 * parts["speech"] + 0.8 * parts["text"]
    torch.testing.assert_close(parts["distill"], want)
    total = (
        500 * parts["time"] + parts["mel"] + 10 * parts["commit"] + parts["adversarial"]
        + 2 * parts["features"] + 120 * parts["distill"]
    )  # fmt: skip
    torch.testing.assert_close(parts["loss"], total)
    assert [all(learning[0]), any(learning[1])] == [True, False]
    assert all(each.requires_grad for each in ours.discriminators.parameters())


def test_every_weight_moves_and_no_teacher(trainer, waves):
    net = nn.Linear(6, 5)
    ours = trainer(teachers={"speech": lambda w: net(w.unflatten(1, (-1, 6))), "text": None})
    before = copy.deepcopy(ours.state_dict())
    frozen = net.weight.clone()
    ours.step(*batch(waves))
    after = ours.state_dict()
    for part in ("codec", "projections", "discriminators"):
        for name, value in before[part].items():
            if value is not None and "extra" not in name:
                assert not torch.equal(value, after[part][name]), name
    assert torch.equal(net.weight, frozen)
    assert net.weight.grad is None


def test_one_map_serves_teachers_of_one_width(trainer):
    ours = trainer()
    assert [tuple(each.weight.shape) for each in ours.projections.values()] == [(5, 6)]
    two = trainer(widths={"speech": 5, "text": 6})
    assert isinstance(two.projections["6"], nn.Identity)
    assert len(two.projections) == 2


def test_steps_learn(trainer, waves):
    """Two waves by heart: each part falls, and with the teachers their cosines come nearer than
    without."""
    wave, states = batch(waves)
    with_teachers, without = trainer(), trainer(loss_weights=CodecWeights(distill=0))
    history = [[each.step(wave, states) for _ in range(60)] for each in (with_teachers, without)]
    for rows in history:
        assert all(part.isfinite() for row in rows for part in row.values())
        first, last = (
            {name: sum(float(r[name]) for r in part) / 5 for name in rows[0]}
            for part in (rows[:5], rows[-5:])
        )
        print(first, last)
        assert last["time"] < 0.9 * first["time"]
        assert last["mel"] < 0.8 * first["mel"]
        assert last["discriminator"] < first["discriminator"]
    distill = [float(rows[-1]["distill"]) for rows in history]
    assert distill[0] < distill[1] - 0.05


def test_without_teachers_and_discriminators(tiny, waves):
    plain = MultiTeacherCodecDistiller(tiny(), {}, {}, learning_rate=2e-3)
    rows = [plain.step(waves(2, 600)) for _ in range(15)]
    assert rows[0].keys() == {"loss", "time", "mel", "commit"}
    assert float(rows[-1]["loss"]) < 0.95 * float(rows[0]["loss"])
    assert plain.state_dict()["discriminators"] is None


def test_it_goes_on_where_it_stopped(trainer, waves, tmp_path):
    """Through a file that `torch.load` takes without running code: the same losses to the bit."""
    ours = trainer(total_steps=6)
    for step in range(3):
        ours.step(*batch(waves, step))
    torch.save(ours.state_dict(), tmp_path / "state.pt")
    want = [ours.step(*batch(waves, step)) for step in range(3, 6)]
    other = trainer(total_steps=6)
    other.codec.load_state_dict(trainer(seed=3).codec.state_dict())
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert other.steps == 3
    for step, row in enumerate(want, 3):
        found = other.step(*batch(waves, step))
        assert {k: float(v) for k, v in found.items()} == {k: float(v) for k, v in row.items()}
    with pytest.raises(ValueError, match="all 6 steps are done"):
        other.step(*batch(waves))
    with pytest.raises(ValueError, match="differ in having discriminators"):
        trainer(judges=False).load_state_dict(other.state_dict())


def test_the_rate_follows_a_cosine(trainer, waves):
    ours, rates = trainer(total_steps=4), []
    for _ in range(4):
        ours.step(*batch(waves))
        rates.append([group["lr"] for each in ours.optimizers for group in each.param_groups])
    want = [1e-3 * (1 + math.cos(math.pi * n / 4)) for n in range(4)]
    assert [rate for rate, _ in rates] == pytest.approx(want)
    assert [rate for _, rate in rates] == pytest.approx(want)
    steady = trainer()
    steady.step(*batch(waves))
    assert steady.optimizers[0].param_groups[0]["lr"] == 2e-3
    assert steady.optimizers[0].defaults["betas"] == (0.9, 0.99)


def test_the_global_generator_stays(trainer, waves):
    given = batch(waves)
    before = torch.get_rng_state()
    ours = trainer()
    ours.step(*given)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(stages={"speech": 1}), "stages are of speech, teachers are speech, text"),
        (dict(stages={"speech": 1, "text": 5}), "stages are 1 to 4, got 5"),
        (dict(widths={"text": 5}), "widths are of text"),
        (dict(widths=0), "widths must be at least 1"),
        (dict(weights={"text": 0.0, "speech": 0.0}), "positive sum"),
        (dict(weights={"text": 1.0}), "weights are of text"),
        (dict(teachers={"mel": None}, stages={"mel": 1}), "a teacher cannot be called 'mel'"),
        (dict(total_steps=0), "total_steps must be at least 1"),
    ],
)
def test_trainers_that_cannot_be(trainer, changes, message):
    with pytest.raises(ValueError, match=message):
        trainer(**changes)


@pytest.mark.filterwarnings("ignore:.* teacher columns are 0")
def test_batches_that_cannot_be(trainer, waves):
    ours = trainer()
    wave, states = batch(waves)
    with pytest.raises(ValueError, match="states of no teacher, it needs those of text"):
        ours.step(wave)
    with pytest.raises(ValueError, match="states of speech, text, it needs those of text"):
        ours.step(wave, states | {"speech": states["text"]})
    with pytest.raises(ValueError, match=r"teacher must be \[B, T, D\]"):
        ours.step(wave, {"text": states["text"][:, None]})
    with pytest.raises(ValueError, match="differ in sequences or features"):
        ours.step(wave, {"text": states["text"][..., :4]})
    with pytest.raises(ValueError, match="the loss of step 1 is nan"):
        ours.step(wave * float("nan"), states)
    assert ours.steps == 0
    ours.step(wave, states)
    assert ours.steps == 1
