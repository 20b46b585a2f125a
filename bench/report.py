"""What is made of the measurements: JSON for machines; tables and charts for people."""

import importlib.metadata
import json
import math
import platform
import re
from collections.abc import Callable, Iterable, Sequence
from datetime import date
from pathlib import Path
from statistics import geometric_mean
from typing import TYPE_CHECKING, Any

import normext
from bench import models
from bench.cases import BOTH
from bench.timing import available_cores, private_cache
from normext.studies.report_text import table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "ORDER",
    "Record",
    "grouped",
    "nbytes",
    "over_limit",
    "processor",
    "ratios_by_peer",
    "size_text",
    "subsets",
    "write",
    "write_between",
]

Record = dict[str, Any]

# Bytes of x up to which a case is of the class.
SIZES = {"up to 32 KiB": 1 << 15, "to 1 MiB": 1 << 20, "to 32 MiB": 1 << 25, "beyond": math.inf}
AHEAD = 1.2  # of PyTorch: where the ratio is smaller, the case is named
PARALLEL = 1 << 20  # bytes of x from which on threads should pay

WORDS = {  # in the order of tables
    "norm": ("batch", "layer", "rms", "group", "instance"),
    "layout": ("ND", "NCHW", "NHWC"),
    "step": ("forward", "backward", "evaluation", BOTH),
}
BESIDE_LIMIT = ("normext", "normext out=", "PyTorch")
ORDER = ("PyTorch", "PyTorch out=", "PyTorch autograd", "JAX", "numba", "NumPy")

# Colours that the colour-blind tell apart (M. Okabe and K. Ito, "Color Universal Design", 2008).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def write(folder: Path, part: str, records: list[Record], quick: bool, load: float) -> None:
    """`part`.json, `part`.md and, of norms, `part`-*.png in the folder; load is what other work took at the start."""
    folder.mkdir(parents=True, exist_ok=True)
    results = {"format": 1, "part": part, "quick": quick, "machine": {**machine(), "load": load}, "records": records}
    (folder / f"{part}.json").write_text(json.dumps(results, indent=1) + "\n")
    if part == "norms":
        records = sorted(records, key=in_order)
    tables = {"norms": norms_text, "models": models.text}.get(part, plain_text)(records)
    (folder / f"{part}.md").write_text(f"# normext beside its peers: {part}\n\n{described(results)}\n\n{tables}\n")
    print("", *summary(records), f"written to {folder}/{part}.*", sep="\n")
    if part == "norms":
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            print("matplotlib is not installed, and the charts are left out")
            return
        for name, figure in charts(records).items():
            figure.savefig(folder / f"{part}-{name}.png", dpi=100)


def write_between(page: Path, begin: str, end: str, text: str) -> None:
    """Put a text between two marks of a page, which must be there once, in this order."""
    old = page.read_text(encoding="utf-8")
    if old.count(begin) != 1 or old.count(end) != 1 or old.index(begin) > old.index(end):
        raise ValueError(f"{page} must have the lines {begin} and {end} once, in this order")
    before, after = old[: old.index(begin)], old[old.index(end) :]
    page.write_text(f"{before}{begin}\n{text}\n{after}", encoding="utf-8")


def machine() -> dict[str, Any]:
    """What was measured on, as far as figures depend on it."""
    cpuinfo = Path("/proc/cpuinfo")
    name = processor(cpuinfo.read_text()) if cpuinfo.exists() else ""
    versions = {}
    for package in ("numpy", "torch", "jax", "numba"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        **{"date": date.today().isoformat(), "processor": name or platform.processor() or platform.machine()},
        **{"cores": len(available_cores()), "own_cache": private_cache()},
        **{"system": platform.system(), "python": platform.python_version()},
        "versions": {"normext": normext.__version__, **versions},
    }


def processor(cpuinfo: str) -> str:
    """The processor by its name and what tells its generation, which virtual machines leave out of the name."""
    facts = dict(re.findall(r"^(\S[^:]*?)[ \t]*:[ \t]*(.*)$", cpuinfo, re.M))
    if "model name" not in facts:  # other processors than x86
        return ""
    numbers = {"family": "cpu family", "model": "model", "stepping": "stepping"}
    flags = facts.get("flags", "").split()
    vectors = [name for flag, name in (("avx512f", "AVX-512"), ("avx2", "AVX2")) if flag in flags]
    told = [" ".join(f"{word} {facts[key]}" for word, key in numbers.items() if key in facts), *vectors[:1]]
    return f"{re.sub(r'[(](R|TM)[)]', '', facts['model name'])} ({', '.join(told)})"


def described(results: dict[str, Any]) -> str:
    """The machine and the method in a few sentences."""
    on = results["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in on["versions"].items())
    return (
        f"{on['processor']}, {on['cores']} cores, {on['own_cache'] >> 10} KiB of cache to each; {on['system']}, "
        f"Python {on['python']}; {versions}. Cores at other work in the minute before: {on['load']:.1f}."
        f"{' A quick run: few shapes, short turns.' if results['quick'] else ''}\n\n"
        "A ratio is the peer's time over ours: above 1, normext is faster. It is the median of the turns' ratios, with "
        "its quartiles in brackets; sides take turns in one process, on the same arrays, cores and number of threads."
    )


# Figures --------------------------------------------------------------------------------------------------------------


def ratios_by_peer(records: Iterable[Record]) -> dict[tuple[str, int], list[tuple[float, str]]]:
    """(peer, threads) to (ratio, name of the case), of all cases that the peer took part in."""
    found: dict[tuple[str, int], list[tuple[float, str]]] = {}
    for record in records:
        for peer, ratio in record["ratios"].items():
            found.setdefault((peer, record["threads"]), []).append((ratio["median"], record["name"]))
    return found


def mean_and_worst(ratios: Sequence[float]) -> str:
    return f"{geometric_mean(ratios):.2f} ({min(ratios):.2f})" if ratios else ""


def over_limit(records: Iterable[Record], side: str) -> list[float]:
    """How many times the limit a side takes, in the cases that it took part in."""
    return [r["over_limit"][side]["median"] for r in records if side in r["over_limit"]]


def mean_and_largest(times: Sequence[float]) -> str:
    return f"{geometric_mean(times):.2f} ({max(times):.2f})" if times else ""


def kind(record: Record) -> str:
    """The operation, whatever the shape."""
    layout = "" if record["layout"] == "ND" else f" {record['layout']}"
    return f"{record['norm']} norm{layout} {record['step']}"


def grouped(records: Iterable[Record], key: Callable[[Record], Any]) -> dict[Any, list[Record]]:
    groups: dict[Any, list[Record]] = {}
    for record in records:
        groups.setdefault(key(record), []).append(record)
    return groups


def in_order(record: Record) -> tuple[int, ...]:
    """By operation, then by size: for `sorted`."""
    return *(words.index(record[what]) for what, words in WORDS.items()), nbytes(record)


def subsets(records: list[Record], operation: Callable[[Record], str]) -> dict[str, list[Record]]:
    """All, and by seed, size class and operation."""
    seeds = grouped(records, lambda r: r["seed"])
    sizes = grouped(records, lambda r: next(name for name, most in SIZES.items() if nbytes(r) <= most))
    return {
        "all": records,
        **({f"seed {seed}": of for seed, of in seeds.items()} if len(seeds) > 1 else {}),
        **{name: sizes[name] for name in SIZES if name in sizes},
        **grouped(sorted(records, key=in_order), operation),
    }


def summary(records: list[Record]) -> list[str]:
    """A line for each dtype, peer and number of threads, and one for each side beside the limit."""
    lines = []
    for dtype, of in grouped(records, lambda r: r["dtype"]).items():
        for (peer, threads), ratios in ratios_by_peer(of).items():
            worst, name = min(ratios)
            lines.append(
                f"{dtype}, threads {threads}: {peer} takes {geometric_mean(r for r, _ in ratios):.2f} times as long "
                f"(geometric mean of {len(ratios)}); the smallest ratio is {worst:.2f}, {name}"
                + (f"; below {AHEAD}: {sum(r < AHEAD for r, _ in ratios)}" if peer == "PyTorch" else "")
            )
        for threads, some in grouped(of, lambda r: r["threads"]).items():
            means = {side: over_limit(some, side) for side in BESIDE_LIMIT}
            if any(means.values()):
                told = ", ".join(f"{side} {mean_and_largest(times)}" for side, times in means.items() if times)
                lines.append(f"{dtype}, threads {threads}: times the limit, geometric mean (largest): {told}")
    return lines


# Tables ---------------------------------------------------------------------------------------------------------------


def duration(seconds: float) -> str:
    for unit, size in (("s", 1), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def with_spread(ratio: dict[str, float]) -> str:
    return f"{ratio['median']:.2f} [{ratio['q1']:.2f} {ratio['q3']:.2f}]"


def peers_of(records: Iterable[Record]) -> list[str]:
    """Those that take part, in their order, which is that of the first measurements for those that have none."""
    there = dict.fromkeys(peer for record in records for peer in record["ratios"])
    return sorted(there, key=lambda peer: ORDER.index(peer) if peer in ORDER else len(ORDER))


def all_cases(records: list[Record]) -> str:
    """A row for each case."""
    peers = peers_of(records)
    ours = [name for name in ("normext", "normext out=") if any(name in r["times"] for r in records)]
    limited = [side for side in BESIDE_LIMIT if over_limit(records, side)]
    rows = []
    for r in records:
        row = [r["name"], *(duration(r["times"][name]["median"]) if name in r["times"] else "" for name in ours)]
        row += [limit_text(r, side) for side in limited]
        rows.append(row + [with_spread(r["ratios"][peer]) if peer in r["ratios"] else "" for peer in peers])
    return table(["case", *ours, *(f"{side} / limit" for side in limited), *peers], rows)


def plain_text(records: list[Record]) -> str:
    """The report of windows and of training."""
    sections = []
    for threads, of in grouped(records, lambda r: r["threads"]).items():
        sections.append(f"## Threads: {threads}\n\n{all_cases(of)}")
        if "batch" in of[0]:
            sides = list(of[0]["times"])
            rows = [[r["name"], *(f"{1 / r['times'][side]['median']:.0f}" for side in sides)] for r in of]
            sections.append("Steps of training a second:\n\n" + table(["net", *sides], rows))
    return "\n\n".join(sections)


def norms_text(records: list[Record]) -> str:
    """The report of the norms."""
    sections = [
        "Results are fresh arrays on both sides; *out=* is into memory that is there. The *limit* is the time of a "
        "plain copy of x into memory that is there, times the bytes that must move beside those of the copy "
        "(`copies_to_move` in bench/cases.py). Below it is where normext writes past the caches and the copy does not."
    ]
    for dtype, of in grouped(records, lambda r: r["dtype"]).items():
        compared = [r for r in of if not r["series"]]
        series = [r for r in of if r["series"]]
        if compared:
            overview = by_operation(compared, peers_of(compared), kind)
            sections += [f"## {dtype}", "Geometric mean of the ratios, and the smallest:", overview]
            sections.append("\n".join(f"- {line}" for line in summary(compared)))
        sections += [text for text in (beside_limit(compared), hardly_ahead(compared)) if text]
        sections += [text for text in (more_threads(of), powers_of_two(series)) if text]
        for title, part in (("All cases", compared), ("Growth with size", series)):
            for threads, some in grouped(part, lambda r: r["threads"]).items():
                sections.append(f"### {title}: {dtype}, threads {threads}\n\n{all_cases(some)}")
    return "\n\n".join(sections)


def by_operation(records: list[Record], peers: list[str], operation: Callable[[Record], str]) -> str:
    """Rows: all, sizes and operations; columns: peers and numbers of threads; cells: geometric mean (smallest)."""
    columns = [(peer, threads) for peer in peers for threads in sorted({r["threads"] for r in records})]
    rows = []
    for name, of in subsets(records, operation).items():
        ratios = ratios_by_peer(of)
        rows.append([name, *(mean_and_worst([r for r, _ in ratios.get(column, [])]) for column in columns)])
    return table(["", *(f"{peer}, {threads} thr." for peer, threads in columns)], rows)


def beside_limit(records: list[Record]) -> str:
    """Rows: all, sizes and operations; columns: sides and numbers of threads; cells: geometric mean (largest)."""
    threads = sorted({r["threads"] for r in records})
    columns = [(side, number) for side in BESIDE_LIMIT if over_limit(records, side) for number in threads]
    if not columns:
        return ""
    rows = []
    for name, of in subsets(records, kind).items():
        some = grouped(of, lambda r: r["threads"])
        rows.append([name, *(mean_and_largest(over_limit(some.get(number, []), side)) for side, number in columns)])
    return "Times the limit: geometric mean, and the largest.\n\n" + table(
        ["", *(f"{side}, {number} thr." for side, number in columns)], rows
    )


def hardly_ahead(records: list[Record]) -> str:
    """The cases that PyTorch takes less than `AHEAD` times as long for, and how near to the limit either side is."""
    ratios = [(r["ratios"]["PyTorch"]["median"], r) for r in records if "PyTorch" in r["ratios"]]
    slow = sorted((pair for pair in ratios if pair[0] < AHEAD), key=lambda pair: pair[0])
    if not slow:
        return ""
    near = sum(times < AHEAD for times in over_limit((r for _, r in slow), "PyTorch"))
    header = ["case", "threads", "PyTorch", *(f"{side} / limit" for side in BESIDE_LIMIT)]
    rows = [
        [r["name"], r["threads"], f"{ratio:.2f}", *(limit_text(r, side) for side in BESIDE_LIMIT)] for ratio, r in slow
    ]
    return (
        f"PyTorch takes less than {AHEAD} times as long in {len(slow)} of {len(ratios)} cases, in {near} of which it is"
        f" itself within {AHEAD} of the limit:\n\n{table(header, rows)}"
    )


def limit_text(record: Record, side: str) -> str:
    return f"{record['over_limit'][side]['median']:.2f}" if side in record["over_limit"] else ""


def more_threads(records: list[Record]) -> str:
    """Each number of threads against the smallest; the medians are of different processes."""
    by_threads = grouped(records, lambda r: r["threads"])
    few = min(by_threads)
    base = {r["name"]: r["times"] for r in by_threads.pop(few)}
    sections = []
    for threads, of in by_threads.items():
        sides = [side for side in ("normext", "normext out=", "limit") if any(side in r["times"] for r in of)]

        def gain(record: Record, side: str, base: Any = base) -> float:
            return base[record["name"]][side]["median"] / record["times"][side]["median"]

        of = [r for r in of if r["name"] in base]
        rows = [
            [name, *(mean_and_worst([gain(r, side) for r in some if side in r["times"]]) for side in sides)]
            for name, some in grouped([r for r in of if nbytes(r) >= PARALLEL], kind).items()
        ]
        if rows:
            sections += [
                f"How many times as fast on {threads} threads as on {few}, arrays from {PARALLEL >> 20} MiB: geometric "
                "mean, and the smallest.",
                table(["", *sides], rows),
            ]
        slower = sorted((gain(r, "normext"), r["name"]) for r in of if gain(r, "normext") < 0.95)
        if slower:
            named = "; ".join(f"{name} {times:.2f}" for times, name in slower[:10])
            sections.append(
                f"Slower on {threads} threads than on {few} by 5 % or more: {len(slower)} of {len(of)}, first {named}."
            )
    return "\n\n".join(sections)


def powers_of_two(series: list[Record]) -> str:
    """Nanoseconds an element at D = 1024 over those at the slower of 1023 and 1025."""
    found = []
    for (name, threads, rows), of in grouped(series, lambda r: (kind(r), r["threads"], r["shape"][0])).items():
        at = {r["series"]: r["times"]["normext out="]["median"] / r["size"] for r in of}
        if {"D = 1023", "D = 1024", "D = 1025"} <= set(at):
            ratio = at["D = 1024"] / max(at["D = 1023"], at["D = 1025"])
            found.append((ratio, f"{name} {rows}x1024, threads {threads}"))
    if not found:
        return ""
    worst, name = max(found)
    return (
        f"D = 1024 takes {geometric_mean(r for r, _ in found):.2f} times as long an element as the slower of D = 1023 "
        f"and 1025 (geometric mean of {len(found)}); most {worst:.2f}, {name}."
    )


def nbytes(record: Record) -> int:
    return record["size"] * {"float64": 8, "float32": 4}.get(record["dtype"], 2)


# Charts ---------------------------------------------------------------------------------------------------------------


def charts(records: list[Record]) -> "dict[str, Figure]":
    """Figures by name."""
    figures = {}
    for (dtype, threads), of in grouped(records, lambda r: (r["dtype"], r["threads"])).items():
        suffix = f"{dtype}-{threads}-threads"
        compared, series = [r for r in of if not r["series"]], [r for r in of if r["series"]]
        title = f"{dtype}, threads: {threads}"
        if peers_of(compared):
            figures[f"ratios-{suffix}"] = ratio_chart(compared, title)
        limited = [r for r in of if r["over_limit"]]
        if limited:
            figures[f"limit-{suffix}"] = limit_chart(limited, title)
        if series:
            figures[f"growth-{suffix}"] = growth_chart(series, title)
    return figures


def ratio_chart(records: list[Record], title: str) -> "Figure":
    """Horizontal bars: a row for each case, a plot for each peer."""
    from matplotlib.figure import Figure

    peers = [peer for peer in peers_of(records) if peer != "PyTorch out="]
    figure = Figure(figsize=(5 + 2.6 * len(peers), 1.6 + 0.19 * len(records)), layout="constrained")
    axes = figure.subplots(1, len(peers), sharey=True, squeeze=False)[0]
    rows = range(len(records))
    for ax, peer in zip(axes, peers):
        there = [(i, r["ratios"][peer]) for i, r in zip(rows, records) if peer in r["ratios"]]
        medians = [ratio["median"] for _, ratio in there]
        spread = [[r["median"] - r["q1"] for _, r in there], [r["q3"] - r["median"] for _, r in there]]
        ax.barh(
            [i for i, _ in there],
            [m - 1 for m in medians],
            left=1,
            xerr=spread,
            color=[COLOURS[0] if m >= 1 else COLOURS[1] for m in medians],
            error_kw={"elinewidth": 0.8, "ecolor": "0.3"},
        )
        ax.set_xscale("log")
        low, high = min(*medians, 0.9), max(*medians, 2)
        ax.set_xlim(low / 1.1, high * 1.9)
        ticks = [t for t in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500) if low / 1.1 <= t <= high * 1.9]
        ax.set_xticks(ticks, [f"{t:g}" for t in ticks])
        ax.minorticks_off()
        for (i, ratio), m in zip(there, medians):
            ax.text(max(ratio["q3"], 1) * 1.06, i, f"{m:.3g}", va="center", fontsize=6)
        ax.axvline(1, color="0.2", lw=0.8)
        ax.set_title(f"{peer}\ngeometric mean {geometric_mean(medians):.2f}", fontsize="medium")
        ax.grid(axis="x", color="0.9")
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(rows, [r["name"].removesuffix(f" {r['dtype']}") for r in records], fontsize=7)
    axes[0].set_ylim(len(records) - 0.4, -0.6)
    figure.suptitle(f"The peer's time over normext's, fresh results; {title}")
    return figure


def limit_chart(records: list[Record], title: str) -> "Figure":
    """How many times the limit normext takes, fresh results, against the bytes of x: a plot for each step."""
    from matplotlib.figure import Figure

    steps = list(dict.fromkeys(r["step"] for r in records))
    norms = list(dict.fromkeys((r["norm"], r["layout"]) for r in records))
    figure = Figure(figsize=(5 * len(steps), 4.4), layout="constrained")
    axes = figure.subplots(1, len(steps), sharey=True, squeeze=False)[0]
    highest = max(over_limit(records, "normext"))
    for ax, step in zip(axes, steps):
        for i, (norm, layout) in enumerate(norms):
            of = [r for r in records if (r["step"], r["norm"], r["layout"]) == (step, norm, layout)]
            ax.scatter(
                [nbytes(r) for r in of],
                over_limit(of, "normext"),
                s=22,
                marker="osD^vP*X"[i % 8],
                color=COLOURS[i % len(COLOURS)],
                label=f"{norm} norm" + (f" {layout}" if layout != "ND" else ""),
                alpha=0.75,
                linewidths=0,
            )
        ax.axhline(1, color="0.2", lw=0.8)
        ax.set_xscale("log", base=2)
        ticks = [2**k for k in range(10, 31, 4)]
        ax.set_xticks(ticks, [size_text(t) for t in ticks])
        ax.set_yscale("log")
        ticks = [t for t in (0.5, 1, 1.5, 2, 3, 5, 10, 20, 50, 100, 200) if t <= highest * 1.2]
        ax.set_yticks(ticks, [f"{t:g}" for t in ticks])
        ax.minorticks_off()
        ax.set_title(step)
        ax.set_xlabel("bytes of x")
        ax.grid(color="0.9")
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("normext over the limit")
    handles = {label: h for ax in axes for h, label in zip(*ax.get_legend_handles_labels())}
    columns = min(len(norms), 2 * len(steps))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns, frameon=False)
    figure.suptitle(f"Times of the limit; {title}")
    return figure


def growth_chart(records: list[Record], title: str) -> "Figure":
    """Nanoseconds an element against the size: a plot for each operation, a curve for each width; dashed, the limit."""
    from matplotlib.figure import Figure

    kinds = grouped(records, kind)
    columns = min(4, len(kinds))
    rows = math.ceil(len(kinds) / columns)
    figure = Figure(figsize=(4 * columns, 3 * rows + 0.6), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    names = list(dict.fromkeys(r["series"] for r in records))
    for ax, (name, of) in zip(axes, kinds.items()):
        for series, curve in grouped(of, lambda r: r["series"]).items():
            sizes, colour = [nbytes(r) for r in curve], COLOURS[names.index(series)]
            for side, style in (("normext out=", "o-"), ("limit", "--")):
                if all(side in r["times"] for r in curve):
                    times = [1e9 * r["times"][side]["median"] / r["size"] for r in curve]
                    label = series if side != "limit" else f"{series}, limit"
                    ax.plot(sizes, times, style, color=colour, ms=3, lw=1.2 if side != "limit" else 0.8, label=label)
        ax.set_xscale("log", base=2)
        ticks = [2**k for k in range(14, 30, 4)]
        ax.set_xticks(ticks, [size_text(t) for t in ticks])
        ax.set_yscale("log")
        low, high = ax.get_ylim()
        ticks = [t for t in (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50) if low <= t <= high]
        ax.set_yticks(ticks, [f"{t:g}" for t in ticks])
        ax.minorticks_off()
        ax.set_title(name, fontsize="medium")
        ax.grid(color="0.9")
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
    for ax in axes[len(kinds) :]:
        ax.set_axis_off()
    handles = {label: h for ax in figure.axes for h, label in zip(*ax.get_legend_handles_labels())}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(names), frameon=False)
    figure.supylabel("nanoseconds an element")
    figure.suptitle(f"Time an element, written with out=, against the bytes of x; {title}")
    return figure


def size_text(number: int) -> str:
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if number >= size:
            return f"{number // size} {unit}"
    return f"{number} B"
