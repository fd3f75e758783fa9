"""Token ids of one document or of several, packed, one by one."""

from typing import Any

import numpy as np


def split_documents(ids: Any, document_ids: Any) -> tuple[np.ndarray, list[np.ndarray]]:
    """The ids as int32 [n], and its documents one by one."""
    ids = np.asarray(ids, dtype=np.int32)
    if ids.ndim != 1 or len(ids) < 2:
        raise ValueError(f"expected ids [n] of at least two tokens, got shape {ids.shape}")
    if document_ids is None:
        return ids, [ids]
    documents = np.asarray(document_ids)
    if documents.shape != ids.shape:
        raise ValueError(f"{ids.shape} ids and {documents.shape} document_ids: one a token")
    return ids, np.split(ids, np.flatnonzero(np.diff(documents)) + 1)
