"""Checkpoints that are whole or do not count.

`transformers.Trainer` writes a checkpoint file by file in its final place, so a process that is
killed meanwhile leaves one that looks usable. Here a file `complete`, written last, lists the
others with their sizes; a folder without it, or with a file missing or short, is torn.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

MARKER = "complete"
STATE_FILE = "distillation.pt"  # what DistillTrainer adds to the Trainer's own files
# What sharded processes gather into one file each (fsdp_state_dict_type: FULL_STATE_DICT).
WHOLE_WEIGHTS, WHOLE_OPTIMIZER = "pytorch_model_fsdp.bin", "optimizer.bin"


def mark_complete(folder: str | Path) -> None:
    """Write the marker of a checkpoint folder whose files are all there."""
    folder = Path(folder)
    sizes = {
        str(file.relative_to(folder)): file.stat().st_size
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }
    temporary = folder / f".{MARKER}.partial"
    temporary.write_text(json.dumps(sizes, indent=1))
    os.replace(temporary, folder / MARKER)


def is_complete(folder: str | Path) -> bool:
    """Whether the marker is there and every file it lists has the size it had then."""
    folder = Path(folder)
    try:
        sizes = json.loads((folder / MARKER).read_text())
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


def is_whole(folder: str | Path) -> bool:
    """Whether sharded processes have written it, for any number of processes to read."""
    return all((Path(folder) / name).is_file() for name in (WHOLE_WEIGHTS, WHOLE_OPTIMIZER))


def is_foreign(folder: str | Path) -> bool:
    """Whether a checkpoint was written to its end, by a trainer that is not ours."""
    folder = Path(folder)
    ours = (folder / STATE_FILE).exists() or (folder / MARKER).exists()
    # The last file of transformers.Trainer; ours follows it at once.
    return (folder / "trainer_state.json").exists() and not ours


def checkpoints(directory: str | Path) -> list[Path]:
    """The checkpoint folders in `directory`, whole or torn, oldest step first."""
    found = {
        int(match[1]): path
        for path in Path(directory).glob("checkpoint-*")
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name)) and path.is_dir()
    }
    return [found[step] for step in sorted(found)]


def newest_complete(directory: str | Path) -> Path | None:
    """The complete checkpoint with the most steps, or None."""
    return next((path for path in reversed(checkpoints(directory)) if is_complete(path)), None)


def remove_torn(directory: str | Path) -> list[Path]:
    """Delete the torn checkpoints in `directory`; returns what is gone."""
    torn = [path for path in checkpoints(directory) if not is_complete(path)]
    for path in torn:
        shutil.rmtree(path)
    return torn


def prune(directory: str | Path, keep: int, protected: str | Path | None = None) -> None:
    """Delete all but the newest `keep` complete checkpoints; `protected` stays in any case."""
    complete = [path for path in checkpoints(directory) if is_complete(path)]
    for path in complete[: max(len(complete) - keep, 0)]:
        if protected is not None and path.resolve() == Path(protected).resolve():
            continue
        # The marker goes first: killed in the middle, what is left counts as torn.
        (path / MARKER).unlink()
        shutil.rmtree(path)


def load_whole_optimizer(model: Any, optimizer: Any, scheduler: Any, checkpoint: Path) -> None:
    """What sharded processes have gathered, by the names of the parameters."""
    import torch
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

    options = StateDictOptions(full_state_dict=True)
    state = torch.load(checkpoint / WHOLE_OPTIMIZER, map_location="cpu", weights_only=True)
    optimizer = getattr(optimizer, "optimizer", optimizer)
    set_optimizer_state_dict(model, optimizer, state, options=options)
    scheduler.load_state_dict(torch.load(checkpoint / "scheduler.pt", weights_only=True))
