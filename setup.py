"""The build: the C kernels once per instruction set, then the Cython modules.

Everything that is not code to run at build time is in pyproject.toml. NORMEXT_OPENMP=0 in the environment builds for
one thread. NORMEXT_JAX=1 builds normext._jax too or fails; 0 leaves it out; by default it is built where jax can be
imported, which with pip is the case with --no-build-isolation alone.
"""

import os
import platform
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy
from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, LinkError

X86_64 = platform.machine().lower() in ("x86_64", "amd64") and "arm64" not in os.environ.get("ARCHFLAGS", "")

C_FILES = sorted(str(path) for path in Path("src_c").iterdir())

# Instruction set -> what the compiler must be told: GCC and clang, MSVC.
VARIANTS = {"baseline": ([], [])}
if X86_64:
    VARIANTS["avx2"] = (["-mavx2", "-mfma", "-mf16c"], ["/arch:AVX2"])
    VARIANTS["avx512"] = (
        ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c", "-mbmi2"],
        ["/arch:AVX512"],
    )

# No contraction: where a * b + c is rounded once, the source says so, and AVX2 and AVX-512 give the same bits.
# Nobody looks at errno or at floating-point traps after a square root or a division: without them these become vectors.
OPTIMIZE = (
    ["-O3", "-std=c11", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"],
    ["/O2", "/std:c11", "/fp:precise"],
)

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
    """Compiles src_c/kernels.c once per instruction set, and everything with OpenMP where the compiler has it."""

    def build_extensions(self):
        self.msvc = self.compiler.compiler_type == "msvc"
        compile_args, link_args = self.openmp_args()
        for ext in self.extensions:
            ext.extra_compile_args = OPTIMIZE[self.msvc] + compile_args
            ext.extra_link_args = link_args
            if ext.name == "normext._core.runtime":
                ext.extra_objects = self.kernel_objects()
        super().build_extensions()

    def kernel_objects(self):
        def compiled(isa):
            return self.compiler.compile(
                ["src_c/kernels.c"],
                output_dir=os.path.join(self.build_temp, isa),
                macros=[("NX_ISA", isa)],
                extra_postargs=OPTIMIZE[self.msvc] + VARIANTS[isa][self.msvc],
                depends=C_FILES,
            )

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return [path for paths in pool.map(compiled, VARIANTS) for path in paths]

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


def extension(name, *sources):
    return Extension(
        f"normext.{name}",
        [f"normext/{name.replace('.', '/')}.pyx", *sources],
        include_dirs=["src_c", "normext/include", numpy.get_include()],
        define_macros=[("NPY_NO_DEPRECATED_API", "NPY_1_7_API_VERSION")] + [("NX_X86_VARIANTS", "1")] * X86_64,
        depends=C_FILES,
    )


def jax_extension():
    """The way from JAX to the loops without Python, compiled against the headers in jaxlib; a list of one or none."""
    wanted = os.environ.get("NORMEXT_JAX", "")
    if wanted == "0":
        return []
    try:
        import jax.ffi
    except ImportError:
        if wanted:
            raise
        return []
    ext = extension("_jax")
    ext.include_dirs.append(jax.ffi.include_dir())
    return [ext]


setup(
    ext_modules=cythonize(
        [
            extension("_core.runtime", "src_c/dispatch.c"),
            extension("_core.runs"),
            extension("_core.columns"),
            extension("_core.updates"),
            extension("_core.windows"),
            extension("_core.api"),
            extension("functional"),
            *jax_extension(),
        ],
        compiler_directives={"language_level": 3},
    ),
    cmdclass={"build_ext": BuildExt},
)
