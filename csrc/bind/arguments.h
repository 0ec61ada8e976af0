/* How an operator's function (operators.c, products.c) reads its arguments, says what is wrong with them, and describes
   its results.

   The first thing that is wrong is kept in the call, so that a function can go on as if nothing were until it begins.
 */
#ifndef OCS_ARGUMENTS_H
#define OCS_ARGUMENTS_H

#include "operators.h"

#include <float.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

/* --- Arguments -------------------------------------------------------------------------------- */

static inline const ocs_array *array(const ocs_call *call, int i) {
    return &call->arguments[i].array;
}

/* The elements of argument i. */
static inline const void *data(const ocs_call *call, int i) {
    return array(call, i)->data;
}

static inline int64_t integer(const ocs_call *call, int i) {
    return call->arguments[i].integer;
}

/* A number as float32; beyond its range it becomes Inf, which the entries refuse. */
static inline float number(const ocs_call *call, int i) {
    const double value = call->arguments[i].number;
    return fabs(value) > FLT_MAX ? (float)copysign(INFINITY, value) : (float)value;
}

/* --- What is wrong ---------------------------------------------------------------------------- */

static inline void require(ocs_call *call, bool valid, ocs_status status) {
    if (!valid && call->status == OCS_OK) {
        call->status = status;
    }
}

/* A bad shape, in words. */
__attribute__((format(printf, 3, 4))) static inline void require_shape(ocs_call *call, bool valid, const char *words,
                                                                       ...) {
    if (!valid && call->status == OCS_OK) {
        call->status = OCS_BAD_SHAPE;
        va_list values;
        va_start(values, words);
        vsnprintf(call->error, sizeof call->error, words, values);
        va_end(values);
    }
}

/* Bits as an int; what no grid has is refused, and is 8 from then on. */
static inline int read_bits(ocs_call *call, int i) {
    const ocs_status status = ocs_check_bits(integer(call, i));
    require(call, status == OCS_OK, status);
    return status == OCS_OK ? (int)integer(call, i) : OCS_MAX_BITS;
}

static inline int64_t read_bins(ocs_call *call, int i) {
    const int64_t bins = integer(call, i);
    require(call, bins >= 1 && bins <= OCS_MAX_BINS, OCS_BAD_BINS);
    return bins;
}

/* O, C and K of a weight or of expanded integers [O, C, ...]. */
static inline ocs_shape read_shape(ocs_call *call, const ocs_array *w, int64_t groups) {
    ocs_shape shape = {.G = groups, .O = w->sizes[0], .C = w->sizes[1], .K = 1};
    for (int64_t i = 2; i < w->rank; ++i) {
        shape.K *= w->sizes[i];
    }
    const bool valid = groups == 1 || (groups > 1 && groups <= shape.O && shape.O % groups == 0);
    require_shape(call, valid, "groups must divide the output channels: groups=%lld, %lld channels", (long long)groups,
                  (long long)shape.O);
    shape.G = valid ? groups : 1;
    return shape;
}

/* The shape of a weight [O, C, ...] and, from the length of a plan's array, its splits. */
static inline ocs_shape read_split_shape(ocs_call *call, const ocs_array *w, int64_t groups, const ocs_array *source) {
    ocs_shape shape = read_shape(call, w, groups);
    shape.S = source->numel / shape.G - shape.C;
    require_shape(call, source->numel % shape.G == 0 && shape.S >= 0,
                  "a source of %lld channels does not fit %lld groups of %lld", (long long)source->numel,
                  (long long)shape.G, (long long)shape.C);
    return shape;
}

/* A plan whose offset may be NULL. */
static inline ocs_plan read_plan(ocs_call *call, const ocs_array *source, const ocs_array *parts,
                                 const ocs_array *offset) {
    require(call, parts->numel == source->numel, OCS_BAD_PLAN);
    require(call, offset == NULL || offset->numel == source->numel, OCS_BAD_PLAN);
    return (ocs_plan){source->data, parts->data, offset != NULL ? offset->data : NULL};
}

/* One number for all output channels, or one for each. */
static inline void require_per_row(ocs_call *call, const char *name, const ocs_array *numbers, int64_t O) {
    const bool valid = numbers->rank == 0 || (numbers->rank == 1 && numbers->numel == O);
    require_shape(call, valid, "%s must have no dimension, or one of the %lld output channels", name, (long long)O);
}

static inline ocs_scale read_scale(ocs_call *call, int i, int64_t O) {
    require_per_row(call, "scale", array(call, i), O);
    return (ocs_scale){array(call, i)->data, array(call, i)->rank};
}

/* --- Results ---------------------------------------------------------------------------------- */

static inline ocs_result *add_result(ocs_call *call, ocs_dtype dtype, int64_t rank) {
    ocs_result *result = &call->results[call->result_count++];
    *result = (ocs_result){.dtype = dtype, .rank = rank, .like = -1, .channels = -1, .outputs = -1};
    return result;
}

static inline void result_1d(ocs_call *call, ocs_dtype dtype, int64_t size) {
    add_result(call, dtype, 1)->sizes[0] = size;
}

static inline void result_2d(ocs_call *call, ocs_dtype dtype, int64_t rows, int64_t columns) {
    memcpy(add_result(call, dtype, 2)->sizes, (int64_t[]){rows, columns}, 2 * sizeof(int64_t));
}

/* A result shaped like argument i. */
static inline ocs_result *result_like(ocs_call *call, ocs_dtype dtype, int i) {
    ocs_result *result = add_result(call, dtype, array(call, i)->rank);
    result->like = i;
    return result;
}

/* Has the results allocated if nothing is wrong; says whether they are there. */
static inline bool begin(ocs_call *call) {
    if (call->status == OCS_OK && !call->allocate(call)) {
        call->status = OCS_NO_MEMORY;
    }
    return call->status == OCS_OK;
}

static inline void *result(const ocs_call *call) {
    return call->results[0].data;
}

/* --- Of products.c ---------------------------------------------------------------------------- */

ocs_status product_pack(ocs_call *call);
ocs_status product_unpack(ocs_call *call);
ocs_status product_rows(ocs_call *call);
ocs_status product(ocs_call *call);
ocs_status recurrent(ocs_call *call);

#endif
