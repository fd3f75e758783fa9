"""Texts of Python's own library to continue: some that repeat themselves, code, prose."""

from __future__ import annotations

import bisect
import http
import inspect
import textwrap
import token

from stillhouse import data

REPETITIVE, CODE, PROSE, OWN = "repetitive", "code", "prose", "given"


def texts() -> dict[str, list[str]]:
    """Two texts of each kind, long enough to be cut to a prompt.

    The prose is of `held_out_docs`, so that a table counted in the others has not seen it.
    """
    statuses = [
        f'{{"code": {each.value}, "name": "{each.name}", "phrase": "{each.phrase}"}},'
        for each in http.HTTPStatus
    ]
    names = [f"{name} = {number}" for number, name in sorted(token.tok_name.items())]
    return {
        REPETITIVE: ["\n".join(statuses), "\n".join(names)],
        CODE: [inspect.getsource(textwrap.TextWrapper), inspect.getsource(bisect)],
        PROSE: held_out_docs()[:2],
    }


def held_out_docs(share: float = 0.08) -> list[str]:
    """What training of `stdlib-docs` holds out, the longest first."""
    records = data.read("stdlib-docs")
    return sorted((records[n]["text"] for n in data.holdout(records, share)[1]), key=len)[::-1]


def corpus(source: str, share: float = 0.08) -> list[str]:
    """The texts of a table: all of `source`, but for what `held_out_docs` are."""
    records = data.read(source)
    numbers = range(len(records))
    if source == "stdlib-docs":
        numbers = data.holdout(records, share)[0]
    return [plain(records[number]) for number in numbers]


def plain(record: dict) -> str:
    """The text of a record of any layout."""
    if "messages" in record:
        return "\n".join(each["content"] for each in record["messages"])
    return record["text"] if "text" in record else f"{record['prompt']}\n{record['response']}"
