/* Which instruction sets were built, and which of them this machine can run. */
#include "kernels.h"

#define NX_STRING_(x) #x
#define NX_STRING(x) NX_STRING_(x)

static int always(void) { return 1; }

#define NX_DECLARE(isa)                                                                          \
    extern const nx_kernels nx_##isa##_f32, nx_##isa##_f64, nx_##isa##_f16, nx_##isa##_bf16;     \
    extern const nx_kernels nx_stream_##isa##_f32, nx_stream_##isa##_f64, nx_stream_##isa##_f16, \
        nx_stream_##isa##_bf16;
#define NX_TABLES(isa)                                                           \
    {                                                                            \
        {&nx_##isa##_f32, &nx_##isa##_f64, &nx_##isa##_f16, &nx_##isa##_bf16},   \
        {&nx_stream_##isa##_f32, &nx_stream_##isa##_f64, &nx_stream_##isa##_f16, \
         &nx_stream_##isa##_bf16},                                               \
    }

NX_DECLARE(baseline)

#ifdef NX_AVX2

NX_DECLARE(avx2)
NX_DECLARE(avx512)

/* GCC's and clang's __builtin_cpu_supports does not know every feature in every version, so cpuid
 * itself is asked. */
#if defined(_MSC_VER) && !defined(__clang__)
#include <immintrin.h>
#include <intrin.h>
static void cpuid_part(unsigned leaf, unsigned part, unsigned registers[4])
{ __cpuidex((int *)registers, (int)leaf, (int)part); }
static unsigned saved(void) { return (unsigned)_xgetbv(0); }
#else
#include <cpuid.h>
static void cpuid_part(unsigned leaf, unsigned part, unsigned registers[4])
{ __cpuid_count(leaf, part, registers[0], registers[1], registers[2], registers[3]); }
static unsigned saved(void)
{
    unsigned low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return low;
}
#endif

static void cpuid(unsigned leaf, unsigned registers[4]) { cpuid_part(leaf, 0, registers); }

/* Where cpuid tells what: leaf, register, bit. */
enum { EBX = 1, ECX = 2 };
#define NX_avx2 7, EBX, 5
#define NX_avx512bw 7, EBX, 30
#define NX_avx512cd 7, EBX, 28
#define NX_avx512dq 7, EBX, 17
#define NX_avx512f 7, EBX, 16
#define NX_avx512vl 7, EBX, 31
#define NX_bmi 7, EBX, 3
#define NX_bmi2 7, EBX, 8
#define NX_f16c 1, ECX, 29
#define NX_fma 1, ECX, 12
#define NX_lzcnt 0x80000001, ECX, 5
#define NX_movbe 1, ECX, 22
#define NX_osxsave 1, ECX, 27

/* Leaf 4 (Intel; AMD has the same at 0x8000001d) describes one cache after the other: its type (1
 * for data, 2 for instructions, 3 for both) and level, then ways, partitions, line size and sets,
 * each less one. */
static ptrdiff_t cache(int level)
{
    static const unsigned leaves[] = {4, 0x8000001d};
    for (int i = 0; i < 2; i++) {
        unsigned registers[4], leaf = leaves[i];
        cpuid(leaf & 0x80000000, registers);
        if (registers[0] < leaf) continue;
        for (unsigned which = 0; which < 16; which++) {
            cpuid_part(leaf, which, registers);
            if ((registers[0] & 31) == 0) break;
            if ((registers[0] & 31) == 2 || (int)(registers[0] >> 5 & 7) != level) continue;
            return (ptrdiff_t)((registers[1] >> 22) + 1) * ((registers[1] >> 12 & 1023) + 1) *
                   ((registers[1] & 4095) + 1) * ((ptrdiff_t)registers[2] + 1);
        }
    }
    return 0;
}

static int has(unsigned leaf, int reg, int bit)
{
    unsigned registers[4];
    cpuid(leaf & 0x80000000, registers); /* the last leaf of its kind that there is */
    if (registers[0] < leaf) return 0;
    cpuid(leaf, registers);
    return registers[reg] >> bit & 1;
}

/* Whether the operating system keeps these registers for a thread while others run. */
static int saves(unsigned states) { return has(NX_osxsave) && (saved() & states) == states; }

/* setup.py defines NX_AVX2 and NX_AVX512: HAS(feature) for each feature that it tells the compiler
 * to use. */
#define HAS(feature) &&has(NX_##feature)
static int avx2(void) { return saves(0x6) NX_AVX2; }
static int avx512(void) { return saves(0xe6) NX_AVX512; }

#else
static ptrdiff_t cache(int level)
{
    (void)level;
    return 0;
}
#endif

ptrdiff_t nx_cache(int level)
{
    const ptrdiff_t bytes = cache(level);
    if (bytes > 0) return bytes;
    return level == 2 ? 1 << 20 : 1 << 24;
}

const nx_isa nx_isas[] = {
    {"baseline", always, NX_TABLES(baseline)},
#ifdef NX_AVX2
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
