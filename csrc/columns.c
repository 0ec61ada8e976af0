/* A split plan column by column, so that one loop serves every K; see ocs_columns. Shapes as in ocs.h. */
#include "kernels.h"

#include <stdlib.h>

ocs_status ocs_check_sizes(int64_t a, int64_t b, int64_t c) {
    const int64_t most = OCS_MAX_ELEMENTS;
    if (a < 0 || b < 0 || c < 0) {
        return OCS_BAD_SHAPE;
    }
    if (a > most || b > most || c > most) {
        return OCS_TOO_LARGE;
    }
    const bool fits = b == 0 || c == 0 || (a <= most / b && a * b <= most / c);
    return fits ? OCS_OK : OCS_TOO_LARGE;
}

ocs_status ocs_check_shape(const ocs_shape *shape) {
    const bool sizes = shape->O >= 0 && shape->C >= 0 && shape->K >= 0 && shape->S >= 0;
    const bool groups = shape->G == 1 || (shape->G > 1 && shape->G <= shape->O && shape->O % shape->G == 0);
    if (!sizes || !groups || (shape->C == 0 && shape->S > 0)) {
        return OCS_BAD_SHAPE;
    }
    OCS_TRY(ocs_check_sizes(shape->C, shape->S, 0)); /* their sum does not wrap around */
    OCS_TRY(ocs_check_sizes(shape->G, shape->C + shape->S, 1));
    return ocs_check_sizes(shape->O, shape->C + shape->S, shape->K);
}

ocs_status ocs_check_scale(ocs_scale scale, int64_t O) {
    const int64_t count = scale.stride == 0 ? 1 : O;
    if (scale.stride != 0 && scale.stride != 1) {
        return OCS_BAD_SHAPE;
    }
    OCS_TRY(ocs_check_sizes(count, 1, 1));
    uint32_t invalid = 0; /* its first bit: positive finite floats are the integers 1 .. 0x7f7fffff */
    for (int64_t i = 0; i < count; ++i) {
        uint32_t bits;
        memcpy(&bits, &scale.value[i], sizeof bits);
        invalid |= (bits - 1u) | (0x7f7fffffu - bits);
    }
    return invalid >> 31 ? OCS_BAD_SCALE : OCS_OK;
}

/* What a plan says of one expanded channel, read once: another thread could change it. */
typedef struct {
    int64_t source;
    int32_t parts, offset;
} entry;

static entry entry_of(const ocs_plan *plan, int64_t at) {
    return (entry){plan->source[at], plan->parts == NULL ? 1 : plan->parts[at],
                   plan->offset == NULL ? 0 : plan->offset[at]};
}

/* Whether it can be expanded channel j of group g; plans may come from a stranger's file. */
static bool entry_valid(entry e, const ocs_shape *shape, int64_t g, int64_t j) {
    const int64_t first = g * shape->C;
    const bool of_group = e.source >= first && e.source < first + shape->C;
    const bool part = e.parts >= 1 && e.parts <= OCS_MAX_PARTS && e.offset >= 0 && e.offset < e.parts;
    return of_group && part && (j >= shape->C || e.source == first + j);
}

static bool all_powers_of_two(const int32_t *parts, int64_t E) {
    for (int64_t at = 0; at < E; ++at) {
        const uint32_t n = (uint32_t)parts[at];
        if ((n & (n - 1)) != 0) {
            return false;
        }
    }
    return true;
}

static ocs_status fill_columns(const ocs_rows *rows, const ocs_plan *plan, int64_t g) {
    const ocs_columns columns = ocs_columns_of_group(rows, g);
    const int64_t C = rows->shape->C, K = rows->shape->K, E = C + rows->shape->S;
    for (int64_t j = 0; j < E; ++j) {
        const entry e = entry_of(plan, g * E + j);
        if (!entry_valid(e, rows->shape, g, j)) {
            return OCS_BAD_PLAN;
        }
        const int64_t c = e.source - g * C;
        const int32_t addend = plan->offset == NULL ? e.parts : 2 * e.offset + 1;
        const int32_t twos = __builtin_ctz((unsigned)e.parts);
        for (int64_t k = 0; k < K; ++k) {
            if (j >= C) {
                columns.index[(j - C) * K + k] = (int32_t)(c * K + k);
            }
            if (columns.addend != NULL) {
                columns.addend[j * K + k] = addend;
                columns.shift[j * K + k] = twos + 1;
            }
            if (columns.odd != NULL) {
                columns.odd[j * K + k] = e.parts >> twos;
            }
        }
    }
    return OCS_OK;
}

ocs_status ocs_rows_begin(ocs_rows *rows, const ocs_plan *plan, const ocs_shape *shape) {
    OCS_TRY(ocs_check_shape(shape));
    const int64_t E = shape->C + shape->S;
    if (shape->K > 0 && E > INT32_MAX / shape->K) {
        return OCS_TOO_LARGE;
    }
    const int64_t N = shape->C * shape->K, M = E * shape->K;
    const int64_t copies = shape->G * (M - N), all = plan->parts == NULL ? 0 : shape->G * M;
    const bool shifts = plan->parts == NULL || all_powers_of_two(plan->parts, shape->G * E);
    int32_t *memory = malloc((size_t)(copies + (shifts ? 2 : 3) * all + 1) * sizeof *memory);
    if (memory == NULL) {
        return OCS_NO_MEMORY;
    }
    *rows = (ocs_rows){ocs_kernel_table(), shape, {N, M, memory, NULL, NULL, NULL}};
    if (plan->parts != NULL) {
        rows->columns.addend = memory + copies;
        rows->columns.shift = rows->columns.addend + all;
        rows->columns.odd = shifts ? NULL : rows->columns.shift + all;
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
    if (columns.odd != NULL) {
        columns.odd += g * columns.M;
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
