"""FSPAD: a draft head that knows which token was sampled, and aligns only what it feeds back.

A head of one decoder layer drafts for a large target: from the target's last feature and the
embedding of the token that followed it predicts the next feature and the token behind. EAGLE adds
both inputs up linearly and asks one output to be feature and logits at once. Here the token's
embedding gates the feature in the width of the MLP, so that the draft follows what was really
sampled ("feature sampling"); and the layer has two outputs, one for logits alone and one that is
fed back, of which only the second is regressed to the target's feature ("partial alignment
distillation"). The head drafts a tree that grows where it is sure; the target verifies it.

Equation, f_t the target's feature behind its final norm, e the embedding of token t + 1, H the
target's output head, both frozen:

    a = Wc [e; f_t] + bc,   h = a + Wd (silu(Wg e) * Wu RMSNorm(a))

    r = h + Attention(h),   [p; q] = [r; r] + MLP_2D(RMSNorm(r))

    L = mean SmoothL1(q_t, f_{t+1}) - 0.1 sum softmax(H f_{t+1}) log softmax(H p_t)

    score(child) = score(parent) + log softmax(H p)(child), then the child's f is its parent's q

Paper: Boosting Lossless Speculative Decoding via Feature Sampling and Partial Alignment
Distillation, arXiv 2408.15562. Code by its authors: Luc4Gui/FSPAD.

Where we differ: the gate's last matrix begins at 0, so that an untrained head fuses as EAGLE's
does. "Feature" is what the target's output head reads, behind the final norm, as in their data.
"""

from __future__ import annotations

from stillhouse.methods.speculative.draft_head import FSPADHead
from stillhouse.methods.speculative.draft_head_training import (
    draft_head_loss,
    target_features,
    train_draft_head,
)
from stillhouse.methods.speculative.dynamic_tree_drafter import DynamicTreeDrafter

__all__ = [
    "DynamicTreeDrafter",
    "FSPADHead",
    "draft_head_loss",
    "target_features",
    "train_draft_head",
]
