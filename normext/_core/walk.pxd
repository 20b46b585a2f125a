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

# What a walk is given beside a norm and its arrays, and which way it went.
cdef struct Walk:
    Way way
    bint copy  # of a block: that is what is walked
    double *var  # of batch norm forward; may be NULL
    const double *pivots  # of batch norm backward; may be NULL

cdef int walk_forward(const nx_norm *norm, const nx_io *io, Walk *w) noexcept nogil
cdef int walk_backward(const nx_norm *norm, const nx_io *io, Walk *w) noexcept nogil

cdef void fill_strides(const nx_norm *norm, Py_ssize_t itemsize, const Py_ssize_t *given,
                       Py_ssize_t *strides) noexcept nogil
cdef Py_ssize_t distance(Py_ssize_t stride) noexcept nogil
cdef void moved_axes(const nx_norm *norm, int to, int *order) noexcept nogil
