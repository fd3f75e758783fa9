"""Behind `stillhouse methods`, `stillhouse run` and `make claims`."""

import inspect
import math
import re
import textwrap
import time
from pathlib import Path

from stillhouse.methods.catalog import METHODS, Method, find
from stillhouse.progress import time_left
from stillhouse.report import Report, claim_row, machine, markdown_table, today, write_atomically

# A claim is something a reader can check over coffee: seconds for one recipe, two cores.
BUDGET = 120.0
SEEDS = 3
COLUMNS = ("method", "claims", "seeds", "seconds", "date", "machine")  # of docs/claims.md


def run(
    id: str,
    seeds: int | None = None,
    *,
    budget: float | None = None,
    directory: str | Path = "runs",
) -> Report:
    """Runs the recipe of a method with seeds 0 .. seeds - 1; prints its tables and leaves
    `<directory>/<id>/report.json` with one PNG a plot.

    budget: no seed is begun that would, going by the longest so far, end after so many seconds;
    the first one is in any case. Without `seeds` they are as many of three as fit into two minutes.
    A claim that does not hold is recorded like any other. Raises ValueError for an unknown id and
    for seeds < 1.
    """
    method = find(id)
    if budget is None:
        budget = BUDGET if seeds is None else math.inf
    seeds = SEEDS if seeds is None else seeds
    if seeds < 1:
        raise ValueError(f"expected at least one seed, got {seeds}")
    report = Report(id, Path(directory) / id)
    method.load_recipe().run(report, range(seeds), budget)
    report.value("seconds", {"total": report.elapsed})
    report.save()
    held = sum(claim["holds"] for claim in report.claims)
    print(
        f"{held} of {len(report.claims)} claims hold, seeds {report.seeds}, "
        f"{report.elapsed:.0f} s on {machine()}"
    )
    return report


def claims(
    seeds: int | None = None,
    *,
    start_with: str | None = None,
    document: str | Path = "docs/claims.md",
    directory: str | Path = "runs",
) -> None:
    """Runs every recipe, those of the catalog before `start_with` left out, and rewrites
    `document` after each: one row a method, with date and machine. The rows of methods that were
    not run stay what they were.

    Raises ValueError for an unknown id, and passes on what a recipe raises: what was measured
    before it is in the document.
    """
    document = Path(document)
    document.parent.mkdir(parents=True, exist_ok=True)
    methods = list(METHODS.values())
    first = methods.index(find(start_with)) if start_with else 0
    rows = _rows(document)
    begin = time.monotonic()
    for done, method in enumerate(methods[first:]):
        spent, left = time.monotonic() - begin, len(methods) - first - done
        rest = f", {time_left(spent / done * left)}" if done else ""
        print(f"\n==> {method.id} ({first + done + 1} of {len(methods)}{rest})", flush=True)
        report = run(method.id, seeds, directory=directory)
        rows[method.id] = _document_row(method, report)
        kept = [rows[each] for each in METHODS if each in rows]
        write_atomically(document, (CLAIMS_HEAD + markdown_table(kept) + "\n").encode())
    print(f"\n{document}")


def _rows(document: Path) -> dict[str, dict[str, str]]:
    """The rows of an earlier run, by method."""
    rows = {}
    text = document.read_text(encoding="utf-8") if document.exists() else ""
    for line in text.splitlines():
        if line.startswith("| ["):
            cells = [cell.strip() for cell in line.strip("| ").split(" | ")]
            rows[line[3 : line.index("]")]] = dict(zip(COLUMNS, cells, strict=True))
    return rows


def show(id: str | None = None, domain: str | None = None) -> None:
    """Prints the catalog, or a domain's part of it, or one method: what it is, its equation,
    defaults and an example. Raises ValueError for an unknown id or domain."""
    if id is None:
        domains = list(dict.fromkeys(method.domain for method in METHODS.values()))
        if domain is not None and domain not in domains:
            raise ValueError(f"no domain {domain!r}: expected one of {', '.join(domains)}")
        chosen = [each for each in METHODS.values() if domain in (None, each.domain)]
        print(markdown_table([_catalog_row(method) for method in chosen]))
        return
    method = find(id)
    module = method.load()
    print(f"{method.title}  [{method.domain}, {method.kind}]")
    print(f"https://arxiv.org/abs/{method.arxiv}")
    print(f"from {method.module.rpartition('.')[0]} import {', '.join(method.names)}")
    print(f"stillhouse run {method.id}\n\n{inspect.getdoc(module)}")
    for name in method.names:
        item = getattr(module, name)
        print(f"\n{signature(name, item)}\n")
        print(textwrap.indent(inspect.getdoc(item), "    "))


def signature(name: str, item: object, width: int = 100) -> str:
    """How a public name is called; a parameter a line where one line is too narrow."""
    found = inspect.signature(item)
    text = _tidy(f"{name}{found}")
    if len(text) <= width:
        return text
    lines, star = [], False
    for parameter in found.parameters.values():
        star |= parameter.kind is inspect.Parameter.VAR_POSITIONAL
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and not star:
            star = True
            lines.append("    *,")
        lines.append(f"    {_tidy(str(parameter))},")
    returned = text.rpartition(" -> ")[2] if found.return_annotation is not found.empty else ""
    return "\n".join([f"{name}(", *lines, f") -> {returned}" if returned else ")"])


def _tidy(text: str) -> str:
    """A default that is a function by its name alone."""
    return re.sub(r"<function (\S+) at 0x[0-9a-f]+>", r"\1", text)


CLAIMS_HEAD = """# Claims

Each method's recipe measures what its paper says, scaled down to minutes on real data. This page is
written by `make claims`; `stillhouse run <id>` repeats one row. A claim that does not hold stays in
the table. A number of several seeds is listed seed by seed, and a claim holds if it holds on each.

"""


def _document_row(method: Method, report: Report) -> dict[str, str]:
    lines = []
    for claim in report.claims:
        row = claim_row(claim)
        lines.append(f"{row['holds']}: {row['claim']}: {row['measured']} {row['bound']}")
    return {
        "method": f"[{method.id}](https://arxiv.org/abs/{method.arxiv})",
        "claims": "<br>".join(lines),
        "seeds": str(len(report.seeds)),
        "seconds": f"{report.elapsed:.0f}",
        "date": today(),
        "machine": machine(),
    }


def _catalog_row(method: Method) -> dict[str, str]:
    return {
        "id": method.id,
        "method": method.title,
        "arXiv": method.arxiv,
        "domain": method.domain,
        "kind": method.kind,
        "kernels": ", ".join(method.kernels),
        "names": ", ".join(method.names),
    }
