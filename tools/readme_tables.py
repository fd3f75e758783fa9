"""Write the measured tables of README.md from bench/results.csv, or `--check` that they agree.

Everything between `<!-- measured: NAME -->` and `<!-- end -->` is generated; NAME is a form of the
divergence family, or another family. All cells of the CSV are shown, those where we lose in bold.
"""

from __future__ import annotations

import argparse
import csv
import re
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
RESULTS = ROOT / "bench" / "results.csv"
REGION = re.compile(r"(<!-- measured: (\w+) -->\n)(.*?)(<!-- end -->)", re.S)
OURS, FLOOR = "stillhouse", "floor"
PEERS = ("torch.compile", "rough torch.compile", "eager", "rough eager", "trl")
VERSUS = tuple(f"vs {peer}" for peer in PEERS)
HEADER = ("kind", "dtype", "N x V", "ours, ms", *VERSUS, "of the floor", "extra MiB")


def times(value: float) -> str:
    """How many times as fast we are; bold where that is slower."""
    text = f"{value:.2f}x" if value < 10 else f"{value:.0f}x"
    return f"**{text}**" if value < 1 else text


def context(row: dict[str, str]) -> tuple[str, ...]:
    """The columns that must agree for two rows to stand in one table."""
    return tuple(row[name] for name in ("machine", "cpu", "level", "threads", "torch"))


def memory(cell: dict[str, dict[str, str]]) -> str:
    """Peak memory beyond inputs and gradient: ours, torch.compile's and eager's."""
    values = [cell.get(name, {}).get("extra_mib", "") for name in (OURS, "torch.compile", "eager")]
    return " / ".join(f"{float(value):.1f}" if value else "-" for value in values)


def line(cell: dict[str, dict[str, str]]) -> str:
    """One row of a table."""
    own = cell[OURS]
    median = {name: float(row["median_ms"]) for name, row in cell.items() if row["median_ms"]}
    ratios = [times(median[p] / median[OURS]) if p in median else "" for p in PEERS]
    parts = [own["kind"], own["dtype"], f"{own['rows']} x {own['columns']}", f"{median[OURS]:.3g}"]
    parts += [*ratios, f"{median[OURS] / median[FLOOR]:.2f}x", memory(cell)]
    return "| " + " | ".join(parts) + " |"


def tables(form: str, rows: list[dict[str, str]]) -> str:
    """The tables of one form, one for each machine and torch."""
    places: dict[tuple, dict[tuple, dict]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        if row["family"] == "divergence" and row["form"] == form:
            cell = (row["kind"], row["dtype"], int(row["columns"]), int(row["rows"]))
            places[context(row)][cell][row["provider"]] = row
    parts = []
    for (machine, cpu, level, threads, torch), cells in places.items():
        whole = {key: cell for key, cell in cells.items() if {OURS, FLOOR} <= cell.keys()}
        if not whole:
            continue
        days = sorted({row["date"] for cell in whole.values() for row in cell.values()})
        when = " to ".join(dict.fromkeys([days[0], days[-1]]))
        title = f"{cpu} ({level}), {machine}, {threads} threads, torch {torch}, {when}"
        bars = "|" + "---|" * len(HEADER)
        lines = [line(whole[key]) for key in sorted(whole)]
        parts.append("\n".join([f"{title}:", "", "| " + " | ".join(HEADER) + " |", bars, *lines]))
    return "\n\n".join(parts) + "\n" if parts else "Nothing has been measured yet.\n"


def by_place(rows: list[dict[str, str]], family: str, make: Callable[..., list[str]]) -> str:
    """A table for each machine and torch: `make` gives the lines of one from its rows."""
    places: dict[tuple, list[dict]] = defaultdict(list)
    for row in rows:
        if row["family"] == family and row["median_ms"]:
            places[context(row)].append(row)
    parts = []
    for (machine, cpu, level, threads, torch), found in places.items():
        days = sorted({row["date"] for row in found})
        when = " to ".join(dict.fromkeys([days[0], days[-1]]))
        title = f"{cpu} ({level}), {machine}, {threads} threads, torch {torch}"
        parts.append("\n".join([f"{title}, {when}:", "", *make(found)]))
    return "\n\n".join(parts) + "\n" if parts else "Nothing has been measured yet.\n"


def markdown(header: list[str], body: list[list[str]]) -> list[str]:
    """Lines of a table."""
    return ["| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *body)]


def by_cell(rows: list[dict], *names: str) -> dict[tuple, dict[str, dict]]:
    """Providers' rows of each cell, in the order of these columns."""
    cells: dict[tuple, dict] = defaultdict(dict)
    for row in rows:
        key = tuple(int(row[n]) if row[n].isdigit() else row[n] for n in names)
        cells[key][row["provider"]] = row
    return {key: cells[key] for key in sorted(cells)}


def medians(cell: dict[str, dict]) -> dict[str, float]:
    """Milliseconds of each provider."""
    return {name: float(row["median_ms"]) for name, row in cell.items()}


def against(baselines: tuple[str, ...], under: str) -> Callable[..., list[str]]:
    """Kinds by form and dtype: our time as a multiple of `under`'s, then how many times as fast as
    the baseline it is."""

    def make(rows: list[dict]) -> list[str]:
        columns = sorted({(row["form"], row["dtype"]) for row in rows})
        found = by_cell(rows, "kind", "form", "dtype")
        body = []
        for kind in sorted({key[0] for key in found}):
            cells = []
            for column in columns:
                ms = medians(found.get((kind, *column), {}))
                if not {OURS, under, *baselines} <= ms.keys():
                    cells.append("")
                    continue
                ratios = [times(ms[name] / ms[OURS]) for name in baselines]
                cells.append(", ".join([f"{ms[OURS] / ms[under]:.2f}", *ratios]))
            body.append([f"`{kind}`", *cells])
        return markdown(["kind", *(f"{form} {dtype}" for form, dtype in columns)], body)

    return make


def linear(rows: list[dict]) -> list[str]:
    """Time over the floor, rivals, and memory."""
    body = []
    for (form, dtype, kind, count, columns), cell in by_cell(
        rows, "form", "dtype", "kind", "rows", "columns"
    ).items():
        ms = medians(cell)
        if not {OURS, FLOOR} <= ms.keys():
            continue
        rivals = [times(ms[n] / ms[OURS]) if n in ms else "" for n in ("torch.compile", "eager")]
        ours = f"{ms[OURS]:.3g}"
        over = f"{ms[OURS] / ms[FLOOR]:.2f}"
        body.append([form, dtype, kind, f"{count} x {columns}", ours, over, *rivals, memory(cell)])
    header = ["form", "dtype", "kind", "N x V", "ours, ms", "over the products"]
    return markdown([*header, "vs torch.compile", "vs eager", "extra MiB"], body)


def step(rows: list[dict]) -> list[str]:
    """Seconds and memory of a training step with and without logits."""
    body = []
    for (count,), cell in by_cell(rows, "rows").items():
        ms, whole = medians(cell), "whole logits"
        if not {OURS, FLOOR, whole} <= ms.keys():
            continue
        loss = [(ms[name] - ms[FLOOR]) / ms[FLOOR] for name in (whole, OURS)]
        memories = [f"{float(cell[name]['extra_mib'] or 'nan'):.0f}" for name in (whole, OURS)]
        seconds = [f"{ms[name] / 1000:.2f}" for name in (whole, OURS)]
        body.append([str(count), *seconds, *(f"{100 * x:.0f}%" for x in loss), *memories])
    header = ["tokens", "s before", "s now", "heads and loss before", "now"]
    return markdown([*header, "extra MiB before", "now"], body)


def shards(rows: list[dict]) -> list[str]:
    """What it costs to read a stored teacher, and to write one beside the teacher's forward."""
    sys.path.insert(0, str(README.parent))
    from bench.grid import Cell
    from bench.shards import CAPTURE, DECODE, row_bytes

    body = []
    for (form, kind, count, columns), cell in by_cell(
        rows, "form", "kind", "rows", "columns"
    ).items():
        ms = medians(cell)
        if not {OURS, FLOOR} <= ms.keys():
            continue
        size = rate = ""
        if form == DECODE:
            size = row_bytes(Cell("shards", kind, form, "fp32", int(count), int(columns)))
            rate = f"{size * int(count) / ms[OURS] / 1e3:.0f}"
        over = f"{ms[OURS] / ms[FLOOR]:.2f}" if form == CAPTURE else ""
        body.append([form, kind, str(count), f"{ms[OURS]:.3g}", str(size), rate, over])
    header = ["", "values", "rows", "ms", "bytes a row", "MB/s of one thread"]
    return markdown([*header, "over the forward alone"], body)


def transport(rows: list[dict]) -> list[str]:
    """Entropic transport beside its rivals: how many times as fast we are."""
    body = []
    for (form, kind, count, columns), cell in by_cell(
        rows, "form", "kind", "rows", "columns"
    ).items():
        ms = medians(cell)
        if not {OURS, FLOOR} <= ms.keys():
            continue
        rivals = [name for name in ms if name not in (OURS, FLOOR)]
        versus = ", ".join(f"{name} {times(ms[name] / ms[OURS])}" for name in rivals)
        problems = f"{int(count) // int(columns)} of {columns} x {columns}"
        floor = f"{ms[OURS] / ms[FLOOR]:.2f}x" if form == "large" else ""
        body.append([form, kind, problems, f"{ms[OURS]:.3g}", versus, floor])
    return markdown(
        ["", "gradient", "problems", "ms", "against", "of reads and exponentials"], body
    )


def rvq(rows: list[dict]) -> list[str]:
    """Residual quantizers beside their rivals: how many times as fast we are, and the memory."""
    body = []
    names = "form", "kind", "columns", "rows"
    for (form, kind, columns, count), cell in by_cell(rows, *names).items():
        ms = medians(cell)
        if not {OURS, FLOOR} <= ms.keys():
            continue
        rivals = [name for name in ms if name not in (OURS, FLOOR)]
        versus = ", ".join(f"{name} {times(ms[name] / ms[OURS])}" for name in rivals)
        extra = [cell[name].get("extra_mib", "") for name in (OURS, *rivals)]
        held = " / ".join(f"{float(value):.0f}" if value else "-" for value in extra)
        shape, floor = f"{count} x {columns}", f"{ms[OURS] / ms[FLOOR]:.2f}x"
        body.append([form, kind, shape, f"{ms[OURS]:.3g}", versus, floor, held])
    return markdown(["", "", "N x D", "ms", "against", "of bare products", "extra MiB"], body)


def fdb(rows: list[dict]) -> list[str]:
    """Dual-binary weights beside torch's dense layers, and beside what must be read or computed."""
    body = []
    names = "kind", "form", "dtype", "rows"
    for (kind, form, dtype, count), cell in by_cell(rows, *names).items():
        ms = medians(cell)
        if not {OURS, FLOOR} <= ms.keys():
            continue
        rivals = [name for name in ms if name not in (OURS, FLOOR)]
        versus = ", ".join(f"{name} {times(ms[name] / ms[OURS])}" for name in rivals)
        floor = f"{ms[OURS] / ms[FLOOR]:.2f}x"
        body.append([f"{kind}, {form}", dtype, str(count), f"{ms[OURS]:.3g}", versus, floor])
    return markdown(["", "x", "rows of x", "ms", "against", "of the floor"], body)


def tree(rows: list[dict]) -> list[str]:
    """Verification of draft trees beside a softmax of all rows, a loop, and a read of few."""
    body = []
    for (form, columns, kind, count), cell in by_cell(
        rows, "form", "columns", "kind", "rows"
    ).items():
        ms = medians(cell)
        if not {OURS, FLOOR} <= ms.keys():
            continue
        rivals = [name for name in ms if name not in (OURS, FLOOR)]
        versus = [f"{name} {times(ms[name] / ms[OURS])}" for name in rivals]
        over, shape = f"{ms[OURS] / ms[FLOOR]:.2f}x", f"{count} x {columns}"
        body.append([form, kind, shape, f"{ms[OURS]:.3g}", ", ".join(versus), over])
    return markdown(["", "mode", "rows x V", "ms", "against", "of a read of visited rows"], body)


def draft(rows: list[dict]) -> list[str]:
    """Drafters without a model: one draft, and what its tree alone takes."""
    body = []
    for (kind, nodes), cell in by_cell(rows, "kind", "columns").items():
        ms = medians(cell)
        if not {OURS, FLOOR} <= ms.keys():
            continue
        body.append([kind, str(nodes), *(f"{1000 * ms[name]:.0f}" for name in (OURS, FLOOR))])
    return markdown(["", "nodes", "us a draft", "of which its tree"], body)


FAMILIES = {
    "draft": draft,
    "tree": tree,
    "fdb": fdb,
    "rvq": rvq,
    "transport": transport,
    "step": step,
    "shards": shards,
    "kinds": against(("eager",), "forward_kl"),
    "sparse": against(("eager",), "dense"),
    "linear": linear,
}


def region(name: str, rows: list[dict[str, str]]) -> str:
    """What stands in the region of this name."""
    return by_place(rows, name, FAMILIES[name]) if name in FAMILIES else tables(name, rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--check", action="store_true", help="fail where README.md differs")
    options = parser.parse_args()
    rows: list[dict[str, str]] = []
    if RESULTS.exists():
        with RESULTS.open(newline="") as file:
            rows = list(csv.DictReader(file))
    text = README.read_text()
    if not REGION.search(text):
        print("README.md has no <!-- measured: ... --> region to fill", file=sys.stderr)
        return 1
    made = REGION.sub(
        lambda m: m[1] + region(m[2], rows) + m[4],
        text,
    )
    if options.check:
        if made != text:
            hint = "run tools/readme_tables.py"
            print(f"README.md does not agree with bench/results.csv: {hint}", file=sys.stderr)
        return int(made != text)
    scratch = README.with_suffix(".part")
    scratch.write_text(made)
    scratch.replace(README)
    return 0


if __name__ == "__main__":
    sys.exit(main())
