/* A split plan column by column, so that one loop serves every K; see ocs_columns. Shapes as in ocs.h. */
#include "kernels.h"

#include <stdlib.h>

ocs_status ocs_check_shape(const ocs_shape *shape) {
    const bool sizes = shape->O >= 0 && shape->C >= 0 && shape->K >= 0 && shape->S >= 0;
    const bool groups = shape->G == 1 || (shape->G > 1 && shape->G <= shape->O && shape->O % shape->G == 0);
    return sizes && groups && (shape->C > 0 || shape->S == 0) ? OCS_OK : OCS_BAD_SHAPE;
}

ocs_status ocs_check_scale(ocs_scale scale, int64_t O) {
    const int64_t count = scale.stride == 0 ? 1 : O;
    uint32_t invalid = 0; /* its first bit: positive finite floats are the integers 1 .. 0x7f7fffff */
    for (int64_t i = 0; i < count; ++i) {
        uint32_t bits;
        memcpy(&bits, &scale.value[i], sizeof bits);
        invalid |= (bits - 1u) | (0x7f7fffffu - bits);
    }
    return invalid >> 31 ? OCS_BAD_SCALE : OCS_OK;
}

/* Whether expanded channel j of group g can be what the plan says, which may come from a stranger's file. */
static bool entry_valid(const ocs_plan *plan, const ocs_shape *shape, int64_t g, int64_t j) {
    const int64_t at = g * (shape->C + shape->S) + j, first = g * shape->C;
    const int64_t source = plan->source[at];
    if (source < first || source >= first + shape->C || (j < shape->C && source != first + j)) {
        return false;
    }
    if (plan->depth == NULL) {
        return true;
    }
    if (plan->depth[at] < 0 || plan->depth[at] > OCS_MAX_DEPTH) {
        return false;
    }
    return plan->offset == NULL || (plan->offset[at] >= 0 && plan->offset[at] < INT32_C(1) << plan->depth[at]);
}

/* How expanded channel `at` follows from floor(2 u): see ocs_columns. */
static int32_t addend_of(const ocs_plan *plan, int64_t at) {
    return plan->offset == NULL ? INT32_C(1) << plan->depth[at] : 2 * plan->offset[at] + 1;
}

static ocs_status fill_columns(const ocs_rows *rows, const ocs_plan *plan, int64_t g) {
    const ocs_columns columns = ocs_columns_of_group(rows, g);
    const int64_t C = rows->shape->C, K = rows->shape->K, E = C + rows->shape->S;
    for (int64_t j = 0; j < E; ++j) {
        if (!entry_valid(plan, rows->shape, g, j)) {
            return OCS_BAD_PLAN;
        }
        const int64_t at = g * E + j, c = plan->source[at] - g * C;
        for (int64_t k = 0; k < K; ++k) {
            if (j >= C) {
                columns.index[(j - C) * K + k] = (int32_t)(c * K + k);
            }
            if (plan->depth != NULL) {
                columns.addend[j * K + k] = addend_of(plan, at);
                columns.shift[j * K + k] = plan->depth[at] + 1;
            }
        }
    }
    return OCS_OK;
}

ocs_status ocs_rows_begin(ocs_rows *rows, const ocs_plan *plan, const ocs_shape *shape) {
    const int64_t E = shape->C + shape->S;
    OCS_TRY(ocs_check_shape(shape));
    if (shape->K > 0 && E > INT32_MAX / shape->K) {
        return OCS_TOO_LARGE;
    }
    const int64_t N = shape->C * shape->K, M = E * shape->K;
    const int64_t copies = shape->G * (M - N), all = plan->depth == NULL ? 0 : shape->G * M;
    int32_t *memory = malloc((size_t)(copies + 2 * all + 1) * sizeof *memory);
    if (memory == NULL) {
        return OCS_NO_MEMORY;
    }
    *rows = (ocs_rows){ocs_kernel_table(), shape, {N, M, memory, NULL, NULL}};
    if (plan->depth != NULL) {
        rows->columns.addend = memory + copies;
        rows->columns.shift = rows->columns.addend + all;
    }
    ocs_status status = OCS_OK;
    for (int64_t g = 0; g < shape->G && status == OCS_OK; ++g) {
        status = fill_columns(rows, plan, g);
    }
    if (status != OCS_OK) {
        ocs_rows_end(rows);
    }
    return status;
}

void ocs_rows_end(ocs_rows *rows) {
    free(rows->columns.index);
}

ocs_columns ocs_columns_of_group(const ocs_rows *rows, int64_t g) {
    ocs_columns columns = rows->columns;
    columns.index += g * (columns.M - columns.N);
    if (columns.addend != NULL) {
        columns.addend += g * columns.M;
        columns.shift += g * columns.M;
    }
    return columns;
}

ocs_columns ocs_columns_of_row(const ocs_rows *rows, int64_t o) {
    return ocs_columns_of_group(rows, o / (rows->shape->O / rows->shape->G));
}

void ocs_link_parts(int32_t *next, const ocs_rows *rows, int64_t g) {
    const ocs_columns columns = ocs_columns_of_group(rows, g);
    const int64_t C = rows->shape->C, K = rows->shape->K, E = C + rows->shape->S;
    for (int64_t j = 0; j < E; ++j) {
        next[j] = -1;
        if (j >= C) {
            const int64_t c = columns.index[(j - C) * K] / K;
            next[j] = next[c];
            next[c] = (int32_t)j;
        }
    }
}
