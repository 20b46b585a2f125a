/* Compiled once per instruction set, with NX_ISA set to its name: each build fills its own tables from kernels_template.h. */
#include "kernels.h"

#include <math.h>

#include "simd.h"

#define NX_JOIN_(a, b, c) a##_##b##_##c
#define NX_JOIN(a, b, c) NX_JOIN_(a, b, c)
#define NX_OP_(e, name) e##_##name
#define NX_OP(e, name) NX_OP_(e, name)

/* Rows of few columns that lie one after the other in memory are taken `fold` at a time: as `rows` rows of `lanes` numbers, which fill
 * whole vectors, and one of `tail` numbers. A column then has `fold` lanes, which share its coefficients and whose sums are its sum. */
typedef struct {
    ptrdiff_t fold, lanes, rows, tail;
} nx_fold;

/* `unit` numbers are a whole vector on every instruction set, and there is room for `most` lanes. */
static nx_fold fold_rows(ptrdiff_t rows, ptrdiff_t cols, int adjacent, ptrdiff_t unit, ptrdiff_t most)
{
    ptrdiff_t fold = 1;
    if (adjacent && cols <= most / 2) {
        while (fold < unit && fold * cols % unit) fold *= 2;
        while (fold * cols < 4 * unit) fold *= 2;
        while (fold * cols > most || rows < 4 * fold) fold = fold == 1 ? 0 : fold / 2;
    }
    if (fold <= 1) return (nx_fold){1, cols, rows, 0};
    return (nx_fold){fold, fold * cols, rows / fold, rows % fold * cols};
}

/* To float, with the last bit set where that is inexact: what then rounds it to fewer bits, two at
 * least, rounds as if there had been no step between (S. Boldo and G. Melquiond, "Emulation of FMA
 * and Correctly Rounded Sums: Proved Algorithms Using Rounding to Odd", 2008). */
static float round_to_odd(double x)
{
    float nearest = (float)x;
    uint32_t bits;
    memcpy(&bits, &nearest, sizeof bits);
    if (x != x || nearest == x || bits & 1) return nearest;
    bits += fabs(nearest) < fabs(x) ? 1 : -1;
    memcpy(&nearest, &bits, sizeof bits);
    return nearest;
}

#define T float
#define E f32
#define C float
#define EC f32
#define T_SQRT sqrtf
#define T_INT int32_t /* as wide as T, so that comparisons of one choose among the other */
#define T_RANGE {1e-30, 0x1p100, 0x1p-80, 0x1p-22}
#define T_LARGE 1e30 /* statistics up to this, and from its inverse on, are applied in C */
#define T_UNDERFLOW 0 /* a result up to this becomes 0 when it is stored */
#include "kernels_template.h"

#define T double
#define E f64
#define C double
#define EC f64
#define T_SQRT sqrt
#define T_INT int64_t
#define T_RANGE {1e-290, 0x1p600, 0x1p-540, 0x1p-300}
#define T_LARGE 1e290
#define T_UNDERFLOW 0
#include "kernels_template.h"

#define T uint16_t
#define E f16
#define C float
#define EC f32
#define T_RANGE {1e-30, 0x1p100, 0x1p-80, 0x1p-22}
#define T_LARGE 1e30
#define T_UNDERFLOW 0x1p-25f /* half the smallest number, which rounds to even */
#include "kernels_template.h"

#define T uint16_t
#define E bf16
#define C float
#define EC f32
#define T_RANGE {1e-30, 0x1p100, 0x1p-80, 0x1p-22}
#define T_LARGE 1e30
#define T_UNDERFLOW 0x1p-134f
#include "kernels_template.h"
