"""Runnable experiments on real data: each measures what its method claims."""
