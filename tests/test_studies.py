"""The studies: complete and resumable results, and reports that say what the numbers say."""

import csv
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from tiny_study import TINY, TinyStudy

import normext
from normext._files import new_file
from normext.cli import main
from normext.studies import STUDIES
from normext.studies.batch_size import BatchSize
from normext.studies.convnet import ConvNet, ConvTraining
from normext.studies.data import Data, load_data
from normext.studies.deep import Deep
from normext.studies.layer_width import LayerWidth
from normext.studies.plots import NORM_STYLES
from normext.studies.study import Result, run_studies
from normext.studies.training import History, load_history, save_history
from normext.studies.weight_scale import WeightScale

to_rgb = pytest.importorskip("matplotlib.colors").to_rgb
imread = pytest.importorskip("matplotlib.image").imread
load_digits = pytest.importorskip("sklearn.datasets").load_digits
pytest.importorskip("tqdm")

ALL = [study for studies in STUDIES.values() for study in studies]


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """The results of all studies on digits, made by the command line."""
    out = tmp_path_factory.mktemp("all") / "results"
    assert main(["study", "all", "--quick", "--out", str(out)]) == 0
    return out


def stored(folder):
    """{training: what its record says of it}, without the time that it took."""
    records = {path.stem: json.loads(path.read_text()) for path in (folder / "trainings").glob("*.json")}
    for record in records.values():
        del record["history"]["seconds"]
    return records


def trained(capsys):
    """The trainings of the tiny study that were run, from the lines that tell so."""
    return re.findall(r"^tiny: (\w+) +train", capsys.readouterr().out, flags=re.MULTILINE)


# What a study leaves behind.


@pytest.mark.parametrize("study", ALL, ids=lambda study: study.name)
def test_every_training_is_recorded_with_its_specification(everything, study):
    specified = study.trainings(load_data("digits").name, 231, quick=True)
    records = stored(everything / study.name)
    assert sorted(records) == sorted(training.name for training in specified)
    for training in specified:
        record = records[training.name]
        assert record["specification"] == json.loads(json.dumps(asdict(training)))
        assert len(record["history"]["loss_history"]) == training.epochs * (1000 // training.batch_size)
        assert len(record["history"]["train_acc_history"]) == training.epochs + 1
        assert len(record["history"]["val_acc_history"]) == training.epochs + 1


@pytest.mark.parametrize("study", ALL, ids=lambda study: study.name)
def test_the_tables_hold_the_same_numbers_as_the_records(everything, study):
    folder = everything / study.name
    losses, accuracies = {}, {}
    with open(folder / "losses.csv", newline="") as file:
        for row in csv.DictReader(file):
            losses.setdefault(row["training"], []).append(float(row["loss"]))
    with open(folder / "accuracies.csv", newline="") as file:
        for row in csv.DictReader(file):
            accuracies.setdefault(row["training"], []).append(
                (float(row["train_accuracy"]), float(row["val_accuracy"]))
            )
    records = {name: record["history"] for name, record in stored(folder).items()}
    assert losses == {name: history["loss_history"] for name, history in records.items()}
    assert accuracies == {
        name: list(zip(history["train_acc_history"], history["val_acc_history"])) for name, history in records.items()
    }


@pytest.mark.parametrize("study", ALL, ids=lambda study: study.name)
def test_the_report_shows_the_plots_and_the_plots_show_curves(everything, study):
    report = (everything / study.name / "report.md").read_text()
    assert report.startswith(f"# {study.title}\n")
    plots = re.findall(r"!\[.*\]\((.*)\)", report)
    assert sorted(plots) == sorted(path.name for path in (everything / study.name).glob("*.png"))
    image = imread(everything / study.name / plots[0])[..., :3]
    baseline = np.abs(image - to_rgb(NORM_STYLES[None]["color"])).max(axis=-1) < 0.1
    # Its curve crosses every panel: an entry in the legend alone is a few per cent of the width.
    assert baseline.any(axis=0).mean() > 0.4


def test_no_temporary_files_are_left(everything):
    assert [path for path in everything.rglob("*") if path.is_file() and path.name.startswith(".")] == []


def test_digits_show_the_effects_that_are_far_beyond_chance(everything):
    # That layer norm does not mind the batch size is not among them: digits leave it open.
    conclusions = {
        "deep": "with batch norm the net learns faster",
        "weight-scale": "with batch norm more scales train",
        "batch-size-batch": "batch norm gets better with the batch size",
        "layer-width": "layer norm fails where a row has very few features",
        "convnet": "with spatial batch norm the net bears a larger learning rate",
    }
    for name, conclusion in conclusions.items():
        assert f"**So {conclusion}" in (everything / name / "report.md").read_text()


def test_the_filters_of_a_convolutional_net_are_recorded_and_shown(everything):
    records = stored(everything / "convnet")
    assert {np.shape(record["history"]["filters"]) for record in records.values()} == {(32, 1, 5, 5)}
    assert stored(everything / "deep")["no-norm"]["history"]["filters"] is None
    picture = imread(everything / "convnet" / "filters.png")[..., :3]
    np.testing.assert_array_equal(picture, picture[..., :1].repeat(3, axis=-1))  # digits have grey filters
    # From black over as many greys as 32 filters of 25 numbers have to white.
    assert len(np.unique(picture)) > 100


# Going on, and starting afresh.


def test_a_finished_study_is_not_run_again(everything, capsys):
    before = {path: path.read_bytes() for path in (everything / "deep").rglob("*.*")}
    assert main(["study", "deep", "--quick", "--out", str(everything)]) == 0
    out = capsys.readouterr().out
    assert "2 of 2 trainings are finished already" in out and "train 0" not in out
    assert {path: path.read_bytes() for path in (everything / "deep").rglob("*.*")} == before


def interrupted(out, how):
    """Start the study, stop it when the first training is stored, and return the process and its output."""
    # The package that is tested here, wherever the tests are run.
    environment = os.environ | {"PYTHONPATH": str(Path(normext.__file__).parents[1])}
    command = [sys.executable, "-m", "normext", "study", "weight-scale", "--quick", "--out", str(out)]
    with subprocess.Popen(
        command, env=environment, cwd=out.parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        while process.poll() is None and not any((out / "weight-scale" / "trainings").glob("*.json")):
            time.sleep(0.005)
        process.send_signal(how)
        output, errors = process.communicate(timeout=60)
    return process.returncode, output, errors


def test_a_study_that_was_killed_goes_on_to_the_same_numbers(everything, tmp_path, capsys):
    status, _, _ = interrupted(tmp_path / "out", signal.SIGKILL)
    assert status == -signal.SIGKILL
    folder = tmp_path / "out" / "weight-scale"
    first = {path: path.read_bytes() for path in (folder / "trainings").glob("*.json")}
    assert 0 < len(first) < 18 and not (folder / "report.md").exists()

    assert main(["study", "weight-scale", "--quick", "--out", str(tmp_path / "out")]) == 0
    assert f"{len(first)} of 18 trainings are finished already" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in first} == first
    assert stored(folder) == stored(everything / "weight-scale")
    for name in ("losses.csv", "accuracies.csv"):
        assert (folder / name).read_bytes() == (everything / "weight-scale" / name).read_bytes()


def test_ctrl_c_ends_in_one_line_and_status_130(tmp_path):
    status, output, errors = interrupted(tmp_path / "out", signal.SIGINT)
    assert status == 130
    assert errors.startswith("normext: interrupted") and errors.count("\n") == 1
    assert "Traceback" not in output
    assert stored(tmp_path / "out" / "weight-scale")


def test_fresh_runs_everything_again_to_the_same_numbers(points, tmp_path, capsys):
    run_studies([TinyStudy()], points, tmp_path)
    before = stored(tmp_path / "tiny")
    assert trained(capsys) == ["none", "batchnorm", "layernorm"]
    run_studies([TinyStudy()], points, tmp_path)
    assert trained(capsys) == []
    run_studies([TinyStudy()], points, tmp_path, fresh=True)
    assert trained(capsys) == ["none", "batchnorm", "layernorm"]
    assert stored(tmp_path / "tiny") == before


@pytest.mark.parametrize(
    "damage",
    [
        lambda record: record[:100],
        lambda record: b"",
        lambda record: b"\xff\xfe\x00",
        lambda record: b"[]",
        lambda record: b'{"specification": 1}',
        lambda record: record.replace(b'"loss_history": [', b'"loss_history": ["x", '),
        lambda record: re.sub(rb'"loss_history": \[.*?\]', b'"loss_history": []', record),
        lambda record: re.sub(rb'"loss_history": \[.*?\]', b'"loss_history": "12345678"', record),
        lambda record: record.replace(b'"loss_history": [', b'"loss_history": [1.0, '),
        lambda record: record.replace(b'"loss_history": [', b'"loss_history": [1' + 400 * b"0" + b", "),
        lambda record: re.sub(rb'"loss_history": \[.*?,', b'"loss_history": [true,', record),
        lambda record: re.sub(rb'"val_acc_history": \[.*?\]', b'"val_acc_history": [0.5]', record),
        lambda record: re.sub(rb'"val_acc_history": \[.*?,', b'"val_acc_history": [1.5,', record),
        lambda record: re.sub(rb'"seconds": [^,]*', b'"seconds": "inf"', record),
        lambda record: record.replace(b'"filters"', b'"others"'),
        lambda record: record.replace(b'"filters": null', b'"filters": [[1.0], [1.0, 2.0]]'),
        lambda record: 100_000 * b"[" + 100_000 * b"]",
        lambda record: b'{"specification": ' + 100_000 * b'{"a": ' + b"1" + 100_000 * b"}" + b', "history": {}}',
    ],
    ids=[
        "truncated",
        "empty",
        "binary",
        "list",
        "no history",
        "no number",
        "no losses",
        "digits for a curve",
        "a loss too many",
        "an integer beyond float64",
        "true for a loss",
        "accuracies missing",
        "accuracy above 1",
        "for ever",
        "no filters",
        "filters of a net without",
        "lists in lists",
        "dicts in dicts",
    ],
)
def test_a_record_that_is_damaged_is_run_again(points, tmp_path, capsys, damage):
    run_studies([TinyStudy()], points, tmp_path)
    before = stored(tmp_path / "tiny")
    record = tmp_path / "tiny" / "trainings" / "batchnorm.json"
    damaged = damage(record.read_bytes())
    assert damaged != record.read_bytes()
    record.write_bytes(damaged)
    capsys.readouterr()
    run_studies([TinyStudy()], points, tmp_path)
    assert trained(capsys) == ["batchnorm"]
    assert stored(tmp_path / "tiny") == before


@pytest.mark.parametrize("batch_size", [2, 10, 11, 20, 100])
def test_a_training_is_loaded_as_it_was_saved(points, tmp_path, batch_size):
    """Also one of which an epoch has one batch."""
    training = replace(TINY, batch_size=batch_size)
    history = training.run(points)
    save_history(tmp_path / "record.json", training, history)
    assert load_history(tmp_path / "record.json", training, points) == history


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_results_of_other_options_are_replaced_by_a_fresh_run_only(points, tmp_path, capsys):
    run_studies([TinyStudy()], points, tmp_path, seed=1)
    before, records = contents(tmp_path), stored(tmp_path / "tiny")
    capsys.readouterr()
    with pytest.raises(
        FileExistsError, match=r"tiny holds results of other options \(seed 1, here 2\): .*--out.*--fresh"
    ):
        run_studies([TinyStudy()], points, tmp_path, seed=2)
    with pytest.raises(FileExistsError, match=r"\(data 'points', here 'others'\)"):
        run_studies([TinyStudy()], replace(points, name="others"), tmp_path, seed=1)
    assert trained(capsys) == [] and contents(tmp_path) == before
    run_studies([TinyStudy()], points, tmp_path, seed=2, fresh=True)
    assert len(trained(capsys)) == 3
    after = stored(tmp_path / "tiny")
    assert all(after[name]["history"] != records[name]["history"] for name in records)


@pytest.mark.parametrize("options", [["--quick", "--seed", "232"], []])
@pytest.mark.parametrize("study", [study.name for study in ALL])
def test_finished_results_survive_other_options(everything, tmp_path, capsys, study, options):
    """Also where the trainings have other names, as have those of other seeds, and where some are the same."""
    out = tmp_path / "out"
    shutil.copytree(everything / study, out / study)
    before = contents(out)
    name = study.removesuffix("-batch").removesuffix("-layer")
    norm = ["--norm", study.rpartition("-")[2]] if name == "batch-size" else []
    assert main(["study", name, *norm, *options, "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"normext: error: {out / study} holds results of other options (")
    assert ("seed 231, here" if options else "epochs") in error and error.count("\n") == 1
    assert contents(out) == before


def test_a_fresh_run_leaves_no_record_of_other_trainings(points, tmp_path):
    class More(TinyStudy):
        def trainings(self, data, seed, quick):
            return [replace(TINY, name="more")]

    run_studies([TinyStudy()], points, tmp_path)
    (tmp_path / "tiny" / "trainings" / "notes.json").write_text("{}")  # no record: not ours
    with pytest.raises(FileExistsError, match=r"other options \(.*\)"):
        run_studies([More()], points, tmp_path)
    run_studies([More()], points, tmp_path, fresh=True)
    assert sorted(path.name for path in (tmp_path / "tiny" / "trainings").iterdir()) == ["more.json", "notes.json"]
    run_studies([More()], points, tmp_path)


def test_a_foreign_record_says_nothing_beyond_its_error(points, tmp_path):
    folder = tmp_path / "tiny" / "trainings"
    folder.mkdir(parents=True)
    foreign = {"name": "none", "data": 100_000 * "\x1b[2J", "hidden_dims": {"deep": []}, "seed": [[]], "epochs": "\n"}
    (folder / "none.json").write_text(json.dumps({"specification": foreign, "history": {}}))
    with pytest.raises(FileExistsError) as error:
        run_studies([TinyStudy()], points, tmp_path)
    assert str(error.value).isprintable() and len(str(error.value)) < 500 + len(str(tmp_path))


# What is there already may be anything, and lead anywhere.


def test_a_file_that_cannot_be_replaced_leaves_nothing_behind(tmp_path):
    (tmp_path / "report.md").mkdir()
    with pytest.raises(OSError, match="cannot write .*report.md"), new_file(tmp_path / "report.md") as file:
        file.write(b"text")
    assert [path.name for path in tmp_path.iterdir()] == ["report.md"]


def test_an_interrupted_file_leaves_what_was_there(tmp_path):
    (tmp_path / "report.md").write_text("before")
    with pytest.raises(KeyboardInterrupt), new_file(tmp_path / "report.md") as file:
        file.write(b"text")
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["report.md"]
    assert (tmp_path / "report.md").read_text() == "before"


def test_files_are_for_all_whom_the_user_lets_read_them(tmp_path):
    (tmp_path / "other").touch()
    with new_file(tmp_path / "report.md"):
        pass
    assert (tmp_path / "report.md").stat().st_mode == (tmp_path / "other").stat().st_mode


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege there")
def test_links_in_a_results_folder_are_not_followed(points, tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    out = tmp_path / "out"
    run_studies([TinyStudy()], points, out)
    (out / "tiny" / "trainings" / "none.json").unlink()
    for name in ("report.md", "losses.csv", "trainings/none.json", f".report.md.{os.getpid()}.tmp"):
        (out / "tiny" / name).unlink(missing_ok=True)
        (out / "tiny" / name).symlink_to(victim)
    run_studies([TinyStudy()], points, out)
    assert victim.read_text() == "precious"
    assert not (out / "tiny" / "report.md").is_symlink()

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for link in (tmp_path / "one" / "tiny", tmp_path / "two" / "tiny" / "trainings"):
        link.parent.mkdir(parents=True)
        link.symlink_to(elsewhere)
        with pytest.raises(OSError, match=f"cannot write results into {link}: it is a symbolic link"):
            run_studies([TinyStudy()], points, tmp_path / link.relative_to(tmp_path).parts[0])
    assert not any(elsewhere.iterdir())


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no such files")
@pytest.mark.parametrize("kind", ["a pipe", "a device", "a huge file"])
def test_a_record_that_would_not_end_is_run_again(points, tmp_path, capsys, kind):
    run_studies([TinyStudy()], points, tmp_path)
    record = tmp_path / "tiny" / "trainings" / "none.json"
    record.unlink()
    if kind == "a pipe":
        os.mkfifo(record)
    elif kind == "a device":
        record.symlink_to("/dev/zero")
    else:
        record.touch()
        os.truncate(record, 1 << 40)
    capsys.readouterr()
    run_studies([TinyStudy()], points, tmp_path)
    assert trained(capsys) == ["none"]


def test_damaged_records_end_in_no_traceback(points, tmp_path):
    """Bytes changed, taken out and put in, some of them such that JSON still reads."""
    run_studies([TinyStudy()], points, tmp_path)
    record = tmp_path / "tiny" / "trainings" / "none.json"
    whole, random = record.read_bytes(), np.random.default_rng(0)
    training = TinyStudy().trainings("points", 231, False)[0]
    for _ in range(1000):
        damaged = bytearray(whole)
        for _ in range(random.integers(1, 4)):
            start, stop = sorted(random.integers(0, len(damaged), 2))
            piece = random.choice([b"", b"9", b"-", b"[", b"{}", b"null", b"NaN", b'"', b"1e999", random.bytes(1)])
            damaged[start : start + min(stop - start, 8)] = piece
        record.write_bytes(damaged)
        history = load_history(record, training, points)
        assert history is None or (len(history.loss_history), len(history.val_acc_history)) == (8, 3)


# Trainings that diverge.


def test_a_diverged_training_is_a_result_and_is_recorded_in_strict_json(points, tmp_path):
    training = replace(TINY, normalization=None, weight_scale=1e30)
    history = training.run(points)  # Warnings are errors in these tests: NumPy's must not get out.
    assert history.diverged and not math.isfinite(history.final_loss)
    save_history(tmp_path / "record.json", training, history)

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    json.loads((tmp_path / "record.json").read_text(), parse_constant=refuse)
    read = load_history(tmp_path / "record.json", training, points)
    np.testing.assert_array_equal(read.loss_history, history.loss_history)
    assert replace(read, loss_history=[]) == replace(history, loss_history=[])


def test_infinite_losses_and_filters_are_recorded_with_their_sign(tmp_path):
    images = Data("images", "images", {"X_train": np.zeros((10, 1, 4, 4))})
    training = ConvTraining(**{**asdict(TINY), "data": "images", "num_filters": 1, "filter_size": 2})
    numbers = [1.5, math.inf, -math.inf, math.nan]
    filters = [[[numbers[:2], numbers[2:]]]]
    save_history(tmp_path / "record.json", training, History(numbers, [0.1, 0.2, 1], [0.1, 0.2, 0], 1.0, filters))
    read = load_history(tmp_path / "record.json", training, images)
    np.testing.assert_array_equal(read.loss_history, numbers)
    np.testing.assert_array_equal(read.filters, filters)


def test_a_line_tells_that_a_training_diverged(points, tmp_path, capsys):
    class Diverging(TinyStudy):
        def trainings(self, data, seed, quick):
            return [replace(TINY, normalization=None, weight_scale=1e30), replace(TINY, name="fine")]

    run_studies([Diverging()], points, tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert [line.endswith("diverged") for line in lines] == [True, False, False]
    assert "not a finite number: tiny.\n" in (tmp_path / "tiny" / "report.md").read_text()


@pytest.mark.parametrize("diverging", [None, "batchnorm", "all"])
def test_plots_and_report_take_diverged_trainings(diverging):
    def history(training):
        bad = diverging in (training.normalization, "all") or training.weight_scale > 0.3
        bad_number = math.nan if bad else 1.0
        return invented(training, 0.1 if bad else 0.9, loss=bad_number, weight=bad_number)

    for study in (Deep(), ConvNet(), WeightScale()):
        results = [Result(training, history(training)) for training in study.trainings("digits", 1, True)]
        study.report(results)
        for figure in study.figures(results).values():
            figure.savefig(io.BytesIO(), format="png")
    statements = WeightScale().report(results)
    assert re.search("- With no norm: .*; (2|9) diverge", statements)
    assert re.search("- With batch norm: .*; (2|9) diverge", statements)


# The reports follow the numbers. The histories are invented, so that both outcomes are met.


def invented(training, accuracy, loss=1.0, start=0.1, weight=1.0):
    """A history that is at this accuracy in every epoch."""
    curve = [start] + [accuracy] * training.epochs
    filters = np.full((2, 1, 3, 3), weight).tolist() if isinstance(training, ConvTraining) else None
    return History([loss] * 20 * training.epochs, curve, curve, 1.0, filters)


def report(study, accuracy, quick=True):
    """The report when a training reaches what this function makes of it."""
    trainings = study.trainings("digits", 231, quick)
    return study.report([Result(training, invented(training, accuracy(training))) for training in trainings])


def test_deep_report_says_which_net_learned_faster():
    text = report(Deep(), lambda training: 0.5 if training.normalization is None else 0.8)
    assert "After the first epoch the training accuracy is 80.0 % with batch norm and 50.0 % without" in text
    assert "in epoch 1; batch norm is there in epoch 1" in text
    assert "**So with batch norm the net learns faster:** its training accuracy is 30.0 points higher" in text
    text = report(Deep(), lambda training: 0.8 if training.normalization is None else 0.5)
    assert "80.0 %, comes in epoch 1; batch norm does not reach it" in text
    assert "**This run does not show the expected effect,**" in text and "-30.0 points" in text and "Why" not in text


def test_weight_scale_report_counts_the_scales():
    def wide(training):
        if training.normalization is None:
            return 0.90 if 0.02 < training.weight_scale < 0.2 else 0.1
        return 0.93 if training.weight_scale < 0.5 else 0.5

    text = report(WeightScale(), wide)
    assert "The best validation accuracy of the run is 93.0 %" in text
    assert "With no norm: 2 of 9 scales come within 5.0 points of it (between 0.0316 and 0.1)" in text
    assert (
        "the best is 90.0 % at 0.0316; 7 stay below 20.0 % even on the training images (between 0.0001 and 1)" in text
    )
    assert "With batch norm: 8 of 9 scales come within 5.0 points of it (between 0.0001 and 0.316)" in text
    assert "8 of 9 scales train well with it, 2 without" in text
    assert "Not at the lower end" not in text and "Nor at the upper end" in text

    text = report(WeightScale(), lambda training: 0.9 if training.weight_scale > 0.01 else 0.3)
    assert "**This run does not show the expected effect,**" in text and "Why" not in text


def test_weight_scale_report_explains_the_end_that_failed():
    def low(training):
        return 0.9 if training.normalization and training.weight_scale > 0.01 else 0.1

    text = report(WeightScale(), low)
    assert "Not at the lower end" in text and "Nor at the upper end" not in text


def by_size(change, spread=0.001):
    """Accuracies that change by so much from the smallest batches to the largest, and little with the seed."""
    return lambda training: 0.8 + (change if training.batch_size == 50 else 0) + spread * (training.seed - 231)


@pytest.mark.parametrize(
    "norm, change, spread, conclusion",
    [
        ("batch", 0.05, 0.001, "**So batch norm gets better with the batch size.**"),
        ("batch", -0.05, 0.001, "**This run does not show the expected effect,**"),
        ("batch", 0.05, 0.1, "**This run does not show the expected effect,**"),
        ("batch", 0.01, 0.001, "**So batch norm gets better with the batch size.**"),
        ("layer", 0.01, 0.001, "**This run does not show the expected effect,**"),
        ("layer", 0.00, 0.001, "**So with layer norm the batch size hardly matters**"),
        ("layer", 0.05, 0.1, "**So with layer norm the batch size hardly matters**"),
        ("layer", 0.05, 0.001, "**This run does not show the expected effect,**"),
        ("layer", -0.05, 0.001, "**This run does not show the expected effect,**"),
    ],
)
def test_batch_size_report_weighs_the_change_against_the_seeds(norm, change, spread, conclusion):
    text = report(BatchSize(norm), by_size(change, spread))
    assert conclusion in text
    # Three seeds, spread apart: their standard deviation is the spread, on both ends of the change.
    changes = f"{100 * change:+.1f} ± {100 * spread * math.sqrt(2 / 3):.1f} points"
    assert f"changes by {changes} on the validation images and by {changes} on the training images" in text


def test_batch_size_report_counts_the_updates():
    assert "20 in an epoch at 5, 20 in an epoch at 10 and 20 in an epoch at 50" in report(
        BatchSize("layer"), by_size(0)
    )


def test_layer_width_report_says_where_layer_norm_fails():
    def narrow(training):
        return 0.3 if training.normalization == "layernorm" and training.hidden_dims[0] < 10 else 0.9

    text = report(LayerWidth(), narrow)
    assert "changes by -60.0 points with 2 features and by 0.0 points with 64" in text
    assert "more than 2.0 points behind with 2 and 4 features" in text
    assert "**So layer norm fails where a row has very few features.**" in text
    text = report(LayerWidth(), lambda training: 0.9)
    assert "behind with no number of features" in text
    assert "**This run does not show the expected effect,**" in text and "Why" not in text


def test_convnet_report_says_which_learning_rates_each_net_bears():
    def steady(training):
        if training.normalization is None:
            return {0.001: 0.90, 0.003: 0.86, 0.01: 0.30}[training.learning_rate]
        return {0.001: 0.80, 0.003: 0.95, 0.01: 0.93}[training.learning_rate]

    text = report(ConvNet(), steady, quick=False)
    assert "changes by -10.0 points at 0.001, +9.0 points at 0.003 and +63.0 points at 0.01" in text
    assert "without normalization at 0.001 and 0.003, the net with batch norm at 0.003 and 0.01" in text
    assert "**So with spatial batch norm the net bears a larger learning rate.**" in text
    assert "At a learning rate of 0.01 the root mean square of the filters becomes 1 with batch norm" in text
    text = report(ConvNet(), lambda training: 0.9)
    assert "**This run does not show the expected effect,**" in text and "Why" not in text


# The specifications and the data.


def test_the_trainings_are_those_of_the_assignment():
    def values(study, field):
        return sorted({getattr(training, field) for training in study.trainings("digits", 231, False)}, key=str)

    assert values(Deep(), "hidden_dims") == [(100,) * 5]
    assert values(Deep(), "normalization") == [None, "batchnorm"]
    for study, learning_rate in ((Deep(), 1e-3), (WeightScale(), 1e-3), (BatchSize("batch"), 10**-3.5)):
        assert values(study, "learning_rate") == [learning_rate]
        assert values(study, "epochs") == [10]
    assert values(Deep(), "weight_scale") == values(BatchSize("layer"), "weight_scale") == [2e-2]
    assert values(WeightScale(), "hidden_dims") == [(50,) * 7]
    assert values(WeightScale(), "batch_size") == [50]
    np.testing.assert_allclose(sorted(values(WeightScale(), "weight_scale")), np.logspace(-4, 0, 20))
    for norm in ("batch", "layer"):
        sizes = {(of.normalization, of.batch_size) for of in BatchSize(norm).trainings("digits", 231, False)}
        assert sizes == {(None, 5), (f"{norm}norm", 5), (f"{norm}norm", 10), (f"{norm}norm", 50)}


@pytest.mark.parametrize("study", ALL, ids=lambda study: study.name)
@pytest.mark.parametrize("quick", [True, False])
def test_names_of_trainings_are_unique_file_names(study, quick):
    names = [training.name for training in study.trainings("digits", 231, quick)]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"[a-z0-9.+-]+", name) for name in names)


def test_digits_are_split_and_centred():
    data = load_data("digits")
    arrays = data.arrays
    assert arrays["X_train"].shape == (1000, 1, 8, 8) and arrays["X_val"].shape == (797, 1, 8, 8)
    np.testing.assert_allclose(arrays["X_train"].mean(axis=0), 0, atol=1e-10)
    everything = np.concatenate([arrays["X_train"], arrays["X_val"]]).reshape(-1, 64)
    assert 200 < np.ptp(everything, axis=0).max() <= 255.001
    assert set(arrays["y_train"]) == set(arrays["y_val"]) == set(range(10))
    # Up to the constant that was subtracted, they are all of scikit-learn's images, each once.
    images = load_digits().data * (255 / 16)
    rows = [(a - a.min(axis=0)).round(6).tolist() for a in (everything, images)]
    assert sorted(rows[0]) == sorted(rows[1])


def test_digits_do_not_depend_on_the_global_seed():
    np.random.seed(1)
    first = load_data("digits")
    np.random.seed(2)
    assert load_data("digits").name == first.name


def test_unknown_data_are_refused():
    with pytest.raises(ValueError, match="unknown data 'mnist': want 'digits' or 'cifar10'"):
        load_data("mnist")
