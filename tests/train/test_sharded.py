"""The loss inside the forward of a model whose weights are sharded over two processes."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from stillhouse.train import row_loss, supervised_rows
from stillhouse.train.forward import FrozenTeacher, RowForward


def step(model, forward, teacher, batch):
    """One forward and backward of the loss of a batch."""
    index = supervised_rows(batch["labels"])
    target = teacher(batch, index)

    def compute(student):
        return {"loss": row_loss(student, target, "forward_kl", {"denominator": 5.0})[0]}

    loss = forward(model, batch, index, compute)["loss"]
    loss.backward()
    return loss.detach()


def part_of(batch, rank):
    return {name: value[rank : rank + 1] for name, value in batch.items()}


def work(rank, store, how, models, batch, queue):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{store}", world_size=2, rank=rank)
    model, teacher = copy.deepcopy(models[0]), FrozenTeacher(copy.deepcopy(models[1]))
    forward, wrapped = RowForward(model), model
    if how.startswith("ddp"):
        # Which parameters are used it finds out from the outputs alone.
        looks = how == "ddp that looks"
        wrapped = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=looks)
    else:
        from torch.distributed.fsdp import fully_shard

        mesh = dist.init_device_mesh("cpu", (2,))
        for layer in model.model.layers if how == "fsdp2" else ():
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    losses = [step(wrapped, forward, teacher, part_of(batch, rank)) for _ in range(2)]
    gradients = {}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        gradients[name] = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
    losses = [dist.all_reduce(loss) or loss.item() for loss in losses]
    if rank == 0:
        queue.put((dist.get_world_size(), losses, {n: g.numpy() for n, g in gradients.items()}))
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
@pytest.mark.parametrize("how", ["ddp", "ddp that looks", "fsdp2", "fsdp2 whole"])
def test_two_processes(how, tied, llama, batch, tmp_path):
    model, teacher = llama(tie_word_embeddings=tied), llama(3, seed=1)
    context = mp.get_context("spawn")
    queue = context.Queue()
    store = tmp_path / "store"
    workers = [
        context.Process(target=work, args=(rank, store, how, (model, teacher), batch, queue))
        for rank in range(2)
    ]
    for worker in workers:
        worker.start()
    try:
        size, losses, gradients = queue.get(timeout=120)
    finally:
        for worker in workers:
            worker.join(timeout=30)
            worker.kill()
    assert size == 2
    plain = copy.deepcopy(model)
    forward, frozen = RowForward(plain), FrozenTeacher(teacher)
    want = sum(step(plain, forward, frozen, part_of(batch, rank)) for rank in range(2))
    assert losses == pytest.approx([want.item()] * 2, rel=1e-5)
    for name, parameter in plain.named_parameters():
        # Averaged over two processes, and two steps of each.
        got = torch.from_numpy(gradients[name])
        torch.testing.assert_close(got, parameter.grad, rtol=1e-4, atol=1e-6)
