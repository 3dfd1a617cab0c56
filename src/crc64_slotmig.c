/* crc64_slotmig.c -- a part of crc64.c: the same sum three to six times as fast, where the processor
 * multiplies without carry.
 *
 * Everything that a migration moves is summed twice, by who sends and by who receives; by tables
 * that was a seventh of the time of the snapshot's thread.
 *
 * From: V. Gopal et al., Fast CRC Computation for Generic Polynomials Using PCLMULQDQ
 * Instruction, Intel, 2009. The bytes are a polynomial, first byte first, lowest bit first.
 * 16 of them that stand D bits before others may be added to these once multiplied by x^D,
 * modulo the CRC's own polynomial: so four lanes of 16 bytes fold what comes, 64 bytes at a
 * time, and in the end each other. The sum of what is left is the sum of all. With bits
 * in this order the product of two words of 64 bits is one bit short: hence the D-1.
 *
 * Any thread, once crc64_init() was called; it is called before there are threads.
 *
 * Copyright (c) 2026, the authors. Licensed under the GNU Affero General
 * Public License v3 (AGPLv3), see LICENSE. */

#if defined(__x86_64__) && (defined(__clang__) || __GNUC__ >= 6)

#include <wmmintrin.h>

#define FOLD_LANES 4
#define FOLD_BYTES (16*FOLD_LANES)
#define FOLD_MIN 256            /* bytes; fewer are not worth it */

static uint64_t fold_far[2], fold_near[2];      /* factors of the first and the second 8 bytes, to 64 and to 16 bytes on */
static int can_fold;

/* x^n modulo the polynomial, bits reversed. */
static uint64_t powerOfX(unsigned n) {
    uint64_t r = UINT64_C(1) << 63, polynomial = crc_reflect(POLY,64);
    while (n--) r = (r >> 1) ^ (r & 1 ? polynomial : 0);
    return r;
}

static void foldInit(void) {
    fold_far[0] = powerOfX(8*FOLD_BYTES+64-1);
    fold_far[1] = powerOfX(8*FOLD_BYTES-1);
    fold_near[0] = powerOfX(128+64-1);
    fold_near[1] = powerOfX(128-1);
    __builtin_cpu_init();
    can_fold = __builtin_cpu_supports("pclmul") != 0;
}

__attribute__((target("pclmul")))
static inline __m128i foldInto(__m128i from, __m128i into, __m128i factors) {
    __m128i first = _mm_clmulepi64_si128(from,factors,0x00), second = _mm_clmulepi64_si128(from,factors,0x11);
    return _mm_xor_si128(into,_mm_xor_si128(first,second));
}

/* Of at least FOLD_BYTES bytes. */
__attribute__((target("pclmul")))
static uint64_t crc64Folded(uint64_t crc, const unsigned char *s, uint64_t l) {
    const __m128i far = _mm_loadu_si128((const __m128i*)fold_far), near = _mm_loadu_si128((const __m128i*)fold_near);
    __m128i lane[FOLD_LANES];
    unsigned char rest[16];
    for (int i = 0; i < FOLD_LANES; i++) lane[i] = _mm_loadu_si128((const __m128i*)s+i);
    lane[0] = _mm_xor_si128(lane[0],_mm_set_epi64x(0,(long long)crc));
    for (s += FOLD_BYTES, l -= FOLD_BYTES; l >= FOLD_BYTES; s += FOLD_BYTES, l -= FOLD_BYTES)
        for (int i = 0; i < FOLD_LANES; i++) lane[i] = foldInto(lane[i],_mm_loadu_si128((const __m128i*)s+i),far);
    for (int i = 1; i < FOLD_LANES; i++) lane[i] = foldInto(lane[i-1],lane[i],near);
    _mm_storeu_si128((__m128i*)rest,lane[FOLD_LANES-1]);
    crc = crcspeed64native(crc64_table,0,rest,sizeof(rest));
    return crcspeed64native(crc64_table,crc,(void*)s,l);
}

#define FOLDS(l) ((l) >= FOLD_MIN && can_fold)

#else

#define foldInit()
#define FOLDS(l) 0
#define crc64Folded(crc,s,l) 0

#endif
