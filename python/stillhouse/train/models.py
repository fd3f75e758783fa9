"""Loading the two models of a distillation, and refusing pairs that cannot be compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from stillhouse.nn.fdb_surgery import has_fdb
from stillhouse.nn.surgery import take_layers
from stillhouse.train import mixtures, quantized

DTYPES = ("auto", "float32", "bfloat16", "float16")

# Words that make another student of one, how, and a usual number.
MADE = (("experts:", mixtures.make_mixtures, 4), ("fdb:", quantized.make_fdb, 64))

# Digits, blanks, accents, two scripts, code, an emoji: where tokenizers differ, they differ here.
PROBE = "The 1,234 kilns\n\tif x != 0: return café naïve 東京 Übung -> 'ok' 🙂  end"


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a hub id, a local folder or a GGUF file."""
    from transformers import AutoTokenizer

    location, options = _locate(name)
    with _one_line(name, "a tokenizer"):
        return AutoTokenizer.from_pretrained(location, **options)


def load_model(name: str, dtype: str = "auto") -> nn.Module:
    """The causal language model of a hub id, a local folder or a GGUF file.

    `dtype` is one of `DTYPES`; "auto" keeps what the checkpoint was saved in. A GGUF file is
    dequantised; a folder of `mixtures.mark` has its experts again, one of `quantized.mark` its
    dual-binary layers. Raises FileNotFoundError for
    what does not exist, ValueError for what is no model.
    """
    from transformers import AutoModelForCausalLM, GgufConfig

    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    location, options = _locate(name)
    if not options and mixtures.is_marked(location):
        return mixtures.load(location, dtype if dtype == "auto" else getattr(torch, dtype))
    if not options and quantized.is_marked(location):
        return quantized.load_fdb(location, dtype if dtype == "auto" else getattr(torch, dtype))
    if "gguf_file" in options:
        options["quantization_config"] = GgufConfig(dequantize=True)
    with _one_line(name, "a causal language model"):
        model = AutoModelForCausalLM.from_pretrained(
            location, dtype=dtype if dtype == "auto" else getattr(torch, dtype), **options
        )
    # A dequantised model is an ordinary one: what is saved must not say "quantised".
    if getattr(model.config, "quantization_config", None) is not None and "gguf_file" in options:
        del model.config.quantization_config
    return model


def load_student(spec: str, teacher: nn.Module | None, dtype: str = "float32") -> nn.Module:
    """The student, trainable: `layers:0,1,2` copies these blocks of the teacher and
    `layers:0,1,2@MODEL` those of another model; `experts:4@STUDENT` is any student with mixtures of
    4 experts (`mixtures.make_mixtures`); `fdb:64@STUDENT` has dual-binary weights in groups of 64
    (`quantized.make_fdb`); anything else is loaded.

    Raises ValueError for a list or number that cannot be read, a block that does not exist, and a
    list of layers without a teacher to take them from.
    """
    for word, make, usual in MADE:
        if spec.startswith(word):
            number, _, dense = spec.removeprefix(word).partition("@")
            if not number.isdigit() or not dense:
                raise ValueError(f"expected --student {word}{usual}@STUDENT, got {spec!r}")
            student = load_student(dense, teacher, dtype)
            if mixtures.has_mixtures(student) or has_fdb(student):
                raise ValueError(
                    f"--student {spec}: a student can have experts or weights of two bits, and once"
                )
            return make(student, int(number))
    if not spec.startswith("layers:"):
        return load_model(spec, dtype).requires_grad_(True)
    blocks, _, source = spec.removeprefix("layers:").partition("@")
    if source:
        teacher = load_model(source)
    if teacher is None:
        raise ValueError(
            f"--student {spec} takes its blocks from a teacher: name one (--teacher), or the model "
            f"that they are of ({spec}@MODEL)"
        )
    numbers = blocks.split(",")
    if not all(number.strip().isdigit() for number in numbers):
        raise ValueError(f"expected --student layers:0,1,2 (0-based blocks), got {spec!r}")
    # A copy of a frozen teacher would be frozen, too.
    student = take_layers(teacher, [int(number) for number in numbers]).requires_grad_(True)
    return student if dtype == "auto" else student.to(getattr(torch, dtype))


def source_of(student: str) -> str:
    """The model whose tokenizer a student without a teacher has."""
    student = dense_of(student)
    return student.partition("@")[2] if student.startswith("layers:") else student


def dense_of(student: str) -> str:
    """What a student is before its experts or bits."""
    made = student.startswith(tuple(word for word, _, _ in MADE))
    return student.partition("@")[2] if made else student


def check_pair(
    student: nn.Module,
    teacher: nn.Module,
    student_tokenizer: Any,
    teacher_tokenizer: Any,
    vocab_size: int | None = None,
) -> None:
    """Raise ValueError unless column j means the same token in both models' logits.

    Compares the tokenizers (vocabulary, and the ids of a probe text) and the widths of the heads;
    with `vocab_size` only that many first columns are compared, the rest being padding.
    """
    check_tokenizers(student_tokenizer, teacher_tokenizer)
    n_student, n_teacher = head_width(student), head_width(teacher)
    if vocab_size is None and n_student != n_teacher:
        raise ValueError(
            f"vocabulary mismatch: student has {n_student} columns and teacher {n_teacher}; if the "
            f"surplus is padding, pass --vocab_size {min(len(student_tokenizer), n_student)}"
        )
    if vocab_size is not None and not 1 <= vocab_size <= min(n_student, n_teacher):
        raise ValueError(
            f"vocab_size must be within both heads ({n_student} and {n_teacher} columns), "
            f"got {vocab_size}"
        )
    check_vocabulary(student, student_tokenizer, vocab_size)


def check_vocabulary(model: nn.Module, tokenizer: Any, vocab_size: int | None = None) -> None:
    """Raise ValueError where the tokenizer can produce ids that the model has no row for, or that
    `vocab_size` leaves out."""
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if vocab_size is not None and not largest < vocab_size <= head_width(model):
        raise ValueError(
            f"vocab_size must hold the tokenizer's ids (up to {largest}) and be within the head "
            f"({head_width(model)} columns), got {vocab_size}"
        )
    if largest >= head_width(model):
        raise ValueError(
            f"vocabulary mismatch: the tokenizer has ids up to {largest}, the model only "
            f"{head_width(model)} rows: they belong to different models, or tokens were added "
            "without resize_token_embeddings"
        )


def check_tokenizers(
    student: Any, teacher: Any, names: tuple[str, str] = ("student", "teacher")
) -> None:
    """Raise ValueError unless both tokenizers give the same ids; `names` are what it calls them."""
    if student is teacher:
        return
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    if ours != theirs:
        differing = sorted(ours.items() ^ theirs.items(), key=lambda item: (item[1], item[0]))
        token, number = differing[0]
        raise ValueError(
            f"tokenizer mismatch: {names[0]} has {len(ours)} tokens and {names[1]} {len(theirs)}, "
            f"the first that differs is {token!r} (id {number}): logits can only be compared with "
            "one vocabulary"
        )
    if student(PROBE)["input_ids"] != teacher(PROBE)["input_ids"]:
        raise ValueError(
            "tokenizer mismatch: same vocabulary, but different ids for the same text: the merges "
            "or the special tokens differ"
        )


def check_length(
    student: nn.Module | None, teacher: nn.Module | None, max_length: int, response: int = 0
) -> None:
    """Raise ValueError for sequences longer than a model has positions for; `response` tokens may
    follow a whole one."""
    flags = f"--max_length {max_length}" + (f" and --max_new_tokens {response}" if response else "")
    for name, model in (("student", student), ("teacher", teacher)):
        positions = getattr(getattr(model, "config", None), "max_position_embeddings", None)
        if positions is not None and max_length + response > positions:
            raise ValueError(f"{flags}: longer than the {positions} positions of the {name}")


def has_tokenizer(name: str) -> bool:
    """Whether a folder holds a tokenizer; anything that is not a folder is taken to have one."""
    path = Path(name)
    return not path.is_dir() or any(path.glob("tokenizer*")) or (path / "vocab.json").exists()


def head_width(model: nn.Module) -> int:
    """Number of logits a token gets: the columns of the output head."""
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError(f"{type(model).__name__} has no output head: not a causal language model")
    return head.weight.shape[0]


def _locate(name: str) -> tuple[str, dict[str, Any]]:
    """What `from_pretrained` wants for this name: a place, and options."""
    path = Path(name)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise FileNotFoundError(f"no GGUF file at {path}: check the path")
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise ValueError(f"{path} is not a GGUF file (it does not begin with GGUF)")
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir():
        return name, {}
    # An existing file, or something that only looks like a path, can be no hub id.
    if path.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise FileNotFoundError(
            f"no model at {name}: expected a folder with config.json, a .gguf file or a hub id"
        )
    return name, {}


class _one_line:
    """Turns what a loader raises (pages of advice) into one line that names the model."""

    def __init__(self, name: str, wanted: str):
        self.name, self.wanted = name, wanted

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is None or not isinstance(error, Exception) or isinstance(error, ImportError):
            return
        lines = str(error).strip().splitlines()
        message = f"cannot load {self.wanted} from {self.name}: {lines[0] if lines else kind}"
        raise (FileNotFoundError if isinstance(error, OSError) else ValueError)(message) from error
