"""A Dask cluster whose processes exchange arrays through shared memory.

python dask_cluster.py [MEGABYTES]          scheduler, two workers and client on this machine

The same on several VMs of a region, or beside workers that only TCP reaches (tcp+shm:// for shm://):

vm-a$ dask scheduler --protocol shm
vm-b$ dask worker shm://vm-a:8786           and Client("shm://vm-a:8786") anywhere among them

It needs `pip install shmsock[dask] numpy`.
"""

import logging
import sys

import numpy as np
from distributed import Client, LocalCluster

from shmsock.aio.attach import current_node


def make(megabytes: int) -> np.ndarray:
    return np.arange(megabytes * 125_000, dtype="f8")


async def received() -> int:
    """How many bytes this process got through memory."""
    node = await current_node()
    return int(node.statistics()["bytes_in"])


def main(megabytes: int) -> None:
    kinds = {"protocol": "shm", "dashboard_address": None}
    with LocalCluster(n_workers=2, threads_per_worker=1, **kinds) as cluster, Client(cluster) as client:
        print(f"the scheduler is {cluster.scheduler_address}", flush=True)
        one, other = client.scheduler_info()["workers"]
        array = client.submit(make, megabytes, workers=[one])
        total = client.submit(np.sum, array, workers=[other]).result()
        print(f"the sum is {total:.0f}, numpy says {make(megabytes).sum():.0f}")
        print(f"{other} got {client.run(received)[other] / 1e6:.0f} MB through memory")


if __name__ == "__main__":
    logging.getLogger("distributed.deploy.spec").disabled = True  # it says that there is no cluster, not why
    try:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 100)
    except RuntimeError as error:
        why: BaseException = error
        while why.__cause__:  # the cluster did not start, as the scheduler did not, as there is no region
            why = why.__cause__
        sys.exit(f"dask_cluster: {why}")
