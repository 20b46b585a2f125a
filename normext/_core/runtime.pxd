from normext._core.kernels cimport nx_kernels

cdef bint tracing

ctypedef void (*Task)(const void *job, Py_ssize_t task) noexcept nogil

cdef extern from "tasks.h" nogil:
    # The tasks 0, 1, ... of a job; each thread has neighbours.
    void run_on "nx_run_on"(int threads, Task f, const void *job, Py_ssize_t tasks) noexcept

cdef const nx_kernels *kernels_for(int element_type, bint stream) noexcept nogil
cdef const nx_kernels *norm_kernels(int element_type, Py_ssize_t elements, Py_ssize_t n,
                                    bint fresh) noexcept nogil
cdef int team_for(Py_ssize_t tasks, Py_ssize_t elements) noexcept nogil
cdef int threads_for(Py_ssize_t tasks, Py_ssize_t elements) except 0
cdef int run_tasks(Task f, const void *job, Py_ssize_t tasks, Py_ssize_t elements) noexcept nogil
cdef int threads_used() noexcept nogil
cdef const char *isa_name() noexcept nogil
