"""Pools of processes for the rule that the number of ranks changes nothing.

A test file has `CASES`, name -> function(folder), and a module-scoped fixture:

    results = ranks.pool(__name__)         # results[N][rank][case], N = 1, 2, 4

Every process of the pools runs all cases once; the tests compare what they returned.
"""
import importlib
import multiprocessing
import os
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

import common

NS = (1, 2, 4)
many = pytest.mark.parametrize("N", NS[1:])


def own_rows(n):
    """This rank's rows of a global batch of n."""
    b = n // common.world()
    return slice(common.rank() * b, (common.rank() + 1) * b)


def normal(*shape, seed=0):
    """Normal numbers in float64, the same on every rank."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(a, b, tolerance=1e-10):
    """Equal within the tolerance of the rule."""
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def dropping_gather(x):
    """The field's common bug: the own rows take the place of their copy, and nothing makes up for
    DDP's mean."""
    parts = [torch.empty_like(x) for _ in range(common.world())]
    dist.all_gather(parts, x.detach().contiguous())
    parts[common.rank()] = x
    return torch.cat(parts, -2)


def blobs(n, seed):
    """n small images of four flat colours with a little noise: no rounding moves a cluster."""
    g = torch.Generator().manual_seed(seed)
    label = torch.randperm(n, generator=g) % 4
    colours = torch.tensor([[40, 40, 40], [40, 210, 210], [210, 40, 210], [210, 210, 40]])
    noise = torch.randint(-9, 10, (n, 3, 8, 8), generator=g)
    images = (colours[label][:, :, None, None] + noise).to(torch.uint8)
    return common.Table(dict(label=label, coarse=label // 2), dict(label=list("abcd")), images)


def blob_tables(args):
    """Stands in for a source of common.SOURCES: 4 batches of 16 and 6 rows that are dropped."""
    return blobs(70, 0), blobs(21, 1)


def worker(rank, N, folder, module):
    """One process of the pool of N."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(N))
    if N > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet-{N}", rank=rank,
                                world_size=N, timeout=timedelta(seconds=90))
    cases = importlib.import_module(module).CASES
    torch.save({name: case(folder) for name, case in cases.items()}, f"{folder}/{N}-{rank}.pt")
    if N > 1:
        dist.barrier()
        time.sleep(0.1)  # see common.run
        dist.destroy_process_group()


def run(folder, module):
    """results[N][rank][case] of all pools, which run at the same time."""
    # one process imports torch and is forked: a few seconds instead of some for each of seven
    multiprocessing.set_forkserver_preload(["torch", "torchvision", "torchvision.transforms"])
    pools = [torch.multiprocessing.start_processes(worker, (N, str(folder), module), N, join=False,
                                                   start_method="forkserver") for N in NS]
    try:
        for pool in pools:
            deadline = time.monotonic() + 150
            while not pool.join(timeout=5):
                assert time.monotonic() < deadline, "a process waits for the others for ever"
    finally:
        for process in (p for pool in pools for p in pool.processes):
            process.kill()
    return {N: [torch.load(folder / f"{N}-{r}.pt", weights_only=False) for r in range(N)]
            for N in NS}


def pool(module):
    """Fixture of a test file: what its CASES returned on all ranks of all pools."""
    @pytest.fixture(scope="module")
    def results(tmp_path_factory):
        return run(tmp_path_factory.mktemp("pool"), module)
    return results
