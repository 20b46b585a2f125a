"""The build: the C kernels once per instruction set, then the Cython modules, side by side.

Everything that is not code to run at build time is in pyproject.toml, but for the license: as a word it is known there
to setuptools 77 and later only. What was built before and is not older than what it was made of, nor made with other
settings, stays as it is; all of it is in the folder build, or where build_ext is told to.

In the environment NORMEXT_OPENMP=0 builds for one thread. CFLAGS=-g keeps debug symbols, which take more room than all
else.
"""

import os
import platform
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy
from Cython.Build import cythonize
from setuptools import Extension, __version__, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, LinkError

X86_64 = platform.machine().lower() in ("x86_64", "amd64") and "arm64" not in os.environ.get("ARCHFLAGS", "")

# Instruction set -> the features that it takes for granted, by the names of GCC's and clang's -m flags; dispatch.c asks
# the processor for each. They are those of the levels x86-64-v3 and -v4, which MSVC knows under names of its own.
VARIANTS = {"baseline": []}
if X86_64:
    VARIANTS["avx2"] = ["avx2", "bmi", "bmi2", "f16c", "fma", "lzcnt", "movbe"]
    VARIANTS["avx512"] = [*VARIANTS["avx2"], "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"]
TYPES = ("f32", "f64", "f16", "bf16")  # of the elements
MSVC_FLAGS = {"baseline": [], "avx2": ["/arch:AVX2"], "avx512": ["/arch:AVX512"]}

# No contraction: where a * b + c is rounded once, the source says so, and AVX2 and AVX-512 give the same bits.
# Nobody looks at errno or at floating-point traps after a square root or a division: without them these become vectors.
# The modules export what Python looks for, and nothing else.
OPTIMIZE = (
    ["-O3", "-std=c11", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"],
    ["/O2", "/std:c11", "/fp:precise"],
)
if not any(flag.startswith("-g") for flag in os.environ.get("CFLAGS", "").split()):
    OPTIMIZE[0].append("-g0")  # Python's own flags have -g

OPENMP_PROGRAM = """
#include <omp.h>
int main(void)
{
    int n = 0;
#pragma omp parallel reduction(+ : n)
    n += 1;
    return omp_get_max_threads() == n ? 0 : n == 0;
}
"""


class BuildExt(build_ext):
    """Compiles src_c/kernels.c once per instruction set and type; and with OpenMP where the compiler has it."""

    def finalize_options(self):
        super().finalize_options()
        if getattr(self, "editable_mode", False):  # since setuptools 64, which then names folders that it removes
            build = type(self.get_finalized_command("build"))(self.distribution)
            build.ensure_finalized()
            self.build_temp, self.build_lib = build.build_temp, build.build_platlib

    def build_extensions(self):
        self.msvc = self.compiler.compiler_type == "msvc"
        openmp_compile_args, openmp_link_args = self.openmp_args()
        compile_args = OPTIMIZE[self.msvc] + openmp_compile_args
        settings = self.settings_file(compile_args, openmp_link_args)
        # What is up to date, is decided here: setuptools compares whole seconds, in which a module may be built and a
        # file of it changed again.
        self.everything, self.force = self.force, True
        with ThreadPoolExecutor(self.parallel or os.cpu_count()) as pool:
            # what takes longest
            kernels = [pool.submit(self.compile_kernels, isa, type, settings) for isa in VARIANTS for type in TYPES]
            jobs = []
            for ext in self.extensions:
                ext.extra_compile_args = compile_args
                ext.extra_link_args = openmp_link_args
                ext.depends.append(settings)
                if ext.name == RUNTIME:
                    ext.extra_objects = [path for job in kernels for path in job.result()]
                    ext.depends += ext.extra_objects
                if self.everything or is_older(self.get_ext_fullpath(ext.name), *ext.sources, *ext.depends):
                    ext.sources = self.in_c(ext)
                    jobs.append(pool.submit(self.build_extension, ext))
            for job in jobs:
                job.result()

    def in_c(self, ext):
        """The sources with the C code that Cython makes of those in its language."""
        folder = os.path.join(self.build_temp, "cython")
        (made,) = cythonize([ext], build_dir=folder, compiler_directives={"language_level": 3})
        return made.sources

    def compile_kernels(self, isa, type, settings):
        flags = MSVC_FLAGS[isa] if self.msvc else [f"-m{feature}" for feature in VARIANTS[isa]]
        folder = os.path.join(self.build_temp, isa, type)
        objects = self.compiler.object_filenames(["src_c/kernels.c"], output_dir=folder)
        sources = [settings, *(path for path in Path("src_c").iterdir() if path.name != "dispatch.c")]
        if self.everything or any(is_older(path, *sources) for path in objects):
            self.compiler.compile(
                ["src_c/kernels.c"],
                output_dir=folder,
                macros=[("NX_ISA", isa), (f"NX_{type.upper()}", None)],
                extra_postargs=OPTIMIZE[self.msvc] + flags,
            )
        return objects

    def settings_file(self, *arguments):
        """A file that is written when anything has changed that is not in the files that are compiled."""
        environment = [os.environ.get(name) for name in ("CC", "CFLAGS", "CPPFLAGS", "LDFLAGS", "ARCHFLAGS")]
        settings = repr((arguments, VARIANTS, environment, sys.version, numpy.__version__))
        path = Path(self.build_temp, "settings")
        if not path.exists() or path.read_text() != settings:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(settings)
        return str(path)

    def openmp_args(self):
        """Compile and link arguments for OpenMP, or none where a trial program does not build with them."""
        candidates = [(["/openmp"], [])] if self.msvc else [(["-fopenmp"], ["-fopenmp"])]
        if sys.platform == "darwin":  # Apple's clang, with libomp from elsewhere
            candidates.append((["-Xpreprocessor", "-fopenmp"], ["-lomp"]))
        if os.environ.get("NORMEXT_OPENMP") == "0":
            candidates = []
        for compile_args, link_args in candidates:
            with tempfile.TemporaryDirectory() as folder:
                source = Path(folder, "openmp.c")
                source.write_text(OPENMP_PROGRAM)
                try:
                    objects = self.compiler.compile([str(source)], output_dir=folder, extra_postargs=compile_args)
                    self.compiler.link_executable(objects, "openmp", output_dir=folder, extra_postargs=link_args)
                except (CompileError, LinkError):
                    continue
                return compile_args, link_args
        print("normext: building without OpenMP, for one thread", file=sys.stderr)
        return [], []


def is_older(path, *sources):
    return not os.path.exists(path) or os.path.getmtime(path) < max(map(os.path.getmtime, sources))


HEADERS = ["src_c/kernels.h", "src_c/kernels_list.h", "src_c/tasks.h", "src_c/pages.h", "normext/include/normext.h"]


def extension(name, *sources, macros=()):
    path = f"normext/{name.replace('.', '/')}"
    return Extension(
        f"normext.{name}",
        [path + (".pyx" if os.path.exists(path + ".pyx") else ".py"), *sources],
        depends=[*HEADERS, *map(str, Path("normext").glob("**/*.pxd"))],
        include_dirs=["src_c", "normext/include", numpy.get_include()],
        # What NumPy 1.26 has: the oldest that runs it (pyproject.toml).
        define_macros=[
            ("NPY_NO_DEPRECATED_API", "NPY_1_7_API_VERSION"),
            ("NPY_TARGET_VERSION", "NPY_1_25_API_VERSION"),
            *macros,
        ],
    )


MODULES = ["memory", "arrays", "norms", "walk", "blocks", "rows", "columns", "updates", "windows", "api", "xla"]
RUNTIME = "normext._core.runtime"
NEEDS = [
    (f"NX_{isa.upper()}", " ".join(f"HAS({feature})" for feature in features))
    for isa, features in VARIANTS.items()
    if features
]

setup(
    **{"license_expression" if int(__version__.partition(".")[0]) >= 77 else "license": "BSD-3-Clause"},
    ext_modules=[
        *(extension(f"_core.{name}") for name in MODULES),
        extension("functional"),  # plain Python: see there
        extension("_core.runtime", "src_c/dispatch.c", macros=NEEDS),  # last: it waits for the kernels
    ],
    cmdclass={"build_ext": BuildExt},
)
