"""Errors at the command line: one line and an exit code, a traceback only where it is asked for."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable


class UsageError(ValueError):
    """The command line itself is wrong; nothing was started."""


def exit_code(action: Callable[[], object], *, traceback_wanted: bool = False) -> int:
    """Run `action` and return what it returns if that is an int, else 0; for an exception one
    line on stderr and 2 (usage), 130 (interrupted) or 1 (anything else)."""
    try:
        result = action()
    except KeyboardInterrupt:
        print("stillhouse: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if traceback_wanted:
            traceback.print_exc()
        else:
            print(f"stillhouse: error: {one_line(error)}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    return result if isinstance(result, int) else 0


def one_line(error: Exception) -> str:
    """What went wrong in one line, with the extra to install where a package is missing."""
    if isinstance(error, ModuleNotFoundError) and error.name and "stillhouse" not in error.name:
        return f"the package {error.name} is missing: pip install 'stillhouse[train,cli,plots]'"
    text = " ".join(str(error).split())
    # A KeyError or an assertion without text would print as nothing.
    named = isinstance(error, (ValueError, TypeError, OSError, RuntimeError)) and text
    return text if named else f"{type(error).__name__}: {text} (--debug shows where)"
