// Tensors in and out of torch_shim.cpp, and the exceptions for what does not fit.
//
// What is wrong with an argument is a RuntimeError that starts with the operator's name.
#ifndef OCS_TENSORS_H
#define OCS_TENSORS_H

#include "ocs.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

[[noreturn]] void fail(const char *op, const std::string &what) {
    throw std::runtime_error(std::string("ocs::") + op + ": " + what);
}

void check(const char *op, ocs_status status) {
    if (status != OCS_OK) {
        fail(op, ocs_status_text(status));
    }
}

// Tensor::scalar_type() compares with every dtype that there is; this asks for the one that is nearly always there.
bool is_float32(const Tensor &t) {
    int32_t type = -1;
    return aoti_torch_get_dtype(t.get(), &type) == 0 && type == aoti_torch_dtype_float32();
}

bool is_float(const Tensor &t) {
    if (is_float32(t)) {
        return true;
    }
    const auto type = t.scalar_type();
    return type == ScalarType::Double || type == ScalarType::Half || type == ScalarType::BFloat16;
}

// Without a trip through the dispatcher where there is nothing to do.
Tensor as_contiguous(const Tensor &t) {
    return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

// A float tensor as contiguous float32.
Tensor floats(const char *op, const char *name, const Tensor &t, int64_t min_rank = 0) {
    if (!is_float(t)) {
        fail(op, std::string(name) + " must be a float tensor");
    }
    if (t.dim() < min_rank) {
        fail(op, std::string(name) + " must have at least " + std::to_string(min_rank) + " dimensions");
    }
    return as_contiguous(is_float32(t) ? t : torch::stable::to(t, ScalarType::Float));
}

Tensor integers(const char *op, const char *name, const Tensor &t, ScalarType type, int64_t min_rank = 1) {
    if (t.scalar_type() != type || t.dim() < min_rank) {
        fail(op, std::string(name) + " has the wrong dtype or too few dimensions");
    }
    return as_contiguous(t);
}

int32_t shim_dtype(ScalarType type) {
    switch (type) {
    case ScalarType::Float: return aoti_torch_dtype_float32();
    case ScalarType::Double: return aoti_torch_dtype_float64();
    case ScalarType::Long: return aoti_torch_dtype_int64();
    case ScalarType::Int: return aoti_torch_dtype_int32();
    case ScalarType::Byte: return aoti_torch_dtype_uint8();
    default: return aoti_torch_dtype_int8();
    }
}

// A new page of 4 KB costs a microsecond, a large result so more than its arithmetic. numpy asks for huge pages too.
void prefer_huge_pages(const Tensor &t, size_t bytes) {
#if defined(__linux__)
    constexpr uintptr_t huge = uintptr_t{1} << 21;
    const auto data = reinterpret_cast<uintptr_t>(t.mutable_data_ptr());
    const uintptr_t begin = (data + huge - 1) & ~(huge - 1), end = (data + bytes) & ~(huge - 1);
    if (bytes >= 2 * huge && begin < end) {
        madvise(reinterpret_cast<void *>(begin), end - begin, MADV_HUGEPAGE); // a wish: failing changes nothing
    }
#else
    (void)t, (void)bytes;
#endif
}

// An uninitialized CPU tensor, straight from the allocator: new_empty and empty_like go through the dispatcher by name.
Tensor empty_strided(int64_t rank, const int64_t *sizes, const int64_t *strides, ScalarType type) {
    AtenTensorHandle handle = nullptr;
    if (aoti_torch_empty_strided(rank, sizes, strides, shim_dtype(type), aoti_torch_device_type_cpu(), 0, &handle)) {
        throw std::runtime_error("ocs: a result of this size cannot be allocated");
    }
    Tensor result(handle);
    prefer_huge_pages(result, result.numel() * (type == ScalarType::Float ? sizeof(float) : 1));
    return result;
}

Tensor empty(const std::vector<int64_t> &sizes, ScalarType type) {
    std::vector<int64_t> strides(sizes.size());
    int64_t stride = 1;
    for (size_t i = sizes.size(); i-- > 0; stride *= std::max<int64_t>(sizes[i], 1)) {
        strides[i] = stride;
    }
    return empty_strided((int64_t)sizes.size(), sizes.data(), strides.data(), type);
}

template <class T> T *write(const Tensor &t) {
    return static_cast<T *>(t.mutable_data_ptr());
}
template <class T> const T *read(const Tensor &t) {
    return static_cast<const T *>(t.const_data_ptr());
}

std::vector<int64_t> sizes_of(const Tensor &t) {
    return {t.sizes().begin(), t.sizes().end()};
}

// O, C and K of a weight or of expanded integers [O, C, ...].
ocs_shape shape_of(const char *op, const Tensor &w, int64_t groups) {
    ocs_shape shape = {groups, w.size(0), w.size(1), 1, 0};
    for (int64_t i = 2; i < w.dim(); ++i) {
        shape.K *= w.size(i);
    }
    if (groups != 1 && (groups < 1 || groups > shape.O || shape.O % groups != 0)) {
        fail(op, "groups must divide the output channels");
    }
    return shape;
}

// S from the length of a plan's array.
void set_splits(const char *op, const Tensor &source, ocs_shape *shape) {
    shape->S = source.numel() / shape->G - shape->C;
    if (source.numel() % shape->G != 0 || shape->S < 0) {
        fail(op, "source does not fit the groups and channels of the weight");
    }
}

// An int; what does not fit becomes one that the entries refuse.
int narrow(int64_t bits) {
    return static_cast<int>(std::clamp<int64_t>(bits, 0, 99));
}

// A float; what does not fit becomes Inf, which the entries refuse.
float narrow(double value) {
    constexpr double most = std::numeric_limits<float>::max();
    return std::abs(value) > most ? std::numeric_limits<float>::infinity() : static_cast<float>(value);
}

void check_numel(const char *op, const Tensor &t, int64_t numel) {
    if (t.numel() != numel) {
        fail(op, ocs_status_text(OCS_BAD_PLAN));
    }
}

// 0 where one number (a scale, say) serves all, 1 where each output channel has its own.
int64_t stride_of(const char *op, const Tensor &numbers, int64_t rows, const char *name = "scale") {
    if (numbers.dim() != 0 && (numbers.dim() != 1 || numbers.numel() != rows)) {
        fail(op, std::string(name) + " must have no dimension, or one of the output channels");
    }
    return numbers.dim();
}

} // namespace

#endif
