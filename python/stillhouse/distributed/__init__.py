"""Divergences of a vocabulary whose columns lie on several processes."""

from .vocab_parallel import vocab_parallel_divergence, vocab_parallel_divergence_loss

__all__ = ["vocab_parallel_divergence", "vocab_parallel_divergence_loss"]
