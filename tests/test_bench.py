"""The benchmark: it compares like with like, counts bytes right, and writes what it says. No time is judged here."""

import json
import os
import subprocess
import sys
from collections import Counter
from itertools import count
from pathlib import Path

import numpy as np
import pytest

import normext

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))  # bench is not installed

from bench import peers, readme, report, timing, training, windows, worker  # noqa: E402
from bench.__main__ import main  # noqa: E402
from bench.cases import BOTH, Case, cases, copies_to_move, data_of, drawn  # noqa: E402

STEPS = ("forward", "backward", BOTH)
FILTER = "rms norm forward"
DRAWN_FIRST = [
    "batch norm backward 11575x922 float32 seed 1",
    "rms norm forward 4x1609 float32 seed 1",
    "instance norm NHWC backward 5x9x9x358 float32 seed 1",
]
SMALL = [
    *[Case("batch", step, "ND", (12, 10), "float32") for step in (*STEPS, "evaluation")],
    *[Case("batch", step, "NCHW", (3, 4, 5, 5), "float32") for step in (*STEPS, "evaluation")],
    *[Case("batch", step, "NHWC", (3, 5, 5, 4), "float64") for step in (*STEPS, "evaluation")],
    *[Case("layer", step, "ND", (12, 10), "float64") for step in STEPS],
    *[Case("layer", step, "ND", (12, 10), "float16") for step in STEPS],
    *[Case("rms", step, "ND", (12, 10), "float32") for step in STEPS],
    *[Case("group", step, "NCHW", (3, 4, 5, 5), "float32") for step in STEPS],
    *[Case("group", step, "NHWC", (3, 5, 5, 12), "float32") for step in STEPS],
    *[Case("instance", step, "NCHW", (3, 4, 5, 5), "float32") for step in STEPS],
    *[Case("instance", step, "NHWC", (3, 5, 5, 4), "float32") for step in STEPS],
]


@pytest.fixture
def torch():
    module = pytest.importorskip("torch")
    yield module
    module.set_grad_enabled(True)  # the benchmark switches it as it needs


def run(folder, *options):
    """A small run from the command line, into the folder."""
    for package in ("tqdm", "matplotlib"):
        pytest.importorskip(package)
    command = [
        *options,
        "--quick",
        "--filter",
        FILTER,
        "--peers",
        "numpy,limit",
        "--threads",
        "1",
        "--out",
        str(folder),
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-m", "bench", "norms", *command],
        **{"cwd": ROOT, "env": environment, "capture_output": True, "text": True},
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The folder of a small run."""
    return run(tmp_path_factory.mktemp("bench"))


@pytest.fixture(scope="module")
def drawn_results(tmp_path_factory):
    """The folder of a run of what two seeds draw: seeds whose cases of the filter are small."""
    return run(tmp_path_factory.mktemp("drawn"), "--draw", "1,6")


# What is compared -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quick", [True, False])
def test_case_names_tell_all_cases_apart(quick):
    for part in (peers, windows, training):
        names = [case.name for case in part.cases(quick, ["float32", "float64", "float16", "bfloat16"])]
        assert len(names) == len(set(names)) > 0


def test_the_awkward_shapes_and_the_large_ones_are_there():
    shapes = {case.shape for case in cases(quick=False, dtypes=["float32"]) if not case.series}
    assert {(1, 64), (1_000_000, 16), (4, 1_000_000), (32, 64, 7, 7)} <= shapes
    assert {3, 7, 100, 1000} <= {shape[1] for shape in shapes if len(shape) == 2}
    assert max(4 * np.prod(shape) for shape in shapes) == 256 << 20


def test_a_series_has_a_power_of_two_and_its_neighbours_at_the_same_number_of_rows():
    of = [c for c in cases(False, ["float32"]) if c.series and c.norm == "layer" and c.step == "forward"]
    rows = {width: [c.shape[0] for c in of if c.shape[1] == width] for width in (1023, 1024, 1025)}
    assert rows[1023] == rows[1024] == rows[1025]
    assert max(rows[1024]) * 1024 * 4 == 256 << 20


# Drawn ----------------------------------------------------------------------------------------------------------------


def test_a_seed_draws_the_same_cases_everywhere():
    names = [case.name for case in drawn([1], ["float32"])]
    assert names[:3] == DRAWN_FIRST
    assert names == [case.name for case in drawn([1], ["float32"])]
    assert names != [case.name for case in drawn([2], ["float32"])]
    assert [case.name for case in drawn([1, 2], ["float32"])][:60] == names


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_every_norm_layout_and_step_is_drawn(dtype):
    for seed in range(3):
        counts = Counter((case.norm, case.layout, case.step) for case in drawn([seed], [dtype]))
        assert sum(counts.values()) == 60 and set(counts.values()) == {2, 3}
        assert {"batch", "layer", "rms", "group", "instance"} == {norm for norm, *_ in counts}
        assert {("batch", "NHWC", "evaluation"), ("group", "NHWC", "backward")} <= set(counts)


def test_sizes_and_widths_are_drawn_within_their_bounds_and_all_over_them():
    found = drawn(range(20), ["float32"])
    sizes = np.array([case.nbytes for case in found])
    assert 1 << 10 <= sizes.min() < 1 << 11 and 1 << 27 < sizes.max() <= 256 << 20
    assert 0.4 < np.mean(sizes < 1 << 19) < 0.6  # half of 1 KiB to 256 MiB
    widths = np.array([case.shape[-1] for case in found if case.layout == "ND"])
    assert widths.min() == 1 and 50_000 < widths.max() <= 100_000
    images = [case.shape for case in found if case.layout == "NCHW"]
    assert all(height == width and height * width <= 100_000 for *_, height, width in images)
    assert max(channels for _, channels, *_ in images) > 10_000 and max(shape[-1] for shape in images) > 200


def test_every_other_width_that_is_drawn_is_odd():
    for i, case in enumerate(drawn(range(3), ["float32"])):
        _, *widths = case.shape  # of images the channels or the side
        assert any(width % 2 == i % 2 for width in widths)
        if case.layout == "ND":
            assert case.shape[1] % 2 == i % 2


def test_two_numbers_or_more_share_a_statistic_where_pytorch_refuses_one():
    for case in drawn(range(20), ["float32"]):
        assert case.size // case.plan.statistics >= (1 if case.norm in ("layer", "rms") else 2)
        assert case.norm != "group" or case.channels % case.plan.groups == 0


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_numpy_computes_what_normext_does(case):
    sides = peers.entrants(case, ["numpy", "limit"], threads=1)
    assert list(sides) == ["normext", "normext out=", "NumPy", "limit"]
    assert worker.disagreements(sides, case.dtype) == {}


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_pytorch_computes_what_normext_does(case, torch):
    sides = peers.entrants(case, ["pytorch"], torch.get_num_threads())
    assert "PyTorch" in sides and ("PyTorch autograd" in sides) == (case.step == BOTH)
    assert worker.disagreements(sides, case.dtype) == {}


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_jax_computes_what_normext_does(case):
    jax = pytest.importorskip("jax")
    before = jax.config.jax_enable_x64
    try:
        sides = peers.entrants(case, ["jax"], threads=1)
        assert "JAX" in sides
        assert worker.disagreements(sides, case.dtype) == {}
    finally:
        jax.config.update("jax_enable_x64", before)


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_numba_computes_what_normext_does(case):
    numba = pytest.importorskip("numba")
    sides = peers.entrants(case, ["numba"], numba.get_num_threads())
    assert ("numba" in sides) == (case.norm in ("batch", "layer") and case.dtype != "float16")
    assert worker.disagreements(sides, case.dtype) == {}


@pytest.mark.parametrize("case", windows.cases(True, ["float32"]), ids=lambda case: case.name)
def test_windows_are_the_same_with_numpy_and_pytorch(case, torch):
    assert worker.disagreements(windows.entrants(case, ["numpy", "pytorch"], 1), case.dtype) == {}


@pytest.mark.parametrize("case", training.cases(True, ["float64"]), ids=lambda case: case.name)
def test_training_gives_the_same_losses_with_numpy_and_pytorch(case, torch):
    sides = training.entrants(case, ["numpy", "pytorch"], 1)
    assert list(sides) == ["normext", "NumPy", "PyTorch"]
    torch.set_grad_enabled(True)
    assert worker.disagreements(sides, case.dtype) == {}


def test_a_side_that_computes_something_else_is_found():
    right = timing.Entrant(lambda: (np.ones(5), np.ones(3)), list)
    sides = {
        "normext": right,
        "right": right,
        "untold": timing.Entrant(lambda: None),
        "wrong": timing.Entrant(lambda: (np.ones(5), np.array([1, 1, 1.1])), list),
        "nan": timing.Entrant(lambda: (np.full(5, np.nan), np.ones(3)), list),
        "shape": timing.Entrant(lambda: (np.ones(5), np.ones((3, 1))), list),
    }
    assert list(worker.disagreements(sides, "float32")) == ["wrong", "nan", "shape"]


# The limit ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "norm, layout, shape, together",
    [
        ("layer", "ND", (100, 1000), 4000),  # a row
        ("rms", "ND", (100, 1000), 4000),
        ("group", "NCHW", (3, 64, 8, 8), 2 * 64 * 4),  # 32 groups of two channels
        ("group", "NHWC", (3, 8, 8, 64), 2 * 64 * 4),
        ("instance", "NCHW", (3, 64, 8, 8), 64 * 4),
        ("batch", "ND", (100, 1000), 400_000),  # all of x
        ("batch", "NCHW", (3, 64, 8, 8), 3 * 64 * 64 * 4),
    ],
)
def test_what_the_cache_does_not_hold_is_read_twice(norm, layout, shape, together):
    forward, backward, both = (Case(norm, step, layout, shape, "float32") for step in STEPS)
    assert copies_to_move(forward, cache=together) == 1  # x read, y written, as a copy does
    assert copies_to_move(forward, cache=together - 1) == 1.5
    assert copies_to_move(backward, cache=2 * together) == 1.5  # x, dy, dx
    assert copies_to_move(backward, cache=2 * together - 1) == 2.5
    assert copies_to_move(both, cache=0) == 4


def test_an_evaluation_reads_once():
    assert copies_to_move(Case("batch", "evaluation", "ND", (100, 1000), "float32"), cache=0) == 1


def test_sixteen_bits_take_half_the_cache():
    wide, narrow = (Case("rms", "forward", "ND", (100, 1000), dtype) for dtype in ("float32", "float16"))
    assert copies_to_move(wide, cache=2000) == 1.5 and copies_to_move(narrow, cache=2000) == 1


def test_the_limit_is_a_copy_as_often_as_must_be_moved():
    case = Case("layer", "backward", "ND", (12, 10), "float32")
    limit = peers.entrants(case, ["limit"], threads=1)["limit"]
    assert limit.scale == 1.5 and limit.call.func is np.copyto
    target, source = limit.call.args
    assert np.shares_memory(source, data_of(case).x) and source.nbytes == target.nbytes == case.nbytes


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 63, 64, 1000, 100_001])
def test_the_copy_copies_every_byte(size, threads):
    array = (np.arange(size) % 251).astype(np.uint8)
    copy = timing.Copy(array, threads)
    copy.target[:] = 255
    copy.call()
    np.testing.assert_array_equal(copy.target, array)
    copy.target[:] = 255
    for part in copy.parts:  # which a little copy does not go by
        np.copyto(*part)
    np.testing.assert_array_equal(copy.target, array)


# Turns ----------------------------------------------------------------------------------------------------------------


def test_every_side_has_enough_turns_and_ours_has_the_most():
    calls, prepared = count(), count()
    sides = {
        "normext": timing.Entrant(lambda: None),
        "slow": timing.Entrant(lambda: sum(range(3000))),
        "scaled": timing.Entrant(lambda: next(calls), before=lambda: next(prepared), scale=1e6),
    }
    times = timing.take_turns(sides, ["normext"], budget=1e-3, turn=1e-4)
    assert min(map(len, times.values())) >= timing.ENOUGH_TURNS
    assert len(times["normext"]) == max(map(len, times.values()))
    assert min(times["scaled"]) > 1e-3  # a call takes nanoseconds, a million of them milliseconds
    assert next(calls) > next(prepared) > len(times["scaled"])


def test_quartiles():
    assert timing.quartiles([4, 1, 3, 2, 5]) == {"median": 3, "q1": 2, "q3": 4, "turns": 5}


# Results --------------------------------------------------------------------------------------------------------------


def test_results_for_machines(results):
    found = json.loads((results / "norms.json").read_text())
    assert found["format"] == 1 and found["part"] == "norms" and found["quick"] is True
    assert (
        found["machine"]["cores"] >= 1
        and found["machine"]["load"] >= 0
        and found["machine"]["versions"]["normext"] == normext.__version__
    )
    wanted = [case.name for case in cases(True, ["float32"]) if FILTER in case.name]
    assert [record["name"] for record in found["records"]] == wanted
    for record in found["records"]:
        assert {"norm", "step", "layout", "shape", "dtype", "series", "seed", "size", "copies"} <= set(record)
        assert record["threads"] == 1 and record["disagreements"] == {}
        sides = {"normext", "normext out=", "limit"} | (set() if record["series"] else {"NumPy"})
        assert set(record["times"]) == sides
        assert set(record["ratios"]) == sides - {"normext", "normext out=", "limit"}
        assert set(record["over_limit"]) == sides - {"limit"}
        for times in [*record["times"].values(), *record["ratios"].values(), *record["over_limit"].values()]:
            assert 0 < times["q1"] <= times["median"] <= times["q3"] and times["turns"] >= timing.ENOUGH_TURNS


def test_results_for_people(results):
    text = (results / "norms.md").read_text()
    for case in cases(True, ["float32"]):
        assert (f"\n| {case.name} |" in text) == (FILTER in case.name)
    assert "| all |" in text and "| rms norm forward |" in text and "the smallest ratio is" in text
    charts = sorted(path.name for path in results.glob("*.png"))
    assert charts == [f"norms-{chart}-float32-1-threads.png" for chart in ("growth", "limit", "ratios")]
    assert all((results / chart).read_bytes().startswith(b"\x89PNG") for chart in charts)


def test_drawn_results_are_told_by_seed_size_and_operation(drawn_results):
    found = json.loads((drawn_results / "norms.json").read_text())["records"]
    wanted = [case.name for case in drawn([1, 6], ["float32"]) if FILTER in case.name]
    assert [record["name"] for record in found] == wanted and len(wanted) == 6
    assert [record["seed"] for record in found] == [1, 1, 1, 6, 6, 6]
    text = (drawn_results / "norms.md").read_text()
    for name in ("all", "seed 1", "seed 6", "up to 32 KiB", "to 1 MiB", "rms norm forward"):
        assert text.count(f"\n| {name} |") == 2  # beside the peers, and beside the limit
    assert "\n| beyond |" not in text
    assert "\n|  | normext, 1 thr. | normext out=, 1 thr. |\n" in text


def told(norm, step, size, ratio, ours, theirs, **more):
    """A record of PyTorch and the limit, as far as the tables use it."""
    over = {"normext": ours, "normext out=": ours - 0.1, "PyTorch": theirs}
    return {
        **{"norm": norm, "step": step, "layout": "ND", "shape": [1, size], "size": size, "dtype": "float32"},
        **{"series": "", "seed": 3, "threads": 1, "name": f"{norm} norm {step} 1x{size}", "times": {}},
        "ratios": {"PyTorch": {"of": "normext", "median": ratio, "q1": ratio, "q3": ratio}},
        "over_limit": {side: {"median": times, "q1": times, "q3": times} for side, times in over.items()},
        **more,
    }


TOLD = [
    told("layer", "forward", 1000, 4.0, 2.0, 8.0),
    told("batch", "forward", 20_000, 1.1, 1.0, 1.1),
    told("layer", "backward", 100_000_000, 0.5, 8.0, 4.0),
]


def test_times_the_limit_are_geometric_means_and_the_largest():
    lines = report.beside_limit(TOLD).splitlines()
    assert "| all | 2.52 (8.00) | 2.38 (7.90) | 3.28 (8.00) |" in lines
    assert [line.split(" | ")[0] for line in lines if line.startswith("| ")][2:] == [
        *("| all", "| up to 32 KiB", "| to 1 MiB", "| beyond"),
        *("| batch norm forward", "| layer norm forward", "| layer norm backward"),
    ]


def test_cases_hardly_ahead_of_pytorch_are_named_the_slowest_first():
    heading, _, *rows = report.hardly_ahead(TOLD).splitlines()
    assert "in 2 of 3 cases, in 1 of which it is itself within 1.2 of the limit" in heading
    assert rows[2:] == [
        "| layer norm backward 1x100000000 | 1 | 0.50 | 8.00 | 7.90 | 4.00 |",
        "| batch norm forward 1x20000 | 1 | 1.10 | 1.00 | 0.90 | 1.10 |",
    ]
    assert "below 1.2: 2" in report.summary(TOLD)[0]
    assert report.hardly_ahead(TOLD[:1]) == ""


@pytest.mark.parametrize(
    "cpuinfo, name",
    [
        (
            "processor\t: 0\ncpu family\t: 25\nmodel\t\t: 17\nmodel name\t: AMD EPYC\nstepping\t: 1\n"
            "flags\t\t: fpu avx2 avx512f\n\nprocessor\t: 1\nmodel name\t: AMD EPYC\nflags\t\t: fpu avx2 avx512f\n",
            "AMD EPYC (family 25 model 17 stepping 1, AVX-512)",
        ),
        (
            "cpu family\t: 6\nmodel\t\t: 79\nmodel name\t: Intel(R) Core(TM) i7\nflags\t\t: sse2 avx2\n",
            "Intel Core i7 (family 6 model 79, AVX2)",
        ),
        ("processor\t: 0\nBogoMIPS\t: 243\nFeatures\t: fp asimd\nCPU part\t: 0xd40\n", ""),  # an ARM
    ],
)
def test_a_processor_is_named_by_what_tells_its_generation(cpuinfo, name):
    assert report.processor(cpuinfo) == name


# The README -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def page(tmp_path):
    page = tmp_path / "README.md"
    page.write_text(f"# One\n\n{readme.BEGIN}\nold\n{readme.END}\n\n## Two\n")
    return page


def test_figures_go_between_the_marks_of_the_readme(drawn_results, page, tmp_path):
    readme.write(page, drawn_results, tmp_path / "measured")
    text = page.read_text()
    assert text.startswith(f"# One\n\n{readme.BEGIN}\n") and text.endswith(f"\n{readme.END}\n\n## Two\n")
    assert "old" not in text and "| rms norm, forward |" in text and "The others, by threads: NumPy " in text
    assert "6 cases drawn by seeds 1 and 6, x from 2 KiB to 263 KiB; a quick run." in text
    readme.write(page, drawn_results, tmp_path / "measured")
    assert page.read_text() == text


def test_the_figures_of_other_processors_are_kept(drawn_results, results, page, tmp_path):
    measured = tmp_path / "measured"
    readme.write(page, drawn_results, measured)
    (path,) = measured.iterdir()
    other = json.loads(path.read_text())
    (measured / "other.json").write_text(json.dumps({**other, "processor": "Another", "seeds": [], "cases": 17}))
    readme.write(page, results, measured)
    assert len(list(measured.iterdir())) == 2
    text = page.read_text()
    assert text.count("| rms norm, forward |") == 2
    assert "**Another**" in text and "; 17 cases, x from 2 KiB" in text
    assert f"**{other['processor']}**" in text and "drawn by" not in text  # what the last run there measured


def test_a_table_of_the_readme_has_a_row_for_each_operation(tmp_path):
    machine = {"processor": "P", "cores": 2, "date": "2026-01-31", "versions": {"torch": "2.13", "normext": "1"}}
    two = [{**r, "threads": 2, "over_limit": {}} for r in TOLD[:1]]
    half = {**told("rms", "forward", 1000, 3.0, 1.5, 4.5), "dtype": "float16"}
    series = told("rms", "forward", 1000, 0.1, 1.5, 4.5, series="D = 1000")
    norms = {"machine": machine, "quick": False, "records": [*TOLD, *two, half, series]}
    (tmp_path / "norms.json").write_text(json.dumps(norms))
    net = {"normalization": "batchnorm", "batch": 50, "threads": 1, "dtype": "float32"}
    net |= {"times": {"normext": {"median": 0.0025}}, "ratios": {"PyTorch": {"median": 1.5}}}
    (tmp_path / "training.json").write_text(json.dumps({"records": [net]}))
    lines = readme.figures([readme.summary(tmp_path)]).splitlines()
    assert lines[2] == "**P**, 2 cores, 2026-01-31; PyTorch 2.13; 3 cases drawn by seed 3, x from 3 KiB to 381 MiB."
    assert lines[4:] == [
        "|  | PyTorch, 1 thr. | PyTorch, 2 thr. | limit, 1 thr. | limit, 2 thr. |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| all | 1.30 (0.50) | 4.00 (4.00) | 2.52 / 3.28 |  |",
        "| up to 32 KiB | 4.00 (4.00) | 4.00 (4.00) | 2.00 / 8.00 |  |",
        "| to 1 MiB | 1.10 (1.10) |  | 1.00 / 1.10 |  |",
        "| beyond | 0.50 (0.50) |  | 8.00 / 4.00 |  |",
        "| batch norm, forward | 1.10 (1.10) |  | 1.00 / 1.10 |  |",
        "| layer norm, forward | 4.00 (4.00) | 4.00 (4.00) | 2.00 / 8.00 |  |",
        "| layer norm, backward | 0.50 (0.50) |  | 8.00 / 4.00 |  |",
        "| float16 | 3.00 (3.00) |  | 1.50 / 4.50 |  |",
        "",
        "Steps of training the assignment's net of six layers, and the others' time over ours:",
        "",
        "|  | steps/s, 1 thr. | PyTorch, 1 thr. |",
        "| --- | ---: | ---: |",
        "| batch norm, batch 50 | 400 | 1.50 |",
    ]


@pytest.mark.parametrize(
    "text", ["none", readme.BEGIN, f"{readme.END} {readme.BEGIN}", 2 * (readme.BEGIN + readme.END)]
)
def test_a_readme_without_its_marks_is_left_alone(text, results, tmp_path):
    page, measured = tmp_path / "README.md", tmp_path / "measured"
    page.write_text(text)
    with pytest.raises(ValueError, match="once, in this order"):
        readme.write(page, results, measured)
    assert page.read_text() == text and not measured.exists()


def test_training_and_windows_are_reported(tmp_path):
    case = Case("rms", "forward", "ND", (12, 10), "float32")  # any: what counts is the table
    record = {**worker.measured(peers, case, ["numpy"], 1, quick=True), "name": "net", "batch": 50}
    text = report.plain_text([record])
    assert "## Threads: 1" in text and "| net |" in text and "Steps of training a second" in text


@pytest.mark.parametrize(
    "option", [["--peers", "numpy,torch"], ["--threads", "0"], ["--dtype", "int8"], ["--draw", "1,one"], ["convs"]]
)
def test_an_unknown_word_is_refused(option, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(option)
    assert option[-1].split(",")[-1] in capsys.readouterr().err


def test_only_norms_are_drawn(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["windows", "--draw", "1"])
    assert "python -m bench norms --draw" in capsys.readouterr().err


def test_a_filter_that_fits_nothing_is_told(capsys, tmp_path):
    assert main(["windows", "--filter", "no such thing", "--out", str(tmp_path)]) == 0
    assert "no case of these dtypes has 'no such thing' in its name" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
