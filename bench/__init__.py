"""The benchmark: our ops beside plain torch, torch.compile and peers, measured in one run.

`python -m bench` from a source tree, `stillhouse bench` from an installation. See `driver.py` for
what is measured and `divergence.py` for a family.
"""

from .driver import main

__all__ = ["main"]
