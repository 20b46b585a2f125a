"""How much of the machine a process may use."""

import math
from pathlib import Path


def cpu_quota(root: Path = Path("/")) -> int | None:
    """How many cores' time the control groups of this process allow it, rounded up. None is no limit.

    A container with half a core, or two, sees all cores of its machine; threads beyond its quota use it up early, and
    then all of them stand still for the rest of the period.

    Parameters
    ----------
    root : Path
        Where proc and sys are.
    """
    try:
        groups = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # not Linux
        return None
    quotas = []
    for group in groups:
        _, controllers, path = group.split(":", 2)
        if not controllers:  # version 2: one hierarchy for all
            top = root / "sys/fs/cgroup"
        elif "cpu" in controllers.split(","):
            top = root / "sys/fs/cgroup/cpu"
        else:
            continue
        # Groups above limit those below. In a container, the path may be the host's, and its own group lies at the top.
        folder = top / path.lstrip("/")
        while True:
            quotas.append(_quota_of(folder))
            if folder == top:
                break
            folder = folder.parent
    quota = min(quotas, default=math.inf)
    return None if quota == math.inf else math.ceil(quota)


def _quota_of(folder: Path) -> float:
    """Of one group, in cores."""
    try:
        if (file := folder / "cpu.max").exists():
            quota, period = file.read_text().split()
        else:
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        cores = float(quota) / float(period)  # "max" is no number, and -1 means the same
    except (OSError, ValueError, ZeroDivisionError):
        return math.inf
    return cores if cores > 0 else math.inf
