# What normext offers to other Cython modules: `from normext cimport nx_norm, nx_io, normext_api,
# normext_import`. normext.h says what each does; compile with normext.get_include() among the
# include_dirs.

cdef extern from "normext.h" nogil:
    enum:
        NORMEXT_API_VERSION
        NORMEXT_FLOAT32
        NORMEXT_FLOAT64
        NORMEXT_FLOAT16
        NORMEXT_BFLOAT16
        NORMEXT_BATCH_NORM
        NORMEXT_GROUP_NORM
        NORMEXT_LAYER_NORM
        NORMEXT_RMS_NORM
        NORMEXT_OK
        NORMEXT_BAD_ARGUMENT
        NORMEXT_NO_MEMORY
        NORMEXT_BAD_KIND
        NORMEXT_BAD_TYPE
        NORMEXT_BAD_SHAPE
        NORMEXT_BAD_AXIS
        NORMEXT_BAD_GROUPS
        NORMEXT_BAD_EPS
        NORMEXT_NO_CHANNELS
        NORMEXT_NO_NUMBERS
        NORMEXT_MAX_NDIM
        NORMEXT_WHOLE
        NORMEXT_SUMS
        NORMEXT_APPLY

    ctypedef struct nx_norm:
        int kind, type
        int ndim
        const Py_ssize_t *shape
        int axis
        Py_ssize_t groups
        bint training, relu
        double eps

    ctypedef struct nx_array:
        void *data
        const Py_ssize_t *strides
        bint swapped

    ctypedef struct nx_running:
        void *mean
        void *var
        bint single_mean, single_var
        double momentum
        bint unbiased

    ctypedef struct nx_io:
        nx_array x, y, residual, sum, dy, dx, dsum
        const void *gamma
        const void *beta
        double *mean
        double *rstd
        double *var
        nx_running running
        double *dgamma
        double *dbeta
        int part
        double count

    ctypedef struct normext_api:
        int version
        int (*normalize_rows)(
            int type, Py_ssize_t rows, Py_ssize_t n, const void *x, Py_ssize_t x_stride, void *y,
            Py_ssize_t y_stride, const void *gamma, const void *beta, int centred, double eps,
            double *mean, double *rstd) noexcept nogil
        int (*rows_backward)(
            int type, Py_ssize_t rows, Py_ssize_t n, const void *x, Py_ssize_t x_stride,
            const void *dy, Py_ssize_t dy_stride, void *dx, Py_ssize_t dx_stride,
            const void *gamma, int centred, const double *mean, const double *rstd,
            double *dgamma, double *dbeta) noexcept nogil
        int (*normalize_channels)(
            int type, Py_ssize_t outer, Py_ssize_t channels, Py_ssize_t inner, const void *x,
            void *y, const void *gamma, const void *beta, int training, double eps, double *mean,
            double *rstd, double *var) noexcept nogil
        int (*channels_backward)(
            int type, Py_ssize_t outer, Py_ssize_t channels, Py_ssize_t inner, const void *x,
            const void *dy, void *dx, const void *gamma, int training, const double *mean,
            const double *rstd, double *dgamma, double *dbeta) noexcept nogil
        int (*normalize_groups)(
            int type, Py_ssize_t outer, Py_ssize_t groups, Py_ssize_t per_group, Py_ssize_t inner,
            const void *x, void *y, const void *gamma, const void *beta, double eps, double *mean,
            double *rstd) noexcept nogil
        int (*groups_backward)(
            int type, Py_ssize_t outer, Py_ssize_t groups, Py_ssize_t per_group, Py_ssize_t inner,
            const void *x, const void *dy, void *dx, const void *gamma, const double *mean,
            const double *rstd, double *dgamma, double *dbeta) noexcept nogil
        int (*check)(const nx_norm *norm) noexcept nogil
        int (*forward)(const nx_norm *norm, const nx_io *io) noexcept nogil
        int (*backward)(const nx_norm *norm, const nx_io *io) noexcept nogil


cdef extern from "normext.h":
    const normext_api *normext_import() except NULL
