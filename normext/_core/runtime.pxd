from normext._core.kernels cimport nx_kernels


cdef const nx_kernels *kernels_for(int element_type, bint stream) noexcept
cdef const nx_kernels *norm_kernels(int element_type, Py_ssize_t elements, Py_ssize_t n, const void *read, const void *written) noexcept
cdef int threads_for(Py_ssize_t tasks, Py_ssize_t elements) except 0
