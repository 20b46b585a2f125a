# cython: boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Sliding windows over images N,C,H,W: columns out of windows and back, and the largest number of each window.

No padded copy of an image is made: what lies outside is zeros that are written, or not read. Columns run through memory as the
images do, along W: all loops end in a run of a row. Shapes and types are checked by the callers.
"""

from cython cimport floating
from cython.parallel cimport prange
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset

import numpy as np

from normext._core.kernels cimport NX_FLOAT32, NX_FLOAT64, ceil_div, nx_block, nx_kernels, nx_rows, nx_window
from normext._core.runtime cimport kernels_for, threads_for

cdef enum:
    TILE_BYTES = 1 << 17  # of an image row of all images, transposed

# How windows lie over an image: kernel, stride, padding, dilation, and how many there are, down and across.
cdef struct Windows:
    Py_ssize_t kh, kw, sh, sw, ph, pw, dh, dw, oh, ow


cdef Windows windows_of(tuple kernel, tuple stride, tuple padding, tuple dilation, tuple output):
    return Windows(kernel[0], kernel[1], stride[0], stride[1], padding[0], padding[1], dilation[0], dilation[1], output[0], output[1])


cdef inline Py_ssize_t first_inside(Py_ssize_t offset, Py_ssize_t stride, Py_ssize_t begin) noexcept nogil:
    """The least o >= 0 with o * stride + offset >= begin."""
    return 0 if offset >= begin else ceil_div(begin - offset, stride)


cdef inline Py_ssize_t end_inside(Py_ssize_t offset, Py_ssize_t stride, Py_ssize_t end, Py_ssize_t count) noexcept nogil:
    """The end of those o < count with o * stride + offset < end."""
    return 0 if offset >= end else min(count, (end - 1 - offset) // stride + 1)


cdef inline void add(const nx_kernels *k, floating *to, const floating *numbers, Py_ssize_t n) noexcept nogil:
    k.add_rows(nx_rows(to, 0), nx_rows(<void *> numbers, 0), nx_rows(to, 0), nx_block(1, n))


# Columns laid out (..., out_h * out_w), as the images are -----------------------------------------------------------------------


cdef void gather_plane(const floating *image, Py_ssize_t H, Py_ssize_t W, Windows g, Py_ssize_t ky, Py_ssize_t kx, Py_ssize_t first,
                       Py_ssize_t last, floating *column) noexcept nogil:
    """One position in the window, for output rows first to last: the image, shifted and thinned out."""
    cdef Py_ssize_t dx = kx * g.dw - g.pw, oy, ox, y
    cdef Py_ssize_t start = min(g.ow, first_inside(dx, g.sw, 0)), end = max(start, end_inside(dx, g.sw, W, g.ow))
    cdef const floating *row
    for oy in range(first, last):
        y = oy * g.sh + ky * g.dh - g.ph
        if y < 0 or y >= H:
            memset(column, 0, g.ow * sizeof(floating))
        else:
            row = image + y * W + dx
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


cdef void scatter_plane(const nx_kernels *k, const floating *column, Py_ssize_t H, Py_ssize_t W, Windows g, Py_ssize_t ky,
                        Py_ssize_t kx, Py_ssize_t first, Py_ssize_t last, floating *image) noexcept nogil:
    """The adjoint of gather_plane: adds the column to where it came from."""
    cdef Py_ssize_t dx = kx * g.dw - g.pw, oy, ox, y
    cdef Py_ssize_t start = min(g.ow, first_inside(dx, g.sw, 0)), end = max(start, end_inside(dx, g.sw, W, g.ow))
    cdef floating *row
    for oy in range(first, last):
        y = oy * g.sh + ky * g.dh - g.ph
        if 0 <= y < H:
            row = image + y * W + dx
            if g.sw == 1:
                add(k, row + start, column + start, end - start)
            else:
                for ox in range(start, end):
                    row[ox * g.sw] += column[ox]
        column += g.ow


def gather(const floating[:, :, :, ::1] x, floating[:, :, ::1] cols, tuple kernel, tuple stride, tuple padding, tuple dilation,
           tuple output, Py_ssize_t first=0, Py_ssize_t last=-1, bint one_thread=False):
    """cols (N, C*kh*kw, windows) of x (N, C, H, W), for the windows in rows first to last of the output (-1: all)."""
    cdef Windows g = windows_of(kernel, stride, padding, dilation, output)
    cdef Py_ssize_t C = x.shape[1], H = x.shape[2], W = x.shape[3], positions = g.kh * g.kw, task, n, position, rest
    cdef Py_ssize_t tasks = x.shape[0] * C * positions
    cdef int threads = threads_for(1 if one_thread else tasks, tasks * cols.shape[2])
    if last < 0:
        last = g.oh
    if tasks * cols.shape[2] == 0:
        return
    for task in prange(tasks, nogil=True, num_threads=threads, use_threads_if=threads > 1, schedule="static"):
        n = task // (C * positions)
        rest = task % (C * positions)
        position = rest % positions
        gather_plane(&x[n, rest // positions, 0, 0] if H * W else NULL, H, W, g, position // g.kw, position % g.kw, first, last,
                     &cols[n, rest, 0])


def scatter(const floating[:, :, ::1] cols, floating[:, :, :, ::1] x, tuple kernel, tuple stride, tuple padding, tuple dilation,
            tuple output, Py_ssize_t first=0, Py_ssize_t last=-1, bint one_thread=False, bint channels_first=False):
    """Adds to x (N, C, H, W) the sums of the columns that each of its numbers went to; the adjoint of `gather`.

    cols is (N, C*kh*kw, windows), or (C*kh*kw, N, windows) with `channels_first`.
    """
    cdef Windows g = windows_of(kernel, stride, padding, dilation, output)
    cdef Py_ssize_t C = x.shape[1], H = x.shape[2], W = x.shape[3], positions = g.kh * g.kw, task, n, c, position, row
    cdef Py_ssize_t tasks = x.shape[0] * C
    cdef const nx_kernels *k = kernels_for(NX_FLOAT32 if floating is float else NX_FLOAT64, False)
    cdef int threads = threads_for(1 if one_thread else tasks, tasks * positions * cols.shape[2])
    if last < 0:
        last = g.oh
    if tasks * positions * cols.shape[2] * H * W == 0:
        return
    for task in prange(tasks, nogil=True, num_threads=threads, use_threads_if=threads > 1, schedule="static"):
        n = task // C
        c = task % C
        for position in range(positions):
            row = c * positions + position
            scatter_plane(k, &cols[row, n, 0] if channels_first else &cols[n, row, 0], H, W, g, position // g.kw, position % g.kw, first,
                          last, &x[n, c, 0, 0])


# Columns laid out (C*kh*kw, out_h * out_w * N), the batch innermost --------------------------------------------------------------
#
# A row y of channel c, of all images, is transposed once into a tile (W, N); every column takes from it runs of N, and of many times
# N where the stride is 1. The tile is cut where it would not fit the cache.


cdef inline Py_ssize_t tile_width(Py_ssize_t N, Py_ssize_t W, size_t itemsize) noexcept nogil:
    return max(1, min(W, TILE_BYTES // <Py_ssize_t> (N * itemsize)))


cdef void gather_row(const nx_kernels *k, const floating[:, :, :, ::1] x, floating[:, ::1] cols, Windows g, Py_ssize_t c, Py_ssize_t y,
                     floating *tile) noexcept nogil:
    """All that goes to the columns from row y of channel c; y may lie in the padding."""
    cdef Py_ssize_t N = x.shape[0], H = x.shape[2], W = x.shape[3], width = tile_width(N, W, sizeof(floating))
    cdef Py_ssize_t part, x0, x1, ky, kx, oy, ox, start, end, dx
    cdef bint inside = 0 <= y < H
    cdef floating *column
    for part in range(ceil_div(W, width) if inside else 1):
        x0 = part * width
        x1 = min(x0 + width, W)
        if inside:
            k.transpose(nx_rows(<void *> &x[0, c, y, x0], x.shape[1] * H * W), nx_block(N, x1 - x0), nx_rows(tile, N))
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
                if x0 == 0:
                    memset(column, 0, start * N * sizeof(floating))
                if g.sw == 1:
                    memcpy(column + start * N, tile + (start + dx - x0) * N, (end - start) * N * sizeof(floating))
                else:
                    for ox in range(start, end):
                        memcpy(column + ox * N, tile + (ox * g.sw + dx - x0) * N, N * sizeof(floating))
                if x1 == W:
                    memset(column + end * N, 0, (g.ow - end) * N * sizeof(floating))


cdef void scatter_row(const nx_kernels *k, const floating[:, ::1] cols, floating[:, :, :, ::1] x, Windows g, Py_ssize_t c, Py_ssize_t y,
                      floating *tile) noexcept nogil:
    """Row y of channel c as the sum of the columns that it went to."""
    cdef Py_ssize_t N = x.shape[0], H = x.shape[2], W = x.shape[3], width = tile_width(N, W, sizeof(floating))
    cdef Py_ssize_t part, x0, x1, ky, kx, oy, ox, start, end, dx
    cdef const floating *column
    for part in range(ceil_div(W, width)):
        x0 = part * width
        x1 = min(x0 + width, W)
        memset(tile, 0, (x1 - x0) * N * sizeof(floating))
        for ky in range(g.kh):
            oy = y + g.ph - ky * g.dh
            if oy < 0 or oy % g.sh or oy // g.sh >= g.oh:
                continue
            for kx in range(g.kw):
                column = &cols[(c * g.kh + ky) * g.kw + kx, oy // g.sh * g.ow * N]
                dx = kx * g.dw - g.pw
                start = first_inside(dx, g.sw, x0)
                end = end_inside(dx, g.sw, x1, g.ow)
                if g.sw == 1:
                    if start < end:
                        add(k, tile + (start + dx - x0) * N, column + start * N, (end - start) * N)
                else:
                    for ox in range(start, end):
                        add(k, tile + (ox * g.sw + dx - x0) * N, column + ox * N, N)
        k.transpose(nx_rows(tile, N), nx_block(x1 - x0, N), nx_rows(<void *> &x[0, c, y, x0], x.shape[1] * H * W))


def gather_batch_innermost(const floating[:, :, :, ::1] x, floating[:, ::1] cols, tuple kernel, tuple stride, tuple padding,
                           tuple output):
    """cols (C*kh*kw, out_h*out_w*N) of x (N, C, H, W)."""
    cdef Windows g = windows_of(kernel, stride, padding, (1, 1), output)
    cdef Py_ssize_t N = x.shape[0], C = x.shape[1], rows = x.shape[2] + 2 * g.ph, thread, task
    cdef int threads = threads_for(C * rows, cols.shape[0] * cols.shape[1])
    cdef Py_ssize_t tile_size = N * tile_width(N, x.shape[3], sizeof(floating)) if N else 0
    cdef const nx_kernels *k = kernels_for(NX_FLOAT32 if floating is float else NX_FLOAT64, False)
    cdef floating *tiles = <floating *> malloc(threads * tile_size * sizeof(floating) + 1)
    if tiles == NULL:
        raise MemoryError
    if cols.shape[0] * cols.shape[1]:
        for thread in prange(threads, nogil=True, num_threads=threads, use_threads_if=threads > 1, schedule="static"):
            for task in range(thread * C * rows // threads, (thread + 1) * C * rows // threads):
                gather_row(k, x, cols, g, task // rows, task % rows - g.ph, tiles + thread * tile_size)
    free(tiles)


def scatter_batch_innermost(const floating[:, ::1] cols, floating[:, :, :, ::1] x, tuple kernel, tuple stride, tuple padding,
                            tuple output):
    """x (N, C, H, W), written over, as the sums of its columns (C*kh*kw, out_h*out_w*N); the adjoint of the above."""
    cdef Windows g = windows_of(kernel, stride, padding, (1, 1), output)
    cdef Py_ssize_t N = x.shape[0], C = x.shape[1], H = x.shape[2], thread, task
    cdef int threads = threads_for(C * H, cols.shape[0] * cols.shape[1])
    cdef Py_ssize_t tile_size = N * tile_width(N, x.shape[3], sizeof(floating)) if N else 0
    cdef const nx_kernels *k = kernels_for(NX_FLOAT32 if floating is float else NX_FLOAT64, False)
    cdef floating *tiles = <floating *> malloc(threads * tile_size * sizeof(floating) + 1)
    if tiles == NULL:
        raise MemoryError
    if N * C * H * x.shape[3]:
        for thread in prange(threads, nogil=True, num_threads=threads, use_threads_if=threads > 1, schedule="static"):
            for task in range(thread * C * H // threads, (thread + 1) * C * H // threads):
                scatter_row(k, cols, x, g, task // H, task % H, tiles + thread * tile_size)
    free(tiles)


# Max pooling -----------------------------------------------------------------------------------------------------------------------

ctypedef fused index_t:
    unsigned char
    int


cdef void pool_plane(const nx_kernels *k, const floating *image, Py_ssize_t W, Windows g, floating *y,
                     index_t *winner) noexcept nogil:
    cdef nx_window window = nx_window(g.kh, g.kw, g.sw)
    cdef Py_ssize_t oy
    for oy in range(g.oh):
        k.pool_row(nx_rows(<void *> (image + oy * g.sh * W), W), &window, g.ow, y + oy * g.ow, winner + oy * g.ow, sizeof(index_t))


def max_pool(const floating[:, :, ::1] x, floating[:, :, ::1] y, index_t[:, :, ::1] winner, tuple kernel, tuple stride):
    """The largest number of each window of x (N*C, H, W) and its position in the window, counted row by row."""
    cdef Windows g = windows_of(kernel, stride, (0, 0), (1, 1), (y.shape[1], y.shape[2]))
    cdef const nx_kernels *k = kernels_for(NX_FLOAT32 if floating is float else NX_FLOAT64, False)
    cdef Py_ssize_t plane
    cdef int threads = threads_for(x.shape[0], x.shape[0] * x.shape[1] * x.shape[2])
    if y.shape[0] * y.shape[1] * y.shape[2] == 0:
        return
    for plane in prange(x.shape[0], nogil=True, num_threads=threads, use_threads_if=threads > 1, schedule="static"):
        pool_plane(k, &x[plane, 0, 0], x.shape[2], g, &y[plane, 0, 0], &winner[plane, 0, 0])


cdef void unpool_plane(const floating *dy, const index_t *winner, Py_ssize_t H, Py_ssize_t W, Windows g, const Py_ssize_t *offsets,
                       floating *dx) noexcept nogil:
    cdef Py_ssize_t oy, ox
    cdef floating *row
    memset(dx, 0, H * W * sizeof(floating))
    for oy in range(g.oh):
        row = dx + oy * g.sh * W
        for ox in range(g.ow):
            row[ox * g.sw + offsets[winner[ox]]] += dy[ox]
        dy += g.ow
        winner += g.ow


def max_pool_backward(const floating[:, :, ::1] dy, const index_t[:, :, ::1] winner, floating[:, :, ::1] dx, tuple kernel,
                      tuple stride):
    """dx (N*C, H, W), written over: each number of dy added to the winner of its window."""
    cdef Windows g = windows_of(kernel, stride, (0, 0), (1, 1), (dy.shape[1], dy.shape[2]))
    cdef Py_ssize_t plane, H = dx.shape[1], W = dx.shape[2]
    cdef int threads = threads_for(dx.shape[0], dx.shape[0] * H * W)
    cdef Py_ssize_t[::1] offsets = np.array([position // g.kw * W + position % g.kw for position in range(g.kh * g.kw)], np.intp)
    if dy.shape[0] * dy.shape[1] * dy.shape[2] == 0:
        return
    for plane in prange(dx.shape[0], nogil=True, num_threads=threads, use_threads_if=threads > 1, schedule="static"):
        unpool_plane(&dy[plane, 0, 0], &winner[plane, 0, 0], H, W, g, &offsets[0], &dx[plane, 0, 0])
