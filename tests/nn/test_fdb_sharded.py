"""Dual-binary layers under `fully_shard`: they train, and refuse what needs whole layers."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from stillhouse.nn import FDBLinear
from stillhouse.nn.fdb_surgery import freeze_fdb_, quantize_fdb_
from stillhouse.nn.surgery import train_only


def make():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 7))
    quantize_fdb_(model, 16)
    train_only(model, "*.change")
    return model


def refusal(action):
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def work(rank, store, queue):
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{store}", world_size=2, rank=rank)
    mesh = dist.init_device_mesh("cpu", (2,))
    plain = make()
    sharded = copy.deepcopy(plain)
    for layer in sharded:
        if isinstance(layer, FDBLinear):
            fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    losses, found = {}, {}
    for name, model in (("plain", plain), ("sharded", sharded)):
        learning = [each for each in model.parameters() if each.requires_grad]
        optimizer = torch.optim.AdamW(learning, lr=0.1)
        losses[name] = []
        for _ in range(3):
            loss = (model(x) - 1).square().mean()
            losses[name].append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    found["losses"] = losses
    found["local"] = tuple(sharded[0].change.to_local().shape)
    found["freeze"] = refusal(lambda: freeze_fdb_(sharded))
    found["layer"] = refusal(sharded[0].freeze)
    found["again"] = refusal(lambda: quantize_fdb_(sharded, 16))
    # What it says to do: the whole state in a model that is not sharded.
    whole = get_model_state_dict(sharded, options=StateDictOptions(full_state_dict=True))
    gathered = make()
    if rank == 0:
        gathered.load_state_dict(whole)
        freeze_fdb_(gathered), freeze_fdb_(plain)
        found["gathered"] = (gathered(x) - plain(x)).abs().max().item()
    frozen = make()
    freeze_fdb_(frozen)
    expected = frozen(x).detach()
    fully_shard(frozen, mesh=mesh)
    found["frozen"] = (frozen(x).detach() - expected).abs().max().item()
    if rank == 0:
        queue.put(found)
    dist.barrier()
    dist.destroy_process_group()


def test_two_processes(tmp_path):
    context = mp.get_context("spawn")
    queue = context.Queue()
    arguments = str(tmp_path / "store"), queue
    workers = [context.Process(target=work, args=(rank, *arguments)) for rank in range(2)]
    for worker in workers:
        worker.start()
    try:
        found = queue.get(timeout=60)
    finally:
        for worker in workers:
            worker.join(timeout=30)
            worker.kill()
    assert found["local"] == (1, 48, 2)  # half of the scales
    assert found["losses"]["sharded"] == pytest.approx(found["losses"]["plain"], rel=1e-6)
    assert found["losses"]["plain"][-1] < found["losses"]["plain"][0]
    assert found["gathered"] < 1e-6
    assert found["frozen"] < 1e-6
    instead = "load its full state dict into one that is not"
    assert found["freeze"] == f"ValueError: the model is sharded: {instead}, and freeze that"
    assert found["layer"] == f"ValueError: the layer is sharded: {instead}"
    assert found["again"] == "ValueError: the model is sharded: quantize it before fully_shard"
