"""The flags of `stillhouse distill`: ours, and every `transformers.TrainingArguments` field."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, NoReturn

from stillhouse.errors import UsageError

# transformers' own defaults where this job wants others.
DEFAULTS = {
    "output_dir": "runs/distill",
    "logging_steps": 10,
    "save_total_limit": 2,
    "include_num_input_tokens_seen": "no",
}
# What --help shows of the more than hundred training arguments.
OFTEN = (
    "output_dir",
    "max_steps",
    "num_train_epochs",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "bf16",
    "gradient_checkpointing",
    "eval_strategy",
    "eval_steps",
    "save_steps",
    "logging_steps",
    "seed",
)


def _flag(text: str, default: Any = None) -> Any:
    return field(default=default, metadata={"help": text})


# The flag that puts another entry of a configuration file out: options of the file's method mean
# nothing to another one, and a stored teacher and a model stand in each other's place.
_REPLACED_BY = {
    "method_options": "method",
    "teacher": "teacher_shards",
    "teacher_dtype": "teacher_shards",
    "teacher_shards": "teacher",
    "teacher_tail": "teacher",
}


@dataclass
class DistillArguments:
    """What is distilled from what, on which text, by which method."""

    teacher: str | None = _flag("hub id, folder, .gguf file, or smollm2 (the installed package)")
    teacher_shards: str | None = _flag("folder of `stillhouse capture`, in the teacher's place")
    teacher_tail: Literal["bucket", "renormalize", "uniform", "drop"] = _flag(
        "what is at columns that were not stored (ops.SparseTeacher)",
        "bucket",
    )
    student: str | None = _flag(
        "layers:0,1,2 copies blocks of the teacher, layers:0,1,2@MODEL another's; "
        "experts:4@STUDENT adds experts, fdb:64@STUDENT is two-bit; else hub id, folder, .gguf"
    )
    data: str | None = _flag(
        "file or folder: text, JSON lines or Parquet with text, messages or prompt and response; "
        "or stdlib-docs (Python's own documentation)"
    )
    method: str = _flag(
        "taid, a divergence such as forward_kl, reverse_kl, jsd, skew_kl or alpha_beta (all of "
        "stillhouse.ops.KINDS), or cross_entropy (no teacher needed)",
        "taid",
    )
    method_options: list[str] = field(
        default_factory=list,
        metadata={"help": "name=value pairs: t_start=0.2 alpha=auto, or beta=0.3"},
    )
    temperature: float = _flag("divides the logits of both sides", 1.0)
    label_weight: float = _flag("share of the cross-entropy to the labels in the loss", 0.0)
    teacher_dtype: Literal["auto", "float32", "bfloat16", "float16"] = _flag(
        "precision of the teacher; auto keeps its checkpoint's", "auto"
    )
    student_dtype: Literal["auto", "float32", "bfloat16", "float16"] = _flag(
        "precision of the student's weights", "float32"
    )
    trainable: list[str] = field(
        default_factory=list,
        metadata={
            "help": "names of the parameters that learn, as patterns: '*.experts.*'; else all"
        },
    )
    lora_rank: int = _flag("train adapters of this rank instead of the student itself", 0)
    on_policy: float = _flag(
        "share of batches whose responses the student writes while it trains", 0.0
    )
    on_policy_adapts: bool = _flag(
        "that share begins at 0 and grows when the evaluated loss rises (DistiLLM)",
        False,
    )
    replay: int = _flag("use so many of the student's last responses again, half of the time", 0)
    max_new_tokens: int = _flag("tokens a response of the student has at most", 128)
    prompt_tokens: int = _flag("of plain text, first tokens that the student goes on from", 32)
    response_temperature: float = _flag("of the student's responses; 0 takes the likeliest", 1.0)
    response_top_k: int | None = _flag("draw responses from the k likeliest tokens")
    response_top_p: float | None = _flag("draw responses from the likeliest tokens of this mass")
    max_length: int = _flag("tokens a training sequence has at most", 512)
    eval_data: str | None = _flag("text to evaluate on, instead of held-out documents")
    eval_share: float = _flag("share of the documents held out for evaluation", 0.05)
    vocab_size: int | None = _flag("columns that count where the heads are padded differently")
    control: bool = _flag(
        "also train with cross-entropy: on the same tokens, and for the same time", False
    )
    resume: bool = _flag("continue from the newest complete checkpoint of output_dir", False)
    overwrite: bool = _flag(
        "delete the checkpoints that output_dir already holds, unless --resume is given", False
    )

    @property
    def student_responds(self) -> bool:
        """Whether the student writes responses while it trains."""
        return self.on_policy > 0 or self.on_policy_adapts


def parse(argv: Sequence[str]) -> tuple[DistillArguments, Any]:
    """(DistillArguments, TrainingArguments) of a command line.

    `--config FILE` (YAML or JSON, names as in the flags) is read first, so flags win over it.
    Raises UsageError, in one line, for anything that does not fit.
    """
    parser = _parser()
    config, rest = _split_config(list(argv))
    words = [*_config_words(config, parser, rest), *rest] if config else rest
    try:
        ours, training, unknown = parser.parse_args_into_dataclasses(
            words, return_remaining_strings=True, look_for_args_file=False
        )
    except UsageError:
        raise
    except ValueError as error:  # TrainingArguments checks its own combinations
        raise UsageError(str(error)) from error
    if unknown:
        raise UsageError(f"unknown argument {unknown[0]}: stillhouse distill --help lists them")
    for name in ("student", "data"):
        if getattr(ours, name) is None:
            raise UsageError(f"--{name} is missing: stillhouse distill --help has an example")
    return ours, training


def help_text(everything: bool = False) -> str:
    """What `--help` prints; `everything` gives each training argument with its own text."""
    if everything:
        return _parser().format_help()
    lines = [
        "usage: stillhouse distill --teacher MODEL --student MODEL --data DATA [options]",
        "",
        "Distil a language model. The student, a report and plots are left in output_dir.",
        "",
        "  stillhouse distill --teacher smollm2 --student layers:0,1,2,10,20,29 \\",
        "      --data stdlib-docs --method taid --max_steps 160 --learning_rate 1e-3",
        "",
        "  --config FILE  options from a YAML or JSON file; flags win over it",
    ]
    for each in fields(DistillArguments):
        lines += _entry(each.name, each.default, each.metadata["help"])
    lines += [
        "  --debug  show the traceback of an error",
        "",
        "Training, often used (any other transformers.TrainingArguments is a flag too):",
    ]
    parser = _parser()
    lines += [f"  --{name}  ({parser.get_default(name)})" for name in OFTEN]
    lines += ["", "  --help-all  every training argument with its meaning"]
    return "\n".join(lines)


def _entry(name: str, default: Any, text: str) -> list[str]:
    quiet = default is None or default is False or default is MISSING
    shown = "" if quiet else f" (default {default})"
    return textwrap.wrap(
        f"--{name}  {text}{shown}", 96, initial_indent="  ", subsequent_indent=" " * 10
    )


def _parser() -> Any:
    import torch
    from transformers import HfArgumentParser, TrainingArguments

    class Parser(HfArgumentParser):
        def error(self, message: str) -> NoReturn:
            # argparse would print several hundred lines of usage first.
            raise UsageError(f"{message} (stillhouse distill --help)")

    parser = Parser(
        [DistillArguments, TrainingArguments],
        prog="stillhouse distill",
        allow_abbrev=False,
        add_help=False,
    )
    # Without this, transformers refuses --bf16 where there is no accelerator.
    parser.set_defaults(**DEFAULTS, use_cpu=not torch.accelerator.is_available())
    return parser


def _split_config(words: list[str]) -> tuple[Path | None, list[str]]:
    """Take `--config FILE` or `--config=FILE` out of the words."""
    path, rest = None, []
    remaining = iter(words)
    for word in remaining:
        name, equals, value = word.partition("=")
        if name != "--config":
            rest.append(word)
            continue
        value = value if equals else next(remaining, None)
        if not value:
            raise UsageError("--config needs a file")
        path = Path(value)
    return path, rest


def _config_words(path: Path, parser: Any, flags: list[str]) -> list[str]:
    """The file as words of a command line, so that it is checked exactly as flags are."""
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))  # JSON is YAML too
    except OSError as error:
        raise UsageError(f"cannot read the configuration {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"{path} is neither YAML nor JSON: {reason}") from error
    if not isinstance(values, Mapping):
        raise UsageError(f"{path} must map names to values, it holds {type(values).__name__}")
    known = {action.dest for action in parser._actions}
    words = []
    for name, value in values.items():
        if name not in known:
            raise UsageError(f"{path}: unknown option {name!r} (stillhouse distill --help)")
        other = _REPLACED_BY.get(name)
        replaced = any(word.partition("=")[0].replace("-", "_") == f"__{other}" for word in flags)
        if value is None or value == [] or replaced:
            continue
        words.append(f"--{name}")
        if isinstance(value, list):
            words += map(str, value)
        elif isinstance(value, Mapping):
            words.append(json.dumps(value))
        else:
            words.append(str(value))
    return words
