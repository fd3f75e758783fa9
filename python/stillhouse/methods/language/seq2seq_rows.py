"""What an encoder-decoder and its decoder-only teacher say of the same answers."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.methods.language.seq2seq_alignment import Side, align_seq2seq
from stillhouse.train import LogitRows, RowIndex
from stillhouse.train.forward import RowForward, evaluating, row_forward
from stillhouse.train.models import check_tokenizers
from stillhouse.train.responses import Tokens


class Seq2SeqRows:
    """The rows of an encoder-decoder and of a decoder-only teacher for pairs of source and target:
    what `CrossArchitectureLoss` takes.

    student: an encoder-decoder of transformers, or one that can be called like it; teacher: any
    causal language model, frozen from then on, or None. tokenizers: (student's, teacher's), which
    must give the same ids. `rows(source, target, gold=None, **options)` gives student's and
    teacher's `LogitRows` and a batch; options are `align_seq2seq`'s. With `gold`, other targets of
    the same sources, the batch has the student's rows of these, and the encoder still runs once.
    Raises ValueError for tokenizers that differ, a student without encoder, and side="left" with
    a teacher that takes no position ids.

    Defaults: side "right".

    Example:
        >>> import torch
        >>> from stillhouse.methods.language import EncoderDecoder, EncoderDecoderConfig
        >>> from stillhouse.methods.language import CrossArchitectureLoss, Seq2SeqRows
        >>> sizes = dict(width=16, heads=2, kv_heads=1, head_size=8, ffn=32)
        >>> config = EncoderDecoderConfig(12, encoder_layers=2, decoder_layers=1, **sizes)
        >>> rows = Seq2SeqRows(EncoderDecoder(config), lambda ids: torch.eye(12)[ids])
        >>> parts = CrossArchitectureLoss()(*rows([[5, 6, 7]], [[3, 2]], gold=[[4, 2]]))
        >>> parts["loss"].backward()
    """

    def __init__(
        self,
        student: Any,
        teacher: Any = None,
        *,
        tokenizers: tuple[Any, Any] | None = None,
        side: Side = "right",
    ):
        if tokenizers is not None:
            check_tokenizers(*tokenizers)
        if not getattr(student.config, "is_encoder_decoder", False):
            raise ValueError(f"{type(student).__name__} is not an encoder-decoder")
        if side == "left" and not _takes_positions(teacher):
            raise ValueError(
                f"{type(teacher).__name__} takes no position_ids: behind padding it would read at "
                "the wrong places; side='right' needs none"
            )
        self.student, self.teacher, self.side = student, teacher, side
        self._student_rows = RowForward(student)
        self._teacher_rows = None if teacher is None else row_forward(teacher)
        if isinstance(teacher, nn.Module):
            teacher.requires_grad_(False)

    def __call__(
        self,
        source: Sequence[Tokens],
        target: Sequence[Tokens],
        *,
        gold: Sequence[Tokens] | None = None,
        **options: Any,
    ) -> tuple[LogitRows, LogitRows | None, dict[str, LogitRows]]:
        start = self.student.config.decoder_start_token_id
        options = {"decoder_start_token_id": start, **options}
        index, other, inputs = align_seq2seq(source, target, side=self.side, **options)
        memory = self._encode(inputs.student)
        rows = self._decode(memory, inputs.student, index)
        batch = {}
        if gold is not None:
            index, _, again = align_seq2seq(source, gold, **options)
            batch["gold"] = self._decode(memory, again.student, index)
        if self.teacher is None:
            return rows, None, batch
        with torch.no_grad(), evaluating(self.teacher):
            said = self._teacher_rows(self._here(inputs.teacher), self._here(other))
        return rows, said, batch

    def _encode(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor]:
        read = self._here({name: inputs[name] for name in ("input_ids", "attention_mask")})
        return (self.student.get_encoder()(**read)[0],)

    def _decode(
        self, memory: tuple[Tensor], inputs: Mapping[str, Tensor], index: RowIndex
    ) -> LogitRows:
        named = {name: inputs[name] for name in ("attention_mask", "decoder_input_ids")}
        options = dict(encoder_outputs=memory)
        return self._student_rows(self.student, self._here(named), self._here(index), **options)

    def _here(self, tensors: Any) -> Any:
        """On the student's device."""
        device = next(self.student.parameters()).device
        if isinstance(tensors, RowIndex):
            return RowIndex(*(each.to(device) for each in tensors))
        return {name: each.to(device) for name, each in tensors.items()}


def _takes_positions(teacher: Any) -> bool:
    """A model without an output head is given ids alone."""
    if teacher is None:
        return True
    head = getattr(teacher, "get_output_embeddings", lambda: None)()
    return head is not None and "position_ids" in inspect.signature(teacher.forward).parameters
