"""Debian's package index: names, sections, dependencies and descriptions, as apt has them."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from stillhouse.data.packages import DataUnavailable

LISTS = Path("/var/lib/apt/lists")
APT_HELPER = Path("/usr/lib/apt/apt-helper")  # it reads what apt has compressed, however


@dataclass(frozen=True)
class DebianPackage:
    """One package: `summary` is its description in a line, `description` the long text, "" where
    apt has not fetched translations; `depends` the names it needs, alternatives left out."""

    name: str
    section: str
    summary: str
    description: str
    depends: tuple[str, ...]


def debian_packages(lists: str | Path | None = None) -> list[DebianPackage]:
    """The packages of the largest index that apt holds (bookworm: some 63,400), sorted by name.

    lists: apt's folder of indexes, /var/lib/apt/lists where it is None. The long descriptions come
    from `Translation-en` there, which `apt-get -o Acquire::Languages=en update` fetches.
    Raises DataUnavailable where there is no apt or no index.
    """
    folder = LISTS if lists is None else Path(lists)
    indexes = [path for path in folder.glob("*_Packages*") if not path.name.endswith(".diff_Index")]
    if not indexes or not APT_HELPER.exists():
        raise DataUnavailable(
            f"no package index of Debian in {folder}: run apt-get update (on Debian or Ubuntu)"
        )
    largest = max(indexes, key=lambda path: (path.stat().st_size, path.name))
    archive = largest.name.partition("_binary-")[0]
    long = {}
    for path in sorted(folder.glob(f"{archive}_i18n_Translation-en*")):
        for record in _records(path):
            lines = record.get("Description-en", "").split("\n")[1:]
            paragraphs = ("" if line.strip() == "." else line.strip() for line in lines)
            long[record.get("Description-md5")] = "\n".join(paragraphs)
    packages = {}
    for record in _records(largest):
        packages[record["Package"]] = DebianPackage(
            name=record["Package"],
            section=record.get("Section", ""),
            summary=record.get("Description", "").partition("\n")[0],
            description=long.get(record.get("Description-md5"), ""),
            depends=_names(record.get("Depends", "")),
        )
    return [packages[name] for name in sorted(packages)]


def _names(depends: str) -> tuple[str, ...]:
    """The packages of a Depends field, each once, without versions, architectures, alternatives."""
    clauses = (each for each in depends.split(",") if each.strip() and "|" not in each)
    return tuple(dict.fromkeys(each.split()[0].partition(":")[0] for each in clauses))


def _records(path: Path) -> list[dict[str, str]]:
    """The stanzas of an index: field to value, continuation lines kept in it."""
    read = subprocess.run([APT_HELPER, "cat-file", path], capture_output=True, check=False)
    if read.returncode:
        reason = read.stderr.decode(errors="replace").strip().replace("\n", " ")
        raise DataUnavailable(f"apt cannot read {path}: {reason}; run apt-get update")
    stanzas = read.stdout.decode("utf-8", "replace").split("\n\n")
    return [dict(FIELD.findall(stanza)) for stanza in stanzas if stanza.strip()]


FIELD = re.compile(r"^([A-Za-z0-9-]+): *(.*(?:\n[ \t].*)*)", re.MULTILINE)
