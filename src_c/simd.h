/* Vectors of numbers under one set of names, and all else that depends on the compiler or the
 * processor.
 *
 * For each type E (f32: float, f64: double) this header defines a vector E##_t of E##_W numbers,
 * for the instruction set that the including file is compiled for, and functions E##_NAME; the
 * name alone picks one of them by the type of its first argument:
 *
 *     load, store    a vector at any address
 *     load_n         its first n numbers; the lanes beyond come from `fill`, memory beyond is not
 *                    touched (n may be <= 0 or >= W)
 *     store_n        its first n numbers, likewise
 *     stream         a vector at an address that is a multiple of its size, around the caches
 *                    where the instruction set can
 *     splat          one number in every lane
 *     add, sub, mul
 *     mul_add        a * b + c, rounded once where the instruction set can (everywhere but on
 *                    baseline x86-64)
 *     mul_add_once   the same, but of float rounded once everywhere, if slowly
 *     greater        the larger, and b where either is NaN
 *     keep_positive  a where b > 0 (or is NaN), elsewhere 0
 *     hold           the same vector, which the compiler is to keep in a register, and not to load
 *                    anew wherever it is used
 *     total          sum of the lanes, always in the same order: lane i + lane (i + W/2), and so
 *                    on by halves
 *     transpose_square  a square of E##_SIDE x E##_SIDE numbers, from rows to columns
 *     transpose_tall    E##_TALL rows of E##_SIDE numbers, from rows to columns
 *     transpose_wide    E##_SIDE rows of E##_TALL numbers
 *
 * 16-bit floats (f16: IEEE 754 binary16, bf16: bfloat16) have types of their own in memory, and are
 * vectors of f32 once loaded: for them there are the loads and stores only. Conversion to them
 * rounds to nearest, ties to even.
 *
 * The kernels are compiled with contraction of a * b + c turned off (see setup.py), so that AVX2
 * and AVX-512 round alike. */
#ifndef NORMEXT_SIMD_H
#define NORMEXT_SIMD_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

typedef struct {
    uint16_t bits;
} nx_f16;
typedef struct {
    uint16_t bits;
} nx_bf16;

#if defined(_MSC_VER) && !defined(__clang__)
#define NX_INLINE static __forceinline
#define NX_OUTLINE static __declspec(noinline)
#define NX_RESTRICT __restrict
#else
#define NX_INLINE static inline __attribute__((always_inline))
#if defined(__clang__)
#define NX_OUTLINE static __attribute__((noinline, unused))
#else
#define NX_OUTLINE static __attribute__((noinline, noclone, unused))
#endif
#define NX_RESTRICT __restrict__
#endif

/* Asks for the cache line at an address, which need not be there, in the second-level cache. */
#if defined(__GNUC__)
#define NX_PREFETCH(p) __builtin_prefetch(p, 0, 2)
#elif defined(_M_X64)
#define NX_PREFETCH(p) _mm_prefetch((const char *)(p), _MM_HINT_T1)
#else
#define NX_PREFETCH(p) ((void)0)
#endif

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>

/* What the three x86 instruction sets spell alike. */
#define NX_X86(E, T, V, P, S, LANES)                               \
    typedef V E##_t;                                               \
    enum { E##_W = LANES };                                        \
    NX_INLINE V E##_load(const T *p) { return P##_loadu_##S(p); }  \
    NX_INLINE void E##_store(T *p, V v) { P##_storeu_##S(p, v); }  \
    NX_INLINE void E##_stream(T *p, V v) { P##_stream_##S(p, v); } \
    NX_INLINE V E##_splat(T a) { return P##_set1_##S(a); }         \
    NX_INLINE V E##_add(V a, V b) { return P##_add_##S(a, b); }    \
    NX_INLINE V E##_sub(V a, V b) { return P##_sub_##S(a, b); }    \
    NX_INLINE V E##_mul(V a, V b) { return P##_mul_##S(a, b); }    \
    NX_INLINE V E##_greater(V a, V b) { return P##_max_##S(a, b); }

NX_INLINE float nx_sum4(__m128 v)
{
    v = _mm_add_ps(v, _mm_movehl_ps(v, v));
    return _mm_cvtss_f32(_mm_add_ss(v, _mm_shuffle_ps(v, v, 1)));
}
NX_INLINE double nx_sum2(__m128d v) { return _mm_cvtsd_f64(_mm_add_sd(v, _mm_unpackhi_pd(v, v))); }

enum { f32_SIDE = 4, f64_SIDE = 2 };
NX_INLINE void f32_transpose_square(const float *p, ptrdiff_t p_stride, float *q,
                                    ptrdiff_t q_stride)
{
    __m128 a = _mm_loadu_ps(p), b = _mm_loadu_ps(p + p_stride), c = _mm_loadu_ps(p + 2 * p_stride),
           d = _mm_loadu_ps(p + 3 * p_stride);
    _MM_TRANSPOSE4_PS(a, b, c, d);
    _mm_storeu_ps(q, a);
    _mm_storeu_ps(q + q_stride, b);
    _mm_storeu_ps(q + 2 * q_stride, c);
    _mm_storeu_ps(q + 3 * q_stride, d);
}
NX_INLINE void f64_transpose_square(const double *p, ptrdiff_t p_stride, double *q,
                                    ptrdiff_t q_stride)
{
    __m128d a = _mm_loadu_pd(p), b = _mm_loadu_pd(p + p_stride);
    _mm_storeu_pd(q, _mm_unpacklo_pd(a, b));
    _mm_storeu_pd(q + q_stride, _mm_unpackhi_pd(a, b));
}

#if defined(__AVX2__)
enum { f32_TALL = 8, f64_TALL = 4 };
/* Two squares, one in each half of the registers. */
NX_INLINE __m256 nx_pair(const float *p, ptrdiff_t distance)
{
    return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(p)), _mm_loadu_ps(p + distance),
                                1);
}
NX_INLINE __m256d nx_pair_d(const double *p, ptrdiff_t distance)
{
    return _mm256_insertf128_pd(_mm256_castpd128_pd256(_mm_loadu_pd(p)), _mm_loadu_pd(p + distance),
                                1);
}
NX_INLINE void nx_unpair(float *p, ptrdiff_t distance, __m256 v)
{
    _mm_storeu_ps(p, _mm256_castps256_ps128(v));
    _mm_storeu_ps(p + distance, _mm256_extractf128_ps(v, 1));
}
NX_INLINE void nx_unpair_d(double *p, ptrdiff_t distance, __m256d v)
{
    _mm_storeu_pd(p, _mm256_castpd256_pd128(v));
    _mm_storeu_pd(p + distance, _mm256_extractf128_pd(v, 1));
}
NX_INLINE void nx_transpose_pair(__m256 v[4])
{
    __m256 a = _mm256_unpacklo_ps(v[0], v[1]), b = _mm256_unpackhi_ps(v[0], v[1]),
           c = _mm256_unpacklo_ps(v[2], v[3]), d = _mm256_unpackhi_ps(v[2], v[3]);
    v[0] = _mm256_shuffle_ps(a, c, 0x44);
    v[1] = _mm256_shuffle_ps(a, c, 0xee);
    v[2] = _mm256_shuffle_ps(b, d, 0x44);
    v[3] = _mm256_shuffle_ps(b, d, 0xee);
}
NX_INLINE void f32_transpose_tall(const float *p, ptrdiff_t p_stride, float *q, ptrdiff_t q_stride)
{
    __m256 v[4];
    for (int i = 0; i < 4; i++) v[i] = nx_pair(p + i * p_stride, 4 * p_stride);
    nx_transpose_pair(v);
    for (int i = 0; i < 4; i++) _mm256_storeu_ps(q + i * q_stride, v[i]);
}
NX_INLINE void f32_transpose_wide(const float *p, ptrdiff_t p_stride, float *q, ptrdiff_t q_stride)
{
    __m256 v[4];
    for (int i = 0; i < 4; i++) v[i] = _mm256_loadu_ps(p + i * p_stride);
    nx_transpose_pair(v);
    for (int i = 0; i < 4; i++) nx_unpair(q + i * q_stride, 4 * q_stride, v[i]);
}
NX_INLINE void f64_transpose_tall(const double *p, ptrdiff_t p_stride, double *q,
                                  ptrdiff_t q_stride)
{
    __m256d a = nx_pair_d(p, 2 * p_stride), b = nx_pair_d(p + p_stride, 2 * p_stride);
    _mm256_storeu_pd(q, _mm256_unpacklo_pd(a, b));
    _mm256_storeu_pd(q + q_stride, _mm256_unpackhi_pd(a, b));
}
NX_INLINE void f64_transpose_wide(const double *p, ptrdiff_t p_stride, double *q,
                                  ptrdiff_t q_stride)
{
    __m256d a = _mm256_loadu_pd(p), b = _mm256_loadu_pd(p + p_stride);
    nx_unpair_d(q, 2 * q_stride, _mm256_unpacklo_pd(a, b));
    nx_unpair_d(q + q_stride, 2 * q_stride, _mm256_unpackhi_pd(a, b));
}

NX_INLINE float nx_sum8(__m256 v)
{ return nx_sum4(_mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1))); }
NX_INLINE double nx_sum4d(__m256d v)
{ return nx_sum2(_mm_add_pd(_mm256_castpd256_pd128(v), _mm256_extractf128_pd(v, 1))); }
#endif

/* Any vector register, of which AVX-512 has twice as many. */
#if defined(__AVX512F__)
#define NX_VECTOR_REGISTER "v"
#else
#define NX_VECTOR_REGISTER "x"
#endif

#if defined(__AVX512F__)

NX_X86(f32, float, __m512, _mm512, ps, 16)
NX_X86(f64, double, __m512d, _mm512, pd, 8)
#define NX_MASK(n, W) ((n) >= (W) ? (1u << (W)) - 1u : (n) <= 0 ? 0u : (1u << (n)) - 1u)
#define NX_AVX512(E, T, V, S, M)                                                                 \
    NX_INLINE V E##_mul_add(V a, V b, V c) { return _mm512_fmadd_##S(a, b, c); }                 \
    NX_INLINE V E##_mul_add_once(V a, V b, V c) { return _mm512_fmadd_##S(a, b, c); }            \
    NX_INLINE V E##_keep_positive(V a, V b)                                                      \
    {                                                                                            \
        return _mm512_maskz_mov_##S(_mm512_cmp_##S##_mask(b, _mm512_setzero_##S(), _CMP_NLE_UQ), \
                                    a);                                                          \
    }                                                                                            \
    NX_INLINE V E##_load_n(const T *p, ptrdiff_t n, V fill)                                      \
    { return _mm512_mask_loadu_##S(fill, (M)NX_MASK(n, E##_W), p); }                             \
    NX_INLINE void E##_store_n(T *p, ptrdiff_t n, V v)                                           \
    { _mm512_mask_storeu_##S(p, (M)NX_MASK(n, E##_W), v); }
NX_AVX512(f32, float, __m512, ps, __mmask16)
NX_AVX512(f64, double, __m512d, pd, __mmask8)
NX_INLINE float f32_total(__m512 v)
{ return nx_sum8(_mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1))); }
NX_INLINE double f64_total(__m512d v)
{ return nx_sum4d(_mm256_add_pd(_mm512_castpd512_pd256(v), _mm512_extractf64x4_pd(v, 1))); }

NX_INLINE __m512 nx_from_f16(__m256i h) { return _mm512_cvtph_ps(h); }
NX_INLINE __m256i nx_to_f16(__m512 v)
{ return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
NX_INLINE __m512 nx_from_bf16(__m256i h)
{ return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16)); }
NX_INLINE __m256i nx_to_bf16(__m512 v)
{
    /* Half of what is cut off, or a hair less where the last bit kept is 0; a NaN is made quiet
     * instead, lest it become infinite. */
    __m512i u = _mm512_castps_si512(v),
            odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    __m512i quiet = _mm512_or_si512(u, _mm512_set1_epi32(0x400000));
    u = _mm512_mask_blend_epi32(_mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), rounded, quiet);
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(u, 16));
}
#define NX_HALF(E)                                                                               \
    NX_INLINE __m512 E##_load(const nx_##E *p)                                                   \
    { return nx_from_##E(_mm256_loadu_si256((const __m256i *)p)); }                              \
    NX_INLINE void E##_store(nx_##E *p, __m512 v)                                                \
    { _mm256_storeu_si256((__m256i *)p, nx_to_##E(v)); }                                         \
    NX_INLINE void E##_stream(nx_##E *p, __m512 v)                                               \
    { _mm256_stream_si256((__m256i *)p, nx_to_##E(v)); }                                         \
    NX_INLINE __m512 E##_load_n(const nx_##E *p, ptrdiff_t n, __m512 fill)                       \
    {                                                                                            \
        __mmask16 mask = (__mmask16)NX_MASK(n, f32_W);                                           \
        return _mm512_mask_blend_ps(mask, fill, nx_from_##E(_mm256_maskz_loadu_epi16(mask, p))); \
    }                                                                                            \
    NX_INLINE void E##_store_n(nx_##E *p, ptrdiff_t n, __m512 v)                                 \
    { _mm256_mask_storeu_epi16(p, (__mmask16)NX_MASK(n, f32_W), nx_to_##E(v)); }
NX_HALF(f16)
NX_HALF(bf16)

#elif defined(__AVX2__)

NX_X86(f32, float, __m256, _mm256, ps, 8)
NX_X86(f64, double, __m256d, _mm256, pd, 4)
/* The 8 (or 4) words from position 8 - n (or 4 - n) on are a mask for the first n lanes. */
static const int32_t nx_mask32[16] = {-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0};
static const int64_t nx_mask64[8] = {-1, -1, -1, -1, 0, 0, 0, 0};
#define NX_AVX2(E, T, V, S, MASKS)                                                                \
    NX_INLINE __m256i E##_mask(ptrdiff_t n)                                                       \
    {                                                                                             \
        n = n < 0 ? 0 : n > E##_W ? E##_W : n;                                                    \
        return _mm256_loadu_si256((const __m256i *)(MASKS + E##_W - n));                          \
    }                                                                                             \
    NX_INLINE V E##_mul_add(V a, V b, V c) { return _mm256_fmadd_##S(a, b, c); }                  \
    NX_INLINE V E##_mul_add_once(V a, V b, V c) { return _mm256_fmadd_##S(a, b, c); }             \
    NX_INLINE V E##_keep_positive(V a, V b)                                                       \
    { return _mm256_and_##S(a, _mm256_cmp_##S(b, _mm256_setzero_##S(), _CMP_NLE_UQ)); }           \
    NX_INLINE V E##_load_n(const T *p, ptrdiff_t n, V fill)                                       \
    {                                                                                             \
        __m256i mask = E##_mask(n);                                                               \
        return _mm256_blendv_##S(fill, _mm256_maskload_##S(p, mask), _mm256_castsi256_##S(mask)); \
    }                                                                                             \
    NX_INLINE void E##_store_n(T *p, ptrdiff_t n, V v) { _mm256_maskstore_##S(p, E##_mask(n), v); }
NX_AVX2(f32, float, __m256, ps, nx_mask32)
NX_AVX2(f64, double, __m256d, pd, nx_mask64)
NX_INLINE float f32_total(__m256 v) { return nx_sum8(v); }
NX_INLINE double f64_total(__m256d v) { return nx_sum4d(v); }

NX_INLINE __m256 nx_from_f16(__m128i h) { return _mm256_cvtph_ps(h); }
NX_INLINE __m128i nx_to_f16(__m256 v) { return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }
NX_INLINE __m256 nx_from_bf16(__m128i h)
{ return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16)); }
NX_INLINE __m128i nx_to_bf16(__m256 v)
{
    /* Half of what is cut off, or a hair less where the last bit kept is 0; a NaN is made quiet
     * instead, lest it become infinite. */
    __m256i u = _mm256_castps_si256(v),
            odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    __m256i quiet = _mm256_or_si256(u, _mm256_set1_epi32(0x400000));
    u = _mm256_srli_epi32(
        _mm256_blendv_epi8(rounded, quiet, _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q))),
        16);
    return _mm_packus_epi32(_mm256_castsi256_si128(u), _mm256_extracti128_si256(u, 1));
}
#define NX_HALF(E)                                                                        \
    NX_INLINE __m256 E##_load(const nx_##E *p)                                            \
    { return nx_from_##E(_mm_loadu_si128((const __m128i *)p)); }                          \
    NX_INLINE void E##_store(nx_##E *p, __m256 v)                                         \
    { _mm_storeu_si128((__m128i *)p, nx_to_##E(v)); }                                     \
    NX_INLINE void E##_stream(nx_##E *p, __m256 v)                                        \
    { _mm_stream_si128((__m128i *)p, nx_to_##E(v)); }                                     \
    NX_INLINE __m256 E##_load_n(const nx_##E *p, ptrdiff_t n, __m256 fill)                \
    {                                                                                     \
        nx_##E lanes[8] = {{0}};                                                          \
        for (ptrdiff_t i = 0; i < n && i < 8; i++) lanes[i].bits = p[i].bits;             \
        return _mm256_blendv_ps(fill, E##_load(lanes), _mm256_castsi256_ps(f32_mask(n))); \
    }                                                                                     \
    NX_INLINE void E##_store_n(nx_##E *p, ptrdiff_t n, __m256 v)                          \
    {                                                                                     \
        nx_##E lanes[8];                                                                  \
        E##_store(lanes, v);                                                              \
        for (ptrdiff_t i = 0; i < n && i < 8; i++) p[i].bits = lanes[i].bits;             \
    }
NX_HALF(f16)
NX_HALF(bf16)

#else

NX_X86(f32, float, __m128, _mm, ps, 4)
NX_X86(f64, double, __m128d, _mm, pd, 2)
NX_INLINE __m128 f32_mul_add(__m128 a, __m128 b, __m128 c)
{ return _mm_add_ps(_mm_mul_ps(a, b), c); }
NX_INLINE __m128d f64_mul_add(__m128d a, __m128d b, __m128d c)
{ return _mm_add_pd(_mm_mul_pd(a, b), c); }
NX_INLINE __m128 f32_mul_add_once(__m128 a, __m128 b, __m128 c)
{
    __m128 a_high = _mm_movehl_ps(a, a), b_high = _mm_movehl_ps(b, b), c_high = _mm_movehl_ps(c, c);
    __m128d low = _mm_add_pd(_mm_mul_pd(_mm_cvtps_pd(a), _mm_cvtps_pd(b)), _mm_cvtps_pd(c));
    __m128d high =
        _mm_add_pd(_mm_mul_pd(_mm_cvtps_pd(a_high), _mm_cvtps_pd(b_high)), _mm_cvtps_pd(c_high));
    return _mm_movelh_ps(_mm_cvtpd_ps(low), _mm_cvtpd_ps(high));
}
NX_INLINE __m128d f64_mul_add_once(__m128d a, __m128d b, __m128d c) { return f64_mul_add(a, b, c); }
NX_INLINE __m128 f32_keep_positive(__m128 a, __m128 b)
{ return _mm_and_ps(a, _mm_cmpnle_ps(b, _mm_setzero_ps())); }
NX_INLINE __m128d f64_keep_positive(__m128d a, __m128d b)
{ return _mm_and_pd(a, _mm_cmpnle_pd(b, _mm_setzero_pd())); }
NX_INLINE float f32_total(__m128 v) { return nx_sum4(v); }
NX_INLINE double f64_total(__m128d v) { return nx_sum2(v); }
#define NX_PARTIAL_BY_ELEMENT
#define NX_SQUARES_ONLY

#endif

#else /* not x86-64 */

#if defined(__GNUC__)
/* GCC's and clang's own vectors: + - * work on them, and 16 bytes fit NEON, VSX and the like. */
typedef float f32_t __attribute__((vector_size(16)));
typedef double f64_t __attribute__((vector_size(16)));
typedef int32_t nx_ints __attribute__((vector_size(16)));
typedef int64_t nx_longs __attribute__((vector_size(16)));
enum { f32_W = 4, f64_W = 2 };
NX_INLINE f32_t f32_greater(f32_t a, f32_t b)
{
    nx_ints first = a > b;
    return (f32_t)(((nx_ints)a & first) | ((nx_ints)b & ~first));
}
NX_INLINE f64_t f64_greater(f64_t a, f64_t b)
{
    nx_longs first = a > b;
    return (f64_t)(((nx_longs)a & first) | ((nx_longs)b & ~first));
}
NX_INLINE f32_t f32_keep_positive(f32_t a, f32_t b)
{ return (f32_t)((nx_ints)a & ~(b <= (f32_t){0})); }
NX_INLINE f64_t f64_keep_positive(f64_t a, f64_t b)
{ return (f64_t)((nx_longs)a & ~(b <= (f64_t){0})); }
NX_INLINE float f32_total(f32_t v) { return (v[0] + v[2]) + (v[1] + v[3]); }
NX_INLINE double f64_total(f64_t v) { return v[0] + v[1]; }
#else
typedef float f32_t;
typedef double f64_t;
enum { f32_W = 1, f64_W = 1 };
NX_INLINE float f32_greater(float a, float b) { return a > b ? a : b; }
NX_INLINE double f64_greater(double a, double b) { return a > b ? a : b; }
NX_INLINE float f32_keep_positive(float a, float b) { return b <= 0 ? 0 : a; }
NX_INLINE double f64_keep_positive(double a, double b) { return b <= 0 ? 0 : a; }
NX_INLINE float f32_total(f32_t v) { return v; }
NX_INLINE double f64_total(f64_t v) { return v; }
#endif

enum { f32_SIDE = 1, f64_SIDE = 1 };
#define NX_TRANSPOSE1(E, T)                                                                       \
    NX_INLINE void E##_transpose_square(const T *p, ptrdiff_t p_stride, T *q, ptrdiff_t q_stride) \
    {                                                                                             \
        (void)p_stride, (void)q_stride;                                                           \
        *q = *p;                                                                                  \
    }
NX_TRANSPOSE1(f32, float)
NX_TRANSPOSE1(f64, double)

#define NX_GENERIC(E, T)                                                 \
    NX_INLINE E##_t E##_load(const T *p)                                 \
    {                                                                    \
        E##_t v;                                                         \
        memcpy(&v, p, sizeof v);                                         \
        return v;                                                        \
    }                                                                    \
    NX_INLINE void E##_store(T *p, E##_t v) { memcpy(p, &v, sizeof v); } \
    NX_INLINE void E##_stream(T *p, E##_t v) { E##_store(p, v); }        \
    NX_INLINE E##_t E##_splat(T a) { return a - (E##_t){0}; }            \
    NX_INLINE E##_t E##_add(E##_t a, E##_t b) { return a + b; }          \
    NX_INLINE E##_t E##_sub(E##_t a, E##_t b) { return a - b; }          \
    NX_INLINE E##_t E##_mul(E##_t a, E##_t b) { return a * b; }
NX_GENERIC(f32, float)
NX_GENERIC(f64, double)

#if defined(__aarch64__) && defined(__GNUC__)
#include <arm_neon.h>
NX_INLINE f32_t f32_mul_add(f32_t a, f32_t b, f32_t c)
{ return (f32_t)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b); }
NX_INLINE f64_t f64_mul_add(f64_t a, f64_t b, f64_t c)
{ return (f64_t)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b); }
#else
NX_INLINE f32_t f32_mul_add(f32_t a, f32_t b, f32_t c) { return a * b + c; }
NX_INLINE f64_t f64_mul_add(f64_t a, f64_t b, f64_t c) { return a * b + c; }
#endif
NX_INLINE f32_t f32_mul_add_once(f32_t a, f32_t b, f32_t c)
{
    float x[f32_W], y[f32_W], z[f32_W];
    f32_store(x, a), f32_store(y, b), f32_store(z, c);
    for (int i = 0; i < f32_W; i++) x[i] = (float)((double)x[i] * y[i] + z[i]);
    return f32_load(x);
}
NX_INLINE f64_t f64_mul_add_once(f64_t a, f64_t b, f64_t c) { return f64_mul_add(a, b, c); }
#define NX_PARTIAL_BY_ELEMENT
#define NX_SQUARES_ONLY

#endif

#ifdef NX_SQUARES_ONLY
enum { f32_TALL = f32_SIDE, f64_TALL = f64_SIDE };
#define f32_transpose_tall f32_transpose_square
#define f64_transpose_tall f64_transpose_square
#define f32_transpose_wide f32_transpose_square
#define f64_transpose_wide f64_transpose_square
#endif

#ifdef NX_PARTIAL_BY_ELEMENT
/* Too long to be inlined at the end of every loop. */
#define NX_PARTIAL(E, T)                                                \
    NX_OUTLINE E##_t E##_load_n(const T *p, ptrdiff_t n, E##_t fill)    \
    {                                                                   \
        T lanes[E##_W];                                                 \
        E##_store(lanes, fill);                                         \
        for (ptrdiff_t i = 0; i < n && i < E##_W; i++) lanes[i] = p[i]; \
        return E##_load(lanes);                                         \
    }                                                                   \
    NX_OUTLINE void E##_store_n(T *p, ptrdiff_t n, E##_t v)             \
    {                                                                   \
        T lanes[E##_W];                                                 \
        E##_store(lanes, v);                                            \
        for (ptrdiff_t i = 0; i < n && i < E##_W; i++) p[i] = lanes[i]; \
    }
NX_PARTIAL(f32, float)
NX_PARTIAL(f64, double)

/* Where the instruction set has no conversions of 16-bit floats, integer operations on the bits of
 * a float. */
NX_INLINE uint32_t nx_bits(float x)
{
    uint32_t u;
    memcpy(&u, &x, sizeof u);
    return u;
}
NX_INLINE float nx_float(uint32_t u)
{
    float x;
    memcpy(&x, &u, sizeof x);
    return x;
}
NX_INLINE float nx_from_bf16(uint16_t h) { return nx_float((uint32_t)h << 16); }
NX_INLINE uint16_t nx_to_bf16(float x)
{
    uint32_t u = nx_bits(x);
    /* Half of what is cut off, or a hair less where the last bit kept is 0; a NaN is made quiet
     * instead, lest it become infinite. */
    return (uint16_t)((x == x ? u + 0x7fff + (u >> 16 & 1) : u | 0x400000) >> 16);
}
NX_INLINE float nx_from_f16(uint16_t h)
{
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, rest = (uint32_t)(h & 0x7fff) << 13;
    /* The exponent's bias differs by 112; multiplied by 2^112, numbers too small for a normal
     * float16 come out right too. */
    float x = nx_float(rest) * 0x1p112f;
    return nx_float(sign | ((h & 0x7c00) == 0x7c00 ? rest | 0x7f800000 : nx_bits(x)));
}
NX_INLINE uint16_t nx_to_f16(float x)
{
    uint32_t u = nx_bits(x), sign = u >> 16 & 0x8000;
    u &= 0x7fffffff;
    if (u > 0x7f800000) u = 0x7e00; /* NaN */
    else if (u >= 0x47800000) u = 0x7c00; /* 2^16 and above: infinite */
    else if (u < 0x38800000)
        u = nx_bits(nx_float(u) + 0.5f) -
            nx_bits(0.5f); /* below 2^-14: the addition rounds to 2^-24 */
    else u = (u - (112u << 23) + 0xfff + (u >> 13 & 1)) >> 13;
    return (uint16_t)(sign | u);
}
#define NX_HALF(E)                                                                           \
    NX_OUTLINE f32_t E##_load_n(const nx_##E *p, ptrdiff_t n, f32_t fill)                    \
    {                                                                                        \
        float lanes[f32_W];                                                                  \
        f32_store(lanes, fill);                                                              \
        for (ptrdiff_t i = 0; i < n && i < f32_W; i++) lanes[i] = nx_from_##E(p[i].bits);    \
        return f32_load(lanes);                                                              \
    }                                                                                        \
    NX_OUTLINE void E##_store_n(nx_##E *p, ptrdiff_t n, f32_t v)                             \
    {                                                                                        \
        float lanes[f32_W];                                                                  \
        f32_store(lanes, v);                                                                 \
        for (ptrdiff_t i = 0; i < n && i < f32_W; i++) p[i].bits = nx_to_##E(lanes[i]);      \
    }                                                                                        \
    NX_INLINE f32_t E##_load(const nx_##E *p) { return E##_load_n(p, f32_W, f32_splat(0)); } \
    NX_INLINE void E##_store(nx_##E *p, f32_t v) { E##_store_n(p, f32_W, v); }               \
    NX_INLINE void E##_stream(nx_##E *p, f32_t v) { E##_store_n(p, f32_W, v); }
NX_HALF(f16)
NX_HALF(bf16)
#endif

#if defined(__GNUC__) && defined(NX_VECTOR_REGISTER)
#define NX_HOLD(E)                               \
    NX_INLINE E##_t E##_hold(E##_t v)            \
    {                                            \
        __asm__("" : "+" NX_VECTOR_REGISTER(v)); \
        return v;                                \
    }
#else
#define NX_HOLD(E) \
    NX_INLINE E##_t E##_hold(E##_t v) { return v; }
#endif
NX_HOLD(f32)
NX_HOLD(f64)

/* One name for all types. Both kinds of pointer are listed, for compilers that tell them apart. */
#define NX_BY_POINTER(p, name)      \
    _Generic((p),                   \
        float *: f32_##name,        \
        const float *: f32_##name,  \
        double *: f64_##name,       \
        const double *: f64_##name, \
        nx_f16 *: f16_##name,       \
        const nx_f16 *: f16_##name, \
        nx_bf16 *: bf16_##name,     \
        const nx_bf16 *: bf16_##name)
#define NX_BY_VECTOR(v, name) _Generic((v), f32_t: f32_##name, f64_t: f64_##name)
#define load(p) NX_BY_POINTER(p, load)(p)
#define load_n(p, n, fill) NX_BY_POINTER(p, load_n)(p, n, fill)
#define store(p, v) NX_BY_POINTER(p, store)(p, v)
#define store_n(p, n, v) NX_BY_POINTER(p, store_n)(p, n, v)
#define stream(p, v) NX_BY_POINTER(p, stream)(p, v)
#define splat(a) _Generic((a), float: f32_splat, double: f64_splat)(a)
#define add(a, b) NX_BY_VECTOR(a, add)(a, b)
#define sub(a, b) NX_BY_VECTOR(a, sub)(a, b)
#define mul(a, b) NX_BY_VECTOR(a, mul)(a, b)
#define mul_add(a, b, c) NX_BY_VECTOR(a, mul_add)(a, b, c)
#define mul_add_once(a, b, c) NX_BY_VECTOR(a, mul_add_once)(a, b, c)
#define hold(a) NX_BY_VECTOR(a, hold)(a)
#define greater(a, b) NX_BY_VECTOR(a, greater)(a, b)
#define keep_positive(a, b) NX_BY_VECTOR(a, keep_positive)(a, b)
#define total(v) NX_BY_VECTOR(v, total)(v)
#define transpose_square(p, p_stride, q, q_stride)                                            \
    _Generic((p), const float *: f32_transpose_square, const double *: f64_transpose_square)( \
        p, p_stride, q, q_stride)
#define transpose_tall(p, p_stride, q, q_stride)                                          \
    _Generic((p), const float *: f32_transpose_tall, const double *: f64_transpose_tall)( \
        p, p_stride, q, q_stride)
#define transpose_wide(p, p_stride, q, q_stride)                                          \
    _Generic((p), const float *: f32_transpose_wide, const double *: f64_transpose_wide)( \
        p, p_stride, q, q_stride)
#define root(a) _Generic((a), float: sqrtf, double: sqrt)(a)

#endif
