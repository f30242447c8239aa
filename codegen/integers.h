// Dot products of small integers, lane by lane, in the instruction that the machine has for them:
//
//   AVX512-VNNI, AVX-VNNI    vpdpbusd    four unsigned bytes times four signed ones
//   NEON with dot products   sdot        four signed bytes times four signed ones
//   AVX2                     vpmaddwd    two numbers of 16 bits times two (vpmaddubsw adds pairs up in 16 bits, too few)
//   others                   loops
//
// A `Run` holds ELEMENTS numbers, neighbours along k: codes of a weight, or what they are multiplied with.
#pragma once
#include "micro.h"

namespace integers {

using micro::Bits;
using micro::Vec;
using micro::W;
using micro::load;
using micro::store;

typedef int32_t Whole __attribute__((vector_size(4 * W)));

#if (defined(__AVX512VNNI__) && defined(__AVX512BW__)) || (defined(__AVXVNNI__) && !defined(__AVX512F__))
#define LLMCOMP_INTEGER_DOTS 1
typedef int8_t Element;
typedef uint8_t Lane;
constexpr int SHIFT = 128;  // signed codes are met as unsigned ones, so much larger
#elif defined(__AVX2__)
#define LLMCOMP_INTEGER_DOTS 1
typedef int16_t Element;
typedef uint16_t Lane;
constexpr int SHIFT = 0;
#else
#if defined(__ARM_FEATURE_DOTPROD)
#define LLMCOMP_INTEGER_DOTS 1
#else
#define LLMCOMP_INTEGER_DOTS 0
#endif
typedef int8_t Element;
typedef uint8_t Lane;
constexpr int SHIFT = 0;
#endif

constexpr int64_t PER = 4 / sizeof(Element);  // numbers that share a lane
constexpr int64_t ELEMENTS = W * PER;
constexpr int BITS = 8 * sizeof(Element);

typedef Lane Run __attribute__((vector_size(4 * W)));
typedef uint8_t Octets __attribute__((vector_size(ELEMENTS)));

// acc[lane] += the products of the numbers of that lane: `w` from `codes`, `x` signed.
INLINE Whole dot(Run w, Run x, Whole acc) {
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
    __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(w), "v"(x));
    return acc;
#elif defined(__AVXVNNI__)
    __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(acc) : "x"(w), "x"(x));
    return acc;
#elif defined(__AVX2__)
    Whole sums;
    __asm__("vpmaddwd %2, %1, %0" : "=x"(sums) : "x"(w), "x"(x));
    return acc + sums;
#elif defined(__ARM_FEATURE_DOTPROD)
    __asm__("sdot %0.4s, %1.16b, %2.16b" : "+w"(acc) : "w"(w), "w"(x));
    return acc;
#else
    for (int64_t i = 0; i < ELEMENTS; ++i) acc[i / PER] += int32_t(int8_t(w[i])) * int8_t(x[i]);
    return acc;
#endif
}

// ---- reading codes --------------------------------------------------------------------------------------------------

INLINE Run widened(Octets bytes, bool negative) {
    Run v;
#if LLMCOMP_INTEGER_DOTS && defined(__AVX2__) && !defined(__AVX512VNNI__) && !defined(__AVXVNNI__)
    if (negative) __asm__("vpmovsxbw %1, %0" : "=x"(v) : "x"(bytes));
    else __asm__("vpmovzxbw %1, %0" : "=x"(v) : "x"(bytes));
#else
    __builtin_memcpy(&v, &bytes, sizeof(v));
    if (negative && SHIFT) v ^= Lane(SHIFT);
#endif
    return v;
}

// ELEMENTS signed codes, each SHIFT more than it is worth.
INLINE Run codes(const int8_t* p) { return widened(load<Octets>(p), true); }
// The first `count` of them; those behind stand for any number.
INLINE Run codes_part(const int8_t* p, int64_t count) { return widened(micro::load_part<Octets>(p, count), true); }
// ELEMENTS bytes as they are.
INLINE Run bytes(const uint8_t* p) { return widened(load<Octets>(p), false); }

// The lower and the upper 4 bits of every byte.
INLINE Run lower(Run bytes) { return bytes & Lane(15); }
INLINE Run upper(Run bytes) {
    typedef uint16_t Pairs __attribute__((vector_size(4 * W)));
    return (Run)((Pairs)bytes >> 4) & Lane(15);
}

// The numbers of a table of bytes at codes of 4 bits.
INLINE Run look_up(const uint8_t (&numbers)[16], Run codes) {
#if LLMCOMP_INTEGER_DOTS && (defined(__AVX2__) || defined(__ARM_NEON))
    typedef uint8_t Whole16 __attribute__((vector_size(4 * W)));
    Whole16 table, v;
    for (int64_t i = 0; i < 4 * W; ++i) table[i] = numbers[i % 16];
#if defined(__ARM_NEON)
    __asm__("tbl %0.16b, {%1.16b}, %2.16b" : "=w"(v) : "w"(table), "w"(codes));
#elif defined(__AVX512BW__)
    __asm__("vpshufb %1, %2, %0" : "=v"(v) : "v"(codes), "v"(table));
#else
    __asm__("vpshufb %1, %2, %0" : "=x"(v) : "x"(codes), "x"(table));
#endif
    return (Run)v & Lane(255);  // a number of 16 bits has a second byte, which found something too
#else
    Run v;
    for (int64_t i = 0; i < ELEMENTS; ++i) v[i] = numbers[codes[i] & 15];
    return v;
#endif
}

// ---- making integers ------------------------------------------------------------------------------------------------

// The nearest integers, of ties the even one; at most 2 ** 22 on machines without an instruction for it.
INLINE Whole nearest(Vec v) {
    Whole n;
#if defined(__AVX512F__)
    __asm__("vcvtps2dq %1, %0" : "=v"(n) : "v"(v));
#elif defined(__AVX__)
    __asm__("vcvtps2dq %1, %0" : "=x"(n) : "x"(v));
#elif defined(__SSE2__)
    __asm__("cvtps2dq %1, %0" : "=x"(n) : "x"(v));
#elif defined(__aarch64__)
    __asm__("fcvtns %0.4s, %1.4s" : "=w"(n) : "w"(v));
#else
    n = __builtin_convertvector((v + 0x1.8p23f) - 0x1.8p23f, Whole);
#endif
    return n;
}

// W numbers, each cut to the bits of an Element.
INLINE void store_elements(Element* to, Whole numbers) {
    typedef Element Narrow __attribute__((vector_size(W * sizeof(Element))));
#if defined(__AVX512F__)
    Narrow bytes;
    __asm__("vpmovdb %1, %0" : "=v"(bytes) : "v"(numbers));
    store(to, bytes);
#else
    store(to, __builtin_convertvector(numbers, Narrow));
#endif
}

INLINE Run ones() { return Run{} + Lane(1); }

// The sum of all lanes.
INLINE int32_t sum(Whole v) {
    Whole lanes[1] = {v};
    return micro::sums(lanes)[0];
}

}  // namespace integers
