/* What both doors, numpy's (module.c) and torch's (torch_shim.cpp), need of an operator.
 *
 * operators.c lists the operators and has a function for each, which checks the shapes, says those of the results and
 * calls an entry of ocs.h. It knows neither Python nor torch: a door converts the arguments as their kinds say, calls
 * the function, allocates the results when that asks for them, and turns a bad status into an exception.
 */
#ifndef OCS_OPERATORS_H
#define OCS_OPERATORS_H

#include "ocs.h"

#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef enum { OCS_FLOAT32, OCS_FLOAT64, OCS_INT64, OCS_INT32, OCS_INT8, OCS_UINT8, OCS_BFLOAT16 } ocs_dtype;

typedef enum {
    OCS_FLOATS,       /* any float array, given as contiguous float32 */
    OCS_DENSE_FLOATS, /* float32 without gaps in any order of memory, which a result like it shares, its dtype too */
    OCS_FLOAT_ROWS,   /* contiguous float32 or bfloat16, given as it is; any other float array as float32 */
    OCS_INT64S,       /* contiguous int64 */
    OCS_INT32S,       /* contiguous int32 */
    OCS_INT8S,        /* contiguous int8 */
    OCS_BYTES,        /* contiguous uint8 */
    OCS_BYTE_ROWS,    /* int8 or uint8 whose rows are contiguous, but may lie apart */
    OCS_ONE_FLOAT,    /* a number; for torch a tensor of one element. This kind and those below are no arrays */
    OCS_FLOAT,        /* a number */
    OCS_INT,
    OCS_BOOL,
} ocs_kind;

enum { OCS_MOST_OPERATORS = 64, OCS_MOST_ARGUMENTS = 24, OCS_MOST_RESULTS = 4 };

typedef struct {
    const char *name;
    ocs_kind kind;
    int min_rank;
} ocs_argument;

typedef struct {
    const void *data;
    ocs_dtype dtype;
    int64_t rank, numel;
    const int64_t *sizes; /* [rank] */
    int64_t row_stride;   /* of OCS_BYTE_ROWS: elements from one row to the next */
} ocs_array;

/* An array, or a number as its kind says; a bool is an integer. */
typedef union {
    ocs_array array;
    double number;
    int64_t integer;
} ocs_value;

typedef struct {
    void *data; /* once it is allocated */
    ocs_dtype dtype;
    int64_t rank;
    int like;         /* the number of the argument that it is shaped like, or -1 */
    int64_t channels; /* on the second axis instead, or -1 */
    int64_t outputs;  /* on the last axis instead, or -1 */
    int64_t sizes[2]; /* where it is like none; rank 2 at most */
    bool same;        /* in the dtype and memory order in which that argument was given, where the door has such */
} ocs_result;

typedef struct ocs_call {
    ocs_value arguments[OCS_MOST_ARGUMENTS];
    ocs_result results[OCS_MOST_RESULTS];
    int result_count;
    ocs_status status;
    char error[160]; /* what is wrong where the status says too little, or empty */

    /* Of the door: allocates the results, and lets go of what the entry does not need (Python's lock). */
    bool (*allocate)(struct ocs_call *call);
} ocs_call;

typedef struct {
    const char *name;
    ocs_status (*run)(ocs_call *call);
    int results; /* how many */
    const char *result;
    ocs_argument argument[OCS_MOST_ARGUMENTS + 1]; /* the one after the last has no name */
} ocs_operator;

/* All of them, ocs._C.<name> and torch.ops.ocs.<name>; the one after the last has no name. */
extern const ocs_operator ocs_operators[OCS_MOST_OPERATORS + 1];

static inline bool ocs_is_array(ocs_kind kind) {
    return kind < OCS_ONE_FLOAT;
}

/* What an array of this kind holds; int8 of OCS_BYTE_ROWS, which may hold uint8 too. */
static inline ocs_dtype ocs_dtype_of(ocs_kind kind) {
    switch (kind) {
    case OCS_INT64S: return OCS_INT64;
    case OCS_INT32S: return OCS_INT32;
    case OCS_INT8S:
    case OCS_BYTE_ROWS: return OCS_INT8;
    case OCS_BYTES: return OCS_UINT8;
    default: return OCS_FLOAT32;
    }
}

/* The size of a result on one axis. */
static inline int64_t ocs_result_size(const ocs_call *call, const ocs_result *result, int64_t axis) {
    if (axis == 1 && result->channels >= 0) {
        return result->channels;
    }
    if (axis == result->rank - 1 && result->outputs >= 0) {
        return result->outputs;
    }
    return result->like >= 0 ? call->arguments[result->like].array.sizes[axis] : result->sizes[axis];
}

/* "name(x, bins) -> int64 [bins]", for help(), or torch's schema "name(Tensor x, int bins) -> Tensor". */
void ocs_write_signature(char *text, size_t size, const ocs_operator *op, bool as_schema);

/* Runs an operator on converted arguments. Returns NULL, or what is wrong: a sentence for call->status. */
const char *ocs_run(const ocs_operator *op, ocs_call *call);

#ifdef __cplusplus
}
#endif
#endif
