"""What every study does: run its trainings, go on where it was interrupted, and write histories, plots and a report."""

import csv
import io
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import normext
from normext._files import make_folder, new_file
from normext._version import how_to_install
from normext.studies.data import Data
from normext.studies.training import History, Training, load_history, load_record, save_history, specification

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Result", "Study", "run_studies"]


class Result(NamedTuple):
    """A training and what came of it."""

    training: Training
    history: History


class Study(ABC):
    """An experiment: some trainings, plots of their histories, and a report that reads its statements off the numbers.

    Attributes
    ----------
    name : str
        Its name and the name of its folder.
    title : str
        Heading of the report.
    description : str
        What it tries and what it answers, for the command's help.
    """

    name: str
    title: str
    description: str

    @abstractmethod
    def trainings(self, data: str, seed: int, quick: bool) -> list[Training]:
        """What to train on the data of that name; when quick, enough to see the effect."""

    @abstractmethod
    def figures(self, results: Sequence[Result]) -> "dict[str, Figure]":
        """The plots by name."""

    @abstractmethod
    def report(self, results: Sequence[Result]) -> str:
        """The body of the report in Markdown: a table of figures, then what they say and why."""

    def folder(self, out: Path) -> Path:
        """Where the results go."""
        return out / self.name

    def prepare(self, data: Data, out: Path, *, seed: int, quick: bool, fresh: bool) -> None:
        """Make the folders, with no results in them but those of these trainings: others are refused, or go if fresh.

        Parameters
        ----------
        data, out, seed, quick, fresh
            As `run_studies` takes them.

        Raises
        ------
        FileExistsError
            If there are results of other trainings.
        OSError
            If the folders cannot be written.
        """
        folder = self.folder(out) / "trainings"
        make_folder(self.folder(out))
        make_folder(folder)
        wanted = {of.name: specification(of) for of in self.trainings(data.name, seed, quick)}
        for path in sorted(folder.glob("*.json")):
            found = load_record(path).get("specification")
            if fresh and (found or path.stem in wanted):
                # All before any runs, so that a fresh run that is interrupted goes on as a fresh one.
                path.unlink()
            elif found and found != wanted.get(path.stem):
                raise FileExistsError(
                    f"{self.folder(out)} holds results of other options ({_differences(found, wanted.values())}): "
                    "name another folder with --out, or replace them with --fresh"
                )

    def run(self, data: Data, out: Path, *, seed: int, quick: bool, comm: Any = None) -> None:
        """Run the trainings that are not finished yet, then write histories, plots and report.

        Of the ranks of an MPI communicator all train together, and the first does the rest.
        """
        if comm is not None and comm.rank > 0:
            for training in comm.bcast(None):
                training.run(data, comm)
            return
        trainings = self.trainings(data.name, seed, quick)
        records = {training: self.folder(out) / "trainings" / f"{training.name}.json" for training in trainings}
        histories = self._histories(records, data, comm)
        self._write([Result(training, histories[training]) for training in trainings], data, self.folder(out))
        print(f"{self.name}: report in {self.folder(out) / 'report.md'}")

    def _histories(self, records: dict[Training, Path], data: Data, comm: Any) -> dict[Training, History]:
        """The histories on record, and those of the trainings that are not there yet and run now."""
        from tqdm import tqdm

        loaded = {training: load_history(record, training, data) for training, record in records.items()}
        histories = {training: history for training, history in loaded.items() if history is not None}
        if histories:
            progress = f"{len(histories)} of {len(records)} trainings are finished already"
            print(f"{self.name}: {progress} (--fresh runs them again)")
        missing = [training for training in records if training not in histories]
        if comm is not None:
            comm.bcast(missing)
        width = max(len(training.name) for training in records)
        # Without a terminal (disable=None) no bar is drawn, and the lines stand alone.
        with tqdm(total=len(records), initial=len(histories), desc=self.name, leave=False, disable=None) as bar:
            for training in missing:
                histories[training] = training.run(data, comm)
                save_history(records[training], training, histories[training])
                bar.write(f"{self.name}: {training.name:<{width}}  {_outcome(histories[training])}")
                bar.update()
        return histories

    def _write(self, results: Sequence[Result], data: Data, folder: Path) -> None:
        losses, accuracies = _csv_tables(results)
        _write_text(folder / "losses.csv", losses)
        _write_text(folder / "accuracies.csv", accuracies)
        figures = self.figures(results)
        for name, figure in figures.items():
            with new_file(folder / f"{name}.png") as file:
                figure.savefig(file, format="png", dpi=120)
        seconds = sum(history.seconds for _, history in results)
        diverged = [training.name for training, history in results if history.diverged]
        parts = [
            f"# {self.title}",
            (
                f"Data: {data.description}. {len(results)} trainings took {seconds:.1f} s together; normext "
                f"{normext.__version__}. Accuracy is measured after the first iteration and after each epoch; best "
                "means best of these."
            ),
            *(
                [f"Diverged, that is, had a loss that is not a finite number: {', '.join(diverged)}."]
                if diverged
                else []
            ),
            self.report(results),
            *(f"![{name}]({name}.png)" for name in figures),
            (
                "The histories are in trainings/ (JSON) and in losses.csv and accuracies.csv, where epoch 0 is the "
                "first iteration."
            ),
        ]
        _write_text(folder / "report.md", "\n\n".join(parts) + "\n")


def run_studies(
    studies: Iterable[Study],
    data: Data,
    out: Path,
    *,
    seed: int = 231,
    quick: bool = False,
    fresh: bool = False,
    comm: Any = None,
) -> None:
    """Run the studies one after another; what is finished in `out` is not run again.

    Parameters
    ----------
    studies : iterable of Study
        Which.
    data : Data
        What to train on.
    out : Path
        The results directory; each study has a folder of its own in it. Made where it is not there.
    seed : int, default 231
        Seed of the trainings.
    quick : bool, default False
        Fewer trainings and epochs: enough to see the effects.
    fresh : bool, default False
        Run finished trainings again, and replace the results of others.
    comm : MPI.Intracomm, optional
        Train on all its ranks, by `normext.distributed.DataParallelSolver`; each rank makes this call. Only the first
        reads and writes `out`. Default: train in this process.

    Raises
    ------
    ImportError
        If matplotlib or tqdm is not there. Before any training, and so is the next.
    FileExistsError
        If the folder of a study holds results of other data or options, unless `fresh`. Before any training, too.
    OSError
        If results cannot be written.
    """
    for package in ("matplotlib.figure", "tqdm"):
        try:
            import_module(package)
        except ImportError:
            raise ImportError(f"the studies need {package.split('.')[0]}: {how_to_install('study')}") from None
    studies = list(studies)
    if comm is None or comm.rank == 0:
        for study in studies:
            study.prepare(data, out, seed=seed, quick=quick, fresh=fresh)
    for study in studies:
        study.run(data, out, seed=seed, quick=quick, comm=comm)


def _outcome(history: History) -> str:
    accuracies = f"train {history.train_acc_history[-1]:.3f}  val {history.val_acc_history[-1]:.3f}"
    return f"{accuracies}  {history.seconds:.1f} s" + "  diverged" * history.diverged


def _differences(found: dict[str, Any], wanted: Iterable[dict[str, Any]]) -> str:
    """What a specification found on record has that none of these has: words for an error."""
    values: dict[str, list[Any]] = {}
    for specified in wanted:
        for field, value in specified.items():
            values.setdefault(field, []).append(value)
    # The name repeats others of the fields. What is a list there may be anything: it comes from a file.
    differing = [
        f"{field} {found[field]!r:.40}, here {' or '.join(dict.fromkeys(map(repr, here)))}"
        for field, here in values.items()
        if field != "name" and type(found.get(field)) in (str, int, float) and found[field] not in here
    ]
    return "; ".join(differing) or "other trainings"


def _write_text(path: Path, text: str) -> None:
    with new_file(path) as file:
        file.write(text.encode())


def _csv_tables(results: Sequence[Result]) -> tuple[str, str]:
    losses, accuracies = io.StringIO(), io.StringIO()
    loss_writer, accuracy_writer = (csv.writer(table, lineterminator="\n") for table in (losses, accuracies))
    loss_writer.writerow(["training", "iteration", "loss"])
    accuracy_writer.writerow(["training", "epoch", "train_accuracy", "val_accuracy"])
    for training, history in results:
        loss_writer.writerows([training.name, i, loss] for i, loss in enumerate(history.loss_history, start=1))
        curves = zip(history.train_acc_history, history.val_acc_history)
        accuracy_writer.writerows([training.name, epoch, *accuracy] for epoch, accuracy in enumerate(curves))
    return losses.getvalue(), accuracies.getvalue()
