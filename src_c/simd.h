/* Vectors of float and double under one set of names, and all else that depends on the compiler or the processor.
 *
 * For each element type E (f32, f64) this header defines, for the instruction set that the including file is compiled for:
 *
 *     E##_t              a vector of E##_W elements
 *     E##_load, _store   W elements at any address
 *     E##_load_n         the first n of them; the lanes beyond come from `fill`, memory beyond is not touched (n may be <= 0 or >= W)
 *     E##_store_n        the first n of them, likewise
 *     E##_set            one number in every lane
 *     E##_add, _sub, _mul
 *     E##_fma            a * b + c, rounded once where the instruction set can (everywhere but on baseline x86-64)
 *     E##_sum            sum of the lanes, always in the same order: lane i + lane (i + W/2), and so on by halves
 *     E##_transpose      a square of E##_SIDE x E##_SIDE elements, from rows to columns
 *
 * The kernels are compiled with contraction of a * b + c turned off (see setup.py), so that AVX2 and AVX-512 round alike.
 */
#ifndef NORMEXT_SIMD_H
#define NORMEXT_SIMD_H

#include <stddef.h>
#include <stdint.h>

#if defined(_MSC_VER) && !defined(__clang__)
#define NX_INLINE static __forceinline
#define NX_RESTRICT __restrict
#else
#define NX_INLINE static inline __attribute__((always_inline))
#define NX_RESTRICT __restrict__
#endif

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>

/* What the three x86 instruction sets spell alike. */
#define NX_X86(E, T, V, P, S, LANES)                                                     \
    typedef V E##_t;                                                                     \
    enum { E##_W = LANES };                                                              \
    NX_INLINE V E##_load(const T *p) { return P##_loadu_##S(p); }                        \
    NX_INLINE void E##_store(T *p, V v) { P##_storeu_##S(p, v); }                        \
    NX_INLINE V E##_set(T a) { return P##_set1_##S(a); }                                 \
    NX_INLINE V E##_add(V a, V b) { return P##_add_##S(a, b); }                          \
    NX_INLINE V E##_sub(V a, V b) { return P##_sub_##S(a, b); }                          \
    NX_INLINE V E##_mul(V a, V b) { return P##_mul_##S(a, b); }

NX_INLINE float nx_sum4(__m128 v)
{
    v = _mm_add_ps(v, _mm_movehl_ps(v, v));
    return _mm_cvtss_f32(_mm_add_ss(v, _mm_shuffle_ps(v, v, 1)));
}
NX_INLINE double nx_sum2(__m128d v) { return _mm_cvtsd_f64(_mm_add_sd(v, _mm_unpackhi_pd(v, v))); }

enum { f32_SIDE = 4, f64_SIDE = 2 };
NX_INLINE void f32_transpose(const float *p, ptrdiff_t p_stride, float *q, ptrdiff_t q_stride)
{
    __m128 a = _mm_loadu_ps(p), b = _mm_loadu_ps(p + p_stride), c = _mm_loadu_ps(p + 2 * p_stride), d = _mm_loadu_ps(p + 3 * p_stride);
    _MM_TRANSPOSE4_PS(a, b, c, d);
    _mm_storeu_ps(q, a);
    _mm_storeu_ps(q + q_stride, b);
    _mm_storeu_ps(q + 2 * q_stride, c);
    _mm_storeu_ps(q + 3 * q_stride, d);
}
NX_INLINE void f64_transpose(const double *p, ptrdiff_t p_stride, double *q, ptrdiff_t q_stride)
{
    __m128d a = _mm_loadu_pd(p), b = _mm_loadu_pd(p + p_stride);
    _mm_storeu_pd(q, _mm_unpacklo_pd(a, b));
    _mm_storeu_pd(q + q_stride, _mm_unpackhi_pd(a, b));
}

#if defined(__AVX2__)
NX_INLINE float nx_sum8(__m256 v) { return nx_sum4(_mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1))); }
NX_INLINE double nx_sum4d(__m256d v)
{
    return nx_sum2(_mm_add_pd(_mm256_castpd256_pd128(v), _mm256_extractf128_pd(v, 1)));
}
#endif

#if defined(__AVX512F__)

NX_X86(f32, float, __m512, _mm512, ps, 16)
NX_X86(f64, double, __m512d, _mm512, pd, 8)
#define NX_MASK(n, W) ((n) >= (W) ? (1u << (W)) - 1u : (n) <= 0 ? 0u : (1u << (n)) - 1u)
#define NX_AVX512(E, T, V, S, M)                                                                                 \
    NX_INLINE V E##_fma(V a, V b, V c) { return _mm512_fmadd_##S(a, b, c); }                                     \
    NX_INLINE V E##_load_n(const T *p, ptrdiff_t n, V fill)                                                      \
    {                                                                                                            \
        return _mm512_mask_loadu_##S(fill, (M)NX_MASK(n, E##_W), p);                                             \
    }                                                                                                            \
    NX_INLINE void E##_store_n(T *p, ptrdiff_t n, V v) { _mm512_mask_storeu_##S(p, (M)NX_MASK(n, E##_W), v); }
NX_AVX512(f32, float, __m512, ps, __mmask16)
NX_AVX512(f64, double, __m512d, pd, __mmask8)
NX_INLINE float f32_sum(__m512 v) { return nx_sum8(_mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1))); }
NX_INLINE double f64_sum(__m512d v)
{
    return nx_sum4d(_mm256_add_pd(_mm512_castpd512_pd256(v), _mm512_extractf64x4_pd(v, 1)));
}

#elif defined(__AVX2__)

NX_X86(f32, float, __m256, _mm256, ps, 8)
NX_X86(f64, double, __m256d, _mm256, pd, 4)
/* The 8 (or 4) words from position 8 - n (or 4 - n) on are a mask for the first n lanes. */
static const int32_t nx_mask32[16] = {-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0};
static const int64_t nx_mask64[8] = {-1, -1, -1, -1, 0, 0, 0, 0};
#define NX_AVX2(E, T, V, S, MASKS)                                                                               \
    NX_INLINE __m256i E##_mask(ptrdiff_t n)                                                                      \
    {                                                                                                            \
        n = n < 0 ? 0 : n > E##_W ? E##_W : n;                                                                   \
        return _mm256_loadu_si256((const __m256i *)(MASKS + E##_W - n));                                         \
    }                                                                                                            \
    NX_INLINE V E##_fma(V a, V b, V c) { return _mm256_fmadd_##S(a, b, c); }                                     \
    NX_INLINE V E##_load_n(const T *p, ptrdiff_t n, V fill)                                                      \
    {                                                                                                            \
        __m256i mask = E##_mask(n);                                                                              \
        return _mm256_blendv_##S(fill, _mm256_maskload_##S(p, mask), _mm256_castsi256_##S(mask));                \
    }                                                                                                            \
    NX_INLINE void E##_store_n(T *p, ptrdiff_t n, V v) { _mm256_maskstore_##S(p, E##_mask(n), v); }
NX_AVX2(f32, float, __m256, ps, nx_mask32)
NX_AVX2(f64, double, __m256d, pd, nx_mask64)
NX_INLINE float f32_sum(__m256 v) { return nx_sum8(v); }
NX_INLINE double f64_sum(__m256d v) { return nx_sum4d(v); }

#else

NX_X86(f32, float, __m128, _mm, ps, 4)
NX_X86(f64, double, __m128d, _mm, pd, 2)
NX_INLINE __m128 f32_fma(__m128 a, __m128 b, __m128 c) { return _mm_add_ps(_mm_mul_ps(a, b), c); }
NX_INLINE __m128d f64_fma(__m128d a, __m128d b, __m128d c) { return _mm_add_pd(_mm_mul_pd(a, b), c); }
NX_INLINE float f32_sum(__m128 v) { return nx_sum4(v); }
NX_INLINE double f64_sum(__m128d v) { return nx_sum2(v); }
#define NX_PARTIAL_BY_ELEMENT

#endif

#else /* not x86-64 */

#if defined(__GNUC__)
/* GCC's and clang's own vectors: + - * work on them, and 16 bytes fit NEON, VSX and the like. */
typedef float f32_t __attribute__((vector_size(16)));
typedef double f64_t __attribute__((vector_size(16)));
enum { f32_W = 4, f64_W = 2 };
NX_INLINE float f32_sum(f32_t v) { return (v[0] + v[2]) + (v[1] + v[3]); }
NX_INLINE double f64_sum(f64_t v) { return v[0] + v[1]; }
#else
typedef float f32_t;
typedef double f64_t;
enum { f32_W = 1, f64_W = 1 };
NX_INLINE float f32_sum(f32_t v) { return v; }
NX_INLINE double f64_sum(f64_t v) { return v; }
#endif

enum { f32_SIDE = 1, f64_SIDE = 1 };
#define NX_TRANSPOSE1(E, T)                                                              \
    NX_INLINE void E##_transpose(const T *p, ptrdiff_t p_stride, T *q, ptrdiff_t q_stride) \
    {                                                                                    \
        (void)p_stride, (void)q_stride;                                                  \
        *q = *p;                                                                         \
    }
NX_TRANSPOSE1(f32, float)
NX_TRANSPOSE1(f64, double)

#include <string.h>
#define NX_GENERIC(E, T)                                                                 \
    NX_INLINE E##_t E##_load(const T *p)                                                 \
    {                                                                                    \
        E##_t v;                                                                         \
        memcpy(&v, p, sizeof v);                                                         \
        return v;                                                                        \
    }                                                                                    \
    NX_INLINE void E##_store(T *p, E##_t v) { memcpy(p, &v, sizeof v); }                 \
    NX_INLINE E##_t E##_set(T a) { return a - (E##_t){0}; }                              \
    NX_INLINE E##_t E##_add(E##_t a, E##_t b) { return a + b; }                          \
    NX_INLINE E##_t E##_sub(E##_t a, E##_t b) { return a - b; }                          \
    NX_INLINE E##_t E##_mul(E##_t a, E##_t b) { return a * b; }
NX_GENERIC(f32, float)
NX_GENERIC(f64, double)

#if defined(__aarch64__) && defined(__GNUC__)
#include <arm_neon.h>
NX_INLINE f32_t f32_fma(f32_t a, f32_t b, f32_t c) { return (f32_t)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b); }
NX_INLINE f64_t f64_fma(f64_t a, f64_t b, f64_t c) { return (f64_t)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b); }
#else
NX_INLINE f32_t f32_fma(f32_t a, f32_t b, f32_t c) { return a * b + c; }
NX_INLINE f64_t f64_fma(f64_t a, f64_t b, f64_t c) { return a * b + c; }
#endif
#define NX_PARTIAL_BY_ELEMENT

#endif

#ifdef NX_PARTIAL_BY_ELEMENT
#define NX_PARTIAL(E, T)                                                                 \
    NX_INLINE E##_t E##_load_n(const T *p, ptrdiff_t n, E##_t fill)                      \
    {                                                                                    \
        T lanes[E##_W];                                                                  \
        E##_store(lanes, fill);                                                          \
        for (ptrdiff_t i = 0; i < n && i < E##_W; i++) lanes[i] = p[i];                  \
        return E##_load(lanes);                                                          \
    }                                                                                    \
    NX_INLINE void E##_store_n(T *p, ptrdiff_t n, E##_t v)                               \
    {                                                                                    \
        T lanes[E##_W];                                                                  \
        E##_store(lanes, v);                                                             \
        for (ptrdiff_t i = 0; i < n && i < E##_W; i++) p[i] = lanes[i];                  \
    }
NX_PARTIAL(f32, float)
NX_PARTIAL(f64, double)
#endif

#endif
