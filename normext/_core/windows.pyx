# cython: boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Sliding windows over images N,C,H,W: columns out of windows and back, and the largest number of
each window.

No padded copy of an image is made: what lies outside is zeros that are written, or not read.
Columns run through memory as the images do, along W: all loops end in numbers of a row that lie
together. Shapes and types are checked by the callers.
"""

from cython cimport floating
from cython.parallel cimport prange
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset

import numpy as np

from normext._core.kernels cimport (
    NX_FLOAT32,
    NX_FLOAT64,
    ceil_div,
    nx_block,
    nx_kernels,
    nx_rows,
    nx_window,
)
from normext._core.runtime cimport kernels_for, threads_for

cdef enum:
    TURNED_BYTES = 1 << 17  # of a row of all images, turned: half of a small second-level cache

# How windows lie over an image of H rows of W: kernel, stride, padding, dilation, and how many
# there are, down and across.
cdef struct Windows:
    Py_ssize_t H, W, kh, kw, sh, sw, ph, pw, dh, dw, oh, ow


cdef Windows windows_of(Py_ssize_t H, Py_ssize_t W, windows):
    (kh, kw), (sh, sw), (ph, pw), (dh, dw), (oh, ow) = windows
    return Windows(H, W, kh, kw, sh, sw, ph, pw, dh, dw, oh, ow)


# Output rows first to last.
cdef struct OutputRows:
    Py_ssize_t first, last


cdef inline Py_ssize_t first_inside(Py_ssize_t offset, Py_ssize_t stride,
                                    Py_ssize_t begin) noexcept nogil:
    """The least o >= 0 with o * stride + offset >= begin."""
    return 0 if offset >= begin else ceil_div(begin - offset, stride)


cdef inline Py_ssize_t end_inside(Py_ssize_t offset, Py_ssize_t stride, Py_ssize_t end,
                                  Py_ssize_t count) noexcept nogil:
    """The end of those o < count with o * stride + offset < end."""
    return 0 if offset >= end else min(count, (end - 1 - offset) // stride + 1)


cdef inline const nx_kernels *kernels_of_type(size_t itemsize) noexcept:
    return kernels_for(NX_FLOAT32 if itemsize == 4 else NX_FLOAT64, False)


cdef inline void add(const nx_kernels *k, floating *to, const floating *numbers,
                     Py_ssize_t n) noexcept nogil:
    k.add_rows(nx_rows(to, 0), nx_rows(<void *> numbers, 0), nx_rows(to, 0), nx_block(1, n))


# Columns laid out (..., out_h * out_w), as the images are ----------------------------------------


cdef void gather_plane(const floating *image, Windows g, Py_ssize_t position, OutputRows rows,
                       floating *column) noexcept nogil:
    """One position in the window, for some rows of the output: the image, shifted, thinned out."""
    cdef Py_ssize_t dx = position % g.kw * g.dw - g.pw, dy = position // g.kw * g.dh - g.ph
    cdef Py_ssize_t oy, ox, y, start = min(g.ow, first_inside(dx, g.sw, 0))
    cdef Py_ssize_t end = max(start, end_inside(dx, g.sw, g.W, g.ow))
    cdef const floating *row
    for oy in range(rows.first, rows.last):
        y = oy * g.sh + dy
        if y < 0 or y >= g.H:
            memset(column, 0, g.ow * sizeof(floating))
        else:
            row = image + y * g.W + dx
            for ox in range(start):
                column[ox] = 0
            if g.sw == 1:
                memcpy(column + start, row + start, (end - start) * sizeof(floating))
            else:
                for ox in range(start, end):
                    column[ox] = row[ox * g.sw]
            for ox in range(end, g.ow):
                column[ox] = 0
        column += g.ow


cdef void scatter_plane(const nx_kernels *k, const floating *column, Windows g, Py_ssize_t position,
                        OutputRows rows, floating *image) noexcept nogil:
    """The adjoint of gather_plane: adds the column to where it came from."""
    cdef Py_ssize_t dx = position % g.kw * g.dw - g.pw, dy = position // g.kw * g.dh - g.ph
    cdef Py_ssize_t oy, ox, y, start = min(g.ow, first_inside(dx, g.sw, 0))
    cdef Py_ssize_t end = max(start, end_inside(dx, g.sw, g.W, g.ow))
    cdef floating *row
    for oy in range(rows.first, rows.last):
        y = oy * g.sh + dy
        if 0 <= y < g.H:
            row = image + y * g.W + dx
            if g.sw == 1:
                add(k, row + start, column + start, end - start)
            else:
                for ox in range(start, end):
                    row[ox * g.sw] += column[ox]
        column += g.ow


def gather(const floating[:, :, :, ::1] x, floating[:, :, ::1] cols, windows,
           Py_ssize_t first=0, Py_ssize_t last=-1, bint one_thread=False):
    """cols (N, C*kh*kw, windows) of x (N, C, H, W), for the windows in rows first to last of the
    output (-1: all)."""
    cdef Windows g = windows_of(x.shape[2], x.shape[3], windows)
    cdef Py_ssize_t C = x.shape[1], positions = g.kh * g.kw, task, n, tail
    cdef Py_ssize_t tasks = x.shape[0] * C * positions
    cdef OutputRows rows = OutputRows(first, last if last >= 0 else g.oh)
    cdef int threads = threads_for(1 if one_thread else tasks, tasks * cols.shape[2])
    if tasks * cols.shape[2] == 0:
        return
    for task in prange(tasks, nogil=True, num_threads=threads, use_threads_if=threads > 1,
                       schedule="static"):
        n = task // (C * positions)
        tail = task % (C * positions)
        gather_plane(&x[n, tail // positions, 0, 0] if g.H * g.W else NULL, g, tail % positions,
                     rows, &cols[n, tail, 0])


def scatter(const floating[:, :, ::1] cols, floating[:, :, :, ::1] x, windows,
            Py_ssize_t first=0, Py_ssize_t last=-1, bint one_thread=False,
            bint channels_first=False):
    """Adds to x (N, C, H, W) the sums of the columns that each of its numbers went to; the adjoint
    of `gather`.

    cols is (N, C*kh*kw, windows), or (C*kh*kw, N, windows) with `channels_first`.
    """
    cdef Windows g = windows_of(x.shape[2], x.shape[3], windows)
    cdef Py_ssize_t C = x.shape[1], positions = g.kh * g.kw, task, n, c, position, row
    cdef Py_ssize_t tasks = x.shape[0] * C, size = tasks * positions * cols.shape[2]
    cdef OutputRows rows = OutputRows(first, last if last >= 0 else g.oh)
    cdef const nx_kernels *k = kernels_of_type(sizeof(floating))
    cdef int threads = threads_for(1 if one_thread else tasks, size)
    if size * g.H * g.W == 0:
        return
    for task in prange(tasks, nogil=True, num_threads=threads, use_threads_if=threads > 1,
                       schedule="static"):
        n = task // C
        c = task % C
        for position in range(positions):
            row = c * positions + position
            scatter_plane(k, &cols[row, n, 0] if channels_first else &cols[n, row, 0], g, position,
                          rows, &x[n, c, 0, 0])


# Columns laid out (C*kh*kw, out_h * out_w * N), the batch innermost -------------------------------
#
# A row y of channel c, of all images, is turned once from (N, W) into (W, N); every column takes
# from it N numbers that lie together, and many times N where the stride is 1. As much of the row is
# turned at a time as fits the cache.


cdef inline Py_ssize_t turned_width(Py_ssize_t N, Py_ssize_t W, size_t itemsize) noexcept nogil:
    return max(1, min(W, TURNED_BYTES // <Py_ssize_t> (N * itemsize)))


cdef void gather_row(const nx_kernels *k, const floating[:, :, :, ::1] x, floating[:, ::1] cols,
                     Windows g, Py_ssize_t c, Py_ssize_t y, floating *turned) noexcept nogil:
    """All that goes to the columns from row y of channel c; y may lie in the padding."""
    cdef Py_ssize_t N = x.shape[0], image = x.shape[1] * g.H * g.W
    cdef Py_ssize_t width = turned_width(N, g.W, sizeof(floating))
    cdef Py_ssize_t index, x0, x1, ky, kx, oy, ox, start, end, dx
    cdef bint inside = 0 <= y < g.H
    cdef floating *column
    cdef const floating *turned_row
    for index in range(ceil_div(g.W, width) if inside else 1):
        x0 = index * width
        x1 = min(x0 + width, g.W)
        if inside:
            k.transpose(nx_rows(<void *> &x[0, c, y, x0], image), nx_block(N, x1 - x0),
                        nx_rows(turned, N))
        for ky in range(g.kh):
            oy = y + g.ph - ky * g.dh
            if oy < 0 or oy % g.sh or oy // g.sh >= g.oh:
                continue
            for kx in range(g.kw):
                column = &cols[(c * g.kh + ky) * g.kw + kx, oy // g.sh * g.ow * N]
                if not inside:
                    memset(column, 0, g.ow * N * sizeof(floating))
                    continue
                dx = kx * g.dw - g.pw
                start = min(g.ow, first_inside(dx, g.sw, x0))
                end = max(start, end_inside(dx, g.sw, x1, g.ow))
                turned_row = turned + (dx - x0) * N
                if x0 == 0:
                    memset(column, 0, start * N * sizeof(floating))
                if g.sw == 1:
                    memcpy(column + start * N, turned_row + start * N,
                           (end - start) * N * sizeof(floating))
                else:
                    for ox in range(start, end):
                        memcpy(column + ox * N, turned_row + ox * g.sw * N, N * sizeof(floating))
                if x1 == g.W:
                    memset(column + end * N, 0, (g.ow - end) * N * sizeof(floating))


cdef void scatter_row(const nx_kernels *k, const floating[:, ::1] cols, floating[:, :, :, ::1] x,
                      Windows g, Py_ssize_t c, Py_ssize_t y, floating *turned) noexcept nogil:
    """Row y of channel c as the sum of the columns that it went to."""
    cdef Py_ssize_t N = x.shape[0], image = x.shape[1] * g.H * g.W
    cdef Py_ssize_t width = turned_width(N, g.W, sizeof(floating))
    cdef Py_ssize_t index, x0, x1, ky, kx, oy, ox, start, end, dx
    cdef const floating *column
    cdef floating *turned_row
    for index in range(ceil_div(g.W, width)):
        x0 = index * width
        x1 = min(x0 + width, g.W)
        memset(turned, 0, (x1 - x0) * N * sizeof(floating))
        for ky in range(g.kh):
            oy = y + g.ph - ky * g.dh
            if oy < 0 or oy % g.sh or oy // g.sh >= g.oh:
                continue
            for kx in range(g.kw):
                column = &cols[(c * g.kh + ky) * g.kw + kx, oy // g.sh * g.ow * N]
                dx = kx * g.dw - g.pw
                start = first_inside(dx, g.sw, x0)
                end = end_inside(dx, g.sw, x1, g.ow)
                turned_row = turned + (dx - x0) * N
                if g.sw == 1:
                    if start < end:
                        add(k, turned_row + start * N, column + start * N, (end - start) * N)
                else:
                    for ox in range(start, end):
                        add(k, turned_row + ox * g.sw * N, column + ox * N, N)
        k.transpose(nx_rows(turned, N), nx_block(x1 - x0, N), nx_rows(&x[0, c, y, x0], image))


def gather_batch_innermost(const floating[:, :, :, ::1] x, floating[:, ::1] cols, windows):
    """cols (C*kh*kw, out_h*out_w*N) of x (N, C, H, W)."""
    cdef Windows g = windows_of(x.shape[2], x.shape[3], windows)
    cdef Py_ssize_t N = x.shape[0], rows = g.H + 2 * g.ph, tasks = x.shape[1] * rows, thread, task
    cdef int threads = threads_for(tasks, cols.shape[0] * cols.shape[1])
    cdef Py_ssize_t size = N * turned_width(N, g.W, sizeof(floating)) if N else 0  # for a thread
    cdef const nx_kernels *k = kernels_of_type(sizeof(floating))
    cdef floating *turned = <floating *> malloc(threads * size * sizeof(floating) + 1)
    if turned == NULL:
        raise MemoryError
    if cols.shape[0] * cols.shape[1]:
        for thread in prange(threads, nogil=True, num_threads=threads, use_threads_if=threads > 1,
                             schedule="static"):
            for task in range(thread * tasks // threads, (thread + 1) * tasks // threads):
                gather_row(k, x, cols, g, task // rows, task % rows - g.ph, turned + thread * size)
    free(turned)


def scatter_batch_innermost(const floating[:, ::1] cols, floating[:, :, :, ::1] x, windows):
    """x (N, C, H, W), written over, as the sums of its columns (C*kh*kw, out_h*out_w*N); the
    adjoint of the above."""
    cdef Windows g = windows_of(x.shape[2], x.shape[3], windows)
    cdef Py_ssize_t N = x.shape[0], tasks = x.shape[1] * g.H, thread, task
    cdef int threads = threads_for(tasks, cols.shape[0] * cols.shape[1])
    cdef Py_ssize_t size = N * turned_width(N, g.W, sizeof(floating)) if N else 0  # for a thread
    cdef const nx_kernels *k = kernels_of_type(sizeof(floating))
    cdef floating *turned = <floating *> malloc(threads * size * sizeof(floating) + 1)
    if turned == NULL:
        raise MemoryError
    if N * tasks * g.W:
        for thread in prange(threads, nogil=True, num_threads=threads, use_threads_if=threads > 1,
                             schedule="static"):
            for task in range(thread * tasks // threads, (thread + 1) * tasks // threads):
                scatter_row(k, cols, x, g, task // g.H, task % g.H, turned + thread * size)
    free(turned)


# Max pooling --------------------------------------------------------------------------------------

ctypedef fused index_t:
    unsigned char
    int


cdef void pool_plane(const nx_kernels *k, const floating *image, Windows g, floating *y,
                     index_t *winner) noexcept nogil:
    cdef nx_window window = nx_window(g.kh, g.kw, g.sw)
    cdef Py_ssize_t oy
    for oy in range(g.oh):
        k.pool_row(nx_rows(<void *> (image + oy * g.sh * g.W), g.W), &window, g.ow, y + oy * g.ow,
                   winner + oy * g.ow, sizeof(index_t))


def max_pool(const floating[:, :, ::1] x, floating[:, :, ::1] y, index_t[:, :, ::1] winner,
             windows):
    """The largest number of each window of x (N*C, H, W) and its position in the window, counted
    row by row."""
    cdef Windows g = windows_of(x.shape[1], x.shape[2], windows)
    cdef const nx_kernels *k = kernels_of_type(sizeof(floating))
    cdef Py_ssize_t plane
    cdef int threads = threads_for(x.shape[0], x.shape[0] * x.shape[1] * x.shape[2])
    if y.shape[0] * y.shape[1] * y.shape[2] == 0:
        return
    for plane in prange(x.shape[0], nogil=True, num_threads=threads, use_threads_if=threads > 1,
                        schedule="static"):
        pool_plane(k, &x[plane, 0, 0], g, &y[plane, 0, 0], &winner[plane, 0, 0])


cdef void unpool_plane(const floating *dy, const index_t *winner, Windows g,
                       const Py_ssize_t *offsets, floating *dx) noexcept nogil:
    cdef Py_ssize_t oy, ox
    cdef floating *row
    memset(dx, 0, g.H * g.W * sizeof(floating))
    for oy in range(g.oh):
        row = dx + oy * g.sh * g.W
        for ox in range(g.ow):
            row[ox * g.sw + offsets[winner[ox]]] += dy[ox]
        dy += g.ow
        winner += g.ow


def max_pool_backward(const floating[:, :, ::1] dy, const index_t[:, :, ::1] winner,
                      floating[:, :, ::1] dx, windows):
    """dx (N*C, H, W), written over: each number of dy added to the winner of its window."""
    cdef Windows g = windows_of(dx.shape[1], dx.shape[2], windows)
    cdef Py_ssize_t plane
    cdef int threads = threads_for(dx.shape[0], dx.shape[0] * g.H * g.W)
    cdef Py_ssize_t[::1] offsets = np.add.outer(np.arange(g.kh) * g.W, np.arange(g.kw)).reshape(-1)
    if dy.shape[0] * dy.shape[1] * dy.shape[2] == 0:
        return
    for plane in prange(dx.shape[0], nogil=True, num_threads=threads, use_threads_if=threads > 1,
                        schedule="static"):
        unpool_plane(&dy[plane, 0, 0], &winner[plane, 0, 0], g, &offsets[0], &dx[plane, 0, 0])
