"""The recipe that trains a codec of waveforms: on noise for two steps, with all that it leaves."""

import json
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("pystoi", reason="the recipe measures STOI")
from stillhouse.data import speech
from stillhouse.methods.speech import CodecConfig, SpeechCodec
from stillhouse.recipes.speech import codec as recipe

FRAMES = 90


def clip(name, seconds):
    generator = torch.Generator().manual_seed(len(name))
    wave = 0.1 * torch.randn(int(16000 * seconds), generator=generator)
    return SimpleNamespace(name=name, text=f"say {name}", wave=lambda: wave)


@pytest.fixture(autouse=True)
def noise(monkeypatch):
    """Ninety frames of noise with two teachers, and three held-out clips, one of them short."""
    generator = torch.Generator().manual_seed(0)
    read = torch.randn(FRAMES, 96, generator=generator)
    read[40:60] = 0  # a pause
    frames = SimpleNamespace(
        heard=torch.randn(FRAMES, 384, generator=generator),
        read=read,
        held_out_clips=[clip("short", 0.5), clip("first", 1.21), clip("second", 1.1)],
    )
    waves = 0.1 * torch.randn(320 * FRAMES, generator=generator)
    monkeypatch.setattr(recipe, "PromptFrames", lambda: frames)
    monkeypatch.setattr(recipe, "_training_waves", lambda given: waves)


def test_what_it_leaves(tmp_path, capsys):
    assert recipe.main(["--steps", "2", "--out", str(tmp_path)]) == 0
    original, rate = speech.read_wav(tmp_path / "original.wav")
    decoded, _ = speech.read_wav(tmp_path / "decoded.wav")
    assert rate == 16000
    assert len(original) == len(decoded) == 19360
    kept = torch.load(tmp_path / "codec.pt", weights_only=True)
    codec = SpeechCodec(CodecConfig(**kept["config"]))
    codec.load_state_dict(kept["state"])
    again = codec.eval().decode(codec.encode(clip("first", 1.21).wave()[None]))[0, :19360]
    torch.testing.assert_close(decoded, again.clamp(-1, 1), rtol=0, atol=2**-15)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["prompt"] == {"name": "first", "text": "say first"}
    assert [row["stages"] for row in report["tables"]["held-out prompts"]] == [1, 2, 4, 8]
    assert report["curves"].keys() == {"wave", "spectra", "teachers", "players"}
    assert "decoded.wav" in capsys.readouterr().out
    assert not list(tmp_path.glob("*partial*"))


def test_without_teachers_and_of_another_prompt(tmp_path):
    words = ["--steps", "1", "--plain", "--clip", "second", "--out", str(tmp_path)]
    assert recipe.main(words) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["prompt"]["name"] == "second"
    assert "teachers" not in report["curves"]


def test_the_same_seed_is_the_same_codec(tmp_path):
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        recipe.main(["--steps", "1", "--seed", seed, "--out", str(tmp_path / name)])
    files = [(tmp_path / name / "decoded.wav").read_bytes() for name in "abc"]
    assert files[0] == files[1] != files[2]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--steps", "0"], "expected at least one step, got 0"),
        (["--clip", "short"], "no prompt 'short' of a second or more is held out"),
    ],
)
def test_errors_are_one_line(tmp_path, capsys, words, message):
    assert recipe.main(["--steps", "1", "--out", str(tmp_path), *words]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
