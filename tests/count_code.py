"""How large the compiled core is: parameters of every function, as its compilers see them, and lines of every file.

    python tests/count_code.py [FOLDER]
    python tests/count_code.py [FOLDER] --chain functional.py:layer_norm ...

Needs GCC, which writes down the functions of C files (``-aux-info``), and Cython, whose parser reads its own and
Python's. A function of a template is one, whatever the types that it is compiled for; those of simd.h, names for single
instructions, are left out, and so are signatures that stand for typing alone (``@overload``). Functions in Python are
not of the compiled core. The adapters to JAX and PyTorch count among the lines; of normext/torch.py only what comes
before its public functions, which stand in for PyTorch's, and of normext/functional only the code: its docstrings are
the manual.

A chain is the functions that a call goes through on its way to the kernels' innermost loops: of both passes over the
data, which are statistics or sums, and then the result. Those of two calls are printed, of float32 numbers along rows
that are each one block, and of N,C,H,W with a task for each channel; or that of the functions given.
"""

import argparse
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from Cython.Compiler import Nodes
from Cython.Compiler.Main import CompilationOptions, Context
from Cython.Compiler.Scanning import FileSourceDescriptor
from Cython.Compiler.Visitor import TreeVisitor

MANY = 10
MOST = 8  # parameters
MOST_OF_KERNELS = 10  # whose innermost loops are in src_c

CODE = (".c", ".h", ".inc", ".pxd", ".py", ".pyi", ".pyx")
FILES = (
    "normext/functional.*",
    "normext/_core/*",
    "src_c/*",
    "normext/include/*",
    "normext/__init__.pxd",
    "normext/_jax*",
    "normext/jax.py",
    "normext/_torch*",
    "normext/torch.py",
    "setup.py",
)
CHAINS = {
    "layer_norm": """
        functional.py:layer_norm arrays.pyx:forward arrays.pyx:run norms.pyx:forward norms.pyx:run_forward walk_forward
        rows.pyx:normalize_rows nx_run_on layer_task layer_forward
        statistics_interleaved row_affine affine_loop affine_vector""",
    "batch_norm_backward": """
        functional.py:batch_norm_backward arrays.pyx:backward arrays.pyx:run norms.pyx:backward walk_backward
        rows.pyx:rows_backward nx_run_on backward_group_task backward_group
        group_dots row_dots dots_loop first_dots group_dx row_dx dx_loop dx_vector""",
}


class Function(NamedTuple):
    file: str
    line: int
    name: str
    parameters: int

    @property
    def most(self) -> int:
        """As many parameters as it may have."""
        return MOST_OF_KERNELS if self.file.startswith("src_c/") else MOST

    def __str__(self) -> str:
        return f"{self.parameters:10}  {self.name} {self.file}:{self.line}"


# As GCC writes it: `/* file:line:NF */ result name (parameters); /* (names) ... */`, with an F for a definition.
DEFINITION = re.compile(r"/\* (src_c/\S+):(\d+):NF \*/ .*?(\w+) \((.*)\); /\* \(")
DOCSTRING = re.compile(r'^ *"""(?s:.*?)"""\n', re.MULTILINE)
TYPES = ("F32", "F64", "F16", "BF16")
PREFIX = re.compile(r"^(b?f(16|32|64)_)?(stream_)?")  # of the names of a template's functions


# Functions ------------------------------------------------------------


def functions_in_c(root: Path) -> Iterator[Function]:
    compiler = os.environ.get("CC", "gcc").split()
    command = [*compiler, "-std=c11", "-fopenmp", "-DNX_ISA=any", "-fsyntax-only", "-aux-info"]
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder, "functions")
        kernels = [("src_c/kernels.c", f"-DNX_{element_type}") for element_type in TYPES]
        names = ("src_c/dispatch.c", "src_c/threads.h", "src_c/tasks.h", "src_c/pages.h")
        others = [(name,) for name in names if (root / name).exists()]
        for source, *macros in (*kernels, *others):
            subprocess.run([*command, str(found), *macros, source], cwd=root, check=True)
            for file, line, name, parameters in DEFINITION.findall(found.read_text()):
                if file != "src_c/simd.h":
                    yield Function(file, int(line), PREFIX.sub("", name), number_of(parameters))


def number_of(parameters: str) -> int:
    """As C writes them: those of a parameter that is a function are its own."""
    while "(" in parameters:
        parameters = re.sub(r"\([^()]*\)", "", parameters)
    return 0 if parameters == "void" else parameters.count(",") + 1


class Definitions(TreeVisitor):
    """The functions of a module in Cython, with or without a C signature."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[int, str, int]] = []

    def visit_CFuncDefNode(self, node: Any) -> None:
        declarator = node.declarator
        while not isinstance(declarator, Nodes.CFuncDeclaratorNode):
            declarator = declarator.base  # of a pointer to what the function returns
        self.found.append((node.pos[1], declarator.base.name, len(declarator.args)))

    def visit_DefNode(self, node: Any) -> None:
        if any(getattr(d.decorator, "name", "") == "overload" for d in node.decorators or ()):
            return
        more = [arg for arg in (node.star_arg, node.starstar_arg) if arg is not None]
        self.found.append((node.pos[1], node.name, len(node.args) + len(more)))

    def visit_Node(self, node: Any) -> None:
        self.visitchildren(node)


def functions_in_cython(root: Path) -> Iterator[Function]:
    """And in Python."""
    for path in files(root):
        if path.suffix in (".pyx", ".pxd", ".py"):
            name = ".".join(path.relative_to(root).with_suffix("").parts)
            context = Context.from_options(CompilationOptions(language_level=3))
            scope = context.find_module(name, need_pxd=False)
            source = FileSourceDescriptor(str(path), str(path))
            tree = context.parse(source, scope, pxd=path.suffix == ".pxd", full_module_name=name)
            definitions = Definitions()
            definitions.visit(tree)
            for definition in definitions.found:
                yield Function(path.relative_to(root).as_posix(), *definition)


def functions(root: Path) -> list[Function]:
    """Those with the most parameters first."""
    found = {*functions_in_c(root), *functions_in_cython(root)}
    return sorted(found, key=lambda f: (-f.parameters, f))


# Lines ------------------------------------------------------------


def files(root: Path) -> list[Path]:
    return [path for pattern in FILES for path in sorted(root.glob(pattern)) if path.suffix in CODE]


def lines(path: Path) -> tuple[int, int]:
    """All, and those that are not empty."""
    text = path.read_text()
    if path.name == "torch.py":
        text = text.partition("\ndef batch_norm(")[0]
    if path.stem == "functional":
        text = DOCSTRING.sub("", text)
    all_lines = text.splitlines()
    return len(all_lines), sum(bool(line.strip()) for line in all_lines)


def in_chain(found: list[Function], hop: str) -> Function:
    """The function that is named so, as `name` or `file:name`."""
    file, _, name = hop.rpartition(":")
    named = [f for f in found if f.name == name and f.file.endswith(file)]
    if len(named) != 1:
        raise ValueError(f"{hop} must name one function, but names {len(named)}")
    return named[0]


def chain_text(found: list[Function], hops: list[str]) -> str:
    """The functions, a line each, and their parameters in all."""
    chain = [in_chain(found, hop) for hop in hops]
    total = f"{sum(f.parameters for f in chain):10}  in {len(chain)} functions"
    return "\n".join(map(str, [*chain, total]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path(__file__).parents[1])
    parser.add_argument("--chain", nargs="+", help="functions, as name or file:name")
    options = parser.parse_args()
    root = options.folder.resolve()

    found = functions(root)
    print("parameters  function")
    if options.chain:
        print(chain_text(found, options.chain))
        return
    compiled = [f for f in found if not f.file.endswith(".py")]
    for f in compiled:
        print(f"{f}{', too many' * (f.parameters > f.most)}")
    many, too_many = sum(f.parameters >= MANY for f in compiled), sum(f.parameters > f.most for f in compiled)
    print(f"{len(compiled)} functions, {many} ({many / len(compiled):.1%}) with {MANY} parameters or more")
    print(f"{too_many} with more than {MOST} ({MOST_OF_KERNELS} in src_c)\n")

    print("lines  not empty")
    counted = {path.relative_to(root).as_posix(): lines(path) for path in files(root)}
    for name, (all_lines, not_empty) in counted.items():
        print(f"{all_lines:5}  {not_empty:9}  {name}")
    print("{:5}  {:9}  in all".format(*map(sum, zip(*counted.values()))))
    for call, hops in CHAINS.items():
        print(f"\nthe chain of {call}")
        try:
            print(chain_text(found, hops.split()))
        except ValueError as error:  # of another state of the code
            print(error)


if __name__ == "__main__":
    main()
