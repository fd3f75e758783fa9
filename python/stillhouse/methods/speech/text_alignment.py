"""Where the rows of a text model stand in time."""

from __future__ import annotations

import torch
from torch import Tensor


def align_text(
    states: Tensor,
    frames: int,
    *,
    align: str = "pad",
    spans: Tensor | None = None,
    frame_rate: float = 50.0,
) -> tuple[Tensor, Tensor]:
    """Rows of a text model, one a token or word, as rows one a frame: [B, frames, D], and which
    of them count, bool [B, frames].

    states: [B, W, D]. align "pad": the paper's, rows stay in the first places, in their order and
    at no moment; those beyond the last do not count. "stretch" (ours): each row is repeated over
    its time, spans [B, W, 2] in seconds, which begins and ends at the nearest frame and lasts one
    frame at least (a word of no length, or NaN, is left out). Frames between words do not count;
    where words overlap the later one has the frame.
    Raises ValueError for another word, shapes that do not fit, and spans without "stretch".

    Defaults: "pad"; 50 frames a second (the paper's codec).

    Example:
        >>> import torch
        >>> from stillhouse.methods.speech import align_text
        >>> words = torch.tensor([[[1.0], [2.0]]])
        >>> spans = torch.tensor([[[0.0, 0.04], [0.06, 0.1]]])
        >>> rows, mask = align_text(words, 6, align="stretch", spans=spans)
        >>> rows[0, :, 0], mask[0]
        (tensor([1., 1., 0., 2., 2., 0.]), tensor([ True,  True, False,  True,  True, False]))
    """
    if align not in ("pad", "stretch"):
        raise ValueError(f"align must be 'pad' or 'stretch', got {align!r}")
    if states.dim() != 3 or frames < 1:
        raise ValueError(
            f"expected states [B, W, D] and frames >= 1, got {tuple(states.shape)} and {frames}"
        )
    count, words, _ = states.shape
    place = torch.arange(frames, device=states.device)
    if align == "pad":
        if spans is not None:
            raise ValueError("spans say when words are: they are for align='stretch'")
        word = place.clamp(max=max(words - 1, 0)).expand(count, frames)
        mask = (place < words).expand(count, frames)
    else:
        if spans is None or spans.shape != (count, words, 2):
            given = None if spans is None else tuple(spans.shape)
            raise ValueError(f"align='stretch' needs spans [{count}, {words}, 2], got {given}")
        begin, end = (spans.double() * frame_rate).round().unbind(-1)
        end = torch.where(spans[..., 1] > spans[..., 0], end.maximum(begin + 1), begin)
        inside = (place[:, None] >= begin[:, None]) & (place[:, None] < end[:, None])
        mask = inside.any(-1)
        # The last word that is there: the largest index among those that hold the frame.
        number = torch.arange(words, device=states.device)
        word = (inside * number).amax(-1) if words else place.expand(count, frames)
    if not words:
        return states.new_zeros(count, frames, states.shape[2]), mask
    rows = states.gather(1, word[..., None].expand(-1, -1, states.shape[2]))
    return rows * mask[..., None], mask
