"""Residual vector quantizers as modules: tables that learn, projections, depth, masks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from stillhouse import ops
from stillhouse.nn.codebooks import begin_, depths, follow_, kept
from stillhouse.nn.quantizer_options import Options
from stillhouse.nn.quantizer_search import Quantized, QuantizerSearch


class ResidualVQ(QuantizerSearch):
    """Rows as sums of codes, one from each of Q tables that learn from what they are given.

    Call it with x [..., D] (float32, bfloat16 or float16, or float64 after `.double()`), and

    - mask: bool [...], False = padding: no code, 0 in out, and nothing is learnt from it.
    - num_quantizers: how many stages, an int, or int64 [B] of each item or [...] of each row; in
      training, too, where it takes the place of the dropout.

    It returns `Quantized`: out [..., D], codes int64 [..., Q] and commit_loss [Q], in each stage
    commitment_weight times the mean over rows and features of the squared distance that it leaves.
    A row that is not finite has codes -1 and NaN, teaches the tables nothing, and makes the loss
    NaN.

    Args:
        dim, codebook_size, num_quantizers: D, K, Q.
        codebook_dim: d, the width of codes; D if None.
        projection: "none"; "shared", a linear map before all stages and one after them;
            "per_stage", two of each stage, which then searches d-wide (Descript Audio Codec): with
            update="gradient", no k-means and no replacement of codes. By default as the widths ask.
        projection_bias: whether those maps have one.
        metric: "l2" or "cosine", as in `ops.rvq`.
        update: "ema", or "gradient": `tables` is a parameter and commit_loss has its gradient.
        decay: counts and sums of a code's rows are running means, c <- decay c + (1 - decay) n; a
            code is their sum / count, the weighted mean of what it was given.
        epsilon: of a smaller count nothing is learnt: the code stays.
        kmeans_init: tables begin as k-means of the first batch in training, stage by stage.
        dead_code_threshold: a code whose count is below this share of the mean count becomes what a
            row of the batch is at its stage, with the mean as its count. 0 = never.
        quantizer_dropout: in training, the chance that an item has fewer stages, 1 to Q.
        grad: out's derivative to x, as in `ops.rvq` ("per_stage": `ops.projected_rvq`).
        commitment_weight, codebook_weight: of commit_loss's gradient to x and, with
            update="gradient", to the tables. Its value has the first.
        shared_codebook: one table for all stages.
        synchronize: processes of torch.distributed learn from all rows together. Where all have as
            many, as one process would from the joined batch.
        seed: of tables and maps, and of what is drawn in training, which depends on it, the step
            and the row's number alone.

    Tables and their statistics stay float32 when the module is cast to a narrower type, and out
    comes in x's type. In evaluation the tables are kept packed; call `.eval()` again after they
    were written through `.data`, which torch does not count as a change.
    `torch.compile(fullgraph=True)` takes a step whole from the first one on.

    Raises ValueError for options, widths, masks and depths that do not fit (on an accelerator a
    tensor's depths count up to Q, unchecked), TypeError for x, masks or depths of another dtype.

    Sources: SoundStream (arXiv 2107.03312), algorithm 1; means as in VQ-VAE (1711.00937, appendix
    A.1). EnCodec and vector-quantize-pytorch smooth counts as (c + eps) / (sum c + K eps), which
    draws codes that are not used to 0; here they stay. EnCodec's replaced codes are overwritten in
    the same step, as their sums stay; here, as in Mimi, the sums change, too. With "cosine" a code
    is the mean of rows as they are, not of their directions, which leaves less of them.

    Defaults: decay .99 (EnCodec, Mimi), epsilon 1e-5 (vector-quantize-pytorch), k-means with 10
    iterations (there), grad "ste", with which all commitments reach x (Mimi), weights 1 (EnCodec;
    DAC has .25 for the commitment), no replacement (Mimi: .1) and no dropout.

    Example:
        >>> import torch
        >>> from stillhouse.nn import ResidualVQ
        >>> quantizer = ResidualVQ(8, codebook_size=16, num_quantizers=3)
        >>> x = torch.randn(2, 20, 8, requires_grad=True)
        >>> out, codes, commit_loss = quantizer(x)
        >>> (out.square().mean() + commit_loss.sum()).backward()
        >>> quantizer.eval().decode(codes[..., :2]).shape
        torch.Size([2, 20, 8])
    """

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        num_quantizers: int,
        *,
        codebook_dim: int | None = None,
        projection: str | None = None,
        projection_bias: bool = True,
        metric: str = "l2",
        update: str = "ema",
        decay: float = 0.99,
        epsilon: float = 1e-5,
        kmeans_init: bool | None = None,
        kmeans_iterations: int = 10,
        dead_code_threshold: float = 0.0,
        quantizer_dropout: float = 0.0,
        grad: str = "ste",
        commitment_weight: float = 1.0,
        codebook_weight: float = 1.0,
        shared_codebook: bool = False,
        synchronize: bool = True,
        seed: int = 0,
    ):
        given = {name: value for name, value in locals().items() if name in Options.__annotations__}
        super().__init__(Options(**given))

    @classmethod
    def from_state_dict(
        cls, state: Mapping[str, Tensor], layout: str, **overrides: Any
    ) -> ResidualVQ:
        """The quantizer that another library's state dict is of, with the same codes.

        layout: "lucidrains", "encodec" (also SpeechTokenizer's), "mimi" or "dac"; each in its own
        package's form and in that of transformers. Names around the quantizer's do not matter; of
        several in one state (Mimi has two) the one is taken whose names begin with `prefix`.
        overrides: options that a state does not tell, such as metric="cosine" for lucidrains.

        Raises ValueError for an unknown layout and a state that is not of it.
        """
        from stillhouse.nn.rvq_layouts import read

        options, tensors = read(state, layout, overrides.pop("prefix", None))
        quantizer = cls(**{**options, "kmeans_init": False, **overrides})
        quantizer.take_(tensors)
        return quantizer

    @property
    def codebooks(self) -> Tensor:
        """The tables, [Q, K, d], or [G, Q, K, d] in groups."""
        return self._ungrouped(self._stages(self.tables))

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        num_quantizers: int | Tensor | None = None,
    ) -> Quantized:
        depth, learns = num_quantizers, self.training or torch.is_grad_enabled()
        if not learns and mask is None and not isinstance(depth, Tensor):
            return self._frames(x, depth)
        leading = x.shape[:-1]
        mask, depth = self._checked(leading, mask, depth)
        rows = self._rows(x, mask)
        if self.training:
            found = self._learn(rows, leading, mask, depth)
        else:
            found = self._search(rows, self.tables, self.packed(), mask, depth)
        return self._result(x.shape, x.dtype, mask, *found)

    @torch.no_grad()
    def encode(
        self, x: Tensor, num_quantizers: int | Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """The codes of x, int64 [..., Q]; nothing is learnt. Arguments as of a call."""
        leading = x.shape[:-1]
        rows = self._rows(x)
        if mask is None and not isinstance(num_quantizers, Tensor):
            codes = self._found(rows, num_quantizers, want_out=False)[0]
        else:
            mask, depth = self._checked(leading, mask, num_quantizers)
            codes = self._search(rows, self.tables, self.packed(), mask, depth)[0]
        return self._ungrouped(codes.view(self.groups, *leading, codes.shape[-1]))

    def decode(self, codes: Tensor) -> Tensor:
        """[..., D] of codes int64 [..., Q], -1 = none; Q may be less than there are stages.

        Raises ValueError for more stages than there are, TypeError for codes that are not integers,
        and on the CPU RuntimeError for codes that are not in a table.
        """
        given = codes if self.grouped else codes[None]
        stages = given.shape[-1]
        if given.dim() < 2 or len(given) != self.groups or not 1 <= stages <= self.num_quantizers:
            raise ValueError(
                f"codes must be {'[G, ..., Q]' if self.grouped else '[..., Q]'} with Q from 1 to "
                f"{self.num_quantizers}, got {tuple(codes.shape)}"
            )
        flat, shape = given.reshape(self.groups, -1, stages), (*given.shape[1:-1], self.dim)
        if self.projection == "per_stage":
            # Each stage as a group: what its code is before its own map.
            flat = flat[0].T[..., None]
            return self._mapped(ops.rvq_decode(flat, self.tables[0, :stages, None]), flat, shape)
        return self._back(ops.rvq_decode(flat, self._stages(self.tables)), shape)

    def from_latents(self, latents: Tensor) -> Quantized:
        """Quantizes what is in the space of the tables already; nothing is learnt.

        latents: [..., d], or [G, ..., d]; with projections of each stage [..., n d], what n stages
        are given (the Descript Audio Codec's latents). Raises ValueError for another shape.
        """
        if self.grouped and (latents.dim() < 2 or len(latents) != self.groups):
            raise ValueError(
                f"latents must be [{self.groups}, ..., {self.codebook_dim}], got "
                f"{tuple(latents.shape)}"
            )
        d, per_stage = self.codebook_dim, self.projection == "per_stage"
        stages, rest = divmod(latents.shape[-1], d)
        if rest or not 1 <= stages <= (self.num_quantizers if per_stage else 1):
            raise ValueError(
                f"latents must be [..., {f'n * {d}' if per_stage else d}], got "
                f"{tuple(latents.shape)}"
            )
        given = latents if self.grouped else latents[None]
        shape = *given.shape[1:-1], self.dim
        if per_stage:
            rows = latents.reshape(-1, stages, d).transpose(0, 1)
            tables = self._scaled(self.tables)[0, :stages, None]
            found = ops.rvq(rows, tables, metric=self.metric)
            out = self._mapped(found.out, found.codes, shape)
            codes, error = (each[..., 0].T[None] for each in (found.codes, found.error))
        else:
            tables = self._stages(self._scaled(self.tables))
            rows = given.reshape(self.groups, -1, d)
            out, codes, error = ops.rvq(rows, tables, grad=self.grad, metric=self.metric)
        return self._result(shape, latents.dtype, None, codes, out, error)

    @torch.no_grad()
    def initialize_(self, x: Tensor, mask: Tensor | None = None) -> None:
        """The tables by k-means of a batch, as the first call in training has it, unless there
        was one."""
        self._begin(self._rows(x), self._checked(x.shape[:-1], mask, None)[0])

    def _learn(self, rows: Tensor, leading: torch.Size, mask, depth):
        """A step of training: codes, out and error of rows."""
        self._begin(rows, mask)
        if self.quantizer_dropout and depth is None:
            words = self.num_quantizers, self.quantizer_dropout, self.seed, rows.device
            depth = depths(self.progress, leading[0] if leading else 1, *words)
            depth = self._of_rows("depth", depth, leading) if leading else depth
        tables, moves = self.tables, self.update == "ema" or self.dead_code_threshold > 0
        begins = self.kmeans_init and torch.compiler.is_compiling()
        learns = torch.is_grad_enabled() and (rows.requires_grad or tables.requires_grad)
        if learns and (moves or begins):
            # The backward pass needs these, and they move in this step or early in the next.
            tables = kept(tables)
        codes, out, error = self._search(rows, tables, None, mask, depth)
        with torch.no_grad():
            tables = self.tables.detach() if moves else self.counts.new_empty(0)
            state = tables, self.counts, self.sums, self.energy, self.progress
            numbers = self.decay, self.epsilon, self.dead_code_threshold, self.seed
            follow_(rows.detach(), codes, error.detach(), *state, *numbers, self.synchronize)
        return codes, out, error

    def _begin(self, rows: Tensor, mask: Tensor | None) -> None:
        # A compiled step looks inside of the op, where it does not break the graph.
        if not self.kmeans_init or (not torch.compiler.is_compiling() and self.begun):
            return
        if mask is not None:
            mask = mask.expand(self.groups, -1)
        with torch.no_grad():
            state = self.tables.detach(), self.counts, self.sums, self.progress
            words = self.metric, self.kmeans_iterations, self.seed, self.synchronize
            begin_(rows.detach(), mask, *state, *words)


class GroupedResidualVQ(ResidualVQ):
    """`ResidualVQ` on each of G equal parts of the features, with tables of their own.

    Options as there, with `codebook_dim` the width of a group's codes; a projection is "shared" by
    the stages of a group. codes are [G, ..., Q], commit_loss [G, Q], codebooks [G, Q, K, d].

    Raises ValueError for groups that do not divide D, and as there.

    Example:
        >>> import torch
        >>> from stillhouse.nn import GroupedResidualVQ
        >>> quantizer = GroupedResidualVQ(8, 16, 3, groups=2)
        >>> quantizer(torch.randn(2, 5, 8)).codes.shape
        torch.Size([2, 2, 5, 3])
    """

    grouped = True

    def __init__(
        self, dim: int, codebook_size: int, num_quantizers: int, *, groups: int, **options: Any
    ):
        options = Options(dim, codebook_size, num_quantizers, groups, **options)
        super(ResidualVQ, self).__init__(options)
