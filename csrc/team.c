/* Threads that go together through a computation of many short steps.

   Calling the host's threads costs as much as a step of a recurrent layer. So they are called once, and each member of
   the team goes through all steps: it claims pieces of a step that nobody has, and the step is over when all of its
   pieces are done. A member waits only for pieces that others have claimed and are working on. So nothing depends on
   how many members there are, nor on whether they run at once: one that comes late skips what is over. */
#include "kernels.h"

#include <sched.h>

enum { MOST_MEMBERS = 16, PATIENCE = 2000 };

/* Alone in its cache line: what a member begins with is seldom another's. */
typedef struct {
    _Alignas(64) int64_t open; /* the first step of which nobody has claimed this piece */
} team_piece;

struct ocs_team {
    ocs_member_fn fn;
    void *ctx;
    int status; /* of a piece that failed, if any did */
    int64_t members;
    _Alignas(64) int64_t step; /* the first that is not over */
    int64_t done;              /* pieces of it */
    team_piece pieces[MOST_MEMBERS];
};

static bool claim(team_piece *piece, int64_t step) {
    int64_t open = __atomic_load_n(&piece->open, __ATOMIC_RELAXED);
    return open <= step &&
           __atomic_compare_exchange_n(&piece->open, &open, step + 1, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
}

static void wait_until_over(const ocs_team *team, int64_t step) {
    for (int64_t turn = 0; __atomic_load_n(&team->step, __ATOMIC_ACQUIRE) <= step; ++turn) {
        if (turn > PATIENCE) {
            sched_yield(); /* to a member that has no processor */
        }
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
    }
}

ocs_status ocs_parallel_in(ocs_member *member, int64_t n, int64_t grain, size_t scratch, ocs_work_fn work, void *ctx) {
    if (member == NULL) {
        return ocs_parallel_for(n, grain, scratch, work, ctx);
    }
    ocs_team *team = member->team;
    if (n <= 0) {
        return (ocs_status)__atomic_load_n(&team->status, __ATOMIC_RELAXED);
    }
    const int64_t step = member->step++, worth = ocs_ceil_div(n, ocs_ceil_div(grain, 8));
    const int64_t pieces = worth < member->most ? worth : member->most, first = member->number % pieces;
    int64_t done = 0;
    for (int64_t i = 0; i < pieces && __atomic_load_n(&team->step, __ATOMIC_ACQUIRE) == step; ++i) {
        const int64_t piece = (first + i) % pieces;
        if (claim(&team->pieces[piece], step)) {
            const ocs_status status = ocs_run_range(n * piece / pieces, n * (piece + 1) / pieces, scratch, work, ctx);
            if (status != OCS_OK) {
                __atomic_store_n(&team->status, (int)status, __ATOMIC_RELAXED);
            }
            ++done;
        }
    }
    if (done > 0 && __atomic_add_fetch(&team->done, done, __ATOMIC_ACQ_REL) == pieces) {
        __atomic_store_n(&team->done, 0, __ATOMIC_RELAXED);
        __atomic_store_n(&team->step, step + 1, __ATOMIC_RELEASE);
    } else {
        wait_until_over(team, step);
    }
    return (ocs_status)__atomic_load_n(&team->status, __ATOMIC_RELAXED);
}

static void run_member(ocs_range *range) {
    ocs_team *team = range->ctx;
    int64_t members = 0, own = ocs_ceil_div(MOST_MEMBERS, range->end - range->begin);
    if (__atomic_compare_exchange_n(&team->members, &members, own, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
        members = own;
    }
    ocs_member member = {team, range->begin * members / MOST_MEMBERS, members, 0};
    range->status = team->fn(&member, team->ctx);
}

ocs_status ocs_with_team(int64_t size, ocs_member_fn fn, void *ctx) {
    ocs_team team = {.fn = fn, .ctx = ctx};
    const int64_t worth = size / OCS_GRAIN, members = worth < 1 ? 1 : worth < MOST_MEMBERS ? worth : MOST_MEMBERS;
    return ocs_parallel_for(MOST_MEMBERS, MOST_MEMBERS / members, 0, run_member, &team);
}
