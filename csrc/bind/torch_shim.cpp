// torch.ops.ocs: the kernels on CPU tensors, registered through libtorch's stable ABI.
//
// The only C++ file, with tensors.h. It takes nothing from libtorch but C shims that torch 2.10 has, so that one build
// serves every later torch (tests/test_build.py reads the symbol table). Argument order and names are those of ocs._C
// (module.c). The stable ABI of 2.10 can throw nothing but RuntimeError; ocs/functional.py checks first and raises
// better ones. Nothing throws inside parallel_for, nor through the C functions of operators.c.
#include "tensors.h"

#include <array>
#include <optional>
#include <pthread.h>

namespace {

using torch::stable::detail::to;

// --- One call ------------------------------------------------------------------------------------

struct TorchCall : ocs_call {
    std::array<std::optional<Tensor>, OCS_MOST_ARGUMENTS> given; // a boxed kernel owns its inputs
    std::array<std::optional<Tensor>, OCS_MOST_ARGUMENTS> read;  // the same tensors, or converted copies
    std::array<Owned, OCS_MOST_RESULTS> made;
};

// Each result contiguous, or in the memory order of the argument that it is like.
bool allocate(ocs_call *call) noexcept {
    auto &own = static_cast<TorchCall &>(*call);
    for (int i = 0; i < own.result_count; ++i) {
        ocs_result &result = own.results[i];
        std::vector<int64_t> sizes(2 * result.rank);
        int64_t *strides = sizes.data() + result.rank, stride = 1;
        for (int64_t axis = result.rank; axis-- > 0; stride *= std::max<int64_t>(sizes[axis], 1)) {
            sizes[axis] = ocs_result_size(call, &result, axis);
            strides[axis] = result.same && result.outputs < 0 ? own.read[result.like]->stride(axis) : stride;
        }
        own.made[i] = empty(result.dtype, result.rank, sizes.data(), strides);
        if (!own.made[i] || torch_get_mutable_data_ptr(own.made[i].get(), &result.data) != 0) {
            return false;
        }
        prefer_huge_pages(result.data, own.made[i].get(), result.dtype);
    }
    return true;
}

// Takes every input from the stack before any is looked at, so that all are freed whatever is thrown.
void take_inputs(TorchCall &own, const ocs_operator &op, const StableIValue *stack) {
    for (int i = 0; op.argument[i].name != nullptr; ++i) {
        switch (op.argument[i].kind) {
        case OCS_FLOAT: own.arguments[i].number = to<double>(stack[i]); break;
        case OCS_INT: own.arguments[i].integer = to<int64_t>(stack[i]); break;
        case OCS_BOOL: own.arguments[i].integer = to<bool>(stack[i]); break;
        default: own.given[i].emplace(to<AtenTensorHandle>(stack[i]));
        }
    }
}

void read_tensors(TorchCall &own, const ocs_operator &op) {
    for (int i = 0; op.argument[i].name != nullptr; ++i) {
        const ocs_argument &argument = op.argument[i];
        if (!own.given[i]) {
            continue;
        }
        if (argument.kind == OCS_ONE_FLOAT && own.given[i]->numel() != 1) {
            fail(op.name, std::string(argument.name) + " must be one number");
        }
        own.read[i] = converted(op.name, argument, *own.given[i]);
        if (argument.kind == OCS_ONE_FLOAT) {
            own.arguments[i].number = *static_cast<const float *>(own.read[i]->const_data_ptr());
        } else {
            own.arguments[i].array = view_of(argument, *own.read[i]);
        }
    }
}

// The result as a StableIValue, which owns it.
StableIValue hand_over(TorchCall &own, int i) {
    const ocs_result &result = own.results[i];
    if (result.same && !has_dtype(*own.given[result.like], result.dtype)) {
        const ScalarType type = own.given[result.like]->scalar_type();
        return torch::stable::detail::from(torch::stable::to(Tensor(own.made[i].release()), type));
    }
    return torch::stable::detail::from(own.made[i].release());
}

void call_operator(const ocs_operator &op, StableIValue *stack) {
    TorchCall own;
    own.allocate = allocate;
    take_inputs(own, op, stack);
    read_tensors(own, op);
    if (const char *wrong = ocs_run(&op, &own)) {
        fail(op.name, wrong);
    }
    for (int i = 0; i < own.result_count; ++i) {
        stack[i] = hand_over(own, i);
    }
}

// --- Registration --------------------------------------------------------------------------------

// A boxed kernel is a function without a context, so there is one for each operator.
template <size_t I> void boxed(StableIValue *stack, uint64_t, uint64_t) {
    call_operator(ocs_operators[I], stack);
}

using Boxed = void (*)(StableIValue *, uint64_t, uint64_t);

template <size_t... I> std::array<Boxed, sizeof...(I)> all_boxed(std::index_sequence<I...>) {
    return {boxed<I>...};
}

void run_in_torch_threads(int64_t n, int64_t grain, ocs_range_fn fn, void *ctx) {
    torch::stable::parallel_for(0, n, grain, [=](int64_t begin, int64_t end) { fn(begin, end, ctx); });
}

} // namespace

STABLE_TORCH_LIBRARY(ocs, m) {
    ocs_set_parallel_for(run_in_torch_threads);
    pthread_atfork(nullptr, nullptr, [] { ocs_set_parallel_for(nullptr); }); // a child has none of these threads
    for (const ocs_operator *op = ocs_operators; op->name != nullptr; ++op) {
        char schema[500];
        ocs_write_signature(schema, sizeof schema, op, true);
        m.def(schema);
    }
}

STABLE_TORCH_LIBRARY_IMPL(ocs, CPU, m) {
    const auto kernels = all_boxed(std::make_index_sequence<OCS_MOST_OPERATORS>());
    for (size_t i = 0; ocs_operators[i].name != nullptr; ++i) {
        m.impl(ocs_operators[i].name, kernels[i]);
    }
}
