/* Which instruction sets were built, and which of them this machine can run. */
#include "kernels.h"

#define NX_STRING_(x) #x
#define NX_STRING(x) NX_STRING_(x)

static int always(void) { return 1; }

#define NX_DECLARE(isa)                                                                      \
    extern const nx_kernels nx_##isa##_f32, nx_##isa##_f64, nx_##isa##_f16, nx_##isa##_bf16; \
    extern const nx_kernels nx_stream_##isa##_f32, nx_stream_##isa##_f64, nx_stream_##isa##_f16, nx_stream_##isa##_bf16;
#define NX_TABLES(isa)                                                                                     \
    {                                                                                                      \
        {&nx_##isa##_f32, &nx_##isa##_f64, &nx_##isa##_f16, &nx_##isa##_bf16},                             \
        {&nx_stream_##isa##_f32, &nx_stream_##isa##_f64, &nx_stream_##isa##_f16, &nx_stream_##isa##_bf16}, \
    }

NX_DECLARE(baseline)

#ifdef NX_X86_VARIANTS

NX_DECLARE(avx2)
NX_DECLARE(avx512)

#if defined(_MSC_VER) && !defined(__clang__)

#include <immintrin.h>
#include <intrin.h>

/* Leaf 7 of cpuid tells what the processor has, xgetbv which registers the operating system saves. */
static int has(int ebx_bits, int ecx1_bits, unsigned long long saved)
{
    int leaf1[4], leaf7[4];
    __cpuid(leaf1, 1);
    if (!(leaf1[2] & (1 << 27)) || (_xgetbv(0) & saved) != saved) return 0;
    __cpuidex(leaf7, 7, 0);
    return (leaf7[1] & ebx_bits) == ebx_bits && (leaf1[2] & ecx1_bits) == ecx1_bits;
}
static int avx2(void) { return has(1 << 5, 1 << 12, 0x6); }
static int avx512(void) { return avx2() && has((int)(1u << 16 | 1u << 17 | 1u << 30 | 1u << 31), 0, 0xe6); }

#else

/* GCC's and clang's built-ins ask cpuid and xgetbv both. */
static int avx2(void)
{
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}
static int avx512(void)
{
    return avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl");
}

#endif
#endif

const nx_isa nx_isas[] = {
    {"baseline", always, NX_TABLES(baseline)},
#ifdef NX_X86_VARIANTS
    {"avx2", avx2, NX_TABLES(avx2)},
    {"avx512", avx512, NX_TABLES(avx512)},
#endif
};
const int nx_isa_count = sizeof nx_isas / sizeof *nx_isas;

const char *nx_compiler(void)
{
#if defined(__clang__)
    return "clang " __clang_version__;
#elif defined(__GNUC__)
    return "gcc " __VERSION__;
#elif defined(_MSC_VER)
    return "msvc " NX_STRING(_MSC_VER);
#else
    return "unknown";
#endif
}
