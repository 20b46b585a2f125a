# cython: language_level=3, boundscheck=False, wraparound=False
"""The loops of the course's extension as its description has them: one element at a time, the batch innermost."""

import numpy as np

from cython cimport floating


def im2col(floating[:, :, :, :] x, int kernel, int pad, int stride):
    cdef int N = x.shape[0], C = x.shape[1], H = x.shape[2], W = x.shape[3]
    cdef int out_h = (H + 2 * pad - kernel) // stride + 1, out_w = (W + 2 * pad - kernel) // stride + 1
    cdef int c, y, z, i, j, n
    cdef floating[:, :, :, :] padded = np.pad(np.asarray(x), ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    result = np.zeros((C * kernel * kernel, N * out_h * out_w), np.asarray(x).dtype)
    cdef floating[:, :] cols = result
    for c in range(C):
        for y in range(out_h):
            for z in range(out_w):
                for i in range(kernel):
                    for j in range(kernel):
                        for n in range(N):
                            cols[(c * kernel + i) * kernel + j, (y * out_w + z) * N + n] = padded[
                                n, c, stride * y + i, stride * z + j]
    return result


def col2im(floating[:, :] cols, int N, int C, int H, int W, int kernel, int pad, int stride):
    cdef int out_h = (H + 2 * pad - kernel) // stride + 1, out_w = (W + 2 * pad - kernel) // stride + 1
    cdef int c, y, z, i, j, n
    result = np.zeros((N, C, H + 2 * pad, W + 2 * pad), np.asarray(cols).dtype)
    cdef floating[:, :, :, :] padded = result
    for c in range(C):
        for i in range(kernel):
            for j in range(kernel):
                for y in range(out_h):
                    for z in range(out_w):
                        for n in range(N):
                            padded[n, c, stride * y + i, stride * z + j] += cols[
                                (c * kernel + i) * kernel + j, (y * out_w + z) * N + n]
    return result[:, :, pad:H + pad, pad:W + pad]


def col2im_6d(floating[:, :, :, :, :, :] cols, int N, int C, int H, int W, int kernel, int pad, int stride):
    cdef int out_h = (H + 2 * pad - kernel) // stride + 1, out_w = (W + 2 * pad - kernel) // stride + 1
    cdef int c, y, z, i, j, n
    result = np.zeros((N, C, H + 2 * pad, W + 2 * pad), np.asarray(cols).dtype)
    cdef floating[:, :, :, :] padded = result
    for n in range(N):
        for c in range(C):
            for i in range(kernel):
                for j in range(kernel):
                    for y in range(out_h):
                        for z in range(out_w):
                            padded[n, c, stride * y + i, stride * z + j] += cols[c, i, j, n, y, z]
    return result[:, :, pad:H + pad, pad:W + pad]
