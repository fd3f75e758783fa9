"""Ramps, the protocol of schedules, and maps of layers."""

import pytest
import torch

from stillhouse.methods.language import SinKDLoss, TAIDLoss
from stillhouse.train import Schedule, layer_map, ramp


def test_ramp():
    assert [ramp(step, 5, 0.0, 1.0) for step in range(7)] == [0, 0.2, 0.4, 0.6, 0.8, 1, 1]
    assert ramp(1, 2, 3.0, -1.0) == 1.0
    # The end is the end: 0.1 + (0.7 - 0.1) is not 0.7.
    assert ramp(3, 3, 0.1, 0.7) == 0.7
    assert ramp(0, 0, 2.0, 5.0) == 5.0
    for step, steps in ((-1, 3), (0, -1)):
        with pytest.raises(ValueError, match="steps are counted from 0"):
            ramp(step, steps, 0.0, 1.0)


def test_taid_is_a_schedule():
    objective = TAIDLoss(t_start=0.2, adaptive=False)
    assert isinstance(objective, Schedule)
    assert not isinstance(SinKDLoss(), Schedule)
    for step in (1, 2):
        objective.update({"loss": 1.0}, step, 4)
    assert objective.value == objective.t == pytest.approx(0.6)
    other = TAIDLoss()
    other.load_state_dict(objective.state_dict())
    assert other.value == objective.value


def test_layer_map():
    """Of 12 onto 4 every third; of 12 onto 5 what int(i * 12 / 5) gives."""
    assert layer_map(4, 12) == [(0, 0), (1, 3), (2, 6), (3, 9), (4, 12)]
    assert layer_map(5, 12) == [(i, int(i * 12 / 5)) for i in range(6)]
    assert layer_map(3, 12, "last") == [(0, 0), (1, 10), (2, 11), (3, 12)]
    assert layer_map(2, 6, [4, 6], embeddings=False) == [(1, 4), (2, 6)]
    assert layer_map(3, 3) == layer_map(3, 3, "last") == [(i, i) for i in range(4)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((3, 2), "no more than the teacher's 2, the student has 3"),
        ((0, 2), "at least one block"),
        ((2, 4, "skip"), "how must be even, last or a list of states, got 'skip'"),
        ((2, 4, [1]), "a state for each of 2 blocks, got 1"),
        ((2, 4, [1, 5]), "state 5 does not exist: the teacher has 0 to 4"),
    ],
)
def test_maps_that_cannot_be(arguments, message):
    with pytest.raises(ValueError, match=message):
        layer_map(*arguments)


def test_states_are_counted_in_blocks_passed(llama):
    """The pairs index the tuples of hidden states that models give."""
    student, teacher = llama(2), llama(4)
    ids = torch.arange(5)[None]
    ours, theirs = (m(ids, output_hidden_states=True).hidden_states for m in (student, teacher))
    pairs = layer_map(2, 4)
    assert [ours[s].shape == theirs[t].shape for s, t in pairs] == [True] * 3
    assert pairs[-1] == (len(ours) - 1, len(theirs) - 1)
