"""Fewer channels: a smaller model made of some hidden channels, heads and inner units of another,
or the same model in another order."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from stillhouse.nn.anatomy import blocks, changed_configuration, require_loadable

Indices = Sequence[int] | Tensor


@dataclass(frozen=True)
class Keep:
    """Channels to keep, in this order; None keeps all of a kind as they are.

    hidden: indices of the H channels that all blocks share. heads: of query heads, and ffn: of the
    inner units of the feed-forward layer, either [n] for every block or [blocks, n].

    Where groups of query heads share keys and values, what is kept must come group by group, with
    as many heads of each: `[2, 3, 6, 7]` of 8 heads in groups of 2 keeps the groups 1 and 3.

    Example:
        >>> from stillhouse.nn.surgery import Keep
        >>> Keep(hidden=[3, 0, 2, 1]).first(hidden=2)
        Keep(hidden=[3, 0], heads=None, ffn=None)
    """

    hidden: Indices | None = None
    heads: Indices | Sequence[Indices] | None = None
    ffn: Indices | Sequence[Indices] | None = None

    def first(
        self, *, hidden: int | None = None, heads: int | None = None, ffn: int | None = None
    ) -> Keep:
        """The first so many of each kind, of a ranking; None leaves a kind as it is. Raises
        ValueError for more than there are."""
        counts = {"hidden": hidden, "heads": heads, "ffn": ffn}
        chosen = {}
        for name, count in counts.items():
            if count is None:
                continue
            rows = getattr(self, name)
            if rows is None:
                raise ValueError(f"{name} has no order to take the first {count} of")
            nested = _is_nested(rows)
            for row in rows if nested else [rows]:
                if not 1 <= count <= len(row):
                    raise ValueError(f"cannot keep {count} of {len(row)} {name}")
            chosen[name] = [row[:count] for row in rows] if nested else rows[:count]
        return replace(self, **chosen)


class Role(NamedTuple):
    """What the axes of a module's weight are: "hidden", "heads", "kv", "ffn" or None (kept)."""

    rows: str | None
    columns: str | None


# The modules of a block, by the ends of their paths; the first that fits counts.
ROLES = {
    # Llama and its relatives
    "q_proj": Role("heads", "hidden"),
    "k_proj": Role("kv", "hidden"),
    "v_proj": Role("kv", "hidden"),
    "o_proj": Role("hidden", "heads"),
    "gate_proj": Role("ffn", "hidden"),
    "up_proj": Role("ffn", "hidden"),
    "down_proj": Role("hidden", "ffn"),
    # BERT and its relatives
    "attention.self.query": Role("heads", "hidden"),
    "attention.self.key": Role("kv", "hidden"),
    "attention.self.value": Role("kv", "hidden"),
    "attention.output.dense": Role("hidden", "heads"),
    "intermediate.dense": Role("ffn", "hidden"),
    "output.dense": Role("hidden", "ffn"),
    # within a head
    "q_norm": Role(None, None),
    "k_norm": Role(None, None),
}
# Outside the blocks every linear layer reads hidden channels; these write them, too.
WRITE_HIDDEN = ("pooler.dense", "transform.dense")


def role_of(path: str) -> Role | None:
    """The role of a linear layer or a head's norm in a block, by the end of its path."""
    found = (role for end, role in ROLES.items() if ("." + path).endswith("." + end))
    return next(found, None)


def is_norm(path: str) -> bool:
    """Whether the name is that of a norm over the hidden channels."""
    return path.lower().endswith("norm") and not path.endswith(("q_norm", "k_norm"))


def slice_channels(model: nn.Module, keep: Keep) -> nn.Module:
    """A copy of `model` with the channels of `keep`; one that only orders anew computes the same.

    For models of `transformers` of Llama's kind (norms before the layers, keys and values shared by
    groups of heads, gated feed-forward layers, with and without biases) and of BERT's. Tied weights
    stay tied, the configuration says the new sizes, `save_pretrained` gives an ordinary model.
    A head keeps its size. What a norm sees is new when hidden channels go: the mean square over
    those that stay.

    Raises ValueError for indices that do not exist, come twice or leave none, blocks that would
    differ in size, heads that break their groups, sizes that the configuration cannot say (BERT's
    head size is the hidden size / heads), and for modules of unknown roles.
    """
    path, stack = blocks(model)
    config = model.config
    counts = {
        "hidden": config.hidden_size,
        "heads": config.num_attention_heads,
        "ffn": config.intermediate_size,
    }
    rows = {
        kind: _rows(kind, getattr(keep, kind), len(stack), count) for kind, count in counts.items()
    }
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    groups = [_groups(each, config.num_attention_heads // kv_heads) for each in rows["heads"]]
    sizes = {name: len(each[0]) for name, each in rows.items()}
    changes = {
        "hidden_size": sizes["hidden"],
        "num_attention_heads": sizes["heads"],
        "intermediate_size": sizes["ffn"],
    }
    if hasattr(config, "num_key_value_heads"):
        changes["num_key_value_heads"] = len(groups[0])
    head_size = getattr(config, "head_dim", None) or config.hidden_size // counts["heads"]

    hidden = rows["hidden"][0]
    # deepcopy's memo says what stands in for an object: the smaller parameter for the old one.
    memo: dict[int, object] = {id(config): changed_configuration(config, changes)}
    for name, module in model.named_modules():
        inner = name.removeprefix(path + ".")
        block = int(inner.partition(".")[0]) if inner != name else None
        axes: dict[str | None, Tensor | None] = {None: None, "hidden": hidden}
        if block is not None:
            axes["ffn"] = rows["ffn"][block]
            axes["heads"] = _units(rows["heads"][block], head_size)
            axes["kv"] = _units(groups[block], head_size)
        for own, parameter in module.named_parameters(recurse=False):
            role = _role(name, module, own, block is not None, model)
            memo[id(parameter)] = _cut(parameter, axes[role.rows], axes[role.columns])
    result = copy.deepcopy(model, memo)
    described = require_loadable(result, "keep other numbers of them")
    for name, module in result.named_modules():
        # Sizes that modules remember (in_features, num_key_value_groups, normalized_shape).
        for key, value in vars(described.get_submodule(name)).items():
            if isinstance(value, (int, tuple)) and not isinstance(value, bool):
                setattr(module, key, value)
    return result


def slice_linear(
    module: nn.Linear, *, rows: Indices | None = None, columns: Indices | None = None
) -> nn.Linear:
    """A copy of a linear layer with some of its outputs (`rows`) and inputs (`columns`), in this
    order; None keeps all. Raises ValueError for indices that do not exist.

    Example:
        >>> from torch import nn
        >>> from stillhouse.nn.surgery import slice_linear
        >>> slice_linear(nn.Linear(4, 3), rows=[2, 0])
        Linear(in_features=4, out_features=2, bias=True)
    """
    axes = []
    for name, given, size in (
        ("rows", rows, module.out_features),
        ("columns", columns, module.in_features),
    ):
        axes.append(None if given is None else _checked(name, given, size))
    sizes = [len(x) if x is not None else n for x, n in zip(axes, module.weight.shape, strict=True)]
    with torch.device("meta"):
        result = nn.Linear(sizes[1], sizes[0], bias=module.bias is not None)
    result.weight = _cut(module.weight, *axes)
    if module.bias is not None:
        result.bias = _cut(module.bias, axes[0], None)
    return result.train(module.training)


def _role(path: str, module: nn.Module, own: str, in_block: bool, model: nn.Module) -> Role:
    """The axes of one parameter of a module."""
    role = None
    if is_norm(path):
        role = Role("hidden", None)
    elif in_block and (type(module) is nn.Linear or path.endswith(("q_norm", "k_norm"))):
        role = role_of(path)
    elif not in_block and type(module) is nn.Embedding:
        role = Role(None, "hidden")
    elif not in_block and type(module) is nn.Linear:
        role = Role("hidden" if path.endswith(WRITE_HIDDEN) else None, "hidden")
    elif not in_block and own == "bias" and getattr(module, "decoder", None) is not None:
        role = Role(None, None)  # BERT's bias of the vocabulary, which its decoder shares
    if role is None:
        raise ValueError(
            f"what the channels of {path or type(model).__name__} ({type(module).__name__}) are is "
            "not known: models of Llama's and BERT's kind can be sliced"
        )
    return role if own == "weight" else Role(role.rows, None)


def _cut(parameter: nn.Parameter, rows: Tensor | None, columns: Tensor | None) -> nn.Parameter:
    with torch.no_grad():
        x = parameter.detach()
        for axis, index in enumerate((rows, columns)):
            if index is not None:
                x = x.index_select(axis, index.to(x.device))
    return nn.Parameter(x.clone(), requires_grad=parameter.requires_grad)


def _is_nested(given: Indices | Sequence[Indices]) -> bool:
    if isinstance(given, Tensor):
        return given.dim() == 2
    return len(given) > 0 and not isinstance(given[0], int) and getattr(given[0], "ndim", 1) > 0


def _rows(
    kind: str, given: Indices | Sequence[Indices] | None, depth: int, count: int
) -> list[Tensor]:
    """The indices of each block."""
    if given is None:
        return [torch.arange(count)] * depth
    nested = _is_nested(given)
    if nested and (kind == "hidden" or len(given) != depth):
        wanted = "one list" if kind == "hidden" else f"one list, or one for each of {depth} blocks"
        raise ValueError(f"expected {wanted} of {kind}, got {len(given)}")
    rows = [_checked(kind, each, count) for each in (given if nested else [given] * depth)]
    if len({len(each) for each in rows}) > 1:
        raise ValueError(
            f"every block must keep as many {kind}, got {sorted({len(each) for each in rows})}"
        )
    return rows


def _checked(kind: str, given: Indices, count: int) -> Tensor:
    index = torch.as_tensor(given, dtype=torch.int64).cpu()
    if index.dim() != 1 or index.numel() == 0:
        raise ValueError(f"at least one of {count} {kind} has to stay")
    if not 0 <= int(index.min()) <= int(index.max()) < count:
        raise ValueError(f"{kind} are 0 to {count - 1}, got {int(index.min())} {int(index.max())}")
    if index.unique().numel() != index.numel():
        raise ValueError(f"{kind} to keep were named twice")
    return index


def _groups(heads: Tensor, size: int) -> Tensor:
    """The groups of `size` heads that these are of, in their order."""
    groups = heads // size
    kept = groups.unique_consecutive()
    each = len(heads) // len(kept)
    whole = kept.unique().numel() == kept.numel() and torch.equal(
        groups, kept.repeat_interleave(each)
    )
    if not whole:
        raise ValueError(
            f"heads share keys and values in groups of {size}: keep them group by group, as many "
            f"of each, got {heads.tolist()}"
        )
    return kept


def _units(heads: Tensor, size: int) -> Tensor:
    """The channels of these heads."""
    return (heads[:, None] * size + torch.arange(size)).flatten()
