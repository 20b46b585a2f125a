"""The benchmark: it compares like with like, counts bytes right, and writes what it says. No time is judged here."""

import json
import os
import subprocess
import sys
from itertools import count
from pathlib import Path

import numpy as np
import pytest

import normext

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))  # bench is not installed

from bench import peers, report, timing, training, windows, worker  # noqa: E402
from bench.__main__ import main  # noqa: E402
from bench.cases import BOTH, Case, cases, traffic  # noqa: E402

STEPS = ("forward", "backward", BOTH)
FILTER = "rms norm forward"
SMALL = [
    *[Case("batch", step, "ND", (12, 10), "float32") for step in (*STEPS, "evaluation")],
    *[Case("batch", step, "NCHW", (3, 4, 5, 5), "float32") for step in (*STEPS, "evaluation")],
    *[Case("batch", step, "NHWC", (3, 5, 5, 4), "float64") for step in (*STEPS, "evaluation")],
    *[Case("layer", step, "ND", (12, 10), "float64") for step in STEPS],
    *[Case("layer", step, "ND", (12, 10), "float16") for step in STEPS],
    *[Case("rms", step, "ND", (12, 10), "float32") for step in STEPS],
    *[Case("group", step, "NCHW", (3, 4, 5, 5), "float32") for step in STEPS],
    *[Case("instance", step, "NCHW", (3, 4, 5, 5), "float32") for step in STEPS],
]


@pytest.fixture
def torch():
    module = pytest.importorskip("torch")
    yield module
    module.set_grad_enabled(True)  # the benchmark switches it as it needs


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The folder of a small run, from the command line."""
    for package in ("tqdm", "matplotlib"):
        pytest.importorskip(package)
    folder = tmp_path_factory.mktemp("bench")
    command = ["norms", "--quick", "--filter", FILTER, "--peers", "numpy,limit", "--threads", "1", "--out"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-m", "bench", *command, str(folder)],
        **{"cwd": ROOT, "env": environment, "capture_output": True, "text": True},
    )
    assert done.returncode == 0, done.stderr
    return folder


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


# Bytes ----------------------------------------------------------------------------------------------------------------


def test_layer_norm_moves_x_and_y_once_while_a_row_fits():
    case = Case("layer", "forward", "ND", (100, 1000), "float32")
    array, parameters, statistics = 400_000, 2 * 4000, 2 * 400
    assert traffic(case, cache=4000) == (2 * array + parameters + statistics,) * 2
    assert traffic(case, cache=3999).moved == 3 * array + parameters + statistics


def test_layer_norm_backward_moves_three_arrays():
    case = Case("layer", "backward", "ND", (100, 1000), "float64")
    array, parameters, statistics = 800_000, 3 * 8000, 2 * 800  # gamma read, dgamma and dbeta written
    assert traffic(case, cache=16_000) == (3 * array + parameters + statistics,) * 2
    assert traffic(case, cache=15_999).moved == 5 * array + parameters + statistics


@pytest.mark.parametrize(
    "layout, shape, least_cache",
    [
        ("ND", (4096, 1024), 4096 * 64),  # a cache line of channels
        ("ND", (1000, 3), 1000 * 12),  # all channels are less than a cache line
        ("NHWC", (4, 8, 8, 64), 256 * 64),
        ("NCHW", (4, 64, 8, 8), 256 * 4),  # a channel
    ],
)
def test_batch_norm_reads_x_twice_where_what_one_statistic_needs_does_not_fit(layout, shape, least_cache):
    case = Case("batch", "forward", layout, shape, "float32")
    array, parameter = 4 * case.size, 4 * case.channels
    # gamma, beta, the running statistics (read and written), and the batch's
    assert traffic(case, cache=least_cache).moved == 2 * array + 8 * parameter
    assert traffic(case, cache=least_cache - 1).moved == 3 * array + 8 * parameter
    evaluation = Case("batch", "evaluation", layout, shape, "float32")
    assert traffic(evaluation, cache=0).moved == 2 * array + 4 * parameter


def test_sixteen_bits_move_half_the_bytes():
    wide, narrow = (traffic(Case("rms", "forward", "ND", (10_000, 100), d), 10**6) for d in ("float32", "float16"))
    assert wide.moved - narrow.moved == 2 * 1_000_000 * 2  # x and y; parameters and statistics stay float32


def test_a_step_of_training_moves_what_its_passes_move():
    forward, backward, both = (traffic(Case("group", s, "NCHW", (2, 4, 8, 8), "float32"), 10**6) for s in STEPS)
    assert both.moved == forward.moved + backward.moved
    assert both.working_set == forward.working_set + 2 * 2048


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 63, 64, 1000, 100_001])
def test_the_copy_copies_every_byte(size, threads):
    copy = timing.Copy(2 * size, threads)
    copy.source[:] = np.arange(size) % 251
    copy.target[:] = 255
    for source, target in ((target, source) for target, source in copy.parts):
        assert source.size == target.size
    copy()
    np.testing.assert_array_equal(copy.target, copy.source)
    assert len(copy.source) == size and sum(target.size for target, _ in copy.parts) == size


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
        assert {"norm", "step", "layout", "shape", "dtype", "series", "size", "moved", "working_set"} <= set(record)
        assert record["threads"] == 1 and record["disagreements"] == {}
        sides = {"normext", "normext out=", "limit"} | (set() if record["series"] else {"NumPy"})
        assert set(record["times"]) == sides
        assert set(record["ratios"]) == sides - {"normext", "normext out="}
        for times in [*record["times"].values(), *record["ratios"].values()]:
            assert 0 < times["q1"] <= times["median"] <= times["q3"] and times["turns"] >= timing.FEWEST_TURNS
        assert record["ratios"]["limit"]["of"] == "normext out="


def test_results_for_people(results):
    text = (results / "norms.md").read_text()
    for case in cases(True, ["float32"]):
        assert (f"\n| {case.name} |" in text) == (FILTER in case.name)
    assert "| all |" in text and "| rms norm forward |" in text and "the smallest ratio is" in text
    charts = sorted(path.name for path in results.glob("*.png"))
    assert charts == [f"norms-{chart}-float32-1-threads.png" for chart in ("growth", "limit", "ratios")]
    assert all((results / chart).read_bytes().startswith(b"\x89PNG") for chart in charts)


def test_figures_go_between_the_marks_of_the_readme(results, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"# One\n\n{report.BEGIN}\nold\n{report.END}\n\n## Two\n")
    report.write_readme(readme, results)
    text = readme.read_text()
    assert text.startswith(f"# One\n\n{report.BEGIN}\n") and text.endswith(f"\n{report.END}\n\n## Two\n")
    assert "old" not in text and "| rms norm, forward |" in text and "NumPy, 1 thr." in text
    assert "x from 8 KiB to 16 MiB" in text and "A quick run." in text
    report.write_readme(readme, results)
    assert readme.read_text() == text


@pytest.mark.parametrize(
    "text", ["none", report.BEGIN, f"{report.END} {report.BEGIN}", 2 * (report.BEGIN + report.END)]
)
def test_a_readme_without_its_marks_is_left_alone(text, results, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(text)
    with pytest.raises(ValueError, match="once, in this order"):
        report.write_readme(readme, results)
    assert readme.read_text() == text


def test_training_and_windows_are_reported(tmp_path):
    case = Case("rms", "forward", "ND", (12, 10), "float32")  # any: what counts is the table
    record = {**worker.measured(peers, case, ["numpy"], 1, quick=True), "name": "net", "batch": 50}
    text = report.plain_text([record])
    assert "## Threads: 1" in text and "| net |" in text and "Steps of training a second" in text


@pytest.mark.parametrize("option", [["--peers", "numpy,torch"], ["--threads", "0"], ["--dtype", "int8"], ["convs"]])
def test_an_unknown_word_is_refused(option, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(option)
    assert option[-1].split(",")[-1] in capsys.readouterr().err


def test_a_filter_that_fits_nothing_is_told(capsys, tmp_path):
    assert main(["windows", "--filter", "no such thing", "--out", str(tmp_path)]) == 0
    assert "no case of these dtypes has 'no such thing' in its name" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
