"""Which row predicts which token: against the teacher's own rows, one sequence at a time."""

import doctest
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from stillhouse import ops
from stillhouse.methods.language import (
    CrossArchitectureLoss,
    Seq2SeqRows,
    align_seq2seq,
    seq2seq_alignment,
    seq2seq_rows,
)
from stillhouse.train import paired
from stillhouse.train.forward import FrozenTeacher, row_forward

VOCABULARY, START, END = 40, 1, 2
SOURCE = [[5, 6, 7, 8, 9], [10], [11, 12, 13]]
TARGET = [[20, END], [21, 22, 23, END], [24, 25, END]]
CHAT = [[30, *each, 31, 32] for each in SOURCE]  # a template around each


# The indices --------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["right", "left"])
def test_rows_four_to_six_predict_tokens_five_to_seven(side):
    student, teacher, inputs = align_seq2seq(
        [[11, 12, 13, 14, 15]], [[16, 17, 18]], decoder_start_token_id=START, side=side
    )
    ids = inputs.teacher["input_ids"][0]
    assert teacher.row.tolist() == [4, 5, 6]
    assert teacher.target.tolist() == ids[5:8].tolist() == [16, 17, 18]
    assert student.row.tolist() == [0, 1, 2]
    assert inputs.student["decoder_input_ids"].tolist() == [[START, 16, 17]]


def test_prefixes_on_the_left_end_in_one_column():
    """As the authors have it: targets in columns S to S + T - 1, predicted from S - 1 on."""
    _, teacher, inputs = align_seq2seq(SOURCE, TARGET, decoder_start_token_id=START, side="left")
    assert inputs.teacher["input_ids"].tolist() == [
        [5, 6, 7, 8, 9, 20, 2, 0, 0],
        [0, 0, 0, 0, 10, 21, 22, 23, 2],
        [0, 0, 11, 12, 13, 24, 25, 2, 0],
    ]
    assert (teacher.row % 9).tolist() == [4, 5, 4, 5, 6, 7, 4, 5, 6]
    assert inputs.teacher["attention_mask"][1].tolist() == [0] * 4 + [1] * 5
    mask = inputs.teacher["attention_mask"]
    counted = (mask.cumsum(1) - 1).clamp(min=0)
    assert torch.equal(inputs.teacher["position_ids"][mask.bool()], counted[mask.bool()])


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("prefix", [None, CHAT])
def test_every_token_of_a_target_has_one_row_and_nothing_else_has(side, prefix):
    student, teacher, inputs = align_seq2seq(
        SOURCE, TARGET, decoder_start_token_id=START, teacher_prefix=prefix, side=side
    )
    paired(student, teacher)
    for index in (student, teacher):
        for number, target in enumerate(TARGET):  # the end-of-text token too
            assert index.target[index.sequence == number].tolist() == target
    flat = inputs.teacher["input_ids"].flatten()
    assert torch.equal(flat[teacher.row + 1], teacher.target)
    width = inputs.student["decoder_input_ids"].shape[1]
    assert (student.row // width).tolist() == student.sequence.tolist()
    assert inputs.student["attention_mask"].sum(1).tolist() == list(map(len, SOURCE))


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("which", ["llama", "gpt2"])
@pytest.mark.parametrize("prefix", [None, CHAT])
def test_a_batch_reads_what_single_calls_say(which, side, prefix, make_teacher, make_student):
    teacher = make_teacher(which)
    rows = Seq2SeqRows(make_student(), teacher, side=side)
    _, found, _ = rows(SOURCE, TARGET, teacher_prefix=prefix)
    log_p = found.logits.log_softmax(-1).gather(1, found.index.target[:, None])[:, 0]
    expected = []
    for x, y in zip(prefix or SOURCE, TARGET, strict=True):
        logits = teacher(torch.tensor([x + y])).logits[0].log_softmax(-1)
        expected += [logits[len(x) - 1 + t, token] for t, token in enumerate(y)]
    assert (log_p - torch.stack(expected)).abs().max() < 1e-5


def test_wrong_positions_would_show(make_teacher):
    """Learned positions that count the padding say something else: the check above can fail."""
    _, index, inputs = align_seq2seq(SOURCE, TARGET, decoder_start_token_id=START, side="left")
    teacher = FrozenTeacher(make_teacher("gpt2"))
    right = teacher(inputs.teacher, index).logits
    plain = {name: inputs.teacher[name] for name in ("input_ids", "attention_mask")}
    assert (teacher(plain, index).logits - right).abs().max() > 1e-2


class Chain(nn.Module):
    """An encoder-decoder that reads nothing: its logits are a table's row of the last token."""

    def __init__(self, table):
        super().__init__()
        self.config = SimpleNamespace(is_encoder_decoder=True, decoder_start_token_id=START)
        self.head = nn.Linear(*table.shape, bias=False)
        self.head.weight.data = table.T.clone()

    def get_output_embeddings(self):
        return self.head

    def get_encoder(self):
        return lambda input_ids, attention_mask: (input_ids[..., None].float(),)

    def forward(self, attention_mask, decoder_input_ids, encoder_outputs, use_cache):
        hidden = nn.functional.one_hot(decoder_input_ids, VOCABULARY).float()
        return SimpleNamespace(logits=self.head(hidden))


def test_the_same_law_on_both_sides_has_no_divergence():
    """A teacher that says the table's row of its last token, behind sources that end with the
    student's start token."""
    table = 3 * torch.randn(VOCABULARY, VOCABULARY)
    rows = Seq2SeqRows(Chain(table), lambda ids: table[ids])
    source = [[*each, START] for each in SOURCE]
    loss = CrossArchitectureLoss(alpha=1.0)
    assert loss(*rows(source, TARGET))["loss"].abs() < 1e-6
    # Another first row is another law: one row of nine differs here.
    assert loss(*rows(SOURCE, TARGET))["loss"] > 1e-2


@pytest.mark.parametrize("which", ["ours", "t5", "bart"])
def test_the_student_s_rows_are_those_of_single_calls(which, make_student):
    student = make_student(which).eval()
    found, nothing, _ = Seq2SeqRows(student)(SOURCE, TARGET)
    assert nothing is None
    start = student.config.decoder_start_token_id
    expected = [
        student(
            input_ids=torch.tensor([x]), decoder_input_ids=torch.tensor([[start, *y[:-1]]])
        ).logits[0]
        for x, y in zip(SOURCE, TARGET, strict=True)
    ]
    torch.testing.assert_close(found.logits, torch.cat(expected), atol=1e-5, rtol=0)


@pytest.mark.parametrize("which", ["ours", "t5", "bart"])
def test_labels_are_read_on_the_same_memory(which, make_student, monkeypatch):
    student = make_student(which).eval()
    rows, calls = Seq2SeqRows(student), []
    encode = student.get_encoder()

    def counted(**inputs):
        calls.append(1)
        return encode(**inputs)

    monkeypatch.setattr(student, "get_encoder", lambda: counted)
    gold = [[26, END], [27, END], [28, 29, END]]
    _, _, batch = rows(SOURCE, TARGET, gold=gold)
    assert len(calls) == 1
    alone, _, _ = rows(SOURCE, gold)
    torch.testing.assert_close(batch["gold"].logits, alone.logits)
    assert batch["gold"].index.target.tolist() == [token for each in gold for token in each]
    batch["gold"].logits.sum().backward()
    assert student.get_output_embeddings().weight.grad.abs().max() > 0


def test_the_teacher_is_read_without_dropout_and_without_gradient(make_student, make_teacher):
    teacher = make_teacher("gpt2").train()
    rows = Seq2SeqRows(make_student(), teacher)
    first, again = (rows(SOURCE, TARGET)[1].logits for _ in range(2))
    assert torch.equal(first, again)
    assert not first.requires_grad
    assert teacher.training
    assert not any(each.requires_grad for each in teacher.parameters())


def test_divergences_take_the_heads(make_student, make_teacher):
    """Hidden states and heads, not logits, go to the op."""
    student, teacher, _ = Seq2SeqRows(make_student("t5"), make_teacher())(SOURCE, TARGET)
    assert student.head.linear() is not None
    assert teacher.head.linear() is not None
    kl = ops.divergence(student.logits, teacher.logits, "forward_kl").mean()
    found = CrossArchitectureLoss(1.0)(student, teacher, {})["loss"]
    torch.testing.assert_close(found, kl)


# Bad input ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": [[5], []]}, "source 1 must be token ids"),
        ({"target": [[], [5]]}, "target 0 must be token ids"),
        ({"source": []}, "there is no source"),
        ({"source": [[[5]], [6]]}, r"source 0 must be token ids \[n\], n >= 1, got shape \(1, 1\)"),
        ({"target": [[5]]}, "2 sources, 1 targets and 2 prefixes"),
        ({"teacher_prefix": [[5]]}, "2 sources, 2 targets and 1 prefixes"),
        ({"teacher_prefix": [[5], []]}, "teacher_prefix 1 must be"),
        ({"longest": (9, 1)}, "target 1 has 2 tokens, at most 1 are allowed"),
        ({"longest": (1, 9)}, "source 0 has 2 tokens, at most 1 are allowed"),
        ({"side": "middle"}, "side must be 'right' or 'left'"),
        ({"vocab_size": 9}, "a target has token 9, the vocabulary 9"),
    ],
)
def test_bad_pairs_raise_in_one_line(changes, message):
    options = dict(source=[[5, 6], [7]], target=[[8], [9, 2]]) | changes
    with pytest.raises(ValueError, match=message) as raised:
        align_seq2seq(**options, decoder_start_token_id=START)
    assert "\n" not in str(raised.value)


def test_tokens_that_the_teacher_does_not_know_become_unknown():
    """The first id outside is `vocab_size` itself."""
    student, teacher, inputs = align_seq2seq(
        [[5]],
        [[30, 31, 32, END]],
        decoder_start_token_id=START,
        vocab_size=31,
        unknown_token_id=3,
    )
    assert student.target.tolist() == teacher.target.tolist() == [30, 3, 3, END]
    assert inputs.teacher["input_ids"].tolist() == [[5, 30, 3, 3, END]]
    assert inputs.student["decoder_input_ids"].tolist() == [[START, 30, 3, 3]]


def test_bad_models_raise(make_student, make_teacher, make_tokenizer):
    with pytest.raises(ValueError, match="LlamaForCausalLM is not an encoder-decoder"):
        Seq2SeqRows(make_teacher())
    with pytest.raises(ValueError, match="function takes no position_ids"):
        Seq2SeqRows(make_student(), lambda ids: torch.zeros(1), side="left")
    with pytest.raises(ValueError, match="Chain takes no position_ids"):
        Seq2SeqRows(make_student(), Chain(torch.eye(VOCABULARY)), side="left")
    one, other = make_tokenizer(), make_tokenizer()
    Seq2SeqRows(make_student(), tokenizers=(one, other))
    other.add_tokens(["<new>"])
    with pytest.raises(ValueError, match="tokenizer mismatch"):
        Seq2SeqRows(make_student(), tokenizers=(one, other))


def test_tokenizers_of_one_size_with_other_strings_raise(make_student, make_tokenizer):
    one, other = make_tokenizer(), make_tokenizer()
    one.add_tokens(["<this>"])
    other.add_tokens(["<that>"])
    assert len(one) == len(other)
    with pytest.raises(ValueError, match="the first that differs is"):
        Seq2SeqRows(make_student(), tokenizers=(one, other))


def test_a_plain_teacher_is_read_on_the_right(make_student):
    """`row_forward` of a callable sees ids alone, so nothing may stand before them."""
    table = torch.randn(VOCABULARY, VOCABULARY)
    _, found, _ = Seq2SeqRows(make_student(), lambda ids: table[ids])(SOURCE, TARGET)
    last = [token for x, y in zip(SOURCE, TARGET, strict=True) for token in [x[-1], *y[:-1]]]
    assert torch.equal(found.logits, table[last])
    _, index, inputs = align_seq2seq(SOURCE, TARGET, decoder_start_token_id=START)
    assert torch.equal(
        row_forward(lambda ids: table[ids])(inputs.teacher, index).logits, table[last]
    )


@pytest.mark.parametrize("module", [seq2seq_alignment, seq2seq_rows])
def test_examples(module):
    outcome = doctest.testmod(module)
    assert outcome.attempted
    assert not outcome.failed
