# Kinds and sizes that follow from a norm.

from normext cimport (
    NORMEXT_BATCH_NORM, NORMEXT_GROUP_NORM, NORMEXT_LAYER_NORM, NORMEXT_RMS_NORM, nx_norm,
)


cdef inline Py_ssize_t numbers_of(const nx_norm *norm, int first, int last) noexcept nogil:
    """How many there are along the axes first to last."""
    cdef Py_ssize_t product = 1
    cdef int i
    for i in range(first, last):
        product *= norm.shape[i]
    return product


cdef inline bint is_group_norm(const nx_norm *norm) noexcept nogil:
    """Instance norm too."""
    return norm.kind == NORMEXT_GROUP_NORM


cdef inline bint is_row_norm(const nx_norm *norm) noexcept nogil:
    """Layer and RMS norm."""
    return norm.kind == NORMEXT_LAYER_NORM or norm.kind == NORMEXT_RMS_NORM


cdef inline Py_ssize_t statistics_of(const nx_norm *norm) noexcept nogil:
    """How many means and rstds there are."""
    if norm.kind == NORMEXT_BATCH_NORM:
        return norm.shape[norm.axis]
    if is_group_norm(norm):
        return norm.shape[0] * norm.groups
    return numbers_of(norm, 0, norm.axis)


cdef inline Py_ssize_t parameters_of(const nx_norm *norm) noexcept nogil:
    """How many numbers gamma and beta have."""
    if is_row_norm(norm):
        return numbers_of(norm, norm.axis, norm.ndim)
    return norm.shape[norm.axis]
