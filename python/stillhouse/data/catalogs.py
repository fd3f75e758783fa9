"""Parallel text: what installed programs say in English and in another language."""

from __future__ import annotations

import gettext
from pathlib import Path

from stillhouse.data.packages import DataUnavailable

LOCALE = Path("/usr/share/locale")


def catalog_pairs(
    language: str, *, words: tuple[int, int] = (1, 1000), locale: str | Path | None = None
) -> list[tuple[str, str]]:
    """(English message, its translation) of the gettext catalogs of installed programs, sorted,
    each English message once; lists of names (the iso catalogs) are left out.

    language: as its folder is called, such as "de" or "zh_CN". words: fewest and most words of the
    English message. locale: the folder of languages, /usr/share/locale where it is None.
    Raises DataUnavailable where there is no catalog of the language.
    """
    folder = (LOCALE if locale is None else Path(locale)) / language / "LC_MESSAGES"
    pairs: dict[str, str] = {}
    for path in sorted(folder.glob("*.mo")):
        if path.name.startswith("iso_"):
            continue
        try:
            with path.open("rb") as file:
                # The module looks messages up one by one; all of them are in this dict.
                messages = gettext.GNUTranslations(file)._catalog
        except (UnicodeDecodeError, OSError):
            continue  # older catalogs do not say which encoding they are in
        for english, translated in messages.items():
            # A tuple is one of a message's plural forms; the first is the singular's.
            if isinstance(english, tuple):
                english, form = english
                if form:
                    continue
            if english and translated and words[0] <= len(english.split()) <= words[1]:
                pairs.setdefault(english, translated)
    if not pairs:
        raise DataUnavailable(
            f"no message catalogs in {folder}: install programs with their translations (Debian: "
            "apt install gettext git, with locales not excluded in /etc/dpkg)"
        )
    return sorted(pairs.items())
