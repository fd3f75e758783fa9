"""What passes through a model on the way, read off by hooks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


class _Stop(Exception):
    """The forward has come to where it was to end."""


@contextmanager
def capture(
    model: nn.Module,
    paths: str | Iterable[str],
    *,
    inputs: bool = False,
    detach: bool = True,
    stop_after: str | None = None,
) -> Iterator[dict[str, Tensor]]:
    """Collect what the modules at `paths` give, or with `inputs` what they get, during a forward.

    Yields a dict path -> tensor, filled as the modules run; of a module that runs several times the
    last one stays. Where a module gives or gets several tensors (attention: states and weights) it
    is the first, by position and then by keyword. detach: without the graph. stop_after: the path
    of a module after which the forward ends; nothing behind it is computed, and nothing that stands
    behind the forward in the `with` block is run.
    Raises ValueError for a path that does not exist, for a module that had no tensor, and where the
    forward stopped before it came to a path.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from stillhouse.train import capture
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> with capture(model, ["1"], stop_after="1") as taps:
        ...     _ = model(torch.ones(5, 2))
        >>> taps["1"].shape
        torch.Size([5, 3])
    """
    paths = [paths] if isinstance(paths, str) else list(paths)
    modules = dict(model.named_modules(remove_duplicate=False))
    for path in [*paths, *([] if stop_after is None else [stop_after])]:
        if path not in modules:
            raise ValueError(f"{type(model).__name__} has no module {path!r}")
    taps: dict[str, Tensor] = {}

    def keep(path: str, found: Tensor | None) -> None:
        if found is None:
            raise ValueError(f"{path} {'gets' if inputs else 'gives'} no tensor")
        taps[path] = found.detach() if detach else found

    def before(path: str):
        return lambda module, args, kwargs: keep(path, _first((*args, *kwargs.values())))

    def after(path: str):
        return lambda module, args, output: keep(path, _first(output))

    def stop(module: nn.Module, args: Any, output: Any) -> None:
        raise _Stop

    handles = []
    try:
        for path in paths:
            if inputs:
                handle = modules[path].register_forward_pre_hook(before(path), with_kwargs=True)
            else:
                handle = modules[path].register_forward_hook(after(path))
            handles.append(handle)
        if stop_after is not None:
            # Registered last: a tap of the same module comes first.
            handles.append(modules[stop_after].register_forward_hook(stop))
        yield taps
    except _Stop:
        missing = [path for path in paths if path not in taps]
        if missing:
            raise ValueError(
                f"the forward stopped after {stop_after}, before {missing[0]}"
            ) from None
    finally:
        for handle in handles:
            handle.remove()


def _first(found: Any) -> Tensor | None:
    """The first tensor of an output or of arguments."""
    if isinstance(found, Tensor):
        return found
    if isinstance(found, Mapping):
        found = tuple(found.values())
    if isinstance(found, (tuple, list)):
        return next((each for each in found if isinstance(each, Tensor)), None)
    return None
