"""Token ids on their way to the drafters' tables."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor


def token_array(ids: Tensor | np.ndarray | Sequence[int]) -> np.ndarray:
    """Contiguous int32 [n] of a tensor on any device, an array or a list of whole numbers.

    Raises TypeError for ids that are not whole numbers, ValueError for those beyond int32.
    """
    array = ids.numpy(force=True) if isinstance(ids, Tensor) else np.asarray(ids)
    if array.dtype == np.int32:
        return np.ascontiguousarray(array)
    if array.size == 0:
        return np.zeros(array.shape, np.int32)
    if not np.issubdtype(array.dtype, np.integer):
        raise TypeError(f"expected token ids to be integers, got {array.dtype}")
    narrow = array.astype(np.int32)
    if (narrow != array).any():
        wrong = array[narrow != array][0]
        raise ValueError(f"expected token ids below 2^31, got {wrong}")
    return narrow
