"""Which experts get which domain: mutual information, its significance, and loads."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stillhouse.nn.moe import MoE

PERMUTATIONS = 999


@torch.no_grad()
def choices_of(model: nn.Module, held: Tensor) -> Tensor:
    """How often a window's tokens choose an expert, float [mixtures, windows, E]."""
    model.eval()(held)
    found = []
    for mixture in (module for module in model.modules() if isinstance(module, MoE)):
        index = mixture.info.index.view(len(held), -1)
        found.append(nn.functional.one_hot(index, len(mixture.experts)).sum(1).double())
    return torch.stack(found)


def information(choices: Tensor, domains: Tensor) -> Tensor:
    """Mutual information of domain and expert, nats, summed over mixtures. domains: [..., n]."""
    second = domains.double() @ choices  # [mixtures, ..., E]
    joint = torch.stack([choices.sum(1, keepdim=True).expand_as(second) - second, second], -2)
    joint = joint / joint.sum((-1, -2), keepdim=True)
    outer = joint.sum(-1, keepdim=True) * joint.sum(-2, keepdim=True)
    return (torch.special.xlogy(joint, joint) - torch.special.xlogy(joint, outer)).sum((0, -1, -2))


def routing_of(model: nn.Module, held: Tensor, domains: Tensor, seed: int) -> dict[str, float]:
    """Domains are permuted by the window: its tokens are not independent."""
    choices, generator = choices_of(model, held), torch.Generator().manual_seed(seed)
    found = information(choices, domains[None])[0]
    shuffled = [
        domains[torch.randperm(len(held), generator=generator)] for _ in range(PERMUTATIONS)
    ]
    chance = information(choices, torch.stack(shuffled))
    load = choices.sum(1)
    return {
        "information, nats": found.item(),
        "by chance": chance.mean().item(),
        "p": (1 + (chance >= found).sum().item()) / (1 + PERMUTATIONS),
        "largest load": (load.max(-1).values / load.mean(-1)).max().item(),
    }
