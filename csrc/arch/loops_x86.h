/* Most of what loops.h asks for on x86, where intrinsics for vectors of 256 and 512 bits differ in their prefix. The
   file that includes it has defined V(name), which puts that before a name, and the rest. */
#ifndef OCS_ARCH_LOOPS_X86_H
#define OCS_ARCH_LOOPS_X86_H

INLINE floats load(const float *x) {
    return V(loadu_ps)(x);
}

INLINE void store(float *to, floats x) {
    V(storeu_ps)(to, x);
}

INLINE floats all(float x) {
    return V(set1_ps)(x);
}

INLINE floats add(floats a, floats b) {
    return V(add_ps)(a, b);
}

INLINE floats sub(floats a, floats b) {
    return V(sub_ps)(a, b);
}

INLINE floats mul(floats a, floats b) {
    return V(mul_ps)(a, b);
}

INLINE floats divide(floats a, floats b) {
    return V(div_ps)(a, b);
}

INLINE floats plus_product(floats c, floats a, floats b) {
    return V(fmadd_ps)(a, b, c);
}

INLINE floats minus_product(floats c, floats a, floats b) {
    return V(fnmadd_ps)(a, b, c);
}

INLINE floats smaller(floats a, floats b) {
    return V(min_ps)(a, b);
}

INLINE floats larger(floats a, floats b) {
    return V(max_ps)(a, b);
}

INLINE floats floor_of(floats x) {
    return V(floor_ps)(x);
}

INLINE ints truncated(floats x) {
    return V(cvttps_epi32)(x);
}

INLINE ints nearest(floats x) {
    return V(cvtps_epi32)(x);
}

INLINE ints int_all(int32_t x) {
    return V(set1_epi32)(x);
}

INLINE ints int_add(ints a, ints b) {
    return V(add_epi32)(a, b);
}

INLINE ints int_smaller(ints a, ints b) {
    return V(min_epi32)(a, b);
}

INLINE ints int_larger(ints a, ints b) {
    return V(max_epi32)(a, b);
}

INLINE ints shift_right(ints x, ints by) {
    return V(srav_epi32)(x, by);
}

INLINE ints octave_of(ints bits) {
    return V(srli_epi32)(bits, 20);
}

#endif
