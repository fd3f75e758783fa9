"""The entropy of the mean code over two processes against all rows in one."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from stillhouse import ops
from stillhouse.nn import LFQ

WORLD = 2
COUNTS = (5, 11)  # rows of each process, where they are not as many


def rows():
    generator = torch.Generator().manual_seed(7)
    return 0.2 * torch.randn(sum(COUNTS), 7, generator=generator, dtype=torch.float64)


def own(rank):
    return rows().split(COUNTS)[rank].clone().requires_grad_()


OPTIONS = [{}, {"group": 3}, {"group": 1}]


def work(rank, store, queue):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{store}", world_size=WORLD, rank=rank)
    results = []
    for entropy in (ops.lfq_entropy, ops.bsq_entropy):
        for options in OPTIONS:
            x = own(rank)
            found = entropy(x, inv_temperature=1.5, process_group=dist.group.WORLD, **options)
            found.mean.backward()
            results.append((found.mean.item(), found.row.item(), x.grad.numpy()))
    module, x = LFQ(5, 7, inv_temperature=2.0), rows().chunk(WORLD)[rank].float()
    for compiled in (False, True):
        each = copy.deepcopy(module)
        run = torch.compile(each, fullgraph=True, backend="aot_eager") if compiled else each
        loss = run(x).loss
        loss.backward()
        results.append((loss.item(), 0.0, each.project_in.weight.grad.numpy()))
    x = own(rank)
    alone = (LFQ(7)(x), LFQ(7, sync=False)(x), LFQ(7).eval()(x))
    results.append(([each.entropy.mean.item() for each in alone], 0.0, x.detach().numpy()))
    queue.put((rank, dist.get_world_size(), results))
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    context, store = mp.get_context("spawn"), tmp_path_factory.mktemp("store") / "store"
    queue = context.Queue()
    workers = [context.Process(target=work, args=(rank, store, queue)) for rank in range(WORLD)]
    for worker in workers:
        worker.start()
    try:
        parts = dict((rank, rest) for rank, *rest in (queue.get(timeout=120) for _ in workers))
    finally:
        for worker in workers:
            worker.join(timeout=30)
            worker.kill()
    assert [parts[rank][0] for rank in range(WORLD)] == [WORLD] * WORLD
    return list(zip(*(parts[rank][1] for rank in range(WORLD)), strict=True))


def test_the_mean_is_that_of_all_rows(found):
    cases = [(e, o) for e in (ops.lfq_entropy, ops.bsq_entropy) for o in OPTIONS]
    for (entropy, options), parts in zip(cases, found[:6], strict=True):
        x = rows().requires_grad_()
        expected = entropy(x, inv_temperature=1.5, **options)
        expected.mean.backward()
        for rank, (mean, row, gradient) in enumerate(parts):
            assert mean == pytest.approx(expected.mean.item(), abs=1e-12)
            local = entropy(own(rank), inv_temperature=1.5, **options)
            assert row == pytest.approx(local.row.item(), abs=1e-12)
            # Averaged over processes, as DDP does, it is the whole's.
            theirs = x.grad.split(COUNTS)[rank]
            torch.testing.assert_close(torch.from_numpy(gradient) / WORLD, theirs)


def test_a_modules_gradient_is_that_of_one_process(found):
    module = LFQ(5, 7, inv_temperature=2.0)
    loss = module(rows().float()).loss
    loss.backward()
    for parts in found[6:8]:
        losses, _, gradients = zip(*parts, strict=True)
        assert sum(losses) / WORLD == pytest.approx(loss.item(), abs=1e-6)
        whole = sum(map(torch.from_numpy, gradients)) / WORLD
        torch.testing.assert_close(whole, module.project_in.weight.grad, atol=1e-7, rtol=1e-5)


def test_alone_where_it_is_said(found):
    for rank, (means, _, _) in enumerate(found[8]):
        expected = ops.lfq_entropy(own(rank)).mean.item()
        assert means[1] == means[2] == pytest.approx(expected)
        assert means[0] == pytest.approx(ops.lfq_entropy(rows()).mean.item())
        assert means[0] != pytest.approx(expected)
