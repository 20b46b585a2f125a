"""Batch norm over several ranks, and data-parallel training: time, messages and bytes, beside the least and a model.

    python -m bench distributed --quick

starts itself under ``mpiexec`` (the one of this Python's packages, or the system's) with 1, 2 and 4 ranks. Weak scaling
gives each rank as many rows whatever their number; strong scaling shares out the rows of one rank. Times are of the
slowest rank. Ranks beyond the cores take turns on them, and their times tell nothing of how it scales.
"""

import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from bench.timing import available_cores
from normext.studies.report_text import table

__all__ = ["NETWORK", "Network", "allreduce_seconds", "main", "model_table", "sync_seconds"]

RANKS = (1, 2, 4)


# The model ------------------------------------------------------------------------------------------------------------


class Network(NamedTuple):
    """What a message costs: seconds to start one, seconds a byte, and seconds to merge a byte."""

    latency: float
    byte: float
    merge: float


# A cluster's: 2 microseconds, 10 GB/s (100 Gbit/s less what protocols take), and merging at 5 GB/s.
NETWORK = Network(2e-6, 1e-10, 2e-10)
MERGE_CALL = 10e-6  # seconds: what calling the operation in Python takes, whatever the size; measured by this benchmark
HEADER = 18  # numbers of a message of normext.distributed beside two a channel


def allreduce_seconds(ranks: int, size: int, network: Network = NETWORK, *, whole: bool = False) -> float:
    """The time of an ``Allreduce`` of so many bytes in the model of Thakur, Rabenseifner and Gropp (2005).

    The best of recursive doubling, ``log2(p) * (latency + size * (byte + merge))``, and of reduce-scatter by recursive
    halving followed by allgather (Rabenseifner), ``2 * log2(p) * latency + (p - 1) / p * size * (2 * byte + merge)``.
    `whole`: the array cannot be cut into pieces, which leaves the first alone.

    Examples
    --------
    >>> round(allreduce_seconds(8, 1000) * 1e6, 1)  # three steps, of which latency is most
    6.9
    """
    steps = math.ceil(math.log2(ranks))
    doubling = steps * (network.latency + size * (network.byte + network.merge))
    if whole:
        return doubling
    scattered = 2 * steps * network.latency + (ranks - 1) / ranks * size * (2 * network.byte + network.merge)
    return min(doubling, scattered)


def sync_seconds(ranks: int, channels: int, network: Network = NETWORK, call: float = MERGE_CALL) -> float:
    """Both messages of `sync_batch_norm`, forward and backward: each is one piece, merged in Python at each step."""
    steps = math.ceil(math.log2(ranks))
    return 2 * (allreduce_seconds(ranks, 8 * (HEADER + 2 * channels), network, whole=True) + steps * call)


def norm_seconds(numbers: int, bandwidth: float = 1e10) -> float:
    """Forward and backward of so many float32 numbers on one rank: x read twice, y written; x and dy twice, dx."""
    return numbers * 4 * (3 + 5) / bandwidth


def least_numbers(ranks: int, channels: int, share: float = 0.1) -> int:
    """From how many numbers of x on a rank on the messages take no more than this share of the layer's own time."""
    return math.ceil(sync_seconds(ranks, channels) / (share * norm_seconds(1)))


def model_table() -> str:
    """What synchronization adds to a layer's own time, at sizes of layers from small to large."""
    layers = {
        "(50, 100): the assignment's net": (50, 100, 1),
        "(32, 64, 56, 56): ResNet-50, first stage": (32, 64, 56 * 56),
        "(32, 512, 28, 28): ResNet-50, second stage": (32, 512, 28 * 28),
        "(32, 2048, 7, 7): ResNet-50, last stage": (32, 2048, 49),
        "(2, 256, 200, 300): detection, 2 images a rank": (2, 256, 200 * 300),
    }
    header = ["x of a rank, float32", "own time, µs"]
    header += [f"messages, {ranks} ranks, µs" for ranks in (8, 64, 1024)]
    header += ["added at 8", "at 64", "at 1024"]
    rows = []
    for name, (n, channels, pixels) in layers.items():
        own = norm_seconds(n * channels * pixels)
        sent = [sync_seconds(ranks, channels) for ranks in (8, 64, 1024)]
        rows.append(
            [name, f"{own * 1e6:.0f}", *(f"{t * 1e6:.0f}" for t in sent), *(f"{100 * t / own:.1f} %" for t in sent)]
        )
    sizes = [
        [str(channels), *(f"{least_numbers(ranks, channels):,}" for ranks in (8, 64, 1024))]
        for channels in (64, 256, 2048)
    ]
    header_of_sizes = ["channels", *(f"numbers of x on each of {ranks} ranks" for ranks in (8, 64, 1024))]
    most = "The least x for which the messages take a tenth of the layer's own time:"
    return "\n\n".join([table(header, rows), most, table(header_of_sizes, sizes)])


# What runs on the ranks -----------------------------------------------------------------------------------------------


def slowest(comm: Any, call: Callable[[], object], seconds: float) -> float:
    """Median time of a call, of the rank that takes longest."""
    from mpi4py import MPI

    call()
    comm.Barrier()
    start = time.perf_counter()
    call()
    once = comm.allreduce(time.perf_counter() - start, op=MPI.MAX)
    number, turns = max(1, int(seconds / 5 / once)), []
    for _ in range(5):
        comm.Barrier()
        start = time.perf_counter()
        for _ in range(number):
            call()
        turns.append(comm.allreduce(time.perf_counter() - start, op=MPI.MAX) / number)
    return median(turns)


def on_ranks(seconds: float) -> dict[str, Any]:
    """All that is measured with the ranks that there are."""
    from mpi4py import MPI

    import normext
    from normext.cs231n.classifiers.fc_net import FullyConnectedNet
    from normext.distributed import DataParallelSolver, sync_batch_norm, sync_batch_norm_backward

    class Counting(MPI.Intracomm):
        """A communicator that counts its messages and their bytes, whatever sends them."""

        def __new__(cls, comm: Any) -> Any:
            return super().__new__(cls, comm)

        def __init__(self, comm: Any) -> None:
            self.sent: list[int] = []

        def Allreduce(self, sendbuf: Any, recvbuf: Any, op: Any = MPI.SUM) -> None:
            self.sent.append(recvbuf.nbytes)
            super().Allreduce(sendbuf, recvbuf, op)

        def Iallreduce(self, sendbuf: Any, recvbuf: Any, op: Any = MPI.SUM) -> MPI.Request:
            self.sent.append(recvbuf[0].nbytes)
            return super().Iallreduce(sendbuf, recvbuf, op)

    world = MPI.COMM_WORLD
    ranks, records = world.size, []
    for name, rows, rest in (("(1024, 100)", 1024, (100,)), ("(16, 64, 56, 56)", 16, (64, 56, 56))):
        for scaling, own_rows in (("weak", rows), ("strong", rows // ranks)):
            x, dy = np.random.default_rng(world.rank).normal(size=(2, own_rows, *rest)).astype(np.float32)
            gamma, beta = np.ones((2, rest[0]), np.float32)
            comm = Counting(world.Dup())

            def both(x=x, dy=dy, gamma=gamma, beta=beta, comm=comm) -> None:
                _, cache = sync_batch_norm(x, gamma, beta, comm=comm)
                sync_batch_norm_backward(dy, cache)

            def alone(x=x, dy=dy, gamma=gamma, beta=beta) -> None:
                _, cache = normext.batch_norm(x, gamma, beta)
                normext.batch_norm_backward(dy, cache)

            both()
            comm.sent.clear()
            both()
            records.append(
                {
                    **{"what": f"norm {name}", "scaling": scaling, "ranks": ranks},
                    **{"messages": len(comm.sent), "bytes": sum(comm.sent)},
                    **{"least_messages": 2, "least_bytes": 8 * (1 + 4 * rest[0])},
                    **{"seconds": slowest(world, both, seconds), "local": slowest(world, alone, seconds)},
                }
            )
    for scaling in ("weak", "strong"):
        batch = 200 * (ranks if scaling == "weak" else 1)
        random = np.random.default_rng(0)
        X, y = random.normal(size=(2000, 3072)).astype(np.float32), random.integers(10, size=2000)
        net = FullyConnectedNet([100] * 5, normalization="batchnorm", weight_scale=2e-2)
        comm = Counting(world.Dup())
        data = {"X_train": X, "y_train": y, "X_val": X[:ranks], "y_val": y[:ranks]}
        solver = DataParallelSolver(
            net, data, comm=comm, batch_size=batch, update_rule="adam", num_epochs=1, num_train_samples=1, verbose=False
        )
        with solver._spanning():
            solver._step()
            comm.sent.clear()
            solver._step()
            sent = list(comm.sent)
            taken = slowest(world, solver._step, seconds)
        gradients = sum(w.nbytes for w in net.params.values())
        records.append(
            {
                **{"what": f"training step, 200 rows {'a rank' if scaling == 'weak' else 'in all'}"},
                **{"scaling": scaling, "ranks": ranks, "messages": len(sent), "bytes": sum(sent)},
                # Five norms forward and backward, all gradients and the loss.
                **{"least_messages": 11, "least_bytes": 5 * 8 * (1 + 4 * 100) + gradients + 4},
                **{"seconds": taken, "local": None},
            }
        )
    # One merge: what the operation costs, beside a sum that MPI does itself.
    from normext.distributed import _HEADER, _merge_messages

    messages = np.ones((2, _HEADER + 200))
    merge = slowest(world, lambda: _merge_messages(messages[0], messages[1], None), seconds)
    library = MPI.Get_library_version().split("\n")[0].strip("\0")
    return {"records": records, "merge": merge, "library": library}


# Start and report -----------------------------------------------------------------------------------------------------


def main(out: Path, quick: bool) -> None:
    """Measure with 1, 2 and 4 ranks; write distributed.json and distributed.md into `out`."""
    beside = shutil.which("mpiexec", path=str(Path(sys.prefix) / "bin"))
    launcher = beside or shutil.which("mpiexec")
    if launcher is None:
        raise FileNotFoundError("the benchmark needs mpiexec: pip install mpi4py mpich")
    environment = {
        **os.environ,
        **{f"{library}_NUM_THREADS": "1" for library in ("NORMEXT", "OMP", "OPENBLAS")},
        # Open MPI by itself refuses to start as root, as in containers, and more ranks than there are cores.
        **{"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "OMPI_MCA_mpi_yield_when_idle": "1"},
        "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    }
    found = []
    for ranks in RANKS:
        print(f"{ranks} ranks ...", file=sys.stderr)
        command = [launcher, "-n", str(ranks), sys.executable, "-m", "bench.distributed", "0.2" if quick else "2"]
        job = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, timeout=600, check=True)
        found.append(json.loads(job.stdout.splitlines()[-1]))
    results = {
        **{"format": 1, "part": "distributed", "quick": quick, "cores": len(available_cores())},
        **{"library": found[0]["library"], "merge": found[0]["merge"]},
        "records": [record for one in found for record in one["records"]],
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "distributed.json").write_text(json.dumps(results, indent=1) + "\n")
    (out / "distributed.md").write_text(report(results))
    print(f"written to {out}/distributed.*")


def report(results: dict[str, Any]) -> str:
    records = results["records"]
    one = {(r["what"], r["scaling"]): r["seconds"] for r in records if r["ranks"] == 1}
    rows = [
        [
            *(f"{r['what']}, {r['scaling']}", str(r["ranks"])),
            f"{r['seconds'] * 1e6:.0f}",
            f"{efficiency(r, one):.2f}",
            "" if r["local"] is None else f"{r['local'] * 1e6:.0f}",
            f"{r['messages']} ({r['least_messages']})",
            f"{r['bytes']} ({r['least_bytes']})",
        ]
        for r in sorted(records, key=lambda r: (r["what"], r["scaling"], r["ranks"]))
    ]
    header = ["case", "ranks", "µs", "efficiency", "batch_norm alone, µs", "messages (least)", "bytes (least)"]
    parts = [
        "# Several ranks",
        (
            f"{results['library']}; {results['cores']} cores; one thread a rank, float32. "
            f"{'A quick run. ' if results['quick'] else ''}Ranks beyond the cores take turns on them. Efficiency: the "
            "time on one rank over that on p ranks with p times the rows (weak), or over p times that with the same "
            "rows (strong). Forward and backward together. Messages and the bytes of their buffers are counted on a "
            "rank as they are sent; the least are those with the numbers that are needed and no more."
        ),
        table(header, rows),
        f"Merging two messages of 100 channels takes {results['merge'] * 1e6:.1f} µs.",
        f"In the model ({NETWORK.latency * 1e6:.0f} µs a message, {1e-9 / NETWORK.byte:.0f} GB/s):",
        model_table(),
    ]
    return "\n\n".join(parts) + "\n"


def efficiency(record: dict[str, Any], one: dict[Any, float]) -> float:
    ideal = one[record["what"], record["scaling"]]
    return ideal / record["seconds"] / (record["ranks"] if record["scaling"] == "strong" else 1)


def rank_main(arguments: Iterable[str]) -> None:
    from normext.distributed import MPI, abort_on_error

    (seconds,) = arguments
    with abort_on_error():
        found = on_ranks(float(seconds))
    if MPI.COMM_WORLD.rank == 0:
        print(json.dumps(found))


if __name__ == "__main__":
    rank_main(sys.argv[1:])
