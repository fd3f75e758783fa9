"""Families x shapes x dtypes x providers, one CSV row each.

All providers of a cell run interleaved in one process, on buffers that rotate; the row holds the
median and the quartiles. Peak memory is measured afterwards, each provider in a process of its own.
"""

from __future__ import annotations

import argparse
import csv
import gc
import os
import statistics
import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from . import (
    calls,
    divergence,
    draft,
    fdb,
    kinds,
    linear,
    machine,
    measure,
    rvq,
    shards,
    sparse,
    step,
    transport,
    tree,
)
from .grid import Cell

_FAMILIES = (divergence, kinds, linear, sparse, shards, transport, rvq, fdb, draft, tree, step)
FAMILIES = {family.NAME: family for family in _FAMILIES}
CELL = ("family", "kind", "form", "dtype", "rows", "columns", "provider")
RESULT = ("median_ms", "quarter_ms", "three_quarters_ms", "rounds", "extra_mib", "note")
CONTEXT = ("machine", "cpu", "level", "threads", "torch", "stillhouse", "date")
COLUMNS = (*CELL, *RESULT, *CONTEXT)
# A new measurement replaces an old one that agrees in all of these.
KEY = (*CELL, "cpu", "level", "threads", "torch")


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line; errors end the process with one line."""
    parser = argparse.ArgumentParser(
        prog="stillhouse bench", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    add = parser.add_argument
    add("--family", action="append", choices=sorted(FAMILIES))
    add("--kind", action="append", help="such as forward_kl; default: all")
    add("--form", action="append", help="such as row or loss; default: all")
    add("--dtype", action="append", help="such as fp32 or bf16; default: all")
    add("--shape", action="append", metavar="ROWSxCOLUMNS", help="default: the family's own list")
    add("--provider", action="append", help="default: all")
    add("--rounds", type=int, default=15, help="timed calls of each provider (default %(default)s)")
    add("--seconds", type=float, default=60, help="time after which a cell has had enough rounds")
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--threads", type=int, default=torch.get_num_threads())
    add("--no-memory", action="store_true", help="leave out the peak-memory probes")
    add("--csv", type=Path, help="merge the rows into this file")
    add("--list", action="store_true", help="print the cells and stop")
    options = parser.parse_args(argv)
    if options.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {options.rounds}")
    try:
        options.shape = [tuple(map(int, text.split("x"))) for text in options.shape or ()]
        if any(len(shape) != 2 or min(shape) < 1 for shape in options.shape):
            raise ValueError
    except ValueError:
        parser.error("--shape wants two positive numbers, such as 512x49152")
    try:
        read(options.csv) if options.csv else None  # before an hour of measuring, not after
    except ValueError as error:
        parser.error(str(error))
    options.cells = select(parser, options)
    return options


def select(parser: argparse.ArgumentParser, options: argparse.Namespace) -> list[Cell]:
    """The cells that the filters leave; shapes given by hand need not be on the family's list."""
    cells = [cell for name in options.family or FAMILIES for cell in FAMILIES[name].grid()]
    if options.shape:
        own = dict.fromkeys((cell.family, cell.kind, cell.form, cell.dtype) for cell in cells)
        cells = [Cell(*rest, *shape) for shape in options.shape for rest in own]
    for name in ("kind", "form", "dtype"):
        wanted, known = getattr(options, name), {getattr(cell, name) for cell in cells}
        # "jsd" is enough for "jsd(0.5)"
        matches = {
            text: {k for k in known if k.split("(")[0] == text or k == text}
            for text in wanted or ()
        }
        for text, found in matches.items():
            if not found:
                parser.error(f"--{name} {text}: not one of {', '.join(sorted(known))}")
        if wanted:
            cells = [cell for cell in cells if getattr(cell, name) in set.union(*matches.values())]
    names = {provider.name for family in FAMILIES.values() for provider in family.PROVIDERS}
    for text in options.provider or ():
        if text not in names:
            parser.error(f"--provider {text}: not one of {', '.join(sorted(names))}")
    return cells


def measure_cell(cell: Cell, options: argparse.Namespace, progress: Progress) -> list[dict]:
    """The CSV rows of one cell, one for each provider and one for the floor."""
    family = FAMILIES[cell.family]
    providers = [p for p in family.PROVIDERS if p.name in (options.provider or [p.name])]
    with torch.device(options.device):
        shown = {p.name: {"note": p.refuses(cell) or ""} for p in providers}
    shown[divergence.FLOOR] = {}
    pause = getattr(family, "PAUSE_SECONDS", measure.PAUSE_SECONDS)
    progress.say("preparing")
    runners = getattr(family, "runners", None) or partial(calls.runners, family)
    timed = runners(cell, providers, options.device)
    times = measure.interleaved(
        timed,
        rounds=options.rounds,
        seconds=options.seconds,
        pause=pause if options.device == "cpu" else 0,
        on_round=lambda done: progress.say(f"round {done}/{options.rounds}"),
    )
    # The buffers go before the probes start: those bring their own.
    timed.clear()
    gc.collect()
    for name, seconds in times.items():
        milliseconds = [1000 * value for value in seconds]
        spread = statistics.quantiles(milliseconds, n=4) if len(seconds) > 1 else milliseconds * 3
        low, _, high = spread
        shown[name] |= {
            "median_ms": f"{statistics.median(milliseconds):.4g}",
            "quarter_ms": f"{low:.4g}",
            "three_quarters_ms": f"{high:.4g}",
            "rounds": len(seconds),
        }
        if name != divergence.FLOOR and not options.no_memory:
            progress.say(f"memory of {name}")
            own = getattr(family, "memory_call", None)
            probe = own or partial(calls.memory_call, family.__name__)
            peak = measure.peak_memory(
                *(probe, cell, name, options.threads, options.device), device=options.device
            )
            shown[name]["extra_mib"] = f"{peak / 2**20:.2f}"
    context = asdict(cell) | machine.describe(options.device)
    return [context | {"provider": name} | values for name, values in shown.items()]


def show(cell: Cell, rows: list[dict]) -> None:
    """A cell's table: time, how many times as long as ours and as the floor it takes, memory."""
    median = {row["provider"]: float(row["median_ms"]) for row in rows if row.get("median_ms")}
    ours, floor = median.get(divergence.OURS), median[divergence.FLOOR]
    print(f"{cell}")
    for row in rows:
        name = row["provider"]
        if name not in median:
            print(f"  {name:20s} not run: {row['note']}")
            continue
        quartiles = f"[{row['quarter_ms']}, {row['three_quarters_ms']}]"
        beside = f"{median[name] / ours:6.2f} x ours" if ours else ""
        memory = f"{row['extra_mib']:>8s} MiB extra" if row.get("extra_mib") else ""
        spent = f"{median[name]:9.3f} ms {quartiles:20s} {median[name] / floor:7.2f} x floor"
        print(f"  {name:20s} {spent}  {beside}  {memory}".rstrip())
    sys.stdout.flush()


def read(path: Path) -> dict[tuple[str, ...], dict]:
    """The rows of an earlier CSV by their key; ValueError when it has other columns than ours."""
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(f"{path} has other columns than this benchmark writes: move it away")
        return {tuple(row[name] for name in KEY): row for row in reader}


def merge(path: Path, rows: list[dict]) -> None:
    """Put rows into the CSV in place of older ones with the same key, by way of a rename."""
    kept = read(path)
    for row in rows:
        kept[tuple(str(row[name]) for name in KEY)] = row
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(path.name + ".part")
    with scratch.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(kept.values())
    os.replace(scratch, path)


class Progress:
    """Where the run stands: cell, rate, time left. Rewrites its line on a terminal."""

    def __init__(self, cells: list[Cell]):
        self.cells, self.done, self.begin = cells, 0, time.perf_counter()
        self.terminal = sys.stderr.isatty()

    def say(self, doing: str) -> None:
        """Say what is being done to the present cell; silent in a log, where lines pile up."""
        if self.terminal:
            cell = self.cells[self.done]
            print(
                f"\r\033[K[{self.done + 1}/{len(self.cells)}] {cell}: {doing}",
                end="",
                file=sys.stderr,
            )

    def next(self) -> None:
        """Count a cell as done, and print rate and estimate."""
        self.done += 1
        minutes = (time.perf_counter() - self.begin) / 60
        spent = sum(cell.cost for cell in self.cells[: self.done])
        left = sum(cell.cost for cell in self.cells[self.done :])
        state = f"[{self.done}/{len(self.cells)}] {self.done / minutes:.2g} cells/min"
        if left:
            state += f", about {minutes * left / spent:.0f} min left"
        print(("\r\033[K" if self.terminal else "") + state, file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    options = parse(sys.argv[1:] if argv is None else argv)
    if options.list:
        print(*options.cells, sep="\n")
        return 0
    torch.set_num_threads(options.threads)
    conditions = machine.describe(options.device)
    print(*(f"{name}: {value}" for name, value in conditions.items()), sep="\n")
    progress = Progress(options.cells)
    for cell in options.cells:
        rows = measure_cell(cell, options, progress)
        if progress.terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
        show(cell, rows)
        if options.csv:
            merge(options.csv, rows)
        progress.next()
    return 0
