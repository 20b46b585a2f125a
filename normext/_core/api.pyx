# cython: boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""The loops as C callers see them: the table of functions that include/normext.h describes, in a capsule."""

from cpython.mem cimport PyMem_Free, PyMem_Malloc
from cpython.pycapsule cimport PyCapsule_New

from normext cimport (
    NORMEXT_API_VERSION,
    NORMEXT_BAD_ARGUMENT,
    NORMEXT_BFLOAT16,
    NORMEXT_FLOAT32,
    NORMEXT_NO_MEMORY,
    NORMEXT_OK,
    normext_api,
)
from normext._core.columns cimport columns_backward, normalize_columns
from normext._core.kernels cimport Operand, nx_kernels
from normext._core.runs cimport (
    ABOUT_ZERO,
    ALONG_RUN,
    CENTRED,
    GIVEN,
    PER_GROUP,
    PER_RUN,
    Runs,
    affine_runs,
    grouped_backward,
    layer_backward,
    normalize_runs,
    runs_backward,
)
from normext._core.runtime cimport norm_kernels


cdef inline bint bad(int type, Py_ssize_t a, Py_ssize_t b, Py_ssize_t c) noexcept:
    return not NORMEXT_FLOAT32 <= type <= NORMEXT_BFLOAT16 or a < 0 or b < 0 or c < 0


cdef void zero(double *a, Py_ssize_t n) noexcept:
    cdef Py_ssize_t i
    for i in range(n):
        a[i] = 0


cdef int normalize_rows(int type, Py_ssize_t rows, Py_ssize_t n, const void *x, Py_ssize_t x_stride, void *y, Py_ssize_t y_stride,
                        const void *gamma, const void *beta, int centred, double eps, double *mean, double *rstd) noexcept with gil:
    if bad(type, rows, n, 0) or (rows * n and NULL in (x, y, mean, rstd)):
        return NORMEXT_BAD_ARGUMENT
    if rows * n == 0:
        return NORMEXT_OK
    try:
        normalize_runs(norm_kernels(type, rows * n, n, x, y), Runs(rows, 1, n, 0), Operand(<char *> x, x_stride, 0),
                       Operand(<char *> y, y_stride, 0), <const char *> gamma, <const char *> beta, ALONG_RUN,
                       CENTRED if centred else ABOUT_ZERO, eps, False, mean, rstd, NULL)
    except MemoryError:
        return NORMEXT_NO_MEMORY
    return NORMEXT_OK


cdef int rows_backward(int type, Py_ssize_t rows, Py_ssize_t n, const void *x, Py_ssize_t x_stride, const void *dy, Py_ssize_t dy_stride,
                       void *dx, Py_ssize_t dx_stride, const void *gamma, int centred, const double *mean, const double *rstd,
                       double *dgamma, double *dbeta) noexcept with gil:
    if bad(type, rows, n, 0) or (n and NULL in (dgamma, dbeta)) or (rows * n and NULL in (x, dy, dx, mean, rstd)):
        return NORMEXT_BAD_ARGUMENT
    zero(dgamma, n)
    zero(dbeta, n)
    if rows * n == 0:
        return NORMEXT_OK
    try:
        layer_backward(norm_kernels(type, rows * n, n, dy, dx), Runs(rows, 1, n, 0), Operand(<char *> x, x_stride, 0),
                       Operand(<char *> dy, dy_stride, 0), Operand(NULL, 0, 0), Operand(<char *> dx, dx_stride, 0), <const char *> gamma,
                       CENTRED if centred else ABOUT_ZERO, mean, rstd, dbeta, dgamma)
    except MemoryError:
        return NORMEXT_NO_MEMORY
    return NORMEXT_OK


cdef int normalize_channels(int type, Py_ssize_t outer, Py_ssize_t channels, Py_ssize_t inner, const void *x, void *y, const void *gamma,
                            const void *beta, int training, double eps, double *mean, double *rstd, double *var) noexcept with gil:
    cdef const nx_kernels *k
    cdef Py_ssize_t size = outer * channels * inner
    if bad(type, outer, channels, inner) or (size and NULL in (x, y, mean, rstd)):
        return NORMEXT_BAD_ARGUMENT
    if size == 0:
        return NORMEXT_OK
    try:
        if inner == 1:
            normalize_columns(norm_kernels(type, size, channels, x, y), outer, channels, Operand(<char *> x, 0, channels),
                              Operand(<char *> y, 0, channels), <const char *> gamma, <const char *> beta, training, eps, False, mean,
                              rstd, var, NULL)
            return NORMEXT_OK
        k = norm_kernels(type, size, inner, x, y)
        if training:
            normalize_runs(k, Runs(channels, outer, inner, 0), Operand(<char *> x, inner, channels * inner),
                           Operand(<char *> y, inner, channels * inner), <const char *> gamma, <const char *> beta, PER_GROUP, CENTRED,
                           eps, False, mean, rstd, var)
        else:
            affine_runs(k, Runs(outer, channels, inner, 0), Operand(<char *> x, channels * inner, inner),
                        Operand(<char *> y, channels * inner, inner), <const char *> gamma, <const char *> beta, False, mean, rstd)
    except MemoryError:
        return NORMEXT_NO_MEMORY
    return NORMEXT_OK


cdef int channels_backward(int type, Py_ssize_t outer, Py_ssize_t channels, Py_ssize_t inner, const void *x, const void *dy, void *dx,
                           const void *gamma, int training, const double *mean, const double *rstd, double *dgamma,
                           double *dbeta) noexcept with gil:
    cdef Py_ssize_t size = outer * channels * inner, j
    cdef double count = <double> outer * <double> inner
    if bad(type, outer, channels, inner) or (channels and NULL in (dgamma, dbeta)) or (size and NULL in (x, dy, dx, mean, rstd)):
        return NORMEXT_BAD_ARGUMENT
    if size == 0:
        zero(dgamma, channels)
        zero(dbeta, channels)
        return NORMEXT_OK
    try:
        if inner == 1:
            columns_backward(norm_kernels(type, size, channels, dy, dx), outer, channels, Operand(<char *> x, 0, channels),
                             Operand(<char *> dy, 0, channels), Operand(<char *> dx, 0, channels), <const char *> gamma, NULL, training,
                             False, False, count, mean, rstd, NULL, dbeta, dgamma)
        else:
            runs_backward(norm_kernels(type, size, inner, dy, dx), Runs(channels, outer, inner, 0),
                          Operand(<char *> x, inner, channels * inner), Operand(<char *> dy, inner, channels * inner),
                          Operand(NULL, 0, 0), Operand(<char *> dx, inner, channels * inner), <const char *> gamma, NULL, PER_GROUP,
                          CENTRED if training else GIVEN, False, False, count, mean, rstd, NULL, dbeta, dgamma)
    except MemoryError:
        return NORMEXT_NO_MEMORY
    for j in range(channels):
        dgamma[j] *= rstd[j]
    return NORMEXT_OK


cdef int normalize_groups(int type, Py_ssize_t outer, Py_ssize_t groups, Py_ssize_t per_group, Py_ssize_t inner, const void *x, void *y,
                          const void *gamma, const void *beta, double eps, double *mean, double *rstd) noexcept with gil:
    cdef Py_ssize_t channels = groups * per_group, size = outer * channels * inner
    if bad(type, outer, groups, inner) or per_group < 0 or (size and NULL in (x, y, mean, rstd)):
        return NORMEXT_BAD_ARGUMENT
    if size == 0:
        return NORMEXT_OK
    try:
        normalize_runs(norm_kernels(type, size, inner, x, y), Runs(outer * groups, per_group, inner, channels),
                       Operand(<char *> x, per_group * inner, inner), Operand(<char *> y, per_group * inner, inner),
                       <const char *> gamma, <const char *> beta, PER_RUN, CENTRED, eps, False, mean, rstd, NULL)
    except MemoryError:
        return NORMEXT_NO_MEMORY
    return NORMEXT_OK


cdef int groups_backward(int type, Py_ssize_t outer, Py_ssize_t groups, Py_ssize_t per_group, Py_ssize_t inner, const void *x,
                         const void *dy, void *dx, const void *gamma, const double *mean, const double *rstd, double *dgamma,
                         double *dbeta) noexcept with gil:
    cdef Py_ssize_t channels = groups * per_group, size = outer * channels * inner, i, j
    cdef double *sums  # of every channel of every example
    cdef double *dots
    if (bad(type, outer, groups, inner) or per_group < 0 or (channels and NULL in (dgamma, dbeta))
            or (size and NULL in (x, dy, dx, mean, rstd))):
        return NORMEXT_BAD_ARGUMENT
    zero(dgamma, channels)
    zero(dbeta, channels)
    if size == 0:
        return NORMEXT_OK
    sums = <double *> PyMem_Malloc(3 * outer * channels * sizeof(double))
    if sums == NULL:
        return NORMEXT_NO_MEMORY
    dots = sums + outer * channels
    try:
        grouped_backward(norm_kernels(type, size, inner, dy, dx), Runs(outer * groups, per_group, inner, channels),
                         Operand(<char *> x, per_group * inner, inner), Operand(<char *> dy, per_group * inner, inner),
                         Operand(<char *> dx, per_group * inner, inner), <const char *> gamma, mean, rstd, sums, dots,
                         dots + outer * channels)
        for i in range(outer):
            for j in range(channels):
                dbeta[j] += sums[i * channels + j]
                dgamma[j] += dots[i * channels + j]
    except MemoryError:
        return NORMEXT_NO_MEMORY
    finally:
        PyMem_Free(sums)
    return NORMEXT_OK


cdef normext_api functions = normext_api(
    NORMEXT_API_VERSION, normalize_rows, rows_backward, normalize_channels, channels_backward, normalize_groups, groups_backward
)

table = PyCapsule_New(&functions, "normext._core.api.table", NULL)
