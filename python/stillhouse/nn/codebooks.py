"""The tables of a quantizer while it trains: how they begin, follow their rows, and what becomes
of codes that no row is given.

Registered as ops of their own, so that a compiler sees one call each, with what it changes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stillhouse import ops
from stillhouse.nn.kmeans import centres, rows_that_count
from stillhouse.nn.ranks import Ranks

# What `progress` counts, int64 [2] on the CPU: reading it never makes an accelerator wait.
BEGUN, STEPS = 0, 1


def _generator(seed: int, step: int) -> torch.Generator:
    """The same on every process, another one each step."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)


@torch.library.custom_op(
    "stillhouse::rvq_begin_", mutates_args=("tables", "counts", "sums", "progress")
)
def begin_(
    x: Tensor,
    mask: Tensor | None,
    tables: Tensor,
    counts: Tensor,
    sums: Tensor,
    progress: Tensor,
    metric: str,
    iterations: int,
    seed: int,
    synchronize: bool,
) -> None:
    """Once: k-means of the rows [G, N, D], stage by stage of what the stages before have left.

    tables [G, T, K, D], counts [G, T, K], sums like the tables, or empty where none are kept. A
    batch without a row that counts leaves everything to the next one.
    """
    if progress[BEGUN]:
        return
    residual = x.to(tables.dtype)
    counted = rows_that_count(residual, mask)
    ranks = Ranks(synchronize)
    there = counted.sum(-1)
    ranks.sum_(there)
    if not there.all():
        return
    generator = _generator(seed, -1)
    for stage in range(tables.shape[1]):
        words = tables.shape[2], iterations, generator, counted, metric, ranks
        tables[:, stage], counts[:, stage], of_stage = centres(residual, *words)
        if sums.numel():
            sums[:, stage] = of_stage
        if stage + 1 < tables.shape[1]:
            table = tables[:, stage : stage + 1]
            residual = residual - ops.rvq(residual, table, metric=metric).out
    progress[BEGUN] = 1


@torch.library.custom_op(
    "stillhouse::rvq_follow_", mutates_args=("tables", "counts", "sums", "energy", "progress")
)
def follow_(
    x: Tensor,
    codes: Tensor,
    error: Tensor,
    tables: Tensor,
    counts: Tensor,
    sums: Tensor,
    energy: Tensor,
    progress: Tensor,
    decay: float,
    epsilon: float,
    threshold: float,
    seed: int,
    synchronize: bool,
) -> None:
    """A step: counts, sums and energies move by 1 - decay towards those of the batch, tables to
    sums / counts (where sums are kept), and dead codes to rows of the batch. Tables that do neither
    are left out (empty).

    x [G, N, D], codes [G, N, Q], error as `ops.rvq` has them; energy [G, 2, Q], or empty, of rows
    before the first stage and after each, as sums over rows.
    """
    averages = sums.numel() > 0
    known = codes >= 0
    wide = x if x.dtype == counts.dtype else x.to(counts.dtype)
    if averages:
        stages = tables.expand(-1, codes.shape[-1], -1, -1) if tables.shape[1] == 1 else tables
        new_counts, new_sums = ops.rvq_statistics(x, codes, stages[:, : codes.shape[-1]])
    else:
        new_counts, new_sums = _counted(codes, known, counts), sums
    new_energy = energy
    if energy.numel():
        of_rows = torch.linalg.vecdot(wide, wide)[..., None].expand_as(error)
        new_energy = torch.stack([of_rows, error], 1).masked_fill(~known[:, None], 0).sum(2)
    ranks = Ranks(synchronize)
    given = new_energy if energy.numel() else None, new_sums if averages else None
    ranks.sum_(new_counts, *(part for part in given if part is not None))

    share, stages = 1 - decay, codes.shape[-1]
    used = slice(0, new_counts.shape[1])  # a call may have had fewer stages than there are tables
    counts, tables = counts[:, used], tables[:, used] if tables.numel() else tables
    counts.lerp_(new_counts, share)
    if energy.numel():
        energy[:, :, :stages].lerp_(new_energy, share)
    revived = None
    if threshold:
        uniform = counts.mean(-1, keepdim=True)
        dead = counts < threshold * uniform
        # Looking at it must not make an accelerator wait.
        most = int(dead.sum(-1).max()) if x.device.type == "cpu" else dead.shape[-1]
        if most:
            draw = ranks.draw(x.shape[:2], _generator(seed, int(progress[STEPS])))
            keys = draw.to(x.device).masked_fill(~known[..., 0], torch.inf)
            revived = _rows_for(wide, codes, tables, dead, keys, most, ranks)
    if averages:
        sums = sums[:, used]
        sums.lerp_(new_sums, share)
        _move_(tables, counts, sums, epsilon)
    if revived is not None:
        _revive_(tables, counts, sums, uniform, *revived)
    progress[STEPS] += 1


def _counted(codes: Tensor, known: Tensor, counts: Tensor) -> Tensor:
    """[G, T, K]: how many rows each code was given."""
    groups, tables, size = counts.shape
    stages = codes.shape[-1]
    table = torch.arange(stages, device=codes.device) if tables > 1 else codes.new_zeros(stages)
    found = counts.new_zeros(groups, (stages if tables > 1 else 1) * size)
    place = (table * size + codes.clamp(min=0)).flatten(1)
    return found.scatter_add_(1, place, known.flatten(1).to(counts.dtype)).view(groups, -1, size)


def _move_(tables: Tensor, counts: Tensor, sums: Tensor, epsilon: float) -> None:
    """Tables to sums / counts; codes that are hardly used stay where they are."""
    used = counts > epsilon
    share = torch.where(used, 1 / counts.clamp(min=epsilon), 0)[..., None]
    if tables.device.type == "cpu" and used.all():
        torch.mul(sums, share, out=tables)
    else:
        tables.mul_(~used[..., None]).addcmul_(sums, share)


def _rows_for(
    x: Tensor, codes: Tensor, tables: Tensor, dead: Tensor, keys: Tensor, most: int, ranks: Ranks
) -> tuple[Tensor, Tensor, Tensor]:
    """For up to `most` dead codes [G, T, K] of each table what drawn rows are at its stage,
    [G, T, most, D], the codes' numbers and whether they are dead [G, T, most].

    Each row is taken once: of more dead codes than rows some wait.
    """
    count, stages = tables.shape[1], codes.shape[-1]

    def residuals(index: Tensor) -> Tensor:
        """Of rows [G, m] what each stage was given, [G, m, Q * D]."""
        rows = x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))
        of_rows = codes.gather(1, index[..., None].expand(-1, -1, stages))
        given = [rows]
        for stage in range(stages - 1):
            table = tables[:, stage if count > 1 else 0, None]
            given.append(given[-1] - ops.rvq_decode(of_rows[..., stage : stage + 1], table))
        return torch.cat(given, -1)

    rows, known = ranks.lowest(keys, most, residuals)
    rows = rows.unflatten(-1, (stages, x.shape[-1])).transpose(1, 2)  # [G, Q, m, D]
    place = torch.arange(most, device=x.device)
    if count == 1:
        rows = rows[:, place % stages, place][:, None]
    which = dead.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[..., :most]
    return rows, which, dead.gather(-1, which) & (place < known[:, None, None])


def _revive_(
    tables: Tensor,
    counts: Tensor,
    sums: Tensor,
    uniform: Tensor,
    rows: Tensor,
    which: Tensor,
    replaced: Tensor,
) -> None:
    """Puts rows in the place of codes, as if they were used as often as all are on average."""
    as_many = uniform.expand_as(which)
    wide = which[..., None].expand_as(rows)
    counts.scatter_(2, which, torch.where(replaced, as_many, counts.gather(2, which)))
    tables.scatter_(2, wide, torch.where(replaced[..., None], rows, tables.gather(2, wide)))
    if sums.numel():
        new = torch.where(replaced[..., None], rows * as_many[..., None], sums.gather(2, wide))
        sums.scatter_(2, wide, new)


@torch.library.custom_op("stillhouse::rvq_kept", mutates_args=())
def kept(tables: Tensor) -> Tensor:
    """A copy for the backward pass of a step that moves the tables. A plain one would be made
    again by a compiled backward pass, of tables that have moved."""
    return tables.clone()


@kept.register_fake
def _(tables):
    return torch.empty_like(tables)


kept.register_autograd(lambda ctx, d_out: d_out)


@torch.library.custom_op("stillhouse::rvq_depths", mutates_args=())
def depths(
    progress: Tensor, items: int, stages: int, share: float, seed: int, device: torch.device
) -> Tensor:
    """int64 [items]: with a chance of `share` drawn from 1 to `stages`, else all of them. Other
    ones on every process and in every step."""
    rank = torch.distributed.get_rank() if Ranks().many else 0
    generator = _generator(seed + 7_919 * (rank + 1), int(progress[STEPS]))
    depth = torch.randint(1, stages + 1, (items,), generator=generator)
    chosen = torch.rand(items, generator=generator) < share
    return torch.where(chosen, depth, stages).to(device)


@depths.register_fake
def _(progress, items, stages, share, seed, device):
    return torch.empty(items, dtype=torch.int64, device=device)
