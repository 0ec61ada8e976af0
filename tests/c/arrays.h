/* Random arrays. Each is a block of memory of its own, or NULL where it is empty, so that whatever a kernel reads or
   writes beyond it is found. */
#ifndef OCS_TEST_ARRAYS_H
#define OCS_TEST_ARRAYS_H

#include "kernels.h"

#include <stdlib.h>

static _Thread_local void *arrays[64];
static _Thread_local int array_count;

static inline void *new_array(int64_t count, size_t size) {
    void *array = count > 0 ? calloc((size_t)count, size) : NULL;
    arrays[array_count++] = array;
    return array;
}

static inline void free_arrays(void) {
    while (array_count > 0) {
        free(arrays[--array_count]);
    }
}

static _Thread_local uint64_t seed = 1;

/* 0 .. n - 1 */
static inline int64_t any(int64_t n) {
    seed = seed * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
    return (int64_t)(seed >> 33) % n;
}

static inline float *any_floats(int64_t count) {
    static const float odd[] = {0.0f, -0.0f, INFINITY, -INFINITY, NAN, 1e-42f, -3e38f, 1e30f};
    float *x = new_array(count, sizeof *x);
    const bool some_odd = any(4) == 0;
    for (int64_t i = 0; i < count; ++i) {
        x[i] = some_odd && any(20) == 0 ? odd[any(8)] : (float)(any(4001) - 2000) * 1e-3f;
    }
    return x;
}

static inline uint8_t *any_bytes(int64_t count) {
    uint8_t *x = new_array(count, 1);
    for (int64_t i = 0; i < count; ++i) {
        x[i] = (uint8_t)(any(3) == 0 ? 127 + any(2) + 127 * any(2) : any(256)); /* 127, 128, 254 and 255 more often */
    }
    return x;
}

#endif
