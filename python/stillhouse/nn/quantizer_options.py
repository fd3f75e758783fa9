"""What a residual quantizer is told, checked."""

from __future__ import annotations

from dataclasses import dataclass

from stillhouse.ops import rvq_autograd, rvq_projected

PROJECTIONS = ("none", "shared", "per_stage")
UPDATES = ("ema", "gradient")


@dataclass
class Options:
    """The arguments of `ResidualVQ`; what was left open is filled in."""

    dim: int
    codebook_size: int
    num_quantizers: int
    groups: int = 1
    codebook_dim: int | None = None
    projection: str | None = None
    projection_bias: bool = True
    metric: str = "l2"
    update: str = "ema"
    decay: float = 0.99
    epsilon: float = 1e-5
    kmeans_init: bool | None = None
    kmeans_iterations: int = 10
    dead_code_threshold: float = 0.0
    quantizer_dropout: float = 0.0
    grad: str = "ste"
    commitment_weight: float = 1.0
    codebook_weight: float = 1.0
    shared_codebook: bool = False
    synchronize: bool = True
    seed: int = 0

    def __post_init__(self):
        numbers = self.dim, self.codebook_size, self.num_quantizers, self.groups
        if min(numbers) < 1 or self.dim % self.groups:
            raise ValueError(
                "dim, codebook_size, num_quantizers and groups must be positive and groups divide "
                f"dim, got {', '.join(map(str, numbers))}"
            )
        own = self.dim // self.groups
        self.codebook_dim = own if self.codebook_dim is None else self.codebook_dim
        if self.projection is None:
            self.projection = "none" if self.codebook_dim == own else "shared"
        per_stage = self.projection == "per_stage"
        if self.kmeans_init is None:
            self.kmeans_init = not per_stage
        grads = rvq_projected.GRADIENTS if per_stage else rvq_autograd.GRADIENTS
        for name, known in (
            ("projection", PROJECTIONS),
            ("metric", rvq_autograd.METRICS),
            ("update", UPDATES),
            ("grad", grads),
        ):
            if getattr(self, name) not in known:
                words = " with projections of each stage" if name == "grad" and per_stage else ""
                raise ValueError(
                    f"{name} must be one of {', '.join(known)}{words}, got {getattr(self, name)!r}"
                )
        if self.projection == "none" and self.codebook_dim != own:
            raise ValueError(
                f"codes of width {self.codebook_dim} for rows of width {own} need a projection"
            )
        self._check_numbers()
        if per_stage:
            self._check_stages()

    def _check_numbers(self):
        if not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"seed must fit int64, got {self.seed}")
        if self.codebook_dim < 1 or self.kmeans_iterations < 1:
            raise ValueError(
                "codebook_dim and kmeans_iterations must be positive, got "
                f"{self.codebook_dim}, {self.kmeans_iterations}"
            )
        if not (0 <= self.decay < 1 and self.epsilon > 0 and 0 <= self.quantizer_dropout <= 1):
            raise ValueError(
                "expected 0 <= decay < 1, epsilon > 0 and 0 <= quantizer_dropout <= 1, got "
                f"{self.decay}, {self.epsilon}, {self.quantizer_dropout}"
            )
        if not 0 <= self.dead_code_threshold < 1:
            raise ValueError(
                "dead_code_threshold is a share of the mean use of all codes, from 0 to below 1, "
                f"got {self.dead_code_threshold}"
            )
        least = min(self.commitment_weight, self.codebook_weight)
        if least < 0 or (self.update == "gradient" and self.commitment_weight == 0):
            raise ValueError(
                "weights must not be negative, and that of the commitment not 0 where tables learn "
                f"by gradient, got {self.commitment_weight} and {self.codebook_weight}"
            )

    def _check_stages(self):
        if self.update != "gradient" or self.kmeans_init or self.dead_code_threshold:
            raise ValueError(
                "with projections of each stage the tables learn by update='gradient', without "
                "k-means and replacement of codes"
            )
        if self.shared_codebook or self.groups > 1:
            raise ValueError("projections of each stage have neither groups nor a shared table")
