/* The kernels of one element type on one instruction set: compiled for each, with NX_ISA set to the
 * instruction set's name and one of the types below chosen. */
#include "kernels.h"
#include "simd.h"

#if defined(NX_F32)
#define NX_TYPE f32
#define T float
#define C float
#define V f32_t
#define T_INT int32_t /* as wide as T, so that comparisons of one choose among the other */
#define T_UNDERFLOW 0

#elif defined(NX_F64)
#define NX_TYPE f64
#define T double
#define C double
#define V f64_t
#define T_INT int64_t
#define T_UNDERFLOW 0

#elif defined(NX_F16)
/* To float, with the last bit set where that is inexact: what then rounds it to fewer bits, two at
 * least, rounds as if there had been no step between (S. Boldo and G. Melquiond, "Emulation of a
 * FMA and Correctly Rounded Sums: Proved Algorithms Using Rounding to Odd", 2008). */
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
#define NX_TYPE f16
#define T nx_f16
#define C float
#define V f32_t
#define T_NARROW(x) round_to_odd(x)
#define T_UNDERFLOW 0x1p-25f /* half the smallest number, 2^-24: a tie, which rounds to even, 0 */

#elif defined(NX_BF16)
#define NX_TYPE bf16
#define T nx_bf16
#define C float
#define V f32_t
#define T_NARROW(x) ((float)(x)) /* rounded twice, as ml_dtypes does, which others compare with */
#define T_UNDERFLOW 0x1p-134f /* likewise of 2^-133 */

#endif

#include "kernels_template.h"
