"""How long one Dask worker takes to get an array of 100 MB from another, over tcp:// and over shm://.

python benchmarks/dask_transfer.py [ROUNDS]    (needs shmsock[dask] and numpy)
"""

from __future__ import annotations

import statistics
import sys
import time
from typing import Any

import numpy as np
from distributed import Client, LocalCluster, wait

MEGABYTES = 100


def make(megabytes: int) -> Any:
    return np.ones(megabytes * 125_000)


def length(array: Any) -> int:
    return len(array)


def main(rounds: int) -> None:
    """Use one cluster of each kind, in turns: in this order, and in the reverse one."""
    kinds = ("tcp", "shm")
    how: dict[str, Any] = {
        "n_workers": 2,
        "threads_per_worker": 1,
        "dashboard_address": None,
        "silence_logs": 50,
    }
    clusters = [LocalCluster(protocol=kind, **how) for kind in kinds]
    clients = [Client(cluster) for cluster in clusters]
    for what, megabytes in (("100 MB", MEGABYTES), ("nothing", 0)):
        took: list[list[float]] = [[], []]
        for turn in range(rounds + 1):
            for client, times in list(zip(clients, took, strict=True))[:: 1 if turn % 2 else -1]:
                one, other = client.scheduler_info()["workers"]
                there = client.submit(make, megabytes, workers=[one], pure=False)
                wait(there)
                begin = time.perf_counter()
                client.submit(length, there, workers=[other], pure=False).result()
                times.append(1000 * (time.perf_counter() - begin))
        for kind, times in zip(kinds, took, strict=True):
            median, best = statistics.median(times[1:]), min(times[1:])
            print(f"a task that gets {what} over {kind}: median {median:.1f} ms, best {best:.1f} ms")
    for client, cluster in zip(clients, clusters, strict=True):
        client.close()
        cluster.close()


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20)
