"""Behind `stillhouse methods`, `stillhouse run` and `make claims`."""

import inspect
import math
import textwrap
from pathlib import Path

from stillhouse.methods.catalog import METHODS, Method, find
from stillhouse.report import Report, claim_row, machine, markdown_table, today, write_atomically

# A claim is something a reader can check over coffee: seconds for one recipe, two cores.
BUDGET = 120.0


def run(
    id: str, seeds: int = 3, *, budget: float = math.inf, directory: str | Path = "runs"
) -> Report:
    """Runs the recipe of a method with seeds 0 .. seeds - 1; prints its tables and leaves
    `<directory>/<id>/report.json` with one PNG a plot.

    budget: seconds after which no further seed is begun. A claim that does not hold is recorded
    like any other. Raises ValueError for an unknown id and for seeds < 1.
    """
    method = find(id)
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
    seeds: int = 3,
    *,
    document: str | Path = "docs/claims.md",
    directory: str | Path = "runs",
) -> None:
    """Runs every recipe and rewrites `document`: one row a method, with date and machine."""
    rows = []
    for method in METHODS.values():
        report = run(method.id, seeds, budget=BUDGET, directory=directory)
        rows.append(_document_row(method, report))
    document = Path(document)
    document.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(document, (CLAIMS_HEAD + markdown_table(rows) + "\n").encode())
    print(f"\n{document}")


def show(id: str | None = None) -> None:
    """Prints the catalog, or one method: what it is, its equation, defaults and an example."""
    if id is None:
        print(markdown_table([_catalog_row(method) for method in METHODS.values()]))
        return
    method = find(id)
    module = method.load()
    print(f"{method.title}  [{method.domain}, {method.kind}]")
    print(f"https://arxiv.org/abs/{method.arxiv}")
    print(f"from {method.module.rpartition('.')[0]} import {', '.join(method.names)}")
    print(f"stillhouse run {method.id}\n\n{inspect.getdoc(module)}")
    for name in method.names:
        item = getattr(module, name)
        print(f"\n{name}{inspect.signature(item)}\n")
        print(textwrap.indent(inspect.getdoc(item), "    "))


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
