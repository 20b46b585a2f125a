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
#define NX_TYPE f16
#define T nx_f16
#define C float
#define V f32_t
#define T_UNDERFLOW 0x1p-25f /* half the smallest number, 2^-24: a tie, which rounds to even, 0 */

#elif defined(NX_BF16)
#define NX_TYPE bf16
#define T nx_bf16
#define C float
#define V f32_t
#define T_UNDERFLOW 0x1p-134f /* likewise of 2^-133 */

#endif

#include "kernels_template.h"
