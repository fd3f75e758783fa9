"""Print how large the project is, folder by folder; name long files, and fail on overlong lines.

Lines are physical lines. The comment share is the part of the non-blank lines that carry a comment
or belong to a docstring.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("csrc", "python/stillhouse", "bench", "tools", "tests")
CPP = {".h", ".cpp", ".cu", ".cuh"}
LONGEST_FILE = 400  # above it a concept is hiding; a table of tests may be longer
LONGEST_LINE = 110


def python_comments(text: str) -> set[int]:
    """Numbers of the lines of Python source that hold a comment or a docstring."""
    lines = {
        token.start[0]
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
        if token.type == tokenize.COMMENT
    }
    scopes = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, scopes) and ast.get_docstring(node, clean=False) is not None:
            lines.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return lines


def cpp_comments(text: str) -> set[int]:
    """Numbers of the lines of C++ or CUDA source that hold a comment."""
    # Strings come first in the alternation, so that a "//" inside one is not taken for a comment.
    pattern = re.compile(r'"(?:\\.|[^"\\\n])*"|//[^\n]*|/\*.*?\*/', re.S)
    lines: set[int] = set()
    for match in pattern.finditer(text):
        if not match.group().startswith('"'):
            first = text.count("\n", 0, match.start()) + 1
            lines.update(range(first, first + match.group().count("\n") + 1))
    return lines


@dataclass
class Tally:
    """What is counted for a folder."""

    files: int = 0
    lines: int = 0
    filled: int = 0
    comments: int = 0
    longest_file: tuple[int, str] = (0, "-")
    longest_line: tuple[int, str] = (0, "-")
    long_files: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def add(self, path: Path) -> None:
        """Count one file."""
        name, text = path.relative_to(ROOT).as_posix(), path.read_text()
        rows = text.splitlines()
        width = max(map(len, rows), default=0)
        filled = {number for number, row in enumerate(rows, 1) if row.strip()}
        find = cpp_comments if path.suffix in CPP else python_comments
        self.files += 1
        self.lines += len(rows)
        self.filled += len(filled)
        self.comments += len(filled & find(text))
        self.longest_file = max(self.longest_file, (len(rows), name))
        self.longest_line = max(self.longest_line, (width, name))
        if len(rows) > LONGEST_FILE and not name.startswith("tests/"):
            self.long_files.append(f"{name} ({len(rows)} lines)")
        if width > LONGEST_LINE:
            self.faults.append(f"{name}: a line of {width} columns, the limit is {LONGEST_LINE}")

    def merge(self, other: Tally) -> None:
        """Add another folder's counts to these."""
        for name in ("files", "lines", "filled", "comments", "long_files", "faults"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.longest_file = max(self.longest_file, other.longest_file)
        self.longest_line = max(self.longest_line, other.longest_line)

    def row(self, folder: str) -> str:
        """The folder's line of the table."""
        share = 100 * self.comments / max(self.filled, 1)
        long_file = f"{self.longest_file[0]:5d} {self.longest_file[1]}"
        counts = f"{self.files:5d} {self.lines:7d} {share:7.0f}%"
        return f"{folder:32s} {counts} {self.longest_line[0]:7d}  {long_file}"


def folder_of(path: Path) -> str:
    """The folder a file is counted under: two levels below csrc and tests, three below python."""
    parts = path.relative_to(ROOT).parts[:-1]
    return "/".join(parts[: 3 if parts[0] == "python" else 2])


def main() -> int:
    tallies: dict[str, Tally] = {}
    for top in FOLDERS:
        for path in sorted((ROOT / top).rglob("*")):
            if path.suffix in CPP | {".py"} and path.is_file():
                tallies.setdefault(folder_of(path), Tally()).add(path)
    total = Tally()
    columns = f"{'files':>5} {'lines':>7} {'comments':>8} {'widest':>7}  longest file"
    print(f"{'folder':32s} {columns}")
    for folder, tally in tallies.items():
        print(tally.row(folder))
        total.merge(tally)
    print(total.row("total"))
    if total.long_files:
        print(f"longer than {LONGEST_FILE} lines: {', '.join(total.long_files)}")
    for fault in total.faults:
        print(f"too wide: {fault}", file=sys.stderr)
    return 1 if total.faults else 0


if __name__ == "__main__":
    sys.exit(main())
