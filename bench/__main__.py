"""Times normext and its peers turn by turn on the same arrays, cores and threads.

    python -m bench                   # norms, windows, whole training; on one thread and on all
    python -m bench norms --quick     # one part, a few shapes
    python -m bench norms --draw 1,2  # norms on shapes that nobody chose, 60 for each seed
    python -m bench models            # whole models in PyTorch, before and after normext.torch.accelerate
    python -m bench distributed       # batch norm and training on several ranks of MPI
    python -m bench readme            # the figures of the last run into bench/measured, README.md and docs/pytorch.md

A ratio is the peer's time over ours. Results are written into --out: JSON, a table (Markdown), charts (PNG).
"""

import argparse
import contextlib
import importlib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench import distributed, models, readme, report
from bench.timing import available_cores
from bench.worker import PARTS, selected
from normext._version import how_to_install

PACKAGES = {"limit": None, "numpy": None, "cython": "Cython", "pytorch": "torch", "jax": "jax", "numba": "numba"}
DTYPES = ("float32", "float64", "float16", "bfloat16")


def main(argv: Sequence[str] | None = None) -> int:
    options = parsed(argv)
    if options.part == "readme":
        readme.write(Path("README.md"), options.out)
        if (options.out / "models.json").exists():
            report.write_between(Path("docs/pytorch.md"), models.BEGIN, models.END, models.page_figures(options.out))
        return 0
    if options.part == "distributed":
        distributed.main(options.out, options.quick)
        return 0
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load > 0.5:
        print(f"other work has had {load:.1f} cores in the last minute: with it, times are noise", file=sys.stderr)
    wrong = []
    for name in [options.part] if options.part else PARTS:
        part = importlib.import_module(PARTS[name])
        peers = [peer for peer in part.PEERS if options.peers is None or peer in options.peers]
        for peer in [peer for peer in peers if not installed(peer)]:
            print(f"{PACKAGES[peer]} is not installed, and left out")
        peers = list(filter(installed, peers))
        names = [case.name for case in selected(part, options.quick, options.dtype, options.filter, options.draw)]
        if name == "models" and not installed("pytorch"):
            continue  # nothing is measured without it
        if not names:
            print(f"{name}: no case of these dtypes has {options.filter!r} in its name")
            continue
        records: list[dict[str, Any]] = []
        try:
            for record in run(name, names, peers, options):
                records.append(record)
        finally:  # what there is of a run that was broken off
            if records:
                report.write(options.out, name, records, options.quick, load)
        wrong += [(r["name"], peer, error) for r in records for peer, error in r["disagreements"].items()]
    for case, peer, error in wrong:
        print(f"{case}: {peer} computes something else (error {error:.2g}) and was not timed", file=sys.stderr)
    return 1 if wrong else 0


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    cores = len(available_cores())
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "part", nargs="?", choices=[*PARTS, "distributed", "readme"], help=f"default: {', '.join(PARTS)}"
    )
    parser.add_argument("--quick", action="store_true", help="few shapes, short turns: about two minutes")
    parser.add_argument("--draw", type=seeds, default=[], metavar="A,B", help="norms: seeds that draw 60 cases each")
    parser.add_argument("--filter", default="", metavar="TEXT", help="only cases whose name has the text in it")
    parser.add_argument("--peers", type=one_of(PACKAGES), metavar="A,B", help=f"of {', '.join(PACKAGES)}; default: all")
    counts, both = range(1, cores + 1), sorted({1, cores})
    parser.add_argument("--threads", type=one_of(counts, int), default=both, metavar="N,M", help="default: 1 and all")
    dtypes = f"of {', '.join(DTYPES)}; default: float32"
    parser.add_argument("--dtype", type=one_of(DTYPES), default=["float32"], metavar="A,B", help=dtypes)
    parser.add_argument("--out", type=Path, default=Path("results/bench"), metavar="DIR", help="default: results/bench")
    options = parser.parse_args(argv)
    if options.draw and options.part != "norms":
        parser.error("--draw draws shapes of norms: python -m bench norms --draw ...")
    return options


def seeds(text: str) -> list[int]:
    if not all(word.isdecimal() for word in text.split(",")):
        raise argparse.ArgumentTypeError(f"{text!r} is not one number or several, from 0 on, with commas between them")
    return list(dict.fromkeys(map(int, text.split(","))))


def one_of(known: Any, kind: type = str) -> Any:
    """A comma-separated list of known words."""

    def parse(text: str) -> list[Any]:
        try:
            words = [kind(word) for word in text.split(",")]
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        for word in words:
            if word not in known:
                raise argparse.ArgumentTypeError(f"{word!r} is not one of {', '.join(map(str, known))}")
        return words

    return parse


def installed(peer: str) -> bool:
    return PACKAGES[peer] is None or importlib.util.find_spec(PACKAGES[peer]) is not None


def run(part: str, names: list[str], peers: list[str], options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The records of all cases, from one process for each number of threads, with a progress bar."""
    try:
        from tqdm import tqdm
    except ImportError:
        raise ImportError(f"the benchmark needs tqdm: {how_to_install('bench')}") from None
    with tqdm(total=len(names) * len(options.threads), unit="case", desc=part) as bar:
        for threads in options.threads:
            settings = {
                **{"part": part, "peers": peers_on(threads, peers), "threads": threads, "quick": options.quick},
                **{"dtypes": options.dtype, "filter": options.filter, "draw": options.draw},
            }
            command = [sys.executable, "-m", "bench.worker", json.dumps(settings)]
            with on_cores(threads):
                worker = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment(threads))
            with worker:
                try:
                    for line in worker.stdout or ():
                        yield (record := json.loads(line))
                        bar.set_postfix_str(f"{threads}: {record['name']}")
                        bar.update()
                except BaseException:
                    worker.terminate()
                    raise
            if worker.returncode:
                raise RuntimeError(f"the process on {threads} threads ended with status {worker.returncode}")


def peers_on(threads: int, peers: list[str]) -> list[str]:
    """Without a way to bind a process to cores (outside Linux) JAX takes all, and is left out where that is unfair."""
    if hasattr(os, "sched_setaffinity") or threads == len(available_cores()) or "jax" not in peers:
        return peers
    print(f"JAX cannot be kept to {threads} of the cores here, and is left out")
    return [peer for peer in peers if peer != "jax"]


@contextlib.contextmanager
def on_cores(number: int) -> Iterator[None]:
    """A process that is started in here stays on that many cores: every library takes as many threads."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[:number])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def environment(threads: int) -> dict[str, str]:
    number = str(threads)
    libraries = ("NORMEXT", "OMP", "OPENBLAS", "MKL", "NUMBA")
    return {
        **os.environ,
        **{f"{library}_NUM_THREADS": number for library in libraries},
        # The threads of several OpenMP libraries take turns here; one that goes on spinning after its turn would be
        # measured in the next one's.
        "GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", "1000"),
    }


if __name__ == "__main__":
    sys.exit(main())
