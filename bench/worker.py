"""Times the cases of one part in one process with a fixed number of threads; `bench.__main__` starts it.

It is told what to do by JSON on its command line, and prints one line of JSON for each case. Cores and threads are set
by who starts it, before any library is loaded: JAX's cannot be changed later.
"""

import importlib
import json
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

import normext
from bench.timing import Entrant, quartiles, take_turns

__all__ = ["PARTS", "selected"]

PARTS = {
    "norms": "bench.peers",
    "windows": "bench.windows",
    "training": "bench.training",
    "models": "bench.models",
}
# Loose: they are to find a side that computes something else, not to judge how exact it is.
TOLERANCES = {"float64": 1e-7, "float32": 5e-3, "float16": 5e-2, "bfloat16": 2e-1}
COMPARED = 1_000_000  # elements of a large array, evenly spread


def selected(part: Any, quick: bool, dtypes: list[str], text: str, draw: list[int]) -> list[Any]:
    """The cases of a part, or those that the seeds draw, whose name has the text in it."""
    return [case for case in (part.drawn(draw, dtypes) if draw else part.cases(quick, dtypes)) if text in case.name]


def measured(part: Any, case: Any, peers: list[str], threads: int, quick: bool) -> dict[str, Any]:
    """Times of all sides of a case, and, turn by turn, a peer's time over ours and a side's over the limit."""
    sides = part.entrants(case, peers, threads)
    wrong = disagreements(sides, case.dtype)
    sides = {name: side for name, side in sides.items() if name not in wrong}
    bases = {name: base_of(name, sides) for name in sides if name != "limit" and not name.startswith("normext")}
    always = {"normext", "limit", *bases.values()} & set(sides)
    times = take_turns(sides, sorted(always), part.BUDGETS[quick], part.TURN)

    def over(name: str, base: str) -> dict[str, float]:
        return quartiles([ours / theirs for ours, theirs in zip(times[name], times[base])])

    return {
        **case.facts(),
        "threads": threads,
        "times": {name: quartiles(taken) for name, taken in times.items()},
        "ratios": {name: {"of": base, **over(name, base)} for name, base in bases.items()},
        "over_limit": {name: over(name, "limit") for name in sides if "limit" in sides and name != "limit"},
        "disagreements": wrong,
    }


def base_of(name: str, sides: dict[str, Entrant]) -> str:
    """Of normext's two ways, fresh results and ``out=``, the one that a side is compared with."""
    ours = "normext out="
    return ours if name.endswith(" out=") and ours in sides else "normext"


def disagreements(sides: dict[str, Entrant], dtype: str) -> dict[str, float]:
    """Sides whose results are not normext's, each with its largest error."""
    results = {}
    for name, side in sides.items():
        if side.arrays is not None:
            if side.before is not None:
                side.before()
            results[name] = [_sample(array) for array in side.arrays(side.call())]
    ours = results["normext"]
    errors = {name: max(map(_error, ours, theirs)) for name, theirs in results.items()}
    return {name: error for name, error in errors.items() if not error <= TOLERANCES[dtype]}


def _sample(array: np.ndarray) -> np.ndarray:
    array = np.asarray(array)
    if array.size > COMPARED:
        # A step that is odd meets every channel, whatever their number.
        array = array.reshape(-1)[:: array.size // COMPARED | 1]
    return array.astype(np.float64)


def _error(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest difference, beside the largest number or 1."""
    if ours.shape != theirs.shape:
        return np.inf
    return float(np.abs(theirs - ours).max(initial=0) / max(1.0, np.abs(ours).max(initial=0)))


def records(settings: dict[str, Any]) -> Iterator[dict[str, Any]]:
    part, threads = importlib.import_module(PARTS[settings["part"]]), settings["threads"]
    if normext.get_num_threads() != threads:
        raise RuntimeError(f"normext would run on {normext.get_num_threads()} threads, {threads} are wanted")
    for case in selected(part, settings["quick"], settings["dtypes"], settings["filter"], settings["draw"]):
        yield measured(part, case, settings["peers"], threads, settings["quick"])


def main() -> None:
    # What a library prints must not get between the lines.
    channel, sys.stdout = sys.stdout, sys.stderr
    for record in records(json.loads(sys.argv[1])):
        print(json.dumps(record), file=channel, flush=True)


if __name__ == "__main__":
    main()
