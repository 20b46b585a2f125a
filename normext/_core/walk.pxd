from normext cimport nx_io, nx_norm

# How the loops go through the arrays of a call. Of ONE_PIXEL, a group is a row, as for layer norm.
cdef enum Way:
    NOTHING
    ROWS
    COLUMNS
    LAYERS
    CHANNELS_FIRST
    CHANNELS_LAST
    ONE_PIXEL
    BLOCKS  # they cannot be walked where they lie

cdef enum:
    MAX_NDIM = 64  # NORMEXT_MAX_NDIM
    MAX_ARRAYS = 4

# What is walked may be the copy of a block.
cdef int walk_forward(const nx_norm *norm, const nx_io *io, double *var, bint copy,
                      Way *way) noexcept nogil
cdef int walk_backward(const nx_norm *norm, const nx_io *io, const double *pivots, bint copy,
                       Way *way) noexcept nogil

cdef void fill_strides(const nx_norm *norm, Py_ssize_t itemsize, const Py_ssize_t *given,
                       Py_ssize_t *strides) noexcept nogil
cdef Py_ssize_t distance(Py_ssize_t stride) noexcept nogil
cdef void moved_axes(const nx_norm *norm, int to, int *order) noexcept nogil
