/* Which variant of each kernel runs: the best that the CPU at hand has, or that of the instruction set asked for. */
#include "kernels.h"

/* Every instruction set that this build has, the worst first; arch/<name>.c defines ocs_isa_<name>. A test has its own
   list. */
#if defined(OCS_INSTRUCTION_SETS)
#elif defined(__x86_64__)
#define OCS_INSTRUCTION_SETS(SET) SET(ref) SET(avx2) SET(avx512) SET(vnni)
#elif defined(__aarch64__)
#define OCS_INSTRUCTION_SETS(SET) SET(ref) SET(neon) SET(dotprod)
#else
#define OCS_INSTRUCTION_SETS(SET) SET(ref)
#endif

#define DECLARE(name) extern const ocs_instruction_set ocs_isa_##name;
OCS_INSTRUCTION_SETS(DECLARE)

#define ADDRESS(name) &ocs_isa_##name,
static const ocs_instruction_set *const built[] = {OCS_INSTRUCTION_SETS(ADDRESS)};
enum { BUILT = sizeof built / sizeof built[0] };

static bool always(void) {
    return true;
}

const ocs_instruction_set ocs_isa_ref = {
    .name = "ref",
    .supported = always,
#define OCS_KERNEL(type, name, parameters) .kernels.name = ocs_##name##_ref,
#include "kernels.def"
#undef OCS_KERNEL
};

/* The instruction sets that this CPU has, each with every kernel. */
static ocs_instruction_set available[BUILT];
static int available_count;
static const ocs_instruction_set *chosen;

/* Takes over each kernel that `better` has. */
static void improve(ocs_kernels *kernels, const ocs_kernels *better) {
#define OCS_KERNEL(type, name, parameters) kernels->name = better->name != NULL ? better->name : kernels->name;
#include "kernels.def"
#undef OCS_KERNEL
}

/* Runs when the library is loaded, before any thread can ask. */
__attribute__((constructor)) static void fill_table(void) {
    ocs_kernels kernels = ocs_isa_ref.kernels;
    for (int i = 0; i < BUILT; ++i) {
        if (built[i]->supported()) {
            improve(&kernels, &built[i]->kernels);
            available[available_count++] = (ocs_instruction_set){built[i]->name, built[i]->supported, kernels};
        }
    }
    chosen = &available[available_count - 1];
}

const ocs_kernels *ocs_kernel_table(void) {
    return &__atomic_load_n(&chosen, __ATOMIC_ACQUIRE)->kernels;
}

const char *ocs_isa_name(int i) {
    return i < available_count ? available[i].name : NULL;
}

const char *ocs_isa(void) {
    return __atomic_load_n(&chosen, __ATOMIC_ACQUIRE)->name;
}

ocs_status ocs_set_isa(const char *name) {
    for (int i = available_count - 1; i >= 0; --i) {
        if (strcmp(name, "auto") == 0 || strcmp(name, available[i].name) == 0) {
            __atomic_store_n(&chosen, &available[i], __ATOMIC_RELEASE);
            return OCS_OK;
        }
    }
    return OCS_BAD_ISA;
}
