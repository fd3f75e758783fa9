"""Dual-binary weights, and a linear layer of them that learns its scales."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from stillhouse import ops
from stillhouse.nn import fdb_fit
from stillhouse.ops import fdb_autograd, fdb_reference
from stillhouse.ops.fdb import multiply

GRADIENTS = ("planes", "thresholds")
ACTIVATIONS = (None, "int8")
# Buffers of scales, which stay float16 whatever a model is cast to.
_SCALES = ("initial", "tile_scales")
# What a state has of a frozen layer, and in what buffers.
_STORED = {"planes": "tiles", "alpha": "tile_scales"}


@dataclass(frozen=True, eq=False)
class FDBWeight:
    """A weight [N, K] as two planes of bits and two scales a group of G columns:
    alpha_1 b_1 + alpha_2 b_2, that is one of four levels, 2 + 32 / G bits a weight.

    planes: bool [2, N, K]. alpha: float16 [2, N, K / G]. Flexible dual binarization of DB-LLM,
    arXiv 2402.11960.
    """

    planes: Tensor
    alpha: Tensor

    @classmethod
    def from_dense(cls, weight: Tensor, group_size: int = 64, method: str = "paper") -> FDBWeight:
        """Scales by `method`, and of each weight the nearest level.

        "paper": s = max |w| / 2, scales 2 s and -s, the levels of a 2-bit integer. "mse": those of
        the s, of either sign, with the least squared error. "ls": from there on, codes and
        least-squares scales in turns; never worse. Scales are rounded to float16 at once. On groups
        of 64 normal numbers the mean squared error is 0.171, 0.122, 0.114 of their variance.

        weight: [N, K], any float dtype. Raises ValueError for K that is no multiple of
        `group_size`, numbers that are not finite or beyond float16's, another method or rank;
        TypeError for another dtype.

        Example:
            >>> import torch
            >>> from stillhouse.nn import FDBWeight
            >>> weight = torch.tensor([[-1.0, -0.2, 0.3, 0.6, 1.4, 2.0]])
            >>> fdb = FDBWeight.from_dense(weight, group_size=6)
            >>> fdb.dequantize()
            tensor([[-1.,  0.,  0.,  1.,  1.,  2.]])
            >>> fdb.planes.int().tolist()
            [[[0, 0, 0, 1, 1, 1]], [[1, 0, 0, 1, 1, 0]]]
        """
        if method not in fdb_fit.METHODS:
            raise ValueError(f"method must be one of {', '.join(fdb_fit.METHODS)}, got {method!r}")
        if not weight.is_floating_point():
            raise TypeError(f"a weight of floats is needed, got {weight.dtype}")
        _check_groups(weight.shape, group_size)
        weight = weight.detach()
        if weight.dtype != torch.float64:
            weight = weight.float()
        if weight.numel() and not weight.abs().max() <= torch.finfo(torch.float16).max:
            raise ValueError("the weight has numbers that are not finite, or beyond float16's")
        groups = weight.unflatten(1, (-1, group_size))
        alpha = fdb_fit.fit(groups.flatten(0, 1), method).view(2, *groups.shape[:2])
        return cls.nearest(weight, alpha)

    @classmethod
    def nearest(cls, weight: Tensor, alpha: Tensor) -> FDBWeight:
        """Of each weight [N, K] the nearest level of given scales [2, N, K / G]; of two as near as
        each other the one with the lower b_1 + 2 b_2."""
        groups = weight.unflatten(1, (alpha.shape[2], -1))
        _, code = fdb_fit.nearest(groups, alpha.to(weight.dtype))
        return cls(fdb_fit.bits(code).flatten(2), alpha)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [N, K]."""
        return fdb_reference.dequantize(self.planes, self.alpha.to(dtype))

    def pack(self) -> ops.FDBPacked:
        """As `ops.fdb_matmul` takes it."""
        return ops.fdb_pack(self.planes, self.alpha)

    def density(self) -> Tensor:
        """Share of ones in each plane, float32 [2]."""
        return self.planes.float().mean((1, 2))


class FDBLinear(nn.Module):
    """A linear layer whose weight is dual-binary: two planes of bits and two scales a group.

    While it trains it keeps `latent` [N, K], the full weight, and takes of it the nearest levels in
    each forward. What learns is `change` [2, N, K / G], with scales `initial` (1 + change): a step
    is relative to the scale, so one learning rate suits all layers. The forward sees them rounded
    to float16, as they will be stored. `freeze()` leaves bits and scales alone, and changes nothing
    in what float32 rows come to but the order of sums. They lie as `ops.fdb_matmul` reads them, in
    the buffers `tiles` and `tile_scales`; a state has them as `planes` (32 bits a word,
    `ops.FDBPacked.from_words`) and `alpha`, which as attributes are made anew each time.

    activations "int8": the frozen layer takes rows of 8 bits (`ops.fdb_quantize`), faster and not
    exact. It then has no gradient: ValueError for an x that needs one. It is no part of a state.

    gradient "planes": that of the scales with the planes held fixed, exact between changes of
    level. "thresholds": also through b = H(t) as if it were t, after a third party's module for
    DB-LLM (the paper's authors published none). train_latent: the weights learn too, with the
    gradient of the levels where they lie within a step of them ((highest - lowest) / 3).

    in_features must be a multiple of `group_size`, or ValueError. Cast a model as you like: scales
    stay float16.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from stillhouse.nn import FDBLinear
        >>> layer = FDBLinear.from_linear(nn.Linear(128, 8), group_size=64)
        >>> x = torch.randn(3, 128)
        >>> layer(x).sum().backward()
        >>> layer.change.grad.shape
        torch.Size([2, 8, 2])
        >>> trained = layer(x)
        >>> bool(torch.allclose(layer.freeze()(x), trained, atol=1e-5))
        True
        >>> {name: str(value.dtype) for name, value in layer.state_dict().items()}
        {'bias': 'torch.float32', 'planes': 'torch.int32', 'alpha': 'torch.float16'}
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        group_size: int = 64,
        *,
        frozen: bool = False,
        train_latent: bool = False,
        gradient: str = "planes",
        activations: str | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        """All zeros, for a state to be loaded; `from_linear` has weights."""
        super().__init__()
        if gradient not in GRADIENTS:
            raise ValueError(f"gradient must be {' or '.join(GRADIENTS)}, got {gradient!r}")
        _check_groups((out_features, in_features), group_size)
        _check_activations(activations)
        self.in_features, self.out_features = in_features, out_features
        self.group_size, self.gradient = group_size, gradient
        self.activations = activations
        like = {"device": device, "dtype": dtype}
        groups = in_features // group_size
        self.register_parameter("bias", None)
        if bias:
            self.bias = nn.Parameter(torch.zeros(out_features, **like))
        self.frozen = frozen
        if frozen:
            block = fdb_reference.BLOCK
            blocks, words = -(-out_features // block), -(-group_size // fdb_reference.WORD)
            tiles = torch.zeros(blocks, groups, words, 2, block, device=device, dtype=torch.int32)
            zeros = torch.zeros(blocks, groups, 2, block, device=device, dtype=torch.float16)
            self._hold(fdb_autograd.hold(tiles), zeros)
            return
        scales = 2, out_features, groups
        zeros = torch.zeros(scales, device=device, dtype=torch.float16)
        latent = torch.zeros(out_features, in_features, **like)
        self.latent = nn.Parameter(latent, requires_grad=train_latent)
        self.register_buffer("initial", zeros)
        self.change = nn.Parameter(torch.zeros(scales, device=device))

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        group_size: int = 64,
        method: str = "ls",
        *,
        train_latent: bool = False,
        gradient: str = "planes",
    ) -> FDBLinear:
        """A copy of `linear` that trains; arguments and errors as above and in
        `FDBWeight.from_dense`."""
        weight = linear.weight
        fdb = FDBWeight.from_dense(weight, group_size, method)
        layer = cls(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            group_size,
            train_latent=train_latent,
            gradient=gradient,
            device=weight.device,
            dtype=weight.dtype,
        )
        with torch.no_grad():
            layer.latent.copy_(weight)
            layer.initial.copy_(fdb.alpha)
            if layer.bias is not None:
                layer.bias.copy_(linear.bias)
        return layer.train(linear.training)

    def scales(self) -> Tensor:
        """alpha [2, N, K / G], rounded to float16; float32 and differentiable unless frozen."""
        if self.frozen:
            return self.alpha
        made = self.initial.float() * (1 + self.change.float())
        exact = made.detach()
        return made + (exact.half().float() - exact)  # the sum is exact: what float16 has

    @property
    def planes(self) -> Tensor:
        """Of a frozen layer: int32 [2, N, ceil(K / 32)]."""
        return fdb_reference.untile_words(self.tiles, self.out_features, self.in_features)

    @property
    def alpha(self) -> Tensor:
        """Of a frozen layer: float16 [2, N, K / G]."""
        return fdb_reference.untile_scales(self.tile_scales, self.out_features)

    def quantized(self) -> FDBWeight:
        """The weight as it is now. Raises ValueError where its parts are sharded."""
        if self.frozen:
            return FDBWeight(*ops.fdb_unpack(self._packed()))
        if hasattr(self.change, "full_tensor"):
            raise ValueError("the layer is sharded: load its full state dict into one that is not")
        return FDBWeight.nearest(self.latent.detach().float(), self.scales().detach().half())

    def freeze(self, activations: str | None = None) -> FDBLinear:
        """Keep bits and scales alone, in place; a second time nothing but `activations`, which None
        leaves as they are. Returns the layer. Raises ValueError for scales that have become
        infinite, and where its parts are sharded."""
        _check_activations(activations)
        if not self.frozen:
            packed = self.quantized().pack()
            del self.latent, self.change, self.initial
            self._hold(packed.tiles, packed.scales)
            self.frozen = True
        if activations is not None:
            self.activations = activations
        return self

    def to_linear(self) -> nn.Linear:
        """An ordinary layer of the same levels, for what knows no others; float32."""
        weight = self._packed().dequantize() if self.frozen else self.quantized().dequantize()
        made = nn.Linear(
            self.in_features, self.out_features, self.bias is not None, device=weight.device
        )
        with torch.no_grad():
            made.weight.copy_(weight)
            if made.bias is not None:
                made.bias.copy_(self.bias)
        return made.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        """[..., N] of x [..., K], in its dtype."""
        if self.frozen:
            rows = ops.fdb_quantize(x, self.group_size) if self.activations == "int8" else x
            size = self.out_features, self.in_features
            return multiply(rows, self.tiles, self.tile_scales, *size, self.bias)
        of_levels = _through_thresholds if self.gradient == "thresholds" else _Levels.apply
        weight = of_levels(self.latent.float(), self.scales())
        return linear(x, weight.to(x.dtype), self.bias)

    def _hold(self, tiles: Tensor, scales: Tensor) -> None:
        self.register_buffer("tiles", tiles)
        self.register_buffer("tile_scales", scales)

    def _packed(self) -> ops.FDBPacked:
        return ops.FDBPacked(self.tiles, self.tile_scales, self.out_features, self.in_features)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, group_size={self.group_size}, frozen={self.frozen}"
            + (f", activations={self.activations}" if self.activations else "")
        )

    def _apply(self, fn: Any, recurse: bool = True) -> FDBLinear:
        kept = {name: self._buffers[name] for name in _SCALES if name in self._buffers}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            now = self._buffers[name]
            if now.dtype != torch.float16:
                self._buffers[name] = before.to(now.device)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.frozen:
            for name, tiled in _STORED.items():
                del destination[prefix + tiled]
                destination[prefix + name] = getattr(self, name)

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        state, missing = dict(state_dict), []
        wrong = _tile_(state, prefix, self) if self.frozen else {}
        error_msgs += wrong.values()
        rest = local_metadata, strict, missing, unexpected_keys, error_msgs
        super()._load_from_state_dict(state, prefix, *rest)
        stored = {prefix + tiled: prefix + name for name, tiled in _STORED.items()}
        names = (stored.get(name, name) for name in missing)
        missing_keys += (name for name in names if name not in wrong)


def _tile_(state: dict[str, Tensor], prefix: str, layer: FDBLinear) -> dict[str, str]:
    """Put what a state has of a frozen layer as its buffers have it; what cannot be, and why."""
    rows, columns, groups = layer.out_features, layer.in_features, layer.tiles.shape[1]
    words = -(-columns // fdb_reference.WORD)
    shapes, wrong = {"planes": (2, rows, words), "alpha": (2, rows, groups)}, {}
    for name, shape in shapes.items():
        found = state.pop(prefix + name, None)
        if found is None:
            continue
        fits = found.dtype == torch.int32 if name == "planes" else found.is_floating_point()
        if not fits or found.shape != shape:
            kind = "int32" if name == "planes" else "float16"
            wrong[prefix + name] = (
                f"{prefix}{name} must be {kind} {list(shape)}, got {found.dtype} "
                f"{list(found.shape)}"
            )
        elif name == "planes":
            tiles = fdb_reference.tile_words(found, groups, columns)
            state[prefix + _STORED[name]] = fdb_autograd.hold(tiles)
        else:
            state[prefix + _STORED[name]] = fdb_reference.tile_scales(found.to(torch.float16))
    return wrong


class _Levels(torch.autograd.Function):
    """The nearest levels [N, K] of latent [N, K] and scales [2, N, K / G]."""

    @staticmethod
    def forward(ctx, latent, alpha):
        groups = latent.unflatten(1, (alpha.shape[2], -1))
        value, code = fdb_fit.nearest(groups, alpha)
        inside = None
        if ctx.needs_input_grad[0]:
            levels = torch.stack([torch.zeros_like(alpha[0]), *alpha, alpha.sum(0)])[..., None]
            lowest, highest = levels.amin(0), levels.amax(0)
            step = (highest - lowest) / 3
            inside = (groups >= lowest - step) & (groups <= highest + step)
        ctx.save_for_backward(code, inside)
        return value.flatten(1)

    @staticmethod
    def backward(ctx, upstream):
        code, inside = ctx.saved_tensors
        groups = upstream.unflatten(1, code.shape[1:])
        d_alpha = torch.stack([(groups * (code & bit).bool()).sum(-1) for bit in (1, 2)])
        return None if inside is None else (groups * inside).flatten(1), d_alpha


def _through_thresholds(latent: Tensor, alpha: Tensor) -> Tensor:
    """The same levels; to autograd b_1 is t_1 = w - (a_1 + a_2) / 2 and b_2 is
    t_2 = -(w - a_1 b_1 - a_2 / 2), of which they are the signs, both negated where a_1 < 0."""
    groups = latent.unflatten(1, (alpha.shape[2], -1))
    first, second = alpha[..., None]
    with torch.no_grad():
        planes = fdb_fit.bits(fdb_fit.nearest(groups, alpha)[1]).to(groups.dtype)
        sign = torch.where(first < 0, -1.0, 1.0)
    threshold = sign * (groups - (first + second) / 2)
    b1 = planes[0] + (threshold - threshold.detach())
    threshold = -sign * (groups - first * b1 - second / 2)
    b2 = planes[1] + (threshold - threshold.detach())
    return (first * b1 + second * b2).flatten(1)


def _check_activations(activations: str | None) -> None:
    if activations not in ACTIVATIONS:
        raise ValueError(f"activations must be 'int8' or None, got {activations!r}")


def _check_groups(shape: tuple[int, ...], group_size: int) -> None:
    if len(shape) != 2:
        raise ValueError(f"a weight is [N, K], got {tuple(shape)}")
    if group_size < 1 or shape[1] % group_size:
        raise ValueError(f"{shape[1]} columns are no multiple of group_size {group_size}")
