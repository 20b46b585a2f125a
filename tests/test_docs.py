"""What README and docs tell to run: the first example prints what is said there, and commands name what there is."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import normext

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md"), *ROOT.glob("notebooks/*.ipynb")]
PYTHON = sorted(path for folder in ("normext", "bench", "tests") for path in ROOT.glob(f"{folder}/**/*.py"))

if not PAGES[0].exists():
    pytest.skip("needs the source tree", allow_module_level=True)


def names(requirement):
    return re.split("[<>=;@ ]", requirement, maxsplit=1)[0]


@pytest.fixture(scope="module")
def project():
    tomllib = pytest.importorskip("tomllib")
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_first_example_prints_what_the_readme_says():
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", PAGES[0].read_text(), re.MULTILINE | re.DOTALL)
    (language, program), (_, printed) = blocks[:2]
    assert language == "python"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == printed != ""


def test_the_example_in_cython_prints_what_is_said(tmp_path):
    """Each block of the page is a file, whose name is its first line."""
    pytest.importorskip("Cython")
    pytest.importorskip("setuptools")
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / "docs/c_and_cython.md").read_text(), re.MULTILINE | re.DOTALL)
    files = {re.match(r"# (\w+\.\w+)", code)[1]: code for language, code in blocks if language}
    for name, code in files.items():
        (tmp_path / name).write_text(code)
    build = [sys.executable, "setup.py", "build_ext", "--inplace"]
    built = subprocess.run(build, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    done = subprocess.run([sys.executable, "use.py"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert [done.stdout] == [code for language, code in blocks if not language]


def test_the_map_of_files_names_what_there_is():
    """Every source of the compiled core, and nothing that is gone."""
    tree = re.search(r"## How it is built\n\n```\n(.*?)```", PAGES[0].read_text(), re.DOTALL)[1]
    named = set(re.findall(r"[\w/]+\.(?:py|pyx|pxd|c|h)\b", tree))
    there = [path for folder in ("src_c", "normext") for path in (ROOT / folder).glob("**/*.*")]
    assert [name for name in named if not any(str(path).endswith("/" + name) for path in there)] == []
    sources = {path.name for path in there if path.suffix in (".pyx", ".c", ".h") and "cs231n" not in path.parts}
    assert sources - {Path(name).name for name in named} == set()


def test_the_page_on_the_architecture_names_what_there_is():
    """Functions, files and settings: what stands between backticks as one word is in the sources."""
    page = (ROOT / "docs/architecture.md").read_text()
    sources = [path for pattern in ("src_c/*", "normext/**/*.p*", "normext/**/*.h", "tests/*.py", "bench/*.py")
               for path in ROOT.glob(pattern)]  # fmt: skip
    text = "\n".join(path.read_text() for path in [*sources, ROOT / "setup.py"] if path.suffix != ".pyc")
    words = set(re.findall(r"`([A-Za-z]\w*)`", page)) - {"bt", "out"}
    assert [word for word in words if not re.search(rf"\b{word}\b", text)] == []
    files = set(re.findall(r"\b[\w/]+\.(?:pyx|pxd|py|h|c|md)\b", page)) - {"call.py"}
    names = [str(path) for path in ROOT.glob("**/*.*")]
    assert [file for file in files if not any(name.endswith("/" + file) for name in names)] == []


def test_commands_install_extras_from_the_clone(project):
    """There is no release that pip would find; and without quotes a shell may take [] for a pattern."""
    extras = project["project"]["optional-dependencies"]
    for path in {*PAGES, *PYTHON} - {Path(__file__)}:
        for command in re.findall(r"pip install.*", path.read_text()):
            assert not re.search(r"install[^&]* \W*normext\b(?=\[|\W*$)(?<!clone of normext)", command), (path, command)
            for before, wanted, after in re.findall(r"(\S*)\.\[([\w,-]+)\](\S*)", command):
                assert before.endswith('"') and after.lstrip("\\").startswith('"'), (path, command)
                assert set(wanted.split(",")) <= extras.keys(), (path, command)


def test_a_package_that_is_named_twice_has_the_same_bound(project):
    """The build's requirements are named among those of the tests, too."""
    extras = project["project"]["optional-dependencies"].values()
    lists = [project["project"]["dependencies"], project["build-system"]["requires"], *extras]
    bounds = {}
    for requirement in (requirement for requirements in lists for requirement in requirements):
        bounds.setdefault(names(requirement), set()).add(requirement.partition(";")[0])
    del bounds["numpy"]  # what is compiled with NumPy 2 runs with NumPy 1 too, and not the other way round
    assert {name: found for name, found in bounds.items() if len(found) > 1 and not name.startswith("normext")} == {}


def test_the_version_is_the_one_that_the_changes_are_of():
    first = next(line for line in (ROOT / "CHANGELOG.md").read_text().splitlines() if line.startswith("## "))
    assert first.split()[1] == normext.__version__
