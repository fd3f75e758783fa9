"""State dicts of other libraries' residual quantizers, as ours has them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

# Names of a stage's tables, in a library of its own and in transformers.
TABLES = {
    "lucidrains": r"(?:rvqs\.(\d+)\.)?layers\.(\d+)\._codebook\.embed",
    "encodec": r"()(?:vq\.)?layers\.(\d+)\._?codebook\.embed",
    "mimi": r"()(?:vq\.)?layers\.(\d+)\._?codebook\.embed(?:ding)?_sum",
    "dac": r"()quantizers\.(\d+)\.codebook\.weight",
}
MAPS = {"into": ("project_in", "input_proj"), "out_of": ("project_out", "output_proj")}
Read = tuple[dict[str, Any], dict[str, Tensor]]


def read(state: Mapping[str, Tensor], layout: str, prefix: str | None) -> Read:
    """Options of a quantizer, and its tensors. See `ResidualVQ.from_state_dict`."""
    if layout not in TABLES:
        raise ValueError(f"layout must be one of {', '.join(TABLES)}, got {layout!r}")
    before, names = _tables(state, layout, prefix)
    # A stage's tensors, without what comes before their names: groups of stages.
    groups = [
        [_below(state, name.rpartition("codebook.")[0].rstrip("_")) for name in group]
        for group in names
    ]
    if layout == "dac":
        options, tensors = _dac(groups[0])
    else:
        stage = _mimi if layout == "mimi" else _averaged
        tensors = _stacked([[stage(each) for each in group] for group in groups])
        options = {}
        shared = layout == "lucidrains" and _one_table(state, names)
        if shared:
            tensors = {name: value[:, :1] for name, value in tensors.items()}
            options["shared_codebook"] = True
        roots = [before] if len(groups) == 1 else [f"{before}rvqs.{n}." for n in range(len(groups))]
        maps = [_maps(state, root) for root in roots]
        if maps[0]:
            tensors |= {name: torch.stack([each[name] for each in maps]) for name in maps[0]}
    count, size, width = len(groups), *tensors["tables"].shape[2:]
    dim = tensors["into_weight"].shape[-1] if "into_weight" in tensors else width
    options |= {
        "dim": dim * count,
        "codebook_size": size,
        "num_quantizers": len(groups[0]),
        "codebook_dim": width,
        "projection_bias": "into_bias" in tensors,
        **({"groups": count} if count > 1 else {}),
    }
    if layout != "dac":
        options["projection"] = "shared" if "into_weight" in tensors else "none"
    return options, tensors


def _tables(
    state: Mapping[str, Tensor], layout: str, prefix: str | None
) -> tuple[str, list[list[str]]]:
    """What comes before all names, and the names of tables: groups of stages."""
    found: dict[str, dict[tuple[int, int], str]] = {}
    for name in state:
        match = re.fullmatch(rf"(.*?){TABLES[layout]}", name)
        if match and (prefix is None or name.startswith(prefix)):
            before, group, stage = match.groups()
            found.setdefault(before, {})[int(group or 0), int(stage)] = name
    if len(found) != 1:
        several = f"several: give a prefix of {', '.join(sorted(found))}" if found else "none"
        raise ValueError(f"expected one residual quantizer of layout {layout!r}, found {several}")
    ((before, names),) = found.items()
    groups, stages = (1 + max(key[n] for key in names) for n in range(2))
    if len(names) != groups * stages:
        raise ValueError(f"{len(names)} tables are not {stages} stages of {groups} groups")
    return before, [[names[g, s] for s in range(stages)] for g in range(groups)]


def _below(state: Mapping[str, Tensor], root: str) -> dict[str, Tensor]:
    return {name[len(root) :]: value for name, value in state.items() if name.startswith(root)}


def _wide(tensor: Tensor) -> Tensor:
    return tensor.detach() if tensor.dtype == torch.float64 else tensor.detach().float()


def _one(stage: dict[str, Tensor], pattern: str) -> Tensor | None:
    """The tensor whose name fits."""
    return next((_wide(t) for name, t in stage.items() if re.fullmatch(pattern, name)), None)


def _needed(stage: dict[str, Tensor], name: str) -> Tensor:
    if name not in stage:
        raise ValueError(f"a stage of this state has no {name!r}, but {', '.join(sorted(stage))}")
    return _wide(stage[name])


def _averaged(stage: dict[str, Tensor]) -> dict[str, Tensor]:
    """A table with its counts and sums."""
    names = {"tables": "embed", "counts": "cluster_size", "sums": "embed_avg"}
    found = {name: _one(stage, rf"_?codebook\.{theirs}") for name, theirs in names.items()}
    table = found["tables"]
    if table.dim() == 3:  # lucidrains: one of several heads
        if len(table) != 1:
            raise ValueError(f"tables of {len(table)} heads: quantizers have one")
        found = {name: value[0] for name, value in found.items() if value is not None}
    return {name: value for name, value in found.items() if value is not None}


def _mimi(stage: dict[str, Tensor]) -> dict[str, Tensor]:
    sums = _one(stage, r"_?codebook\.embed(?:ding)?_sum")
    counts = _one(stage, r"_?codebook\.cluster_usage")
    if counts is None:
        raise ValueError("a stage of this state has sums of codes, but no 'cluster_usage'")
    return {"tables": sums / counts.clamp(min=1e-5)[:, None], "counts": counts, "sums": sums}


def _stacked(groups: list[list[dict[str, Tensor]]]) -> dict[str, Tensor]:
    """Tensors [G, Q, ...] of each stage's."""
    if len({tuple(sorted(stage)) for group in groups for stage in group}) > 1:
        raise ValueError("all stages must have the same tensors: some lack their counts or sums")
    shapes = {tuple(stage["tables"].shape) for group in groups for stage in group}
    if len(shapes) > 1:
        raise ValueError(f"all stages must have as many codes of one width, got {sorted(shapes)}")
    return {
        name: torch.stack([torch.stack([stage[name] for stage in group]) for group in groups])
        for name in groups[0][0]
    }


def _one_table(state: Mapping[str, Tensor], names: list[list[str]]) -> bool:
    """Whether all stages are one table: the same memory, or equal after it was saved."""
    first, *others = (state[name] for name in names[0])
    return bool(others) and all(torch.equal(first, other) for other in others)


def _maps(state: Mapping[str, Tensor], root: str) -> dict[str, Tensor]:
    """The maps before and after all stages: linear layers, or convolutions over one frame."""
    found = {}
    for ours, names in MAPS.items():
        for kind in ("weight", "bias"):
            for name in names:
                if (value := state.get(f"{root}{name}.{kind}")) is not None:
                    value = _wide(value)
                    found[f"{ours}_{kind}"] = value.flatten(1) if kind == "weight" else value
    return found


def _dac(stages: list[dict[str, Tensor]]) -> Read:
    """Stages with convolutions of their own, plain or with weight norm."""
    found = []
    for stage in stages:
        of_stage = {"tables": _wide(stage["codebook.weight"])}
        for ours, theirs in (("into", "in_proj"), ("out_of", "out_proj")):
            of_stage[f"{ours}_weight"] = _folded(stage, theirs).flatten(1)
            of_stage[f"{ours}_bias"] = _needed(stage, f"{theirs}.bias")
        found.append(of_stage)
    tensors = {name: value[0] for name, value in _stacked([found]).items()}
    tensors["tables"] = tensors["tables"][None]
    options = {
        "projection": "per_stage",
        "update": "gradient",
        "metric": "cosine",
        "commitment_weight": 0.25,
    }
    return options, tensors


def _folded(stage: dict[str, Tensor], name: str) -> Tensor:
    """A convolution's weight, g v / |v| of weight norm."""
    for g, v in (
        ("weight_g", "weight_v"),
        ("parametrizations.weight.original0", "parametrizations.weight.original1"),
    ):
        if f"{name}.{g}" in stage:
            return torch._weight_norm(_needed(stage, f"{name}.{v}"), _wide(stage[f"{name}.{g}"]), 0)
    return _needed(stage, f"{name}.weight")
