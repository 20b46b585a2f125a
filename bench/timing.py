"""How time is taken: turn by turn, and the copy that nothing can beat."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from timeit import Timer
from typing import Any, NamedTuple

import numpy as np

__all__ = ["ENOUGH_TURNS", "Copy", "Entrant", "available_cores", "private_cache", "quartiles", "take_turns"]

ENOUGH_TURNS = 5
LONG = 2e-2  # seconds, in which a call goes through more than the caches hold


class Entrant(NamedTuple):
    """One side of a comparison."""

    call: Callable[[], Any]
    arrays: Callable[[Any], Sequence[np.ndarray]] | None = None  # what the call computed, to be compared; None: nothing
    before: Callable[[], object] | None = None  # called before each turn and not timed
    scale: float = 1.0  # the time that counts is this times the measured one


def take_turns(
    entrants: dict[str, Entrant], always: Sequence[str], budget: float, turn: float
) -> dict[str, list[float]]:
    """Seconds a call of each entrant, one number a turn; the same index is the same turn.

    A turn calls one entrant as often as fills `turn` seconds, at least once, and is timed as a whole (`timeit`'s loop
    and clock, collection of garbage off). A third as many calls before it, at least one, are not timed: they bring back
    the entrant's data into the caches, whether it calls once or often, and outlast other entrants' threads that spin
    on. A single call that is `LONG` has none before it. A result is freed before the next call, so that fresh outputs
    cost every side the same. Every other turn goes through the entrants backwards. An entrant sits out the rest when it
    has had `budget` seconds and `ENOUGH_TURNS`; those named in `always` go on while another does, for a ratio needs
    both.
    """
    timers = {name: Timer(e.call, e.before or (lambda: None)) for name, e in entrants.items()}
    repeats: dict[str, int] = {}
    before: dict[str, int] = {}
    for name, timer in timers.items():
        once = timer.timeit(1)  # fills caches, wakes threads
        # What is called often is faster than what is called once: three times, each nearer to the truth.
        for _ in range(3 if once < LONG else 0):
            number = max(1, int(turn / 2 / once))
            once = min(once, timer.timeit(number) / number)
        repeats[name] = max(1, int(turn / once))
        before[name] = -(-repeats[name] // 3) if repeats[name] > 1 or once < LONG else 0

    times: dict[str, list[float]] = {name: [] for name in timers}
    spent = dict.fromkeys(timers, 0.0)
    order = list(timers)

    def wants_more(name: str) -> bool:
        return len(times[name]) < ENOUGH_TURNS or spent[name] < budget

    while playing := list(filter(wants_more, order)):
        for name in [n for n in order if n in playing or n in always]:
            if before[name]:
                timers[name].timeit(before[name])
            measured = timers[name].timeit(repeats[name])
            spent[name] += measured
            times[name].append(measured / repeats[name] * entrants[name].scale)
        order.reverse()
    return times


def quartiles(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles, and of how many turns."""
    q1, median, q3 = np.percentile(values, [25, 50, 75])
    return {"median": float(median), "q1": float(q1), "q3": float(q3), "turns": len(values)}


class Copy:
    """A plain copy of an array, into memory that is there already.

    `np.copyto` of contiguous bytes is the C library's memcpy. On several threads each copies its part (`np.copyto`
    releases the GIL), unless one thread alone is faster, as it is with little data.

    Attributes
    ----------
    call : callable
        Copies; on one thread it is `np.copyto` itself.
    """

    def __init__(self, array: np.ndarray, threads: int) -> None:
        source = array.reshape(-1).view(np.uint8)
        self.target = np.zeros_like(source)
        # A part ends at a cache line.
        cuts = [source.size * i // threads // 64 * 64 for i in range(threads)] + [source.size]
        self.parts = [(self.target[a:b], source[a:b]) for a, b in zip(cuts, cuts[1:])]
        self.call: Callable[[], Any] = partial(np.copyto, self.target, source)
        if threads > 1:
            self.pool = ThreadPoolExecutor(threads - 1)
            together, alone = (min(Timer(copy).repeat(5, 1)) for copy in (self._together, self.call))
            if together < alone:
                self.call = self._together
            else:
                self.pool.shutdown()

    def _together(self) -> None:
        others = [self.pool.submit(np.copyto, *part) for part in self.parts[1:]]
        np.copyto(*self.parts[0])
        for other in others:
            other.result()


@cache
def private_cache() -> int:
    """Bytes of the second-level cache, most often the last that is a core's own; 1 MiB if the system does not say."""
    try:
        text = Path("/sys/devices/system/cpu/cpu0/cache/index2/size").read_text().strip()
        return int(text.removesuffix("K")) * 1024
    except (OSError, ValueError):
        return 1 << 20


def available_cores() -> list[int]:
    """The cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))
