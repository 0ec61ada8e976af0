/* The host's threads, and what a status means to a reader. */
#include "kernels.h"

#include <stdlib.h>

static ocs_parallel_for_fn host_parallel_for;

void ocs_set_parallel_for(ocs_parallel_for_fn parallel_for) {
    host_parallel_for = parallel_for;
}

typedef struct {
    ocs_work_fn work;
    void *ctx;
    size_t scratch;
    int status; /* of a range that failed, if any did */
} parallel_job;

ocs_status ocs_run_range(int64_t begin, int64_t end, size_t scratch, ocs_work_fn work, void *ctx) {
    ocs_range range = {begin, end, ctx, NULL, OCS_NO_MEMORY};
    range.scratch = scratch > 0 ? malloc(scratch) : NULL;
    if (range.scratch != NULL || scratch == 0) {
        range.status = OCS_OK;
        work(&range);
    }
    free(range.scratch);
    return range.status;
}

static void run_range(int64_t begin, int64_t end, void *ctx) {
    parallel_job *job = ctx;
    const ocs_status status = ocs_run_range(begin, end, job->scratch, job->work, job->ctx);
    if (status != OCS_OK) {
        __atomic_store_n(&job->status, (int)status, __ATOMIC_RELAXED);
    }
}

ocs_status ocs_parallel_for(int64_t n, int64_t grain, size_t scratch, ocs_work_fn work, void *ctx) {
    parallel_job job = {work, ctx, scratch, OCS_OK};
    if (n > 0 && host_parallel_for != NULL) {
        host_parallel_for(n, grain, run_range, &job);
    } else if (n > 0) {
        run_range(0, n, &job);
    }
    return (ocs_status)job.status;
}

/* The limits of ocs.h in words. */
_Static_assert(OCS_MIN_BITS == 2 && OCS_MAX_BITS == 8, "as ocs_status_text says");
_Static_assert(OCS_MAX_BINS == 1 << 24 && OCS_MAX_SEARCH_BINS == 1 << 16, "as ocs_status_text says");
_Static_assert(OCS_MAX_DEPTH == 22 && OCS_MAX_PARTS == 1 << OCS_MAX_DEPTH, "as ocs_status_text says");

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
    case OCS_BAD_PLAN: return "source, parts and offset are no split plan of this shape";
    case OCS_BAD_ORDER: return "order must have each column once";
    case OCS_NOT_FINITE: return "the values hold NaN or Inf";
    case OCS_TOO_LARGE:
        return "an array has more than 2^48 elements, an output channel 2^31 weights or more, or a channel is split "
               "more than 22 deep, into over 2^22 "
               "parts";
    case OCS_BAD_CODE: return "an integer is outside -qmax .. qmax, or bits beyond the last one are not 0";
    case OCS_BAD_METHOD: return "there is no such clip method, kind of cell or type of rows";
    case OCS_BAD_ISA: return "this build or CPU does not have that instruction set";
    case OCS_BAD_GROUP: return "a group must be a multiple of 32 channels";
    case OCS_BAD_INDEX: return "an index is outside the rows of the weight";
    }
    return "unknown status";
}
