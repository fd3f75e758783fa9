"""The one table of methods: what exists, what it is called, where it lives."""

from dataclasses import dataclass
from importlib import import_module
from types import ModuleType


@dataclass(frozen=True)
class Method:
    """One row. `names` are the public names of the method's module; `objective` is the one among
    them that `--method` builds, where the method is a loss that a trainer can follow."""

    id: str
    title: str
    arxiv: str
    domain: str
    kind: str
    kernels: tuple[str, ...]
    names: tuple[str, ...]
    objective: str | None = None

    @property
    def module(self) -> str:
        return f"stillhouse.methods.{self.domain}.{self.id.replace('-', '_')}"

    @property
    def recipe(self) -> str:
        return f"stillhouse.recipes.{self.domain}.{self.id.replace('-', '_')}"

    def load(self) -> ModuleType:
        """The method's module."""
        return import_module(self.module)

    def load_recipe(self) -> ModuleType:
        """The module whose `run(report, seeds, budget)` measures the method's claims."""
        return import_module(self.recipe)


METHODS = {
    method.id: method
    for method in (
        Method(
            id="taid",
            title="Temporally adaptive interpolated distillation",
            arxiv="2501.16937",
            domain="language",
            kind="logit loss with a schedule",
            kernels=("divergence",),
            names=("taid_loss", "TAIDLoss"),
            objective="TAIDLoss",
        ),
        Method(
            id="sinkd",
            title="Sinkhorn distance minimisation",
            arxiv="2402.17110",
            domain="language",
            kind="logit loss across samples",
            kernels=("sinkhorn", "divergence"),
            names=("sinkhorn_kd", "sample_sinkhorn_kd", "embedded_sinkhorn_kd", "SinKDLoss"),
            objective="SinKDLoss",
        ),
        Method(
            id="capacity-gap",
            title="Law of capacity gap",
            arxiv="2311.07052",
            domain="language",
            kind="pruned students, logit loss, scaling law",
            kernels=("divergence",),
            names=(
                "mask_importance",
                "component_sparsity",
                "CapacityGapLoss",
                "capacity_gap_sweep",
                "optimal_teacher",
                "fit_capacity_gap_law",
            ),
            objective="CapacityGapLoss",
        ),
    )
}


def find(id: str) -> Method:
    """The row of a method. Raises ValueError naming the ids that exist."""
    if id not in METHODS:
        raise ValueError(f"no method {id!r}: expected one of {', '.join(METHODS)}")
    return METHODS[id]
