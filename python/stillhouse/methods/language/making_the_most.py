"""Making the most of a model: recurrence, cache optimisation, denoising and conditional search.

Five tools for a pretrained transformer, four that get more out of it and one that explains why its
likeliest text may be a bad one.

Equations. R, recurrence: text in windows of w tokens; of window t the states H of layer l_out are
pooled, and what an MLP makes of them is one more key and value in the layers l_in of window t + 1,
visible to all its tokens, with no query and no position:

    r_t = W_2 act(W_1 mean_i H_i)

H, hidden-state optimisation: C the cached keys and values, eta a rate; x of a chunk is predicted
with C, then Adam steps on it, with moments that belong to the single states and travel with them:

    l = -sum log p(x | C),   C <- C - eta Adam(dl/dC)

S, a masked model as encoder and as decoder, with cross-attention behind a gate that starts at 0;
y the target, y_c the target with each token replaced with probability a ~ U(0, 1), f the decoder:

    L = 1/2 (CE(f(y_c | x), y) + CE(f(y' | x), y)),   y' ~ softmax f(y_c | x)

C, conditional search, for an attribute a (a length, not empty) and a classifier q of prefixes that
reads the model's own states; the score is replaced at each token, not accumulated:

    s_t = log p(x_1..t) + log q(a | x_1..t)

A, bad modes: if no good text has a probability above 2^-h, a share e of one bad text makes it the
mode of (1 - e) P + e delta as soon as e > 2^-h / (1 + 2^-h).

Thesis: Making the Most of your Model: Methods for Finetuning and Applying Pretrained Transformers,
D. Yoshida, TTIC 2023, arXiv 2408.16241. Its chapters: arXiv 2008.07027 (R), 2112.08653 (H),
2311.08817 (C, A). No code of the author is public: where the papers leave a choice open it is an
argument here, and this is our reading.
"""

from stillhouse.methods.language.conditional_search import (
    conditional_beam_search,
    exact_length_mode,
)
from stillhouse.methods.language.hidden_state_optimizer import HiddenStateOptimizer
from stillhouse.methods.language.mode_flip import mode_flip_threshold, output_entropy
from stillhouse.methods.language.prefix_classifier import LengthAttribute, train_prefix_classifier
from stillhouse.methods.language.unrolled_denoiser import UnrolledDenoiser, seq2seq_from_mlm
from stillhouse.methods.language.window_recurrence import WindowRecurrence

__all__ = [
    "HiddenStateOptimizer",
    "LengthAttribute",
    "UnrolledDenoiser",
    "WindowRecurrence",
    "conditional_beam_search",
    "exact_length_mode",
    "mode_flip_threshold",
    "output_entropy",
    "seq2seq_from_mlm",
    "train_prefix_classifier",
]
