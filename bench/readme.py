"""The README's figures: a summary of what was measured on each processor, kept here, and the tables made of them."""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from bench.report import ORDER, Record, grouped, nbytes, over_limit, ratios_by_peer, size_text, subsets, write_between
from normext.studies.report_text import listed, table

__all__ = ["BEGIN", "END", "MEASURED", "figures", "summary", "write"]

Summary = dict[str, Any]

MEASURED = Path(__file__).parent / "measured"
BEGIN, END = "<!-- benchmark -->", "<!-- end of benchmark -->"  # what stands between them in README.md is written here
PACKAGES = {"PyTorch": "torch", "JAX": "jax", "numba": "numba", "NumPy": "numpy"}


def write(readme: Path, results: Path, measured: Path = MEASURED) -> None:
    """Put the figures of all processors into the README, and keep those of the results for the next time.

    Raises
    ------
    ValueError
        If the README does not have `BEGIN` and `END` once, in this order, or no case is of float32.
    FileNotFoundError
        If there are no results of norms.
    """
    new = summary(results)
    name = re.sub(r"[^a-z0-9]+", "-", f"{new['processor']} {new['cores']} cores".lower())
    kept = {path.stem: json.loads(path.read_text()) for path in measured.glob("*.json")} | {name: new}
    write_between(readme, BEGIN, END, figures(kept[name] for name in sorted(kept)))
    measured.mkdir(exist_ok=True)
    (measured / f"{name}.json").write_text(json.dumps(new, indent=1) + "\n")


# What is kept ---------------------------------------------------------------------------------------------------------


def summary(results: Path) -> Summary:
    """What the README needs of the results in a folder, and no more."""
    norms = json.loads((results / "norms.json").read_text())
    records = [r for r in norms["records"] if not r["series"]]
    wide = [r for r in records if r["dtype"] == "float32"]
    if not wide:
        raise ValueError(f"{results / 'norms.json'} has no float32 cases")
    on, sizes = norms["machine"], [nbytes(r) for r in wide]
    rows = {name: of for name, of in subsets(wide, operation).items() if not name.startswith("seed ")}
    rows |= {dtype: of for dtype, of in grouped(records, lambda r: r["dtype"]).items() if dtype != "float32"}
    return {
        **{name: on[name] for name in ("processor", "cores", "date", "versions")},
        "quick": norms["quick"],
        "seeds": sorted({r["seed"] for r in wide if r["seed"] is not None}),
        "cases": len({r["name"] for r in wide}),
        "bytes": [min(sizes), max(sizes)],
        "rows": {name: _by_threads(of) for name, of in rows.items()},
        "training": _training(results / "training.json"),
    }


def operation(record: Record) -> str:
    return f"{record['norm']} norm, {record['step']}"


def _by_threads(records: list[Record]) -> dict[str, Any]:
    """For each number of threads the peers' ratios (geometric mean, smallest) and times the limit (geometric mean)."""
    found = {}
    for threads, of in grouped(records, lambda r: r["threads"]).items():
        ratios = {peer: [ratio for ratio, _ in pairs] for (peer, _), pairs in ratios_by_peer(of).items()}
        limits = {side: over_limit(of, side) for side in ("normext", "PyTorch")}
        found[str(threads)] = {
            "ratios": {peer: [round(geometric_mean(r), 3), round(min(r), 3)] for peer, r in ratios.items()},
            "over_limit": {side: round(geometric_mean(times), 3) for side, times in limits.items() if times},
        }
    return found


def _training(path: Path) -> dict[str, Any]:
    """Steps a second with normext, and the others' time over ours, by net and number of threads."""
    found: dict[str, Any] = {}
    if path.exists():
        for r in json.loads(path.read_text())["records"]:
            if r["dtype"] == "float32":
                norm = {"batchnorm": "batch norm", "layernorm": "layer norm", None: "no norm"}[r["normalization"]]
                found.setdefault(f"{norm}, batch {r['batch']}", {})[str(r["threads"])] = {
                    "steps": round(1 / r["times"]["normext"]["median"]),
                    "ratios": {peer: round(ratio["median"], 3) for peer, ratio in r["ratios"].items()},
                }
    return found


# What is shown --------------------------------------------------------------------------------------------------------


def figures(summaries: Iterable[Summary]) -> str:
    """The tables of all processors."""
    return "\n\n".join(
        [
            "*PyTorch* is how many times as long it takes: the geometric mean of the cases, and the smallest in "
            "brackets. *Limit* is how many times as long normext / PyTorch take as a plain copy of x, times the bytes "
            "that must move beside those of the copy: a backward pass reads dy too, and what a core's own cache has "
            "not kept from the statistics to the results is read again. Fresh results; float32, unless the row "
            "says something else.",
            *map(_section, summaries),
        ]
    )


def _section(of: Summary) -> str:
    versions = ", ".join(f"{peer} {of['versions'][p]}" for peer, p in PACKAGES.items() if p in of["versions"])
    seeds = f" drawn by seed{'s' * (len(of['seeds']) > 1)} {listed(of['seeds'])}" if of["seeds"] else ""
    sections = [
        f"**{of['processor']}**, {of['cores']} cores, {of['date']}; {versions}; {of['cases']} cases{seeds}, x from "
        f"{size_text(of['bytes'][0])} to {size_text(of['bytes'][1])}{'; a quick run' if of['quick'] else ''}.",
        _norms(of["rows"]),
        _others(of["rows"]["all"]),
        _nets(of["training"]),
    ]
    return "\n\n".join(filter(None, sections))


def _norms(rows: dict[str, Any]) -> str:
    threads = list(rows["all"])

    def ratio(cell: Any) -> str:
        return "{:.2f} ({:.2f})".format(*cell["ratios"]["PyTorch"]) if "PyTorch" in cell["ratios"] else ""

    def limit(cell: Any) -> str:
        return " / ".join(f"{times:.2f}" for times in cell["over_limit"].values())

    empty = {"ratios": {}, "over_limit": {}}
    return table(
        ["", *(f"{column}, {number} thr." for column in ("PyTorch", "limit") for number in threads)],
        [
            [name, *(show(cells.get(number, empty)) for show in (ratio, limit) for number in threads)]
            for name, cells in rows.items()
        ],
    )


def _others(by_threads: dict[str, Any]) -> str:
    """The other peers in one sentence."""
    found: dict[str, list[str]] = {}
    for threads, cell in by_threads.items():
        for peer, (mean, worst) in cell["ratios"].items():
            if peer != "PyTorch" and not peer.endswith(" out="):
                found.setdefault(peer, []).append(f"{mean:.2f} ({worst:.2f}) on {threads}")
    return (
        f"The others, by threads: {'; '.join(f'{peer} {listed(told)}' for peer, told in found.items())}."
        if found
        else ""
    )


def _nets(nets: dict[str, Any]) -> str:
    if not nets:
        return ""
    columns = dict.fromkeys(
        (peer, n) for cells in nets.values() for n, cell in cells.items() for peer in cell["ratios"]
    )
    columns = sorted(columns, key=lambda column: ORDER.index(column[0]))
    threads = list(dict.fromkeys(number for cells in nets.values() for number in cells))
    rows = [
        [
            name,
            *(cells[n]["steps"] if n in cells else "" for n in threads),
            *(f"{cells[n]['ratios'][peer]:.2f}" if n in cells else "" for peer, n in columns),
        ]
        for name, cells in nets.items()
    ]
    header = [*(f"steps/s, {n} thr." for n in threads), *(f"{peer}, {n} thr." for peer, n in columns)]
    return "Steps of training the assignment's net of six layers, and the others' time over ours:\n\n" + table(
        ["", *header], rows
    )
