"""The command line: ``normext check``, ``normext study`` and ``normext config``."""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NoReturn

import normext

__all__ = ["main"]

# What a command needs beyond this is imported when it runs: `normext --help` should not wait for the studies.


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command of ``normext``.

    Parameters
    ----------
    argv : sequence of str, optional
        The arguments, without the program's name. Default: those of the process.

    Returns
    -------
    int
        The exit status: 0 is success, 1 a failed check, 2 an error of the user's making (told in one line on stderr),
        130 an interruption.

    Examples
    --------
    >>> main(["study", "deep", "--data", "mnist"])  # and on stderr: normext: error: argument --data: invalid choice ...
    2
    """
    try:
        arguments = _parser().parse_args(argv)
        return arguments.run(arguments)
    except KeyboardInterrupt:
        print("normext: interrupted; a study goes on from here when it is started again", file=sys.stderr)
        return 130
    except (_UserError, OSError, ImportError) as error:
        print("normext: error:", " ".join(str(error).split()), file=sys.stderr)
        return 2


class _UserError(Exception):
    """What the user can put right."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise _UserError(message)


def _parser() -> _Parser:
    parser = _Parser(prog="normext", description="Normalization for NumPy, compiled: checks and experiments.")
    parser.add_argument("--version", action="version", version=f"normext {normext.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    about = (
        "Check every compiled layer three ways: against numerical gradients, against the twin in plain NumPy, and "
        "float32 against float64. Prints the relative errors with their limits; exit status 1 if one exceeds its "
        "limit."
    )
    check = commands.add_parser(
        "check", help="check the results and gradients of every compiled layer", description=about
    )
    check.add_argument(
        "--accuracy",
        action="store_true",
        help="instead: float32 far from zero, with outliers and at the ends of its range, beside the textbook formula "
        "in NumPy, and PyTorch and JAX where they are installed; some seconds",
    )
    check.set_defaults(run=_check)

    config = commands.add_parser("config", help="print how normext was built and what it uses here")
    config.set_defaults(run=_config)

    study = commands.add_parser("study", help="run an experiment: what normalization does for training")
    _add_studies(study.add_subparsers(title="studies", metavar="STUDY", required=True))
    return parser


def _add_studies(commands: argparse._SubParsersAction) -> None:
    from normext.studies import STUDIES

    options = _Parser(add_help=False)
    options.add_argument(
        "--out", type=Path, default=Path("results"), metavar="DIR", help="where results go (default: results)"
    )
    options.add_argument(
        "--data", choices=("digits", "cifar10"), default="digits", help="images to train on (default: digits)"
    )
    options.add_argument(
        "--data-dir", type=Path, metavar="DIR", help="folder of CIFAR-10 as published; required with cifar10"
    )
    options.add_argument("--seed", type=_seed, default=231, metavar="N", help="seed of the trainings (default: 231)")
    options.add_argument("--quick", action="store_true", help="fewer trainings and epochs: enough to see the effects")
    options.add_argument("--fresh", action="store_true", help="run again what is finished, whatever is there")
    options.add_argument(
        "--mpi",
        action="store_true",
        help="train on all processes that mpiexec has started, each with its part of every batch: mpiexec -n 4 normext "
        "study deep --mpi (needs mpi4py)",
    )
    epilog = (
        "Histories (JSON, CSV), plots (PNG) and report.md go to a folder of the study's name. An interrupted study "
        "goes on from its last finished training when it is started again with the same options; with others it is "
        "refused, unless --fresh replaces what is there."
    )
    everything = tuple(study for studies in STUDIES.values() for study in studies)
    for name, studies in {**STUDIES, "all": everything}.items():
        if name == "all":
            summary = about = f"run them all: {', '.join(study.name for study in everything)}"
        else:
            about = studies[0].description
            summary = about.partition(". ")[0]
        command = commands.add_parser(name, parents=[options], help=summary, description=about, epilog=epilog)
        command.set_defaults(run=_study, studies=studies, norm="")
        if name == "batch-size":
            command.add_argument("--norm", choices=("batch", "layer"), help="which norm (default: one after the other)")


def _seed(text: str) -> int:
    # NumPy takes 32 bits; some studies use the two seeds that follow as well.
    if not text.isdecimal() or int(text) > 2**32 - 3:
        raise argparse.ArgumentTypeError(f"want a whole number from 0 to {2**32 - 3}, got {text!r}")
    return int(text)


def _check(arguments: argparse.Namespace) -> int:
    if arguments.accuracy:
        from normext.accuracy import check_accuracy, format_table

        rows = check_accuracy()
        print(format_table(rows))
        rows, what = [row for row in rows if row.program == "normext"], "cases"
    else:
        from normext.gradcheck import check_layers, format_rows

        rows, what = check_layers(), "results"
        print(format_rows(rows))
    wrong = sum(not row.ok for row in rows)
    print(f"{len(rows)} {what} checked, " + (f"{wrong} beyond their limit" if wrong else "all within their limits"))
    return 1 if wrong else 0


def _config(arguments: argparse.Namespace) -> int:
    normext.show_config()
    return 0


def _study(arguments: argparse.Namespace) -> int:
    from normext.studies.data import load_data
    from normext.studies.study import run_studies

    try:
        data = load_data(arguments.data, arguments.data_dir)
    except ValueError as error:
        raise _UserError(error) from error
    studies = [study for study in arguments.studies if study.name.endswith(arguments.norm)]
    run = partial(
        run_studies, studies, data, arguments.out, seed=arguments.seed, quick=arguments.quick, fresh=arguments.fresh
    )
    if not arguments.mpi:
        run()
        return 0
    from normext.distributed import MPI, abort_on_error

    with abort_on_error():
        run(comm=MPI.COMM_WORLD)
    return 0
