"""The supervised rows of any causal language model, and a loss over them in its own forward."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.train.examples import STORED
from stillhouse.train.head import PROBE, Head, transform_of
from stillhouse.train.objective import LogitRows
from stillhouse.train.rows import RowIndex

# What a batch holds for us and not for the model.
LAYOUT = ("prefix_length", "document_ids")  # what attention masks are made of, not the mask
OURS = ("labels", "record", "denominator", "vocab_size", "on_policy", "pairs", *LAYOUT, *STORED)


class RowForward:
    """Runs a causal LM up to its output head, and there what is to be made of the rows instead.

    While it runs, something else stands in for the head's forward: it gets hidden [B, T, H], takes
    the supervised rows [N, H] and calls `compute(rows)`. That is inside the model's own forward,
    where data-parallel wrappers, sharded weights and autocast have already done their part, and no
    logits have to exist. What the model does to logits afterwards (a scale, a soft-cap) is found
    out once, by sending numbers through it; a model that does anything else computes its logits as
    usual, and says so. Between calls the model is untouched.

    Raises ValueError for a model without an output head.
    """

    def __init__(self, model: nn.Module):
        head = getattr(model, "get_output_embeddings", lambda: None)()
        if head is None:
            raise ValueError(
                f"{type(model).__name__} has no output head: a causal language model is needed"
            )
        self.head = head
        self._stand_in: Callable[[Tensor], Tensor] | None = None
        # One function for all calls, or a compiled model would be compiled again for each.
        self._instead = torch.compiler.disable(lambda hidden: self._stand_in(hidden))
        self._looked = False
        self._known: Head | None = None  # None: something unknown happens to the logits

    def __call__(
        self,
        model: nn.Module,
        batch: Mapping[str, Any],
        index: RowIndex,
        compute: Callable[[LogitRows], Any] | None = None,
        **options: Any,
    ) -> Any:
        """`compute` of the rows `index` of `model`'s forward, or these rows themselves.

        `model` may wrap the one given at first; `batch` is the language-model batch, `options` go
        to the forward. A dict with a "loss" passes it through the model's output, for wrappers
        that look there for what has a gradient.
        """
        inputs = {name: value for name, value in batch.items() if name not in OURS}
        # The forward is asked for no cache: it would hold every layer's keys for nothing.
        options["use_cache"] = False
        if not self._looked:
            self._known, self._looked = self._look(model, inputs, options), True
        if self._known is None:
            return self._outside(model, inputs, index, compute, options)
        result: list[Any] = []
        upstream: list[Tensor] = []

        def stand_in(hidden: Tensor) -> Tensor:
            hidden = hidden.reshape(-1, hidden.shape[-1])[index.row]
            result.append(LogitRows(None, index, hidden, self._known))
            if compute is None:
                return hidden.new_zeros(1, 1, 1)
            result[0] = compute(result[0])
            if not _has_loss(result[0]):
                return hidden.new_zeros(1, 1, 1)
            return _Leave.apply(result[0]["loss"], upstream)

        output = self._run(model, inputs, options, stand_in)
        if not result:
            raise _goes_round(model)
        if compute is None:
            result[0].hidden_states = getattr(output, "hidden_states", None)
        elif _has_loss(result[0]):
            result[0]["loss"] = _Return.apply(output.logits, result[0]["loss"].detach(), upstream)
        return result[0]

    def _run(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        options: Mapping[str, Any],
        stand_in: Callable[[Tensor], Tensor],
    ) -> Any:
        before = self.head.__dict__.get("forward")
        self.head.forward, self._stand_in = self._instead, stand_in
        try:
            return model(**inputs, **options)
        finally:
            del self.head.forward
            self._stand_in = None
            if before is not None:
                self.head.forward = before

    def _look(
        self, model: nn.Module, inputs: Mapping[str, Any], options: Mapping[str, Any]
    ) -> Head | None:
        """The head, with what one token's forward shows of the logits' way out."""
        called, own = [], self.head.forward
        ids = inputs.get("input_ids")
        if ids is not None:
            inputs = {"input_ids": ids[:1, :1]}
        some = next(x for x in inputs.values() if isinstance(x, Tensor))
        # As wide as a row: what is done to some columns only must show.
        columns = self.head.weight.shape[0]
        probe = torch.tensor(PROBE, device=some.device)
        probe = probe.repeat(-(-columns // len(PROBE)))[:columns].view(1, 1, -1)

        def stand_in(hidden: Tensor) -> Tensor:
            called.append(True)
            return probe

        devices = [some.device] if some.is_cuda else []
        # The run's random numbers are those that it would have without us: those of torch, and
        # those of modules that count their draws.
        with torch.no_grad(), torch.random.fork_rng(devices), evaluating(model):
            seen = self._run(model, inputs, options, stand_in)
        if not called:
            raise _goes_round(model)
        found = transform_of(probe, getattr(seen, "logits", seen))
        if found is None:
            warnings.warn(
                f"{type(model).__name__} does more to its logits than a scale and a soft-cap: they "
                "are computed whole for the supervised rows, with the memory that takes",
                stacklevel=4,
            )
            return None
        return Head(self.head, own, *found)

    def _outside(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        index: RowIndex,
        compute: Callable[[LogitRows], Any] | None,
        options: Mapping[str, Any],
    ) -> Any:
        """The model's logits of the rows, whatever it does to them."""
        seen, own = [], self.head.forward

        def stand_in(hidden: Tensor) -> Tensor:
            seen.append(hidden.reshape(-1, hidden.shape[-1])[index.row])
            return own(seen[0])

        output = self._run(model, inputs, options, stand_in)
        states = getattr(output, "hidden_states", None)
        rows = LogitRows(output.logits, index, seen[0], hidden_states=states)
        return rows if compute is None else compute(rows)


def _goes_round(model: nn.Module) -> ValueError:
    return ValueError(
        f"{type(model).__name__} did not call its output head: models that compute logits without "
        "it are not supported"
    )


def _has_loss(result: Any) -> bool:
    return isinstance(result, dict) and "loss" in result


# The loss does not go through the model, which would do to it what it does to logits, but a 0 that
# depends on it: wrappers find it among the outputs and see its gradient come back. The gradient
# itself takes a way of its own, in the precision it has.


class _Leave(torch.autograd.Function):
    """loss -> a 0 for the model's way out; hands the loss the gradient that `_Return` has left."""

    @staticmethod
    def forward(ctx, loss, upstream):
        ctx.upstream = upstream
        return loss.new_zeros(1, 1, 1, dtype=torch.float32)

    @staticmethod
    def backward(ctx, _):
        return ctx.upstream.pop(), None


class _Return(torch.autograd.Function):
    """That 0, and the loss's value -> the loss again, on the far side."""

    @staticmethod
    def forward(ctx, way, loss, upstream):
        ctx.like, ctx.upstream = way.detach(), upstream
        return loss.clone()

    @staticmethod
    def backward(ctx, gradient):
        ctx.upstream.append(gradient)
        return torch.ones_like(ctx.like), None, None


class FrozenTeacher:
    """A language model that is only read: evaluation mode, no gradients, supervised rows only."""

    def __init__(self, model: nn.Module):
        self.model = model.eval().requires_grad_(False)
        self._forward = RowForward(model)

    @torch.no_grad()
    def __call__(self, batch: Mapping[str, Any], index: RowIndex, **options: Any) -> LogitRows:
        """The teacher's rows `index` for this batch."""
        return self._forward(self.model, batch, index, **options)


@contextmanager
def evaluating(*models: Any) -> Iterator[None]:
    """Evaluation mode within, and afterwards the mode that each submodule was in; what is no module
    is left alone."""
    modules = [each for each in models if isinstance(each, nn.Module)]
    training = [each for module in modules for each in module.modules() if each.training]
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for each in training:
            each.training = True


@contextmanager
def frozen(*models: Any) -> Iterator[None]:
    """`evaluating`, and within no parameter of the models requires a gradient."""
    modules = [each for each in models if isinstance(each, nn.Module)]
    learning = [each for model in modules for each in model.parameters() if each.requires_grad]
    with evaluating(*models):
        for each in learning:
            each.requires_grad_(False)
        try:
            yield
        finally:
            for each in learning:
                each.requires_grad_(True)


def row_forward(model: Any) -> Callable[[Mapping[str, Any], RowIndex], LogitRows]:
    """`rows(batch, index)` of a model: those of `RowForward`, or of any other callable that maps
    ids [B, T] to logits [B, T, V], where a token's logits depend on nothing to its right.

    The batch must be padded on the right. The function raises ValueError for logits of another
    shape.
    """
    if getattr(model, "get_output_embeddings", lambda: None)() is not None:
        return functools.partial(RowForward(model), model)

    def rows(batch: Mapping[str, Any], index: RowIndex) -> LogitRows:
        return LogitRows(plain_logits(model, batch["input_ids"]).flatten(0, 1)[index.row], index)

    return rows


def plain_logits(model: Callable[[Tensor], Any], ids: Tensor) -> Tensor:
    """Logits [B, T, V] of a callable, or of its output's `logits`, for ids [B, T]."""
    output = model(ids)
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor) or logits.shape[:-1] != ids.shape:
        found = tuple(getattr(logits, "shape", ())) or type(logits).__name__
        raise ValueError(
            f"a model must give logits [B, T, V] of ids [B, T] = {tuple(ids.shape)}, got {found}"
        )
    return logits
