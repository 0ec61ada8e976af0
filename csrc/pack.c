/* k-bit integers in k bits: what a saved model holds.

   The codes q + qmax (0 .. 2^k - 2) follow each other without gaps, the least significant bit first: bit b of code i is
   bit k i + b of the packed array, and bit j of that is bit j % 8 of byte j / 8. What is left of the last byte is 0. So
   eight codes are k bytes, and any run of eight can be worked on by itself. */
#include "kernels.h"

/* --- Plain kernels ---------------------------------------------------------------------------- */

uint8_t ocs_pack_ref(uint8_t *restrict packed, const int8_t *q, int64_t N, int bits) {
    const int32_t qmax = ocs_qmax(bits);
    uint32_t held = 0;
    int held_bits = 0;
    uint8_t largest = 0;
    for (int64_t i = 0; i < N; ++i) {
        const uint8_t code = (uint8_t)(q[i] + qmax);
        largest = code > largest ? code : largest;
        held |= (uint32_t)code << held_bits;
        for (held_bits += bits; held_bits >= 8; held_bits -= 8) {
            *packed++ = (uint8_t)held;
            held >>= 8;
        }
    }
    if (held_bits > 0) {
        *packed = (uint8_t)held;
    }
    return largest;
}

uint8_t ocs_unpack_ref(int8_t *restrict q, const uint8_t *packed, int64_t N, int bits) {
    const int32_t qmax = ocs_qmax(bits);
    const uint32_t mask = (UINT32_C(1) << bits) - 1;
    uint32_t held = 0;
    int held_bits = 0;
    uint8_t largest = 0;
    for (int64_t i = 0; i < N; ++i) {
        if (held_bits < bits) {
            held |= (uint32_t)*packed++ << held_bits;
            held_bits += 8;
        }
        const uint8_t code = (uint8_t)(held & mask);
        largest = code > largest ? code : largest;
        q[i] = (int8_t)(code - qmax);
        held >>= bits;
        held_bits -= bits;
    }
    return largest;
}

/* --- Entries ---------------------------------------------------------------------------------- */

typedef struct {
    const ocs_kernels *kernels;
    int8_t *q_out;
    const int8_t *q_in;
    uint8_t *packed_out;
    const uint8_t *packed_in;
    int64_t N;
    int bits;
} pack_job;

/* Runs of eight codes; the last may be shorter. */
static void pack_runs(ocs_range *range) {
    const pack_job *job = range->ctx;
    const int64_t first = 8 * range->begin, last = 8 * range->end < job->N ? 8 * range->end : job->N;
    const int64_t byte = range->begin * job->bits;
    uint8_t largest;
    if (job->q_in != NULL) {
        largest = job->kernels->pack(job->packed_out + byte, job->q_in + first, last - first, job->bits);
    } else {
        largest = job->kernels->unpack(job->q_out + first, job->packed_in + byte, last - first, job->bits);
    }
    range->status = largest > 2 * ocs_qmax(job->bits) ? OCS_BAD_CODE : OCS_OK;
}

static ocs_status run_pack(pack_job *job) {
    job->kernels = ocs_kernel_table();
    return ocs_parallel_for(job->N / 8 + (job->N % 8 != 0), OCS_GRAIN / 8, 0, pack_runs, job);
}

int64_t ocs_packed_bytes(int64_t N, int bits) {
    const bool any = N >= 0 && ocs_check_bits(bits) == OCS_OK;
    return any ? N / 8 * bits + (N % 8 * bits + 7) / 8 : -1;
}

ocs_status ocs_pack_i8(uint8_t *packed, const int8_t *q, int64_t N, int bits) {
    OCS_TRY(ocs_check_bits(bits));
    OCS_TRY(ocs_check_sizes(N, 1, 1));
    pack_job job = {.packed_out = packed, .q_in = q, .N = N, .bits = bits};
    return run_pack(&job);
}

ocs_status ocs_unpack_i8(int8_t *q, const uint8_t *packed, int64_t N, int bits) {
    OCS_TRY(ocs_check_bits(bits));
    OCS_TRY(ocs_check_sizes(N, 1, 1));
    const int64_t used = N % 8 * bits % 8; /* bits of the last byte, 0 for all */
    if (used > 0 && packed[ocs_packed_bytes(N, bits) - 1] >> used != 0) {
        return OCS_BAD_CODE;
    }
    pack_job job = {.q_out = q, .packed_in = packed, .N = N, .bits = bits};
    return run_pack(&job);
}
