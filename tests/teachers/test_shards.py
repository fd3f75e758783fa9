"""Stored teachers on disk: what comes back, what is refused, and what nobody can make them do."""

import json
import os
import random
import shutil
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch

from stillhouse import ops
from stillhouse.teachers import (
    ShardError,
    StoredExamples,
    StoredRows,
    StoredTeacher,
    TeacherShards,
    packing,
)
from stillhouse.teachers.shard_format import columns_of, write_manifest
from stillhouse.train.examples import Example, collate

VALUES = tuple(packing.VALUES)


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("vocab_size", [300, 70000])
def test_what_was_stored_comes_back(tmp_path, stored, values, vocab_size):
    rows = stored(tmp_path, values=values, vocab_size=vocab_size, temperature=2.0)
    shards = TeacherShards(tmp_path)
    assert (len(shards), shards.row_count, len(shards.parts)) == (5, 10, 3)
    for number, want in enumerate(rows):
        got = shards.rows(number)
        assert torch.equal(got.ids, want.ids)
        assert got.log_probs.shape == (len(want.ids), 6)
        if values == "exact":
            assert torch.equal(got.log_probs, want.log_probs)
            assert torch.equal(got.log_rest, want.log_rest)
        tolerance = {"exact": 0, "fp16": 4e-3, "bf16": 4e-2, "compact": 5e-2}[values]
        torch.testing.assert_close(got.log_probs, want.log_probs, rtol=0, atol=tolerance)
        mass = got.log_probs.double().exp().sum(-1) + got.log_rest.double().exp()
        torch.testing.assert_close(mass, torch.ones_like(mass), rtol=0, atol=1e-6)
        teacher = shards.teacher(number, "uniform")
        assert (teacher.vocab_size, teacher.temperature) == (vocab_size, 2.0)
        assert teacher.to_dense().shape == (len(want.ids), vocab_size)


@pytest.mark.parametrize("values", VALUES)
def test_the_bounds_of_the_page_hold_for_what_is_read(tmp_path, write_one, values):
    """e + ln sum p exp(e): of the stored value and, since the row is divided by it, of the sum."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(200, 300, generator=generator) * 10 ** (
        3 * torch.rand(200, 1, generator=generator) - 1.5
    )
    logits[0, :3] = torch.tensor([60.0, 59.6, 40.0])  # next to nothing beside two
    top = ops.SparseTeacher.from_logits(logits.double(), k=12)
    want, rest = top.log_probs, top.log_rest
    shards = write_one(tmp_path, StoredRows(top.ids, want, rest), values=values)
    got = shards.rows(0).log_probs.double()
    if values == "compact":
        pieces = shards._read(0)
        below = torch.from_numpy(np.frombuffer(pieces["scale"], "<f4").reshape(-1, 2)[:, 1:].copy())
        codes = torch.from_numpy(np.frombuffer(pieces["values"], "u1").reshape(want.shape).copy())
        error = packing.compact_error(codes.double(), below.double())
    else:
        error = {"exact": 0.0, "fp16": 2**-11, "bf16": 2**-8}[values] * want.abs()
    if values != "exact":
        error = error + 3e-7 * (1 + want.abs())  # float32's own
        mass = (want + error).exp().sum(-1, keepdim=True) + rest.exp()[:, None]
        assert bool(((got - want).abs() <= error + mass.log()).all())
        assert bool(((got - want).abs() > error).any())  # without the sum's it would not hold
    else:
        assert torch.equal(got, want.float().double())


def test_columns_that_are_none(tmp_path, write_one):
    ids = torch.tensor([[4, -1, 2], [-1, -1, -1]], dtype=torch.int32)
    log_probs = torch.tensor([[0.5, 0.0, 0.25], [0, 0, 0]]).log()
    rest = torch.tensor([0.25, 1.0]).log()
    for values in VALUES:
        shards = write_one(tmp_path, StoredRows(ids, log_probs, rest), values=values)
        assert not write_manifest(tmp_path, shards.schema, shards.parts)
        got = shards.rows(0)
        assert torch.equal(got.ids, ids)
        torch.testing.assert_close(got.log_probs, log_probs, rtol=0, atol=4e-3)


@pytest.mark.parametrize("values", VALUES)
def test_any_reader_of_safetensors_reads_a_shard(tmp_path, stored, values):
    safetensors = pytest.importorskip("safetensors")
    from safetensors.torch import load_file

    rows = stored(tmp_path, values=values)
    path = tmp_path / "shard-00001.safetensors"  # examples 2 and 3
    tensors = load_file(path)
    assert tensors["first_row"].tolist() == [0, 4, 5]
    want = torch.cat([rows[2].log_rest, rows[3].log_rest])
    assert torch.equal(tensors["log_rest"], want)
    assert tensors["values"].shape == (5, 6)
    ids, _ = packing.unpack_ids(tensors["ids"].numpy(), 6, 300)
    assert torch.equal(ids, torch.cat([rows[2].ids, rows[3].ids]))
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "stillhouse teacher shards 1"
    assert (metadata["vocab_size"], metadata["temperature"]) == ("300", "1.0")


def test_bytes_a_row(schema):
    demonstration = {"vocab_size": 49152, "k": 64}
    assert schema(values="fp16", **demonstration).row_bytes <= 4 * 64 + 16
    assert schema(values="compact", **demonstration).row_bytes <= 3 * 64 + 16


def examples_for(counts, seed=0):
    generator = torch.Generator().manual_seed(seed)
    result = []
    for number, count in enumerate(counts):
        ids = torch.randint(0, 256, (count + 1,), generator=generator, dtype=torch.int32)
        result.append(Example(ids.numpy(), np.ones(count + 1, dtype=bool), number))
    return result


def test_a_batch_brings_its_teacher(tmp_path, stored):
    from stillhouse.teachers import fingerprints
    from stillhouse.train.rows import supervised_rows

    counts = (3, 0, 4, 1, 2)
    examples = examples_for(counts)
    rows = stored(tmp_path, data=fingerprints.of_examples(examples))
    shards = TeacherShards(tmp_path)
    dataset = StoredExamples(examples, shards)
    order = [4, 0, 2]
    batch = collate([dataset[i] for i in order])
    teacher = StoredTeacher(shards, "renormalize")(batch, supervised_rows(batch["labels"]))
    assert torch.equal(teacher.ids, torch.cat([rows[i].ids for i in order]))
    assert torch.equal(teacher.log_rest, torch.cat([rows[i].log_rest for i in order]))
    assert (teacher.tail, teacher.vocab_size) == ("renormalize", 300)
    # Workers of their own, in an order of their own.
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=2, sampler=order, num_workers=2, collate_fn=collate
    )
    ids = torch.cat([each["teacher_ids"] for each in loader])
    assert torch.equal(ids, teacher.ids)
    batch["labels"][0, 1] = -100
    with pytest.raises(ValueError, match="8 supervised rows and 9 of its teacher"):
        StoredTeacher(shards)(batch, supervised_rows(batch["labels"]))
    with pytest.raises(ValueError, match="wrap the data in StoredExamples"):
        StoredTeacher(shards)({}, None)
    with pytest.raises(ValueError, match="tail must be one of"):
        StoredTeacher(shards, "none")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda each: each[::-1], "other tokens than this data gives"),
        (lambda each: [each[1], each[0], *each[2:]], "other tokens"),
        (lambda each: each[:-1], "has 5 examples, the data gives 4"),
        (lambda each: examples_for((3, 0, 4, 1, 2), seed=1), "other tokens"),
    ],
)
def test_other_data_is_refused(tmp_path, stored, change, message):
    from stillhouse.teachers import fingerprints

    examples = examples_for((3, 0, 4, 1, 2))
    stored(tmp_path, data=fingerprints.of_examples(examples))
    shards = TeacherShards(tmp_path)
    StoredExamples(examples, shards)
    with pytest.raises(ShardError, match=message):
        StoredExamples(change(examples), shards)


def test_a_mask_is_part_of_the_data():
    from stillhouse.teachers import fingerprints

    examples = examples_for((3, 4))
    masked = [Example(e.input_ids, np.arange(len(e.input_ids)) > 1, e.record) for e in examples]
    assert fingerprints.of_examples(examples) != fingerprints.of_examples(masked)


# ---- what is damaged, missing, or of something else ----------------------------------------------


def read_all(folder):
    shards = TeacherShards(folder)
    return [shards.rows(number) for number in range(len(shards))]


def edit(path, place, content):
    data = bytearray(path.read_bytes())
    data[place : place + len(content)] = content
    path.write_bytes(data)


def rewrite_manifest(folder, change):
    """Change a manifest and give it a checksum that fits again."""
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    change(content)
    del content["crc32"]
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
    content["crc32"] = zlib.crc32(canonical)
    path.write_text(json.dumps(content))


def claim(**changes):
    def attack(folder):
        rewrite_manifest(folder, lambda content: content["schema"].update(changes))

    return attack


def shards_say(change):
    return lambda folder: rewrite_manifest(folder, lambda content: change(content["shards"]))


def replace_header(make):
    """Another header in front of the first shard's tensors."""

    def attack(folder):
        path = folder / "shard-00000.safetensors"
        data = path.read_bytes()
        (size,) = struct.unpack("<Q", data[:8])
        path.write_bytes(make(size, json.loads(data[8 : 8 + size])) + data[8 + size :])

    return attack


def encoded(header):
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text


def overlapping(size, header):
    header["values"]["data_offsets"] = header["log_rest"]["data_offsets"]
    return encoded(header)


def twice(size, header):
    text = json.dumps(header)[:-1] + ', "ids": ' + json.dumps(header["ids"]) + "}"
    return struct.pack("<Q", len(text)) + text.encode()


def first(folder):
    return folder / "shard-00000.safetensors"


def another_shard(folder):
    shutil.copy(folder / "shard-00001.safetensors", folder / "shard-00002.safetensors")


def a_pipe(path):
    path.unlink()
    os.mkfifo(path)


def a_device(path):
    path.unlink()
    path.symlink_to("/dev/zero")


ATTACKS = {
    "manifest is a device": (lambda f: a_device(f / "manifest.json"), "it is no file"),
    "manifest is a pipe": (lambda f: a_pipe(f / "manifest.json"), "it is no file"),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "the capture is not finished"),
    "missing": (lambda f: first(f).unlink(), "is missing"),
    "folder in its place": (lambda f: (first(f).unlink(), first(f).mkdir()), "is no file"),
    "device in its place": (lambda f: a_device(first(f)), "is no file"),
    "pipe in its place": (lambda f: a_pipe(first(f)), "is no file"),
    "truncated": (lambda f: os.truncate(first(f), first(f).stat().st_size - 1), "is torn"),
    "half a header": (lambda f: os.truncate(first(f), 100), "header cannot be read"),
    "empty": (lambda f: os.truncate(first(f), 0), "header cannot be read"),
    "too long": (lambda f: first(f).write_bytes(first(f).read_bytes() + b"x"), "is torn"),
    "rows": (lambda f: edit(first(f), first(f).stat().st_size - 3, b"\xff\x00\xff"), "checksum"),
    "another shard": (another_shard, "its shard is 1, not 2"),
    "header length": (lambda f: edit(first(f), 0, struct.pack("<Q", 2**63)), "cannot be read"),
    "no header": (lambda f: edit(first(f), 0, struct.pack("<Q", 0)), "cannot be read"),
    "overlapping tensors": (replace_header(overlapping), "other sizes"),
    "a tensor twice": (replace_header(twice), "other sizes"),
    "no JSON": (replace_header(lambda size, _: struct.pack("<Q", size) + b"{" * size), "read"),
    "deep JSON": (replace_header(lambda size, _: struct.pack("<Q", 900) + b"[" * 900), "read"),
    "huge k": (claim(k=2**24, vocab_size=2**24), "more than the 1073741824 of an example"),
    "another vocabulary": (claim(vocab_size=301), "its vocab_size is 300, not 301"),
    "k above the vocabulary": (claim(k=301), "k = 301 of 300 columns cannot be"),
    "huge vocabulary": (claim(vocab_size=2**62), "cannot be"),
    "negative k": (claim(k=-1), "cannot be"),
    "k is true": (claim(k=True), "k must be int"),
    "temperature": (claim(temperature=2.0), "its temperature is 1.0, not 2.0"),
    "temperature of nothing": (claim(temperature=float("nan")), "temperature must be"),
    "values": (claim(values="fp8"), "values must be one of"),
    "another teacher": (claim(teacher="e" * 64), "its teacher is mmm"),
    "unknown field": (claim(path="../.."), "path"),
    "more examples": (claim(examples=6), "5 of 6 examples"),
    "more rows": (shards_say(lambda s: s[0].__setitem__(2, 30)), "other sizes"),
    "huge rows": (shards_say(lambda s: s[0].__setitem__(2, 2**39)), "more rows than its examples"),
    "huge examples": (claim(max_length=2**39), "more than the 1073741824 of an example"),
    "rows beyond numbers": (shards_say(lambda s: s[0].__setitem__(2, 2**70)), "cannot be"),
    "a gap": (shards_say(lambda s: s[1].__setitem__(0, 3)), "does not go on"),
    "path traversal": (shards_say(lambda s: s[0].__setitem__(0, "../../secret")), "cannot be"),
    "a path as well": (shards_say(lambda s: s[0].append("../x")), "damaged"),
    "shards are a word": (lambda f: rewrite_manifest(f, lambda c: c.update(shards="x")), "dam"),
    "a name twice": (
        lambda f: (f / "manifest.json").write_text(
            (f / "manifest.json").read_text().replace('"k": 6', '"k": 7, "k": 6')
        ),
        "a name comes twice",
    ),
    "deep manifest": (lambda f: (f / "manifest.json").write_text("[" * 10**6), "damaged"),
    "long manifest": (lambda f: os.truncate(f / "manifest.json", 65 << 20), "more than"),
    "edited manifest": (
        lambda f: (f / "manifest.json").write_text(
            (f / "manifest.json").read_text().replace("a teacher", "another")
        ),
        "its checksum does not fit",
    ),
    "another format": (lambda f: rewrite_manifest(f, lambda c: c.update(format="x")), "format"),
    "no object": (lambda f: (f / "manifest.json").write_text("[1]"), "its format is not"),
    "binary": (lambda f: (f / "manifest.json").write_bytes(b"\xff\xfe\x00"), "damaged"),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_a_folder_that_is_not_right(tmp_path, stored, name):
    attack, message = ATTACKS[name]
    stored(tmp_path)
    read_all(tmp_path)
    attack(tmp_path)
    with pytest.raises(ShardError, match=message) as caught:
        read_all(tmp_path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_damage_is_found_late_where_it_was_not_looked_for(tmp_path, stored):
    stored(tmp_path)
    path = tmp_path / "shard-00002.safetensors"
    edit(path, path.stat().st_size - 1, b"\xff")
    shards = TeacherShards(tmp_path, verify=False)
    shards.rows(0)
    with pytest.raises(ShardError, match="checksum of example 4 does not fit"):
        shards.rows(4)
    with pytest.raises(IndexError):
        shards.rows(5)


def test_a_file_that_shrinks_meanwhile_is_an_error(tmp_path, stored):
    stored(tmp_path)
    shards = TeacherShards(tmp_path)
    path = tmp_path / "shard-00000.safetensors"
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(ShardError, match="is torn"):
        shards.rows(0)


def mend(path, example, part_of):
    """Give an example of a shard's file the checksum that its bytes have."""
    shards, data = TeacherShards(path.parent, verify=False), bytearray(path.read_bytes())
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    start, count = 8 + size + header["first_row"]["data_offsets"][0], header["first_row"]["shape"]
    first_row = np.frombuffer(data, "<i8", count[0], start)
    at = example - part_of.first
    value = zlib.crc32(example.to_bytes(8, "little"))
    for name, width, each in columns_of(shards.schema):
        start = 8 + size + header[name]["data_offsets"][0]
        begin, end = (start + int(row) * width * each for row in first_row[at : at + 2])
        value = zlib.crc32(data[begin:end], value)
    place = 8 + size + header["crc32"]["data_offsets"][0] + 8 * at
    data[place : place + 8] = struct.pack("<q", value)
    path.write_bytes(data)


def test_examples_in_each_others_place(tmp_path, stored):
    """Two examples of a shard with as many rows, exchanged with their checksums."""
    stored(tmp_path, counts=(1, 1), k=4, vocab_size=255)
    path = first(tmp_path)
    data = bytearray(path.read_bytes())
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    for name, entry in header.items():
        if name not in ("__metadata__", "first_row"):
            begin, end = (8 + size + place for place in entry["data_offsets"])
            half = (end - begin) // 2
            data[begin:end] = data[begin + half : end] + data[begin : begin + half]
    path.write_bytes(data)
    with pytest.raises(ShardError, match="the checksum of example 0 does not fit"):
        TeacherShards(tmp_path)


@pytest.mark.parametrize("values", VALUES)
def test_forged_rows_are_refused_or_can_be_a_teacher(tmp_path, stored, values):
    """Any bytes, with checksums that fit: what is read has ids of the vocabulary, or none, and
    numbers that are logarithms of probabilities."""
    stored(tmp_path, counts=(2, 3), values=values, k=5)
    path, chance, refused, taken = first(tmp_path), random.Random(1), 0, 0
    whole, part = path.read_bytes(), TeacherShards(tmp_path).parts[0]
    (size,) = struct.unpack("<Q", whole[:8])
    rows = 8 + size + 8 * 5
    for _ in range(1500):
        data = bytearray(whole)
        for _ in range(chance.randrange(1, 6)):
            place = chance.randrange(rows, len(data) - 4)
            data[place : place + 4] = chance.randbytes(4)
        path.write_bytes(data)
        for example in (0, 1):
            mend(path, example, part)
        try:
            found = read_all(tmp_path)
        except ShardError:
            refused += 1
            continue
        taken += 1
        for each in found:
            assert int(each.ids.min()) >= -1
            assert int(each.ids.max()) < 300
            assert float(each.log_probs.max()) < 2e-3
            assert float(each.log_rest.max()) < 2e-3
    assert refused > 100
    assert taken > 10


FILES = 100_000


def test_a_hundred_thousand_damaged_files(tmp_path, stored):
    """Bytes changed, lost, added, moved: an error, or exactly what was stored."""
    want = stored(tmp_path, counts=(2, 1, 0, 2), per_shard=4, values="fp16", k=3)
    want = read_all(tmp_path)
    paths = [tmp_path / "manifest.json", tmp_path / "shard-00000.safetensors"]
    whole = [path.read_bytes() for path in paths]
    chance, refused = random.Random(0), 0

    def damaged(data):
        data = bytearray(data)
        place = chance.randrange(len(data))
        what = chance.randrange(6)
        if what == 0:
            data[place] ^= 1 << chance.randrange(8)
        elif what == 1:
            data[place : place + 8] = chance.randbytes(min(8, len(data) - place))
        elif what == 2:
            del data[place : place + chance.randrange(1, 64)]
        elif what == 3:
            data[place:place] = chance.randbytes(chance.randrange(1, 64))
        elif what == 4:
            other = chance.randrange(len(data))
            data[place], data[other] = data[other], data[place]
        else:
            data[place:] = b""
        return bytes(data)

    for _ in range(FILES):
        which = chance.random() < 0.75
        data = damaged(whole[which])
        if data == whole[which]:
            continue
        paths[which].write_bytes(data)
        try:
            got = read_all(tmp_path)
        except ShardError:
            refused += 1
        else:  # a manifest may say the same with another blank
            for each, other in zip(got, want, strict=True):
                assert all(map(torch.equal, each, other))
        paths[which].write_bytes(whole[which])
    assert refused > 0.9 * FILES


def test_memory_does_not_grow_with_what_was_read(tmp_path, stored):
    """A folder of 80 MB, read from end to end by a process of its own."""
    examples = {"counts": (500,) * 8, "times": 20, "per_shard": 40, "max_length": 501}
    stored(tmp_path, **examples, vocab_size=2000, k=250, values="fp16")
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert size > 60e6
    script = """
import sys
from stillhouse.teachers import TeacherShards
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
shards = TeacherShards(sys.argv[1], verify=False)
for example in range(20):
    shards.rows(example)
before = resident()
for example in range(len(shards)):
    shards.rows(example)
print(resident() - before)
"""
    if not os.path.exists("/proc/self/statm"):
        pytest.skip("needs /proc")
    grown = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], check=True, capture_output=True, text=True
    )
    assert int(grown.stdout) < size / 10


def test_master_all_columns_equal_the_dense_divergence(tmp_path, stored):
    """k = V: what the shards give is the dense teacher, in every mode to its rounding."""
    rows = stored(tmp_path, k=300)
    shards = TeacherShards(tmp_path)
    student = torch.randn(3, 300)
    dense = torch.empty(3, 300).scatter_(1, rows[0].ids.long(), rows[0].log_probs)
    got = ops.divergence(student, shards.teacher(0), "forward_kl")
    torch.testing.assert_close(got, ops.divergence(student, dense, "forward_kl"))
