"""The command line: what it prints, its exit status, and one line for whatever the user can put right."""

import os
import pickle
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

import normext
from normext import accuracy, gradcheck
from normext._version import how_to_install
from normext.cli import main

needs_studies = pytest.mark.skipif(
    not all(map(find_spec, ("matplotlib", "sklearn", "tqdm"))), reason="needs the packages of the extra study"
)


def error_line(capsys, *argv):
    """The one line on stderr with which the command ends in status 2, having printed nothing else."""
    assert main([str(word) for word in argv]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("normext: error: ") and err.endswith("\n") and err.count("\n") == 1
    return err


def write_cifar10(folder, images=400):
    """Random images in the published layout: five training files and a test file, all of so many images."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        batch = {
            b"data": rng.integers(0, 256, (images, 3072), dtype=np.uint8),
            b"labels": rng.integers(0, 10, images).tolist(),
        }
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
    return folder


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"normext {normext.__version__}\n"


def test_config_tells_the_version(capsys):
    assert main(["config"]) == 0
    assert normext.__version__ in capsys.readouterr().out


def test_check_prints_every_layer_and_succeeds(capsys):
    assert main(["check"]) == 0
    out = capsys.readouterr().out
    comparisons = {row.comparison for row in gradcheck.check_layers(gradcheck.LAYERS[:1])}
    for layer in gradcheck.LAYERS:
        found = [line for line in out.splitlines() if line.startswith(layer.name + "  ") and line.endswith("  ok")]
        assert len(found) == len(comparisons)
    assert "FAIL" not in out


def test_check_exits_1_on_a_layer_with_a_wrong_backward_pass(capsys, monkeypatch):
    def backward(dy, cache):
        dx, dgamma, dbeta = normext.layer_norm_backward(dy, cache)
        return dx, dgamma, dbeta + 1e-4

    wrong = gradcheck.Layer("wrong", (normext.layer_norm, backward), (4, 3), {"gamma": (3,), "beta": (3,)})
    monkeypatch.setattr(gradcheck, "LAYERS", (*gradcheck.LAYERS[:1], wrong))
    assert main(["check"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines if line.endswith("FAIL")] == ["numerical", "twin"]
    assert "2 beyond their limit" in lines[-1]


def test_check_accuracy_prints_every_case_beside_others_and_its_limits(capsys):
    assert main(["check", "--accuracy"]) == 0
    header, *lines, total = capsys.readouterr().out.splitlines()
    assert {"normext", "NumPy", "limits"} <= set(header.split())
    assert [line.startswith(f"{case.norm}  {case.name}  ") for case, line in zip(accuracy.CASES, lines)] == [
        True
    ] * len(lines)
    assert all(line.endswith("  ok") for line in lines)
    assert total == f"{len(accuracy.CASES)} cases checked, all within their limits"


def test_check_accuracy_exits_1_on_a_formula_that_loses_digits(capsys, monkeypatch):
    offsets = [case for case in accuracy.CASES if case.name.startswith("offset")]
    monkeypatch.setattr(accuracy.check_accuracy, "__defaults__", (offsets, ("normext",)))
    monkeypatch.setitem(accuracy._LOADERS, "normext", accuracy._LOADERS["NumPy"])
    assert main(["check", "--accuracy"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].endswith("FAIL") and lines[-1] == f"{len(offsets)} cases checked, 7 beyond their limit"


@pytest.mark.parametrize("study", ["deep", "weight-scale", "batch-size", "layer-width", "convnet", "all"])
def test_study_help_describes_the_study(capsys, study):
    with pytest.raises(SystemExit) as stop:
        main(["study", study, "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert "report.md" in out
    assert ("--norm" in out) == (study == "batch-size")
    assert study == "all" or "Answers" in out


@pytest.mark.parametrize(
    "argv, message",
    [
        ([], "the following arguments are required: COMMAND"),
        (["study"], "the following arguments are required: STUDY"),
        (["train"], "invalid choice: 'train'"),
        (["study", "wide"], "invalid choice: 'wide'"),
        (["study", "deep", "--data", "mnist"], "invalid choice: 'mnist'"),
        (["study", "batch-size", "--norm", "group"], "invalid choice: 'group'"),
        (["study", "deep", "--seed", "-1"], "want a whole number from 0 to 4294967293, got '-1'"),
        (["study", "deep", "--seed", "4294967294"], "got '4294967294'"),
        (["study", "deep", "--data", "cifar10"], "cifar10 needs the folder of its files (--data-dir)"),
        (["study", "deep", "--data-dir", "here"], "a data folder is for cifar10 only, got here with digits"),
    ],
)
def test_bad_arguments_are_one_line(capsys, tmp_path, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    assert message in error_line(capsys, *argv)
    assert not any(tmp_path.iterdir())


def test_a_missing_cifar10_folder_is_one_line(capsys, tmp_path):
    argv = ["study", "deep", "--data", "cifar10", "--data-dir", tmp_path / "nowhere", "--out", tmp_path / "out"]
    line = error_line(capsys, *argv)
    assert str(tmp_path / "nowhere") in line and "ownload" in line
    assert not (tmp_path / "out").exists()


def test_a_truncated_cifar10_file_is_one_line(capsys, tmp_path):
    folder = write_cifar10(tmp_path / "cifar", images=2)
    whole = (folder / "data_batch_3").read_bytes()
    (folder / "data_batch_3").write_bytes(whole[: len(whole) // 2])
    argv = ["study", "deep", "--data", "cifar10", "--data-dir", folder, "--out", tmp_path / "out"]
    assert str(folder / "data_batch_3") in error_line(capsys, *argv)
    assert not (tmp_path / "out").exists()


def test_too_few_cifar10_images_are_one_line(capsys, tmp_path):
    folder = write_cifar10(tmp_path / "cifar", images=2)
    assert "10" in error_line(
        capsys, "study", "deep", "--data", "cifar10", "--data-dir", folder, "--out", tmp_path / "out"
    )


@needs_studies
def test_cifar10_in_its_published_layout_is_studied(capsys, tmp_path):
    folder = write_cifar10(tmp_path / "cifar")
    argv = ["study", "deep", "--quick", "--data", "cifar10", "--data-dir", str(folder), "--out", str(tmp_path / "out")]
    assert main(argv) == 0
    report = (tmp_path / "out" / "deep" / "report.md").read_text()
    assert "CIFAR-10, 1000 training and 1000 validation images" in report


@needs_studies
@pytest.mark.parametrize("place", ["", "out", "out/deep", "out/deep/trainings"])
def test_results_that_cannot_be_written_are_found_before_any_training(capsys, tmp_path, place):
    obstacle = tmp_path / "file" / place if place else tmp_path / "file"
    obstacle.parent.mkdir(parents=True, exist_ok=True)
    obstacle.write_text("a file where a folder should be")
    line = error_line(capsys, "study", "deep", "--out", tmp_path / "file" / "out")
    assert f"cannot write results into {tmp_path / 'file' / 'out' / 'deep'}" in line


@needs_studies
@pytest.mark.parametrize(
    "module, package", [("tqdm", "tqdm"), ("matplotlib.figure", "matplotlib"), ("sklearn.datasets", "scikit-learn")]
)
def test_a_missing_package_is_one_line_before_any_training(capsys, tmp_path, monkeypatch, module, package):
    monkeypatch.setitem(sys.modules, module, None)  # So Python marks a module that cannot be imported.
    line = error_line(capsys, "study", "deep", "--out", tmp_path / "out")
    assert package in line and how_to_install("study") in line
    assert not (tmp_path / "out").exists()


def test_the_command_line_starts_without_the_packages_of_the_studies():
    script = "import sys, normext.cli; normext.cli.main(['study', 'deep', '--seed', 'x']); print(*sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(Path(normext.__file__).parents[1])}
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True)
    heavy = {"matplotlib", "sklearn", "tqdm", "scipy", "normext.cs231n"}
    assert heavy.isdisjoint(run.stdout.split())
