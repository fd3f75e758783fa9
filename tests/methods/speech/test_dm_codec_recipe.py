"""The parts of DM-Codec's recipe, on made-up frames and sentences."""

import types

import pytest
import torch

from stillhouse.data import DataUnavailable
from stillhouse.recipes.speech import dm_codec, prompt_frames, word_lm
from stillhouse.report import Report

TEXTS = [
    ["press", "one"],
    ["press", "two", "or", "three"],
    ["hold"],
    ["press", "one", "or", "hold"],
]


def test_a_word_model_learns_what_follows(monkeypatch):
    state = torch.get_rng_state()
    model, loss = word_lm.train_word_lm(TEXTS)
    # Two choices at the start of three of four, one or two later on: about a bit a word is left.
    assert loss < 0.7
    following = model.head(model.states(torch.tensor([[0, model.index["press"]]]))[-1])[0, -1]
    best = following.topk(2).indices.tolist()
    assert set(best) == {model.index["one"], model.index["two"]}
    again, same = word_lm.train_word_lm(TEXTS)
    assert same == loss
    assert torch.equal(again.head.weight, model.head.weight)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_word_is_read_with_what_came_before_it():
    model = word_lm.WordLM(["a", "b", "c"])
    states = model.read(["a", "b", "c"])
    assert states.shape == (3, word_lm.WIDTH)
    torch.testing.assert_close(model.read(["a", "b"]), states[:2])
    assert not torch.allclose(model.read(["b", "b"])[1], states[1])
    layers = model.states(torch.tensor([[0, model.index["a"]]]))
    torch.testing.assert_close(states[0], sum(each[0, 1] for each in layers) / 3)


def test_a_word_model_is_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model, loss = word_lm.kept_word_lm(TEXTS)
    monkeypatch.setattr(word_lm, "train_word_lm", None)
    kept, same = word_lm.kept_word_lm(TEXTS)
    assert same == pytest.approx(loss, rel=1e-6)
    assert torch.equal(kept.read(TEXTS[1]), model.read(TEXTS[1]))


def test_white_columns():
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(300, 5, generator=generator) @ torch.randn(5, 5, generator=generator) + 3
    counts = torch.arange(300) % 3 > 0
    white = prompt_frames._white(states, counts)[counts]
    torch.testing.assert_close(white.mean(0), torch.zeros(5), rtol=0, atol=1e-4)
    torch.testing.assert_close(white.T @ white / 200, torch.eye(5), rtol=0, atol=1e-4)


@pytest.fixture
def frames():
    generator = torch.Generator().manual_seed(0)
    phones = torch.randint(6, (400,), generator=generator)
    mel = torch.randn(6, 80, generator=generator)[phones] - 5
    part = prompt_frames.Frames(mel, phones)
    return types.SimpleNamespace(
        train=part,
        held_out=part,
        reader=part,
        phones=list("abcdef"),
        heard=torch.randn(6, 384, generator=generator)[phones],
        read=torch.randn(6, 96, generator=generator)[phones],
        lm_loss=1.0,
    )


def test_weights_come_from_the_seed(frames):
    for make in (
        lambda seed: word_lm.WordLM(["a", "b"], seed),
        lambda seed: dm_codec.MelCodec(frames.train.mel, seed),
    ):
        first = make(3).state_dict()
        torch.rand(1)
        again, other = make(3).state_dict(), make(4).state_dict()
        assert all(torch.equal(first[name], again[name]) for name in first)
        assert not all(torch.equal(first[name], other[name]) for name in first)


def test_a_run_of_few_steps(frames, monkeypatch, tmp_path):
    monkeypatch.setattr(dm_codec, "PromptFrames", lambda: frames)
    monkeypatch.setattr(dm_codec, "STEPS", 3)
    made, codec = [], dm_codec.MelCodec
    monkeypatch.setattr(
        dm_codec, "MelCodec", lambda mel, seed: made.append(seed) or codec(mel, seed)
    )
    state = torch.get_rng_state()
    report = Report("dm-codec", tmp_path)
    dm_codec.run(report, range(2), 1e9)
    assert torch.equal(torch.get_rng_state(), state)
    rows = report.tables["held-out prompts"]
    assert [(row["seed"], row["teachers"]) for row in rows] == [
        (seed, arm) for seed in range(2) for arm in ("none", "LM", "LM+SM")
    ]
    # One start a seed, and each teacher leads somewhere else.
    assert made == [0, 0, 0, 1, 1, 1]
    assert len({row["L1"] for row in rows}) == 6
    assert [len(each) for _, each in report.curves["pnmi"]["series"].values()] == [4] * 3
    assert next(iter(report.pictures["spectrograms"]["panels"])) == "recorded"
    statements = {claim["statement"]: claim for claim in report.claims}
    claim = statements["PNMI of stage 1, LM+SM, against none"]
    assert claim["measured"] == [row["PNMI"] for row in rows if row["teachers"] == "LM+SM"]
    assert claim["reference"] == [row["PNMI"] for row in rows if row["teachers"] == "none"]
    ratios = statements["reconstruction L1, LM, over none's"]["measured"]
    assert ratios[1] == pytest.approx(rows[4]["L1"] / rows[3]["L1"])


def test_the_first_stage_is_of_the_tables_that_gave_the_codes(frames):
    codec = dm_codec.MelCodec(frames.train.mel, 0)
    codec(frames.train.mel[None])
    before = codec.quantizer.codebooks[0].clone()
    _, first, codes, _ = codec(frames.train.mel[None, :50] + 1)
    assert torch.equal(first, before[codes[..., 0]])
    assert not torch.equal(codec.quantizer.codebooks[0], before)


def test_teachers_teach_by_maps_of_their_own(frames, monkeypatch):
    monkeypatch.setattr(dm_codec, "STEPS", 3)
    for arm, weights in dm_codec.ARMS.items():
        codec = dm_codec.MelCodec(frames.train.mel, 0)
        before = {name: each.weight.clone() for name, each in codec.towards.items()}
        dm_codec._train(codec, frames, weights, 0)
        moved = {
            name
            for name, each in codec.towards.items()
            if (each.weight - before[name]).abs().max() > 1e-3
        }
        assert moved == set(weights), arm
        assert not codec.training


def test_frames_of_the_prompts():
    try:
        frames = prompt_frames.PromptFrames()
    except DataUnavailable as error:
        pytest.skip(str(error))
    assert frames.heard.shape == (len(frames.train.mel), 384)
    assert frames.read.shape == (len(frames.train.mel), 96)
    for part in (frames.train, frames.held_out, frames.reader):
        assert part.mel.shape == (len(part.phones), 80)
        assert part.phones.max() < len(frames.phones) <= 40
    assert 0.1 < len(frames.held_out.mel) / len(frames.train.mel) < 0.4
    # Pauses are where no word is said.
    quiet = (frames.read == 0).all(-1)
    pause = frames.train.phones == 0
    assert (quiet == pause).float().mean() > 0.97
    assert frames.train.mel[quiet].mean() < frames.train.mel[~quiet].mean() - 1
