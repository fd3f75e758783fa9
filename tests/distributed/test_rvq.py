"""Quantizers in two processes learn what one does from the joined batch."""

import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from stillhouse.nn import GroupedResidualVQ, ResidualVQ

WORLD, STEPS = 2, 4
CASES = {
    "means": {"kmeans_init": False},
    "kmeans": {},
    "few_rows": {"codebook_size": 128},
    "dead_codes": {"kmeans_init": False, "dead_code_threshold": 0.4},
    "shared": {"shared_codebook": True, "dead_code_threshold": 0.4},
    "gradient": {"update": "gradient"},
    "groups": {"groups": 2, "dead_code_threshold": 0.4},
}


def quantizer(codebook_size=16, **options):
    made = GroupedResidualVQ if "groups" in options else ResidualVQ
    return made(8, codebook_size, 3, **{"decay": 0.8, **options}).train()


def batch(step):
    """Rows [4, 20, 8] and a mask: two items for each process, the second one has fewer rows."""
    x = torch.randn(4, 20, 8, generator=torch.Generator().manual_seed(step))
    return x, torch.arange(20) < torch.tensor([20, 17, 3, 11])[:, None]


def trained(options, items, world=1):
    """A quantizer after steps on these items of the batches, and the codes of the last one.

    Tables that learn by gradient move by its mean over processes, as in DistributedDataParallel;
    losses are sums over rows, so that means of processes with unequal masks do not differ.
    """
    module = quantizer(**options)
    for step in range(STEPS):
        x, mask = batch(step)
        found = module(x[items], mask=mask[items])
        if module.update == "gradient":
            (slope,) = torch.autograd.grad(
                (found.commit_loss * mask[items].sum()).sum(), [module.tables]
            )
            if world > 1:
                dist.all_reduce(slope)
            with torch.no_grad():
                module.tables -= 0.01 * slope
    return {
        "codes": found.codes,
        **{name: getattr(module, name).detach() for name in ("tables", "counts", "sums", "energy")},
        "begun": module.begun,
    }


def work(rank, folder):
    """A process of its own: what it has found, into the folder."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", world_size=WORLD, rank=rank)
    items = slice(2 * rank, 2 * rank + 2)
    found = {name: trained(options, items, WORLD) for name, options in CASES.items()}
    found["alone"] = trained({"synchronize": False, "dead_code_threshold": 0.4}, items)
    module = quantizer(quantizer_dropout=1.0, kmeans_init=False)
    found["depths"] = (module(torch.ones(50, 1, 8)).codes >= 0).sum((1, 2))
    calls = []
    reduce, gather = dist.all_reduce, dist.all_gather
    dist.all_reduce = lambda *a, **k: (calls.append("reduce"), reduce(*a, **k))[1]
    dist.all_gather = lambda *a, **k: (calls.append("gather"), gather(*a, **k))[1]
    quantizer(kmeans_init=False)(batch(0)[0])
    found["calls"] = calls
    torch.save(found, f"{folder}/{rank}.part")
    os.replace(f"{folder}/{rank}.part", f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # threads that gloo leaves behind can abort an interpreter that shuts down


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """What each process has found."""
    folder = tmp_path_factory.mktemp("processes")
    # Of this file by its path: other packages have a module named tests.
    command = [sys.executable, __file__, str(folder)]
    workers = [subprocess.Popen([*command, str(rank)]) for rank in range(WORLD)]
    try:
        ends = [worker.wait(timeout=120) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    files = [folder / f"{rank}.pt" for rank in range(WORLD)]
    assert all(file.exists() for file in files), f"processes ended with {ends}"
    return [torch.load(file) for file in files]


@pytest.mark.parametrize("name", CASES)
def test_as_one_process_with_the_joined_batch(parts, name):
    whole = trained(CASES[name], slice(None))
    axis = 1 if "groups" in CASES[name] else 0
    codes = torch.cat([parts[r][name]["codes"] for r in range(WORLD)], axis)
    assert (codes == whole["codes"]).all()
    for rank in range(WORLD):
        found = parts[rank][name]
        assert found["begun"]
        for state in ("tables", "counts", "sums", "energy"):
            torch.testing.assert_close(found[state], whole[state], atol=1e-4, rtol=1e-4)
            if CASES[name].get("update") != "gradient" or state != "tables":
                assert (found[state] == parts[0][name][state]).all()  # not a bit apart


def test_processes_that_do_not_synchronize(parts):
    for rank in range(WORLD):
        options = {"dead_code_threshold": 0.4}
        alone = trained(options, slice(2 * rank, 2 * rank + 2))
        torch.testing.assert_close(parts[rank]["alone"]["tables"], alone["tables"])
    assert (parts[0]["alone"]["tables"] != parts[1]["alone"]["tables"]).any()


def test_depths_differ_between_processes(parts):
    assert (parts[0]["depths"] != parts[1]["depths"]).any()


def test_one_collective_a_step(parts):
    assert [parts[rank]["calls"] for rank in range(WORLD)] == [["reduce"]] * WORLD


if __name__ == "__main__":
    work(int(sys.argv[2]), sys.argv[1])
