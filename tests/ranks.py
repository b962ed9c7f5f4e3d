import traceback, sys
import torch.multiprocessing as mp, torch.distributed as dist, tempfile, datetime


def _w(rank, worker, size, path, args):
    dist.init_process_group(
        "gloo",
        init_method=f"file://{path}/store",
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=60),
    )
    worker(dist.group.WORLD, *args)
    dist.destroy_process_group()


def run(worker, size, *args):
    with tempfile.TemporaryDirectory() as d:
        mp.spawn(_w, (worker, size, d, args), nprocs=size)
