import numpy as np
import pytest
import torch

from stillhouse.train import supervised_rows
from stillhouse.train.examples import Example, chat_example, collate, encode, pack
from stillhouse.train.forward import RowForward

TURNS = [
    {"role": "system", "content": "brief"},
    {"role": "user", "content": "kiln?"},
    {"role": "assistant", "content": "an oven"},
    {"role": "user", "content": "wash?"},
    {"role": "assistant", "content": "weak beer"},
]


def supervised(example, tokenizer):
    return tokenizer.decode(example.input_ids[example.loss_mask])


def test_pack_by_hand():
    windows = pack([(3, [1, 2, 3]), (5, [4, 5, 6, 7])], 4, separator=0)
    assert [window.input_ids.tolist() for window in windows] == [[1, 2, 3, 0], [4, 5, 6, 7], [0]]
    assert [window.record for window in windows] == [3, 5, 5]
    assert all(window.loss_mask.all() for window in windows)


def test_pack_says_which_document_a_token_is_of():
    documents = [(3, [1, 2, 3]), (5, [4, 5, 6, 7]), (8, [8])]
    windows = pack(documents, 5, separator=0, keep_documents=True)
    found = [window.document_ids.tolist() for window in windows]
    assert found == [[0, 0, 0, 0, 1], [0, 0, 0, 0, 1], [0]]
    assert [window.record for window in windows] == [3, 5, 8]
    assert pack(documents, 5)[0].document_ids is None


def test_prefixes_and_documents_reach_the_batch():
    ids, mask = np.arange(3, dtype=np.int32), np.ones(3, dtype=bool)
    documents = np.asarray([0, 1, 1], dtype=np.int32)
    batch = collate(
        [
            Example(ids, mask, prefix_length=2),
            Example(ids[:2], mask[:2], document_ids=documents[:2]),
            Example(ids, mask),
        ]
    )
    assert batch["prefix_length"].tolist() == [2, 0, 0]
    assert batch["document_ids"].tolist() == [[0, 0, 0], [0, 1, -1], [0, 0, 0]]
    assert not {"prefix_length", "document_ids"} & collate([Example(ids, mask)]).keys()


def test_a_model_is_not_given_them(llama):
    """Only the attention mask that somebody has made of them."""
    ids = np.arange(5, dtype=np.int32)
    example = Example(ids, np.ones(5, dtype=bool), prefix_length=3, document_ids=ids * 0)
    batch = collate([example])
    index = supervised_rows(batch["labels"])
    model = llama(1)
    rows = RowForward(model)(model, batch, index)
    torch.testing.assert_close(rows.logits, model(batch["input_ids"]).logits[0, :-1])


def test_only_the_assistant_is_supervised(tokenizer):
    example = chat_example(TURNS, tokenizer)
    assert supervised(example, tokenizer) == "an oven<|end|>\nweak beer<|end|>\n"
    whole = tokenizer.apply_chat_template(TURNS, tokenize=False)
    assert tokenizer.decode(example.input_ids) == whole


def test_exchanges_that_do_not_fit_are_dropped(tokenizer):
    whole, first = chat_example(TURNS, tokenizer), chat_example(TURNS[:3], tokenizer)
    cut = chat_example(TURNS, tokenizer, max_length=len(whole.input_ids) - 1)
    assert cut.input_ids.tolist() == first.input_ids.tolist()
    assert supervised(cut, tokenizer) == "an oven<|end|>\n"
    # The first exchange is cut, not dropped.
    short = chat_example(TURNS, tokenizer, max_length=len(first.input_ids) - 5)
    assert supervised(short, tokenizer) == "an o"


def test_templates_that_cannot_be_masked(tokenizer):
    rewriting = "{% for m in messages %}{{ messages | length }}{{ m['content'] }}{% endfor %}"
    with pytest.raises(ValueError, match="the chat template rewrites turn 2"):
        chat_example(TURNS, tokenizer, template=rewriting)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        chat_example(TURNS, tokenizer)


def test_prompt_and_response(tokenizer):
    records = [{"prompt": "2+2", "response": "4"}, {"prompt": "long" * 9, "response": "x"}]
    examples = encode(records, [0, 1], tokenizer, 40).examples
    # The second prompt fills the window: no target, no example.
    assert [example.record for example in examples] == [0]
    assert supervised(examples[0], tokenizer) == "4<|end|>\n"
    tokenizer.chat_template = None
    (plain,) = encode(records, [0], tokenizer, 40).examples
    assert tokenizer.decode(plain.input_ids) == "2+24<|end|>"
    assert supervised(plain, tokenizer) == "4<|end|>"


def test_text_is_packed_with_separators(tokenizer):
    records = [{"text": "abc"}, {"text": "unused"}, {"text": "de"}]
    result = encode(records, [0, 2], tokenizer, 4)
    assert [tokenizer.decode(each.input_ids) for each in result.examples] == [
        "abc<|end|>",
        "de<|end|>",
    ]
    assert result.targets == 3 + 2  # nothing predicts the first token of a window


def test_a_batch(batch):
    assert batch["input_ids"].shape == (2, 12)
    assert batch["record"].tolist() == [7, 11]
    assert batch["attention_mask"].sum(1).tolist() == [12, 9]
    assert batch["input_ids"][1, 9:].tolist() == [257] * 3
    labels = batch["labels"]
    assert (labels != -100).sum(1).tolist() == [8, 8]
    assert labels[0, :4].tolist() == [-100] * 4
    assert labels[1, 0] == -100
    assert (labels[0, 4:] == batch["input_ids"][0, 4:]).all()


def test_nothing_to_learn(tokenizer):
    with pytest.raises(ValueError, match="the data is empty: 1 records gave no supervised token"):
        encode([{"text": ""}], [0], tokenizer, 8)
    with pytest.raises(ValueError, match="max_length must be at least 2"):
        encode([{"text": "abc"}], [0], tokenizer, 1)


def test_collate_does_not_touch_the_examples(examples):
    before = [example.loss_mask.copy() for example in examples.examples]
    collate(examples.examples)
    for mask, example in zip(before, examples.examples, strict=True):
        assert np.array_equal(mask, example.loss_mask)


def test_messages_win_over_text(tokenizer):
    record = {"text": "raw", "messages": TURNS}
    (example,) = encode([record], [0], tokenizer, 400).examples
    assert supervised(example, tokenizer) == supervised(chat_example(TURNS, tokenizer), tokenizer)


def test_an_opening_answer_is_context(tokenizer):
    turns = [{"role": "assistant", "content": "Hello!"}, *TURNS]
    example = chat_example(turns, tokenizer)
    assert supervised(example, tokenizer) == supervised(chat_example(TURNS, tokenizer), tokenizer)
    assert "Hello!" in tokenizer.decode(example.input_ids)
    # It is no exchange that could be left alone: the first one is cut instead.
    first = chat_example(turns[:4], tokenizer)
    cut = chat_example(turns[:4], tokenizer, max_length=len(first.input_ids) - 3)
    assert len(cut.input_ids) == len(first.input_ids) - 3
    assert cut.loss_mask.any()


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": None}, "text of record 1 is NoneType, not text"),
        ({"prompt": "a", "response": None}, "record 1 .*: response of record 1 is NoneType"),
        ({"messages": None}, "record 1 cannot be encoded: messages must be a list"),
        ({"messages": ["who?"]}, "record 1 cannot be encoded"),
    ],
)
def test_a_broken_record_is_named(tokenizer, record, message):
    whole = {"text": "abc", "prompt": "a", "response": "b", "messages": TURNS}
    first = {name: whole[name] for name in record}
    with pytest.raises(ValueError, match=message):
        encode([first, record], [0, 1], tokenizer, 64)
