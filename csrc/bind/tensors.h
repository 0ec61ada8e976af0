// Tensors as arguments and results of torch_shim.cpp, and the exceptions for what does not fit.
//
// What is wrong with an argument is a RuntimeError that starts with the operator's name.
#ifndef OCS_TENSORS_H
#define OCS_TENSORS_H

#include "operators.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

[[noreturn]] void fail(const char *op, const std::string &what) {
    throw std::runtime_error(std::string("ocs::") + op + ": " + what);
}

// libtorch's number of a dtype.
int32_t shim_dtype(ocs_dtype dtype) {
    switch (dtype) {
    case OCS_FLOAT64: return aoti_torch_dtype_float64();
    case OCS_INT64: return aoti_torch_dtype_int64();
    case OCS_INT32: return aoti_torch_dtype_int32();
    case OCS_INT8: return aoti_torch_dtype_int8();
    case OCS_UINT8: return aoti_torch_dtype_uint8();
    case OCS_BFLOAT16: return aoti_torch_dtype_bfloat16();
    default: return aoti_torch_dtype_float32();
    }
}

size_t bytes_of(ocs_dtype dtype) {
    switch (dtype) {
    case OCS_FLOAT64:
    case OCS_INT64: return 8;
    case OCS_FLOAT32:
    case OCS_INT32: return 4;
    case OCS_BFLOAT16: return 2;
    default: return 1;
    }
}

// Tensor::scalar_type() compares with every dtype that there is; this asks for the one that is nearly always there.
bool has_dtype(const Tensor &t, ocs_dtype dtype) {
    int32_t type = -1;
    return aoti_torch_get_dtype(t.get(), &type) == 0 && type == shim_dtype(dtype);
}

bool is_float(const Tensor &t) {
    if (has_dtype(t, OCS_FLOAT32)) {
        return true;
    }
    const auto type = t.scalar_type();
    return type == ScalarType::Double || type == ScalarType::Half || type == ScalarType::BFloat16;
}

// Whether each row (all but the first axis) is contiguous: of a slice such as q[:, a:b] only their distance is larger.
bool rows_contiguous(const Tensor &t) {
    int64_t expected = 1;
    for (int64_t i = t.dim() - 1; i > 0; --i) {
        if (t.size(i) != 1 && t.stride(i) != expected) {
            return false;
        }
        expected *= t.size(i);
    }
    return t.dim() > 0 && t.stride(0) >= expected;
}

// Whether the elements fill their memory without gaps, in whatever order (channels-last, transposed ...).
bool is_dense(const Tensor &x) {
    if (x.is_contiguous()) {
        return true;
    }
    std::vector<std::pair<int64_t, int64_t>> axes; // stride, size
    for (int64_t i = 0; i < x.dim(); ++i) {
        if (x.size(i) != 1) {
            axes.emplace_back(x.stride(i), x.size(i));
        }
    }
    std::sort(axes.begin(), axes.end());
    int64_t expected = 1;
    for (const auto &[stride, size] : axes) {
        if (stride != expected) {
            return false;
        }
        expected *= size;
    }
    return true;
}

// Without a trip through the dispatcher where there is nothing to do.
Tensor as_contiguous(const Tensor &t) {
    return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

// In any order of memory, but without gaps. A copy goes into a tensor of its own: autograd records it.
Tensor as_dense(const Tensor &x) {
    if (is_dense(x)) {
        return x;
    }
    Tensor in_order = torch::stable::empty_like(x);
    return torch::stable::copy_(in_order, x);
}

// A tensor that can be read as the argument's kind says: the same one where it can, else a converted copy.
Tensor converted(const char *op, const ocs_argument &argument, const Tensor &t) {
    if (ocs_dtype_of(argument.kind) != OCS_FLOAT32) {
        const bool fits =
            has_dtype(t, ocs_dtype_of(argument.kind)) || (argument.kind == OCS_BYTE_ROWS && has_dtype(t, OCS_UINT8));
        if (!fits || t.dim() < argument.min_rank) {
            fail(op, std::string(argument.name) + " has the wrong dtype or too few dimensions");
        }
        return argument.kind == OCS_BYTE_ROWS && rows_contiguous(t) ? t : as_contiguous(t);
    }
    if (!is_float(t)) {
        fail(op, std::string(argument.name) + " must be a float tensor");
    }
    if (t.dim() < argument.min_rank) {
        const auto rank = std::to_string(argument.min_rank);
        fail(op, std::string(argument.name) + " must have at least " + rank + " dimensions");
    }
    const bool as_it_is = has_dtype(t, OCS_FLOAT32) || (argument.kind == OCS_FLOAT_ROWS && has_dtype(t, OCS_BFLOAT16));
    const Tensor x = as_it_is ? t : torch::stable::to(t, ScalarType::Float);
    return argument.kind == OCS_DENSE_FLOATS ? as_dense(x) : as_contiguous(x);
}

// What operators.c sees of a converted tensor.
ocs_array view_of(const ocs_argument &argument, const Tensor &t) {
    ocs_array array = {};
    array.data = t.const_data_ptr();
    array.dtype = ocs_dtype_of(argument.kind);
    array.rank = t.dim();
    array.numel = t.numel();
    array.sizes = t.sizes().data();
    if (argument.kind == OCS_FLOAT_ROWS && has_dtype(t, OCS_BFLOAT16)) {
        array.dtype = OCS_BFLOAT16;
    }
    if (argument.kind == OCS_BYTE_ROWS) {
        array.dtype = has_dtype(t, OCS_UINT8) ? OCS_UINT8 : OCS_INT8;
        array.row_stride = array.rank > 0 ? t.stride(0) : 1;
    }
    return array;
}

// A new page of 4 KB costs a microsecond, a large result so more than its arithmetic. numpy asks for huge pages too.
void prefer_huge_pages(void *memory, AtenTensorHandle t, ocs_dtype dtype) {
#if defined(__linux__)
    int64_t numel = 0;
    aoti_torch_get_numel(t, &numel);
    const size_t bytes = numel * bytes_of(dtype);
    constexpr uintptr_t huge = uintptr_t{1} << 21;
    const auto data = reinterpret_cast<uintptr_t>(memory);
    const uintptr_t begin = (data + huge - 1) & ~(huge - 1), end = (data + bytes) & ~(huge - 1);
    if (bytes >= 2 * huge && begin < end) {
        madvise(reinterpret_cast<void *>(begin), end - begin, MADV_HUGEPAGE); // a wish: failing changes nothing
    }
#else
    (void)memory, (void)t, (void)dtype;
#endif
}

struct Delete {
    void operator()(AtenTensorOpaque *t) const {
        aoti_torch_delete_tensor_object(t);
    }
};
using Owned = std::unique_ptr<AtenTensorOpaque, Delete>;

// An uninitialized CPU tensor, straight from the allocator: new_empty and empty_like go through the dispatcher by name.
// NULL where there is no memory.
Owned empty(ocs_dtype dtype, int64_t rank, const int64_t *sizes, const int64_t *strides) {
    AtenTensorHandle t = nullptr;
    aoti_torch_empty_strided(rank, sizes, strides, shim_dtype(dtype), aoti_torch_device_type_cpu(), 0, &t);
    return Owned(t);
}

} // namespace

#endif
