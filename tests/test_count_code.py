"""The script that counts parameters and lines."""

import shutil

import pytest

pytest.importorskip("Cython")
import count_code

TEMPLATE = """
static inline T WR(loop)(const T *x, T (*of)(T, int), int n) { return n ? of(*x, n) : 0; }
T *WR(first)(T *x) { return x; }
"""
KERNELS = """
#ifdef NX_F32
#define T float
#else
#define T double
#endif
void only_declared(int a, int b);
#define WR(name) name
#include "template.h"
#undef WR
#define WR(name) stream_##name
#include "template.h"
"""
CYTHON = """
cdef extern from "x.h":
    int elsewhere(int a)

cdef class A:
    cdef int *method(self, int (*f)(int, int), int c=1) noexcept nogil:
        return NULL

@overload
def words(a: int): ...
def words(a, *, b=1, **more):
    pass
"""


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
def test_functions_are_counted_once(tmp_path, monkeypatch):
    """Whatever the types that they are compiled or declared for; a function that is a parameter is one parameter."""
    monkeypatch.delenv("CC", raising=False)
    sources = {
        "kernels.c": KERNELS,
        "template.h": TEMPLATE,
        "dispatch.c": "int none(void) { return 0; }",
        "threads.h": "",
    }
    sources = {f"src_c/{name}": text for name, text in sources.items()}
    sources |= {"normext/_core/some.pyx": CYTHON, "normext/_core/some.pxd": "cdef inline int f(int a):\n    return a\n"}
    for name, text in sources.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert [(f.name, f.parameters, f.file.split("/")[-1]) for f in count_code.functions(tmp_path)] == [
        ("method", 3, "some.pyx"),
        ("words", 3, "some.pyx"),
        ("loop", 3, "template.h"),
        ("f", 1, "some.pxd"),
        ("first", 1, "template.h"),
        ("none", 0, "dispatch.c"),
    ]
