"""Batch norm and layer norm as one writes them by hand for numba: parallel loops, no fast maths, sums in float64.

x is (rows, channels) for columns, (N, channels, inner) for runs, and (rows, features) for rows. Sums down columns are
taken over as many parts of the rows as there are threads; that number is an argument, as numba caches no loop that asks
for it. Sums are written out, as numba starts threads for each NumPy sum.
"""

import numpy as np
from numba import njit, prange

# ruff: noqa: B007  (prange is what makes a loop parallel)


@njit(parallel=True, cache=True)
def columns_forward(x, gamma, beta, running_mean, running_var, momentum, eps, threads):
    rows, channels = x.shape
    chunks = min(threads, rows)
    sums = np.zeros((chunks, channels))
    squares = np.zeros((chunks, channels))
    mean, rstd, y = np.empty_like(gamma), np.empty_like(gamma), np.empty_like(x)
    for k in prange(chunks):
        for i in range(rows * k // chunks, rows * (k + 1) // chunks):
            for c in range(channels):
                sums[k, c] += x[i, c]
    for c in range(channels):
        total = 0.0
        for k in range(chunks):
            total += sums[k, c]
        mean[c] = total / rows
    for k in prange(chunks):
        for i in range(rows * k // chunks, rows * (k + 1) // chunks):
            for c in range(channels):
                squares[k, c] += (x[i, c] - mean[c]) ** 2
    for c in range(channels):
        var = 0.0
        for k in range(chunks):
            var += squares[k, c] / rows
        rstd[c] = 1 / np.sqrt(var + eps)
        running_mean[c] = momentum * running_mean[c] + (1 - momentum) * mean[c]
        running_var[c] = momentum * running_var[c] + (1 - momentum) * var
    for i in prange(rows):
        for c in range(channels):
            y[i, c] = (x[i, c] - mean[c]) * rstd[c] * gamma[c] + beta[c]
    return y, mean, rstd


@njit(parallel=True, cache=True)
def columns_evaluation(x, gamma, beta, running_mean, running_var, eps):
    rows, channels = x.shape
    scale, y = np.empty_like(gamma), np.empty_like(x)
    for c in range(channels):
        scale[c] = gamma[c] / np.sqrt(running_var[c] + eps)
    for i in prange(rows):
        for c in range(channels):
            y[i, c] = (x[i, c] - running_mean[c]) * scale[c] + beta[c]
    return y


@njit(parallel=True, cache=True)
def columns_backward(dy, x, gamma, mean, rstd, threads):
    rows, channels = x.shape
    chunks = min(threads, rows)
    sums = np.zeros((chunks, channels))
    dots = np.zeros((chunks, channels))
    dgamma, dbeta, dx = np.empty_like(gamma), np.empty_like(gamma), np.empty_like(x)
    scale, centre, slope = np.empty_like(gamma), np.empty_like(gamma), np.empty_like(gamma)
    for k in prange(chunks):
        for i in range(rows * k // chunks, rows * (k + 1) // chunks):
            for c in range(channels):
                sums[k, c] += dy[i, c]
                dots[k, c] += dy[i, c] * (x[i, c] - mean[c])
    for c in range(channels):
        total, dot = 0.0, 0.0
        for k in range(chunks):
            total += sums[k, c]
            dot += dots[k, c]
        dbeta[c], dgamma[c] = total, dot * rstd[c]
        scale[c], centre[c], slope[c] = gamma[c] * rstd[c], dbeta[c] / rows, dgamma[c] * rstd[c] / rows
    for i in prange(rows):
        for c in range(channels):
            dx[i, c] = scale[c] * (dy[i, c] - centre[c] - (x[i, c] - mean[c]) * slope[c])
    return dx, dgamma, dbeta


@njit(parallel=True, cache=True)
def runs_forward(x, gamma, beta, running_mean, running_var, momentum, eps):
    N, channels, inner = x.shape
    mean, rstd, y = np.empty_like(gamma), np.empty_like(gamma), np.empty_like(x)
    for c in prange(channels):
        total = 0.0
        for i in range(N):
            for j in range(inner):
                total += x[i, c, j]
        mean[c] = total / (N * inner)
        squares = 0.0
        for i in range(N):
            for j in range(inner):
                squares += (x[i, c, j] - mean[c]) ** 2
        var = squares / (N * inner)
        rstd[c] = 1 / np.sqrt(var + eps)
        running_mean[c] = momentum * running_mean[c] + (1 - momentum) * mean[c]
        running_var[c] = momentum * running_var[c] + (1 - momentum) * var
        for i in range(N):
            for j in range(inner):
                y[i, c, j] = (x[i, c, j] - mean[c]) * rstd[c] * gamma[c] + beta[c]
    return y, mean, rstd


@njit(parallel=True, cache=True)
def runs_evaluation(x, gamma, beta, running_mean, running_var, eps):
    N, channels, inner = x.shape
    scale, y = np.empty_like(gamma), np.empty_like(x)
    for c in range(channels):
        scale[c] = gamma[c] / np.sqrt(running_var[c] + eps)
    for i in prange(N):
        for c in range(channels):
            for j in range(inner):
                y[i, c, j] = (x[i, c, j] - running_mean[c]) * scale[c] + beta[c]
    return y


@njit(parallel=True, cache=True)
def runs_backward(dy, x, gamma, mean, rstd):
    N, channels, inner = x.shape
    dgamma, dbeta, dx = np.empty_like(gamma), np.empty_like(gamma), np.empty_like(x)
    scale, centre, slope = np.empty_like(gamma), np.empty_like(gamma), np.empty_like(gamma)
    for c in prange(channels):
        total, dot = 0.0, 0.0
        for i in range(N):
            for j in range(inner):
                total += dy[i, c, j]
                dot += dy[i, c, j] * (x[i, c, j] - mean[c])
        dbeta[c], dgamma[c] = total, dot * rstd[c]
        scale[c], centre[c] = gamma[c] * rstd[c], total / (N * inner)
        slope[c] = dgamma[c] * rstd[c] / (N * inner)
        for i in range(N):
            for j in range(inner):
                dx[i, c, j] = scale[c] * (dy[i, c, j] - centre[c] - (x[i, c, j] - mean[c]) * slope[c])
    return dx, dgamma, dbeta


@njit(parallel=True, cache=True)
def rows_forward(x, gamma, beta, eps):
    rows, features = x.shape
    mean, rstd, y = np.empty(rows, x.dtype), np.empty(rows, x.dtype), np.empty_like(x)
    for i in prange(rows):
        total = 0.0
        for j in range(features):
            total += x[i, j]
        mean[i] = total / features
        squares = 0.0
        for j in range(features):
            squares += (x[i, j] - mean[i]) ** 2
        rstd[i] = 1 / np.sqrt(squares / features + eps)
        for j in range(features):
            y[i, j] = (x[i, j] - mean[i]) * rstd[i] * gamma[j] + beta[j]
    return y, mean, rstd


@njit(parallel=True, cache=True)
def rows_backward(dy, x, gamma, mean, rstd, threads):
    rows, features = x.shape
    chunks = min(threads, rows)
    dgammas = np.zeros((chunks, features))
    dbetas = np.zeros((chunks, features))
    numbers = np.empty((rows, 2), x.dtype)
    dgamma, dbeta, dx = np.empty_like(gamma), np.empty_like(gamma), np.empty_like(x)
    for k in prange(chunks):
        for i in range(rows * k // chunks, rows * (k + 1) // chunks):
            total, dot = 0.0, 0.0
            for j in range(features):
                g = dy[i, j] * gamma[j]
                total += g
                dot += g * (x[i, j] - mean[i])
            numbers[i, 0], numbers[i, 1] = total / features, dot * rstd[i] ** 2 / features
            for j in range(features):
                centred = x[i, j] - mean[i]
                dx[i, j] = rstd[i] * (dy[i, j] * gamma[j] - numbers[i, 0] - centred * numbers[i, 1])
                dgammas[k, j] += dy[i, j] * (centred * rstd[i])
                dbetas[k, j] += dy[i, j]
    for j in range(features):
        of_beta, of_gamma = 0.0, 0.0
        for k in range(chunks):
            of_beta += dbetas[k, j]
            of_gamma += dgammas[k, j]
        dbeta[j], dgamma[j] = of_beta, of_gamma
    return dx, dgamma, dbeta
