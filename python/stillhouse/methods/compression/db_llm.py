"""DB-LLM: weights of two bits that stay flexible, taught more where teacher and student are unsure.

Each weight of a language model becomes the sum of two binary ones with a scale each. At first that
is a 2-bit integer; then the scales move, two for each group of weights, and the four levels with
them, while products stay sums over the set bits. What is lost is won back from the full-precision
teacher: low-bit models fail where the next token is ambiguous, so a token counts by the entropies
of the teacher's and the student's distributions.

Equation, w_k a weight of a group, p and q the teacher's and the student's probabilities of a token:

    w_k  ~ a1 b1_k + a2 b2_k,   b in {0, 1},   at first a1 = 2 s, a2 = -s
    b1_k = [w_k >= (a1 + a2) / 2],   b2_k = [a1 b1_k + a2 / 2 >= w_k]
    L    = mean_i [ H(p_i)^gamma H(q_i)^(1 - gamma) ] CE(p_i, q_i)

Paper: DB-LLM: Accurate Dual-Binarization for Efficient LLMs, Findings of ACL 2024,
arXiv 2402.11960. Its authors released no code.

Our reading: that the weight is made of both entropies is the paper's, the exponents are not known
to be. It is a constant for the gradient. Planes are the nearest levels, which the equation gives as
long as a2 < 0 < a1 + a2 < a1, and of two equally near ones that of the lower b1 + 2 b2.
"""

from stillhouse.methods.compression.entropy_weighting import (
    EntropyWeightedLoss,
    entropy_weighted_kd,
)
from stillhouse.nn.fdb_surgery import freeze_fdb_, quantize_fdb_
from stillhouse.train.quantized import load_fdb, save_fdb

__all__ = [
    "EntropyWeightedLoss",
    "entropy_weighted_kd",
    "freeze_fdb_",
    "load_fdb",
    "quantize_fdb_",
    "save_fdb",
]
