"""Write the measured tables of README.md from bench/results.csv, or `--check` that they agree.

Everything between `<!-- measured: NAME -->` and `<!-- end -->` is generated; NAME is a form of the
divergence family, or `kinds`. All cells of the CSV are shown, those where we lose in bold.
"""

from __future__ import annotations

import argparse
import csv
import re
import sys
from collections import defaultdict
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


def kinds(rows: list[dict[str, str]]) -> str:
    """Every kind beside forward KL and beside its eager form."""
    places: dict[tuple, dict[str, dict]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        if row["family"] == "kinds" and row["median_ms"]:
            cell = places[context(row)][row["kind"]].setdefault((row["form"], row["dtype"]), {})
            cell[row["provider"]] = row
    parts = []
    for (machine, cpu, level, threads, torch), found in places.items():
        every = [r for cells in found.values() for cell in cells.values() for r in cell.values()]
        columns = sorted({key for cells in found.values() for key in cells})
        shape = f"{every[0]['rows']} x {every[0]['columns']}"
        days = sorted({row["date"] for row in every})
        when = " to ".join(dict.fromkeys([days[0], days[-1]]))
        title = f"{cpu} ({level}), {machine}, {threads} threads, torch {torch}, {shape}, {when}"
        heads = [f"{form} {dtype}" for form, dtype in columns]
        lines = ["| " + " | ".join(["kind", *heads]) + " |", "|" + "---|" * (len(heads) + 1)]
        for kind in sorted(found):
            cells = []
            for column in columns:
                cell = found[kind].get(column, {})
                median = {name: float(row["median_ms"]) for name, row in cell.items()}
                if {OURS, "forward_kl", "eager"} <= median.keys():
                    ours = median[OURS]
                    cells.append(
                        f"{ours / median['forward_kl']:.2f}, {times(median['eager'] / ours)}"
                    )
                else:
                    cells.append("")
            lines.append("| " + " | ".join([f"`{kind}`", *cells]) + " |")
        parts.append("\n".join([f"{title}:", "", *lines]))
    return "\n\n".join(parts) + "\n" if parts else "Nothing has been measured yet.\n"


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
        lambda m: m[1] + (kinds(rows) if m[2] == "kinds" else tables(m[2], rows)) + m[4], text
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
