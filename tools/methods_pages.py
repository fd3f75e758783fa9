"""Write docs/methods/<domain>.md, a page of each domain's methods, or `--check` them.

Everything on them is the methods' own: the catalog, the docstrings, and what docs/claims.md says
was measured.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import re
import sys
from pathlib import Path

from stillhouse.methods.catalog import METHODS, Method
from stillhouse.recipes.runner import signature

ROOT = Path(__file__).resolve().parents[1]
PAGES = ROOT / "docs" / "methods"
CLAIMS = ROOT / "docs" / "claims.md"

HEAD = """# Methods: {domain}

{summary} This page is written by `make docs` from the docstrings, which
`stillhouse methods <id>` prints too; `stillhouse run <id>` measures a method on real data. A method
with a check mark under "trainer" is a `--method` of `stillhouse distill`.

"""


def domains() -> list[str]:
    """The domains that have methods, in the catalog's order."""
    return list(dict.fromkeys(method.domain for method in METHODS.values()))


def page(domain: str) -> str:
    """The page of one domain."""
    module = importlib.import_module(f"stillhouse.methods.{domain}")
    methods = [method for method in METHODS.values() if method.domain == domain]
    table = ["| id | method | paper | kind | kernels | trainer |", "|---|---|---|---|---|---|"]
    for method in methods:
        cells = (
            f"[{method.id}](#{method.id})",
            method.title,
            f"[{method.arxiv}](https://arxiv.org/abs/{method.arxiv})",
            method.kind,
            ", ".join(method.kernels) or "none",
            "✓" if method.objective else "",
        )
        table.append("| " + " | ".join(cells) + " |")
    head = HEAD.format(domain=domain, summary=inspect.getdoc(module))
    parts = [head + "\n".join(table) + "\n", *map(section, methods)]
    shared = getattr(module, "standard", None)
    if shared is not None:
        names = [name for name in vars(shared) if name.endswith(("_loss", "_source"))]
        parts += [f"## Standard losses\n\n{markdown(inspect.getdoc(shared))}\n"]
        parts += [entry(name, getattr(shared, name)) for name in names]
    return "\n".join(parts)


def section(method: Method) -> str:
    """One method: what it is, what was measured, its names."""
    module = method.load()
    title, _, rest = inspect.getdoc(module).partition("\n")
    names = ", ".join(f"`{name}`" for name in method.names)
    lines = [
        f'## <a id="{method.id}"></a>{method.title}',
        "",
        f"**`{method.id}`**, arXiv [{method.arxiv}](https://arxiv.org/abs/{method.arxiv}). {title}",
        "",
        f"`from {method.module.rpartition('.')[0]} import` {names}",
        "",
        markdown(rest.strip("\n")),
        "",
        *measured(method),
    ]
    lines += ["", *(entry(name, getattr(module, name)) for name in method.names)]
    return "\n".join(lines)


def measured(method: Method) -> list[str]:
    """The method's row of docs/claims.md, as a list."""
    text = CLAIMS.read_text(encoding="utf-8") if CLAIMS.exists() else ""
    row = re.search(rf"^\| \[{re.escape(method.id)}\]\([^)]*\)(.*)\|$", text, re.MULTILINE)
    if row is None:
        return [f"Not measured yet: `stillhouse run {method.id}`."]
    claims, seeds, seconds, date, machine = (x.strip() for x in row[1].strip(" |").split(" | "))
    conditions = f"{seeds} seeds in {seconds} s, {date}, {machine}"
    return [f"**Measured** ({conditions}):", "", *(f"- {x}" for x in claims.split("<br>"))]


def entry(name: str, item: object) -> str:
    """A public name: its signature and its docstring."""
    text = markdown(inspect.getdoc(item))
    return f"### `{name}`\n\n```python\n{signature(name, item)}\n```\n\n{text}\n"


def markdown(doc: str) -> str:
    """A docstring: what is indented is an equation or an example, and becomes a block."""
    lines: list[str] = []
    block: list[str] = []

    def close() -> None:
        while block and not block[-1]:
            block.pop()
        if block:
            language = "python" if block[0].startswith(">>>") else "text"
            blank = [""] if lines and lines[-1] else []
            lines.extend([*blank, f"```{language}", *block, "```", ""])
            block.clear()

    for line in doc.splitlines():
        if line.startswith("    ") or (block and not line):
            block.append(line[4:])
        else:
            close()
            lines.append(line)
    close()
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip("\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--check", action="store_true", help="fail where a page differs")
    options = parser.parse_args()
    PAGES.mkdir(parents=True, exist_ok=True)
    differ = []
    for domain in domains():
        path, text = PAGES / f"{domain}.md", page(domain)
        if not options.check:
            scratch = path.with_suffix(".part")
            scratch.write_text(text, encoding="utf-8")
            scratch.replace(path)
        elif not path.exists() or path.read_text(encoding="utf-8") != text:
            differ.append(str(path.relative_to(ROOT)))
    if differ:
        print(f"{', '.join(differ)} differs: run make docs", file=sys.stderr)
    return 1 if differ else 0


if __name__ == "__main__":
    raise SystemExit(main())
