"""The notebooks: they run from top to bottom, assertions and all, and are stored with what they print and draw."""

from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
NotebookClient = pytest.importorskip("nbclient").NotebookClient
pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def kinds_of_output(cell):
    """What a cell gives: text, in one piece or several, and pictures. A library may say something on stderr."""
    outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    return {kind for output in outputs for kind in output.get("data", {"stream": ...})}


def test_there_are_notebooks_on_both_halves_of_the_assignment():
    assert [path.stem for path in NOTEBOOKS] == ["batch_normalization", "convolutional_networks"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_stored_as_it_was_run_once_from_top_to_bottom(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    kinds = [kind for cell in cells for kind in kinds_of_output(cell)]
    assert kinds.count("stream") >= 3 and kinds.count("image/png") >= 3
    text = path.read_text()
    assert len(text) < 300_000
    for trace in ("stderr", "Traceback", "/home/", "/root/", "/tmp/", "/Users/", "site-packages"):
        assert trace not in text


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
@pytest.mark.filterwarnings("default")  # those of Jupyter's own are not ours to mend
def test_notebook_runs_from_top_to_bottom(path, tmp_path):
    stored = nbformat.read(path, as_version=4)
    notebook = nbformat.read(path, as_version=4)
    for cell in code_cells(notebook):
        cell.outputs, cell.execution_count = [], None
    NotebookClient(notebook, timeout=180, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    assert list(map(kinds_of_output, code_cells(notebook))) == list(map(kinds_of_output, code_cells(stored)))
    assert not any(tmp_path.iterdir())  # no notebook leaves files behind
