/* What the entries run on: one row of kernels for the CPU at hand, and the host's threads. */
#include "kernels.h"

#include <stddef.h>

static const ocs_kernels kernels_ref = {
    .isa = "ref",
    .abs_max = ocs_abs_max_ref,
    .scaled_max = ocs_scaled_max_ref,
    .channel_max = ocs_channel_max_ref,
    .histogram = ocs_histogram_ref,
    .octave_histogram = ocs_octave_histogram_ref,
    .quantize_row = ocs_quantize_row_ref,
    .fold_row = ocs_fold_row_ref,
    .squared_error = ocs_squared_error_ref,
    .quantize = ocs_quantize_ref,
    .dequantize = ocs_dequantize_ref,
    .fake_quantize = ocs_fake_quantize_ref,
    .pack = ocs_pack_ref,
    .unpack = ocs_unpack_ref,
};

static bool always(void) {
    return true;
}

#if defined(__x86_64__)
static bool has_avx2(void) {
    return __builtin_cpu_supports("avx2");
}
#endif

/* Best first. */
static const struct {
    bool (*supported)(void);
    const ocs_kernels *kernels;
} rows[] = {
#if defined(__x86_64__)
    {has_avx2, &ocs_kernels_avx2},
#endif
    {always, &kernels_ref},
};

static const ocs_kernels *chosen;

const ocs_kernels *ocs_kernel_table(void) {
    const ocs_kernels *kernels = __atomic_load_n(&chosen, __ATOMIC_ACQUIRE);
    if (kernels == NULL) {
        (void)ocs_set_isa("auto");
        kernels = __atomic_load_n(&chosen, __ATOMIC_ACQUIRE);
    }
    return kernels;
}

const char *ocs_isa(void) {
    return ocs_kernel_table()->isa;
}

ocs_status ocs_set_isa(const char *name) {
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; ++i) {
        const ocs_kernels *kernels = rows[i].kernels;
        if (rows[i].supported() && (strcmp(name, "auto") == 0 || strcmp(name, kernels->isa) == 0)) {
            __atomic_store_n(&chosen, kernels, __ATOMIC_RELEASE);
            return OCS_OK;
        }
    }
    return OCS_BAD_ISA;
}

static ocs_parallel_for_fn host_parallel_for;

void ocs_set_parallel_for(ocs_parallel_for_fn parallel_for) {
    host_parallel_for = parallel_for;
}

void ocs_parallel_for(int64_t n, int64_t grain, ocs_range_fn fn, void *ctx) {
    if (n <= 0) {
        return;
    }
    if (host_parallel_for == NULL) {
        fn(0, n, ctx);
    } else {
        host_parallel_for(n, grain, fn, ctx);
    }
}

const char *ocs_status_text(ocs_status status) {
    switch (status) {
    case OCS_OK: return "no error";
    case OCS_NO_MEMORY: return "out of memory";
    case OCS_BAD_BITS: return "bits must be 2 to 8";
    case OCS_BAD_SCALE: return "every scale must be a positive finite number";
    case OCS_BAD_BINS:
        return "bins must be 1 to 2^24 (2^16 in a search), counts not negative, limits finite and not negative";
    case OCS_BAD_LIMIT: return "the limit must be a power of two, 2^-110 or more";
    case OCS_BAD_SHAPE:
        return "sizes must not be negative, and groups must divide the output channels and be at most their number";
    case OCS_BAD_PLAN: return "source, depth and offset are no split plan of this shape";
    case OCS_NOT_FINITE: return "the values hold NaN or Inf";
    case OCS_TOO_LARGE: return "an output channel has 2^31 weights or more, or a channel is split more than 22 deep";
    case OCS_BAD_CODE: return "an integer is outside -qmax .. qmax, or bits beyond the last one are not 0";
    case OCS_BAD_METHOD: return "there is no such clip method";
    case OCS_BAD_ISA: return "this build or CPU does not have that instruction set";
    }
    return "unknown status";
}
