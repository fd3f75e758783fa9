"""What is slow to compute for a set of clips, kept in the user's cache."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stillhouse.data.speech import alignment, recognizer
from stillhouse.data.speech.alignment import Alignment, Segment
from stillhouse.data.speech.clips import Clip
from stillhouse.progress import Progress
from stillhouse.teachers import TensorCache


def user_cache() -> Path:
    """stillhouse's folder in XDG_CACHE_HOME, by default ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "stillhouse"


def alignments(clips: Sequence[Clip], *, cache: str | Path | None = None) -> dict[str, Alignment]:
    """`align` of each clip that has a text and can be aligned, by name: 507 of the 568 English
    prompts, in twenty seconds the first time, then from the folder `cache` (by default
    `user_cache()`). Raises DataUnavailable as `align` does."""

    def compute() -> dict[str, Tensor]:
        found = {}
        for clip in _shown(clips, "aligning words and phones"):
            try:
                found[clip.name] = alignment.align(clip.wave(), clip.text or "")
            except ValueError:  # no text, a word that the dictionary lacks, or no path
                continue
        content = bytearray(json.dumps(found).encode())
        return {"json": torch.frombuffer(content, dtype=torch.uint8)}

    stored = _stored("alignments", "pocketsphinx", clips, cache, compute)["json"]
    return {
        name: Alignment(*([Segment(*each) for each in row] for row in rows))
        for name, rows in json.loads(bytes(stored.numpy())).items()
    }


def encoder_states(
    clips: Sequence[Clip], *, layer: int = 3, cache: str | Path | None = None
) -> dict[str, Tensor]:
    """`whisper_states` of each clip, float16 [T, 384], by name: 59 MB for the English prompts,
    fifteen seconds the first time, then from the folder `cache` (by default `user_cache()`).
    Raises as `whisper_states` does."""

    def compute() -> dict[str, Tensor]:
        shown = _shown(clips, "reading speech")
        states = [recognizer.whisper_states(clip.wave(), layer=layer).half() for clip in shown]
        lengths = torch.tensor([len(each) for each in states], dtype=torch.int64)
        return {"states": torch.cat([torch.empty(0, 384).half(), *states]), "lengths": lengths}

    kind = f"states after layer {layer}"
    stored = _stored(kind, recognizer.PACKAGE, clips, cache, compute)
    parts = stored["states"].split(stored["lengths"].tolist())
    return {clip.name: part for clip, part in zip(clips, parts, strict=True)}


def _stored(
    kind: str,
    package: str,
    clips: Sequence[Clip],
    cache: str | Path | None,
    compute: Callable[[], dict[str, Tensor]],
) -> dict[str, Tensor]:
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        version = None  # the computation says what is missing
    key: dict[str, Any] = {"kind": f"speech {kind}", "format": 1, package: version, "clips": []}
    for clip in clips:
        content = hashlib.sha256(clip.path.read_bytes()).hexdigest()
        key["clips"].append([clip.name, clip.text, content])
    return TensorCache(user_cache() if cache is None else cache).get(key, compute)


def _shown(clips: Sequence[Clip], doing: str) -> Iterator[Clip]:
    progress = Progress("clips")
    for done, clip in enumerate(clips):
        progress(doing, done, len(clips))
        yield clip
