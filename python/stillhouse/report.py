"""What a run leaves behind: `report.json`, one PNG a curve, and the same tables in the terminal.

A recipe or a job fills a `Report`; methods and ops never see one. A *claim* is a measurement with
the bound it was held against, kept whether it holds or not.
"""

import datetime
import json
import math
import operator
import os
import platform
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

RELATIONS = {">=": operator.ge, "<=": operator.le}
PACKAGES = ("stillhouse", "torch", "numpy", "transformers")


class Report:
    """Collects values, claims, tables and curves of one run; `save()` writes and prints them.

    name: what ran, e.g. "taid". directory: created when missing; `save()` overwrites what an
    earlier run of the same name left there.
    """

    def __init__(self, name: str, directory: str | Path):
        self.name, self.directory = name, Path(directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        self.values: dict[str, object] = {}
        self.claims: list[dict] = []
        self.tables: dict[str, list[dict]] = {}
        self.curves: dict[str, dict] = {}
        self.pictures: dict[str, dict] = {}
        self.seeds: list[int] = []
        self.started = time.monotonic()

    @property
    def elapsed(self) -> float:
        """Seconds since this report was opened."""
        return time.monotonic() - self.started

    def within(self, budget: float, seeds: Sequence[int]) -> Iterator[int]:
        """Yields the seeds for which `budget` seconds of this report last: the first one always,
        another one while as much time is left as the longest so far took. `seeds` of the report
        are those that were begun."""
        longest = 0.0
        for index, seed in enumerate(seeds):
            if index and self.elapsed + longest > budget:
                return
            began = time.monotonic()
            self.seeds.append(seed)
            yield seed
            longest = max(longest, time.monotonic() - began)

    def value(self, key: str, value: object) -> None:
        """A top-level entry of report.json: a number, string, list, dict or tensor."""
        if key in {"name", "date", "machine", "versions", "claims", "tables", "curves", "pictures"}:
            raise ValueError(f"{key!r} is written by the report itself: choose another key")
        self.values[key] = value

    def claim(
        self,
        statement: str,
        measured: float | Sequence[float],
        reference: float | Sequence[float],
        margin: float = 0.0,
        seeds: Sequence[int] | None = None,
        holds: bool | None = None,
        *,
        relation: str = ">=",
    ) -> bool:
        """Records whether `measured relation reference + margin`, on every seed; returns it.

        measured, reference: one number, or one a seed in the order of `seeds` (default: those that
        `within` yielded). relation: ">=" (more is better) or "<=". holds: overrides the comparison
        where a claim is of another form. A NaN never holds.
        """
        if relation not in RELATIONS:
            raise ValueError(f"expected relation '>=' or '<=', got {relation!r}")
        seeds = list(seeds if seeds is not None else self.seeds or [0])
        rows = [_plain(side) for side in (measured, reference)]
        columns = [side if isinstance(side, list) else [side] * len(seeds) for side in rows]
        if not seeds or any(len(column) != len(seeds) for column in columns):
            raise ValueError(
                f"expected one number, or one for each of {len(seeds)} seeds (at least 1), "
                f"got {len(columns[0])} measured and {len(columns[1])} reference"
            )
        if holds is None:
            holds = all(
                None not in pair and RELATIONS[relation](pair[0], pair[1] + margin)
                for pair in zip(*columns, strict=True)
            )
        self.claims.append(
            {
                "statement": statement,
                "measured": rows[0],
                "relation": relation,
                "reference": rows[1],
                "margin": margin,
                "seeds": seeds,
                "holds": bool(holds),
            }
        )
        return bool(holds)

    def table(self, name: str, rows: Sequence[Mapping[str, object]]) -> None:
        """Rows of one table: mappings column -> value, printed in the order of the first row."""
        self.tables[name] = [dict(row) for row in rows]

    def curve(
        self,
        name: str,
        x: Sequence[float] | Mapping[str, Sequence[float]],
        ys: Mapping[str, Sequence[float]],
        *,
        xlabel: str = "step",
        ylabel: str = "",
        points: bool = False,
    ) -> None:
        """One plot `<name>.png`. ys: label -> values; x: shared by all, or label -> values.
        points: dots instead of lines."""
        _file_name("curve", name)
        xs = x if isinstance(x, Mapping) else dict.fromkeys(ys, x)
        series = {label: (_plain(xs[label]), _plain(y)) for label, y in ys.items()}
        for label, (x_values, y_values) in series.items():
            if len(x_values) != len(y_values):
                raise ValueError(
                    f"curve {name!r}, {label!r}: {len(x_values)} x values, {len(y_values)} y values"
                )
        self.curves[name] = dict(series=series, xlabel=xlabel, ylabel=ylabel, points=points)

    def picture(
        self,
        name: str,
        panels: Mapping[str, Sequence[Sequence[float]]],
        *,
        xlabel: str = "",
        ylabel: str = "",
        xstep: float = 1.0,
    ) -> None:
        """One picture `<name>.png`, such as spectrograms: panels one above another in the same
        colours. panels: label -> values of each column, rows from below, that is [columns, rows];
        they stay out of report.json. xstep: width of a column in units of `xlabel`."""
        _file_name("picture", name)
        rows = {label: _plain(values) for label, values in panels.items()}
        for label, columns in rows.items():
            heights = {len(each) if isinstance(each, list) else 0 for each in columns}
            if len(heights) != 1 or not min(heights):
                raise ValueError(
                    f"picture {name!r}, {label!r}: expected columns of one height, at least one"
                )
            if not any(value is not None for column in columns for value in column):
                raise ValueError(f"picture {name!r}, {label!r}: no value is finite")
        self.pictures[name] = dict(panels=rows, xlabel=xlabel, ylabel=ylabel, xstep=xstep)

    def save(self) -> Path:
        """Writes report.json and the plots, prints tables and claims; returns the JSON's path."""
        path = self.directory / "report.json"
        content = {
            "name": self.name,
            "date": today(),
            "machine": machine(),
            "versions": versions(),
            **self.values,
            "claims": self.claims,
            "tables": self.tables,
            "curves": self.curves,
            "pictures": {name: list(each["panels"]) for name, each in self.pictures.items()},
        }
        write_atomically(path, (json.dumps(_plain(content), indent=1) + "\n").encode())
        self._plot()
        tables = dict(self.tables)
        if self.claims:
            tables["claims"] = [claim_row(claim) for claim in self.claims]
        for name, rows in tables.items():
            print(f"\n{self.name}: {name}\n{markdown_table(rows)}")
        print(f"\n{path}")
        return path

    def _plot(self) -> None:
        if not self.curves and not self.pictures:
            return
        try:
            import numpy
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure
        except ImportError:
            # The numbers are in report.json already; a finished run is not thrown away for a plot.
            print("no plots: matplotlib is not installed (pip install 'stillhouse[plots]')")
            return
        for name, curve in self.curves.items():
            figure = Figure(figsize=(7, 4.5), layout="constrained")
            axes = figure.add_subplot(xlabel=curve["xlabel"], ylabel=curve["ylabel"])
            axes.set_title(f"{self.name}: {name}")
            for label, (x, y) in curve["series"].items():
                axes.plot(x, y, "o" if curve["points"] else "-", label=label)
            axes.grid(alpha=0.3)
            axes.legend()
            self._print(name, FigureCanvasAgg(figure))
        for name, picture in self.pictures.items():
            # None stands for what was not finite, and stays blank.
            panels = {
                label: numpy.array(columns, dtype=float).T
                for label, columns in picture["panels"].items()
            }
            figure = Figure(figsize=(7, 1 + 2 * len(panels)), layout="constrained")
            figure.suptitle(f"{self.name}: {name}")
            grid = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
            finite = [each[numpy.isfinite(each)] for each in panels.values()]
            lowest, highest = (getattr(numpy.concatenate(finite), end)() for end in ("min", "max"))
            for axes, (label, values) in zip(grid, panels.items(), strict=True):
                image = axes.imshow(
                    values,
                    origin="lower",
                    aspect="auto",
                    interpolation="nearest",
                    extent=(0, values.shape[1] * picture["xstep"], 0, values.shape[0]),
                    vmin=lowest,
                    vmax=highest,
                )
                axes.set(ylabel=picture["ylabel"], title=label)
            grid[-1].set_xlabel(picture["xlabel"])
            figure.colorbar(image, ax=list(grid))
            self._print(name, FigureCanvasAgg(figure))

    def _print(self, name: str, canvas: object) -> None:
        path = self.directory / f"{name}.png"
        temporary = path.with_suffix(".partial")
        canvas.print_figure(temporary, format="png", dpi=120)
        os.replace(temporary, path)


def claim_row(claim: Mapping) -> dict[str, object]:
    """One recorded claim as a row for `markdown_table`."""
    bound = f"{claim['relation']} {_text(claim['reference'])}"
    if claim["margin"]:
        bound += f" {'+' if claim['margin'] > 0 else '−'} {abs(claim['margin']):g}"
    return {
        "claim": claim["statement"],
        "measured": _text(claim["measured"]),
        "bound": bound,
        "seeds": len(claim["seeds"]),
        "holds": "yes" if claim["holds"] else "NO",
    }


def markdown_table(rows: Sequence[Mapping[str, object]]) -> str:
    """An aligned Markdown table, for terminals and documents alike; columns of the first row."""
    if not rows:
        return "(no rows)"
    cells = [list(rows[0])] + [[_text(row.get(name, "")) for name in rows[0]] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in cells]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def machine() -> str:
    """One line: GPU if there is one, processor, cores this process may use, system."""
    processor = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        names = re.findall(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        processor = names[0] if names else processor
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        processor = f"{torch.cuda.get_device_name()}, {processor}"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{processor}, {cores} cores, {platform.system()} {platform.machine()}"


def versions() -> dict[str, str]:
    """Versions of Python and of the packages a result depends on, those that are loaded."""
    loaded = {name: sys.modules[name] for name in PACKAGES if name in sys.modules}
    # torch's own string carries the build (+cpu, +cu130), which package metadata may drop.
    return {"python": platform.python_version()} | {
        name: str(module.__version__) for name, module in loaded.items()
    }


def today() -> str:
    """The date in UTC, as 2025-12-31."""
    return datetime.datetime.now(datetime.timezone.utc).date().isoformat()


def write_atomically(path: Path, content: bytes) -> None:
    """Writes beside `path` and renames, so that a reader never sees half a file."""
    temporary = path.with_name(path.name + ".partial")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def _file_name(what: str, name: str) -> None:
    if not re.fullmatch(r"[\w-]+", name):
        raise ValueError(
            f"a {what}'s name becomes a file name: expected [A-Za-z0-9_-], got {name!r}"
        )


def _plain(value: object) -> object:
    """Tensors and arrays as lists, and NaN or infinity as None, which is what JSON can say."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, range)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, (bool, int, float, str, type(None))) else str(value)


def _text(value: object) -> str:
    """A table cell: four significant digits, numbers of several seeds separated by blanks."""
    value = _plain(value)
    if isinstance(value, list):
        return " ".join(map(_text, value))
    if isinstance(value, float):
        return f"{value:.4g}"
    return "–" if value is None else str(value).replace("|", "\\|")
