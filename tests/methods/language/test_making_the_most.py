"""The recipe's own steps: its text, what its classifier learns from, its claims."""

import math

import pytest
import torch

from stillhouse import data
from stillhouse.recipes.language import conditional_search, hidden_state_optimizer, package_lm
from stillhouse.report import Report
from stillhouse.train import Responses


@pytest.fixture(scope="module")
def text():
    try:
        return package_lm.PackageText()
    except data.DataUnavailable as error:
        pytest.skip(str(error))


def test_no_line_is_seen_and_held_out(text):
    held = {tuple(line) for block in text.held_out for line in block}
    seen = {tuple(line) for line in text.lines}
    assert not held & seen
    assert 0.08 < len(held) / (len(held) + len(seen)) < 0.12
    assert all(line[-1] == package_lm.END and line.count(package_lm.END) == 1 for line in held)


def test_lines_and_names_can_be_read(text):
    line = next(line for line in text.lines if text.names([line]))
    name, _, summary = text.tokenizer.decode(line).partition(":")
    assert text.names([line]) == [text.encode(name + ":")]
    assert text.encode(name + ":" + summary) == line[:-1]
    assert text.names([text.encode("no name")]) == []
    assert text.names([text.encode("x" * 99 + ": much too long")]) == []


def test_documents_are_drawn_from_whole_pieces():
    texts = [list(range(start, start + 700)) for start in range(0, 7000, 700)]
    found = hidden_state_optimizer._documents(texts, seed=0)
    assert found.shape == (hidden_state_optimizer.DOCUMENTS, package_lm.LENGTH)
    assert (found[:, 1:] - found[:, :-1] == 1).all()
    assert ((found[:, 0] % 700) % package_lm.LENGTH == 0).all()
    assert len(found[:, 0].unique()) == len(found)


def test_what_follows_a_token():
    end, most = package_lm.END, conditional_search.CLASSES - 1
    drawn = Responses.of([[7], [8, 9]], [[4, 5, 6, end], [4, 5]])
    row, place, follow = conditional_search._prefixes(drawn)
    assert row.tolist() == [0, 0, 0, 1, 1]
    assert drawn.ids[row, place].tolist() == [4, 5, 6, 4, 5]
    # The second text was cut: nobody knows how it would have gone on.
    assert follow.tolist() == [2, 1, 0, most, most]


def test_three_ways_to_a_length():
    """On a chain whose best texts of one token are known: cut it is the likeliest first token."""
    table = torch.full((2, package_lm.VOCABULARY), -30.0)
    table[0, [1, 2]] = torch.tensor([0.6, 0.4]).log()  # at first

    def step(ids):
        logits = table[:1].expand(len(ids), -1).clone()
        if ids.shape[1]:
            ends = torch.where(ids[:, -1] == 1, 0.1, 0.9)
            logits = torch.full_like(logits, -30.0)
            logits[:, package_lm.END], logits[:, 1] = ends.log(), (1 - ends).log()
        return logits, None

    assert conditional_search._cut(step, 1) == pytest.approx(math.log(0.06), abs=1e-4)
    assert conditional_search._ending(step, 1) == pytest.approx(math.log(0.36), abs=1e-4)


@pytest.mark.parametrize(("worst", "holds"), [(0.97, [True, True]), (0.99, [False, False])])
def test_claims_on_the_cache_take_the_worst_text(tmp_path, worst, holds):
    report = Report("cache", tmp_path)
    report.seeds = [0]
    kinds = {hidden_state_optimizer.IN_DOMAIN: 0.98, "one": worst, "two": 0.5}
    rows = [{"text": kind, "seed": 0, "its ratio": ratio} for kind, ratio in kinds.items()]
    hidden_state_optimizer.claim(report, rows)
    assert [claim["holds"] for claim in report.claims] == holds


@pytest.mark.parametrize(("share", "holds"), [(0.7, True), (0.69, False)])
def test_the_claim_on_lengths(tmp_path, share, holds):
    report = Report("search", tmp_path)
    report.seeds = [0]
    conditional_search.claim(report, [{"seed": 0, "better than a cut beam, share": share}])
    assert report.claims[0]["holds"] == holds
