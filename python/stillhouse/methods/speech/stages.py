"""What single stages of a residual quantizer stand for, with a gradient to what is quantized."""

from __future__ import annotations

from torch import Tensor

from stillhouse import ops

Stage = int | str


def stage_range(stage: Stage, num_quantizers: int) -> tuple[int, int]:
    """First and last stage, counted from 1, of 3, "3", "2:5" or "1:Q" (to the last one).

    Raises ValueError for another form and for stages that do not exist.
    """
    first, colon, last = str(stage).partition(":")
    last = last if colon else first
    try:
        ends = int(first), num_quantizers if colon and last == "Q" else int(last)
    except ValueError:
        raise ValueError(f"a stage is a number, or a range as '1:Q', got {stage!r}") from None
    if not 1 <= ends[0] <= ends[1] <= num_quantizers:
        raise ValueError(f"stages are 1 to {num_quantizers}, got {stage!r}")
    return ends


def stage_average(encoded: Tensor, codes: Tensor, tables: Tensor, first: int, last: int) -> Tensor:
    """The mean of what stages first to last (counted from 1) have added, [B, T, D].

    encoded [B, T, D] is what was quantized, codes [B, T, Q], tables [Q, K, D] those that gave the
    codes. The value is the sum of the codes over their number n; the gradient to `encoded` is 1/n,
    whatever the range: each stage's input is `encoded` less codes that have no gradient.
    """
    n = last - first + 1
    total = ops.rvq_decode(codes[..., first - 1 : last], tables[first - 1 : last])
    # Not encoded + (total - encoded): the value is that of the codes to the last bit.
    return (total.detach() + (encoded - encoded.detach())) / n
