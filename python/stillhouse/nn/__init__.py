"""Modules, and the stateless functions that several domains share."""

from stillhouse.nn.kmeans import kmeans

__all__ = ["kmeans"]
