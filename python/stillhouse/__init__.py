"""stillhouse: distillation for PyTorch, from the kernel up."""

from importlib.metadata import PackageNotFoundError, version

from . import ops

try:
    __version__ = version("stillhouse")
except PackageNotFoundError:  # a source tree on sys.path that was never installed
    __version__ = "0+uninstalled"

__all__ = ["ops"]
