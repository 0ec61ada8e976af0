// torch.ops.ocs: the kernels on CPU tensors, registered through libtorch's stable ABI.
//
// The only C++ file, with tensors.h. It takes nothing from libtorch but C shims that torch 2.10 has, so that one build
// serves every later torch (tests/test_build.py reads the symbol table). Argument order and names are those of ocs._C
// (module.c). The stable ABI of 2.10 can throw nothing but RuntimeError; ocs/functional.py checks first and raises
// better ones. Nothing throws inside parallel_for.
#include "tensors.h"

#include <tuple>
#include <utility>

namespace {

// --- Where the outliers are ----------------------------------------------------------------------

Tensor abs_max(const Tensor &x_any) {
    const Tensor x = floats("abs_max", "x", x_any);
    Tensor max = empty({}, ScalarType::Float);
    *write<float>(max) = ocs_abs_max_f32(read<float>(x), x.numel());
    return max;
}

Tensor histogram(const Tensor &x_any, int64_t bins, double limit) {
    const Tensor x = floats("histogram", "x", x_any);
    if (bins < 1 || bins > 1 << 24) {
        check("histogram", OCS_BAD_BINS);
    }
    Tensor counts = empty({bins}, ScalarType::Long);
    check("histogram", ocs_histogram_f32(write<int64_t>(counts), read<float>(x), x.numel(), bins, narrow(limit)));
    return counts;
}

Tensor octave_histogram(const Tensor &x_any, double limit) {
    const Tensor x = floats("octave_histogram", "x", x_any, 2);
    const ocs_shape shape = shape_of("octave_histogram", x, 1);
    Tensor counts = empty({shape.C, OCS_OCTAVE_BINS}, ScalarType::Long);
    check("octave_histogram",
          ocs_octave_histogram_f32(write<int64_t>(counts), read<float>(x), shape.O, shape.C, shape.K, narrow(limit)));
    return counts;
}

Tensor channel_max(const Tensor &w_any, int64_t groups) {
    const Tensor w = floats("channel_max", "w", w_any, 2);
    const ocs_shape shape = shape_of("channel_max", w, groups);
    Tensor max = empty({shape.G * shape.C}, ScalarType::Float);
    check("channel_max", ocs_channel_max_f32(write<float>(max), read<float>(w), &shape));
    return max;
}

// --- Which channels to split ---------------------------------------------------------------------

std::tuple<Tensor, Tensor, Tensor, Tensor> split_plan(const Tensor &max_any, int64_t groups, int64_t splits) {
    const Tensor max = floats("split_plan", "channel_max", max_any, 1);
    if (groups < 1 || max.numel() % groups != 0 || splits < 0 || splits > max.numel() / groups) {
        fail("split_plan", "groups must divide the channels, and splits be at most their number in a group");
    }
    const int64_t channels = max.numel() / groups, expanded = max.numel() + groups * splits;
    Tensor source = empty({expanded}, ScalarType::Long), depth = empty({expanded}, ScalarType::Int);
    Tensor offset = empty({expanded}, ScalarType::Int), split_max = empty({expanded}, ScalarType::Float);
    check("split_plan", ocs_split_plan(write<int64_t>(source), write<int32_t>(depth), write<int32_t>(offset),
                                       write<float>(split_max), read<float>(max), groups, channels, splits));
    return {source, depth, offset, split_max};
}

Tensor output_max(const Tensor &w_any, const Tensor &source_any, const Tensor &depth_any, int64_t groups) {
    const char *op = "output_max";
    const Tensor w = floats(op, "w", w_any, 2), source = integers(op, "source", source_any, ScalarType::Long);
    const Tensor depth = integers(op, "depth", depth_any, ScalarType::Int);
    ocs_shape shape = shape_of(op, w, groups);
    set_splits(op, source, &shape);
    check_numel(op, depth, source.numel());
    Tensor max = empty({shape.O}, ScalarType::Float);
    const ocs_plan plan = {read<int64_t>(source), read<int32_t>(depth), nullptr};
    check(op, ocs_output_max_f32(write<float>(max), read<float>(w), &plan, &shape));
    return max;
}

// --- Where to clip -------------------------------------------------------------------------------

// [bins], or [O, bins] where there is a limit for each output channel.
Tensor split_histogram(const Tensor &w_any, const Tensor &source_any, const Tensor &depth_any, int64_t groups,
                       int64_t bins, const Tensor &limit_any) {
    const char *op = "split_histogram";
    const Tensor w = floats(op, "w", w_any, 2), limit = floats(op, "limit", limit_any);
    const Tensor source = integers(op, "source", source_any, ScalarType::Long);
    const Tensor depth = integers(op, "depth", depth_any, ScalarType::Int);
    ocs_shape shape = shape_of(op, w, groups);
    set_splits(op, source, &shape);
    check_numel(op, depth, source.numel());
    if (bins < 1 || bins > 1 << 24) {
        check(op, OCS_BAD_BINS);
    }
    stride_of(op, limit, shape.O, "limit");
    auto sizes = sizes_of(limit);
    sizes.push_back(bins);
    Tensor counts = empty(sizes, ScalarType::Long);
    const ocs_plan plan = {read<int64_t>(source), read<int32_t>(depth), nullptr};
    check(op, ocs_split_histogram_f32(write<int64_t>(counts), read<float>(w), &plan, &shape, limit.numel(), bins,
                                      read<float>(limit)));
    return counts;
}

Tensor clip_threshold(const Tensor &counts_any, const Tensor &limit_any, int64_t bits, bool is_signed, int64_t method) {
    const char *op = "clip_threshold";
    const Tensor counts = integers(op, "counts", counts_any, ScalarType::Long);
    const Tensor limit = floats(op, "limit", limit_any);
    const int64_t rows = limit.numel(), bins = counts.size(counts.dim() - 1);
    if (counts.numel() != rows * bins) {
        fail(op, "counts must be [..., bins], and limit hold one number for each histogram");
    }
    if (method < OCS_CLIP_MSE || method > OCS_CLIP_SAWB) {
        check(op, OCS_BAD_METHOD);
    }
    Tensor threshold = empty(sizes_of(limit), ScalarType::Float);
    check(op, ocs_clip_threshold_f32(write<float>(threshold), read<int64_t>(counts), read<float>(limit), rows, bins,
                                     narrow(bits), is_signed, static_cast<ocs_clip>(method)));
    return threshold;
}

// --- Weights to integers and back ----------------------------------------------------------------

// What quantize_weight and squant_weight share; `entry` writes the integers.
template <class Entry> Tensor weight_to_integers(const char *op, const Tensor &w_any, const Tensor &scale_any,
                                                 const Tensor &source_any, const Tensor &depth_any,
                                                 const Tensor &offset_any, int64_t groups, Entry entry) {
    const Tensor w = floats(op, "w", w_any, 2), scale = floats(op, "scale", scale_any);
    const Tensor source = integers(op, "source", source_any, ScalarType::Long);
    const Tensor depth = integers(op, "depth", depth_any, ScalarType::Int);
    const Tensor offset = integers(op, "offset", offset_any, ScalarType::Int);
    ocs_shape shape = shape_of(op, w, groups);
    set_splits(op, source, &shape);
    check_numel(op, depth, source.numel());
    check_numel(op, offset, source.numel());
    auto sizes = sizes_of(w);
    sizes[1] = shape.C + shape.S;
    Tensor ints = empty(sizes, ScalarType::Char);
    const ocs_plan plan = {read<int64_t>(source), read<int32_t>(depth), read<int32_t>(offset)};
    check(op,
          entry(write<int8_t>(ints), read<float>(w), &plan, read<float>(scale), stride_of(op, scale, shape.O), &shape));
    return ints;
}

Tensor quantize_weight(const Tensor &w, const Tensor &scale, const Tensor &source, const Tensor &depth,
                       const Tensor &offset, int64_t groups, int64_t bits, bool quantization_aware) {
    const auto entry = [=](auto... args) { return ocs_quantize_weight_f32(args..., narrow(bits), quantization_aware); };
    return weight_to_integers("quantize_weight", w, scale, source, depth, offset, groups, entry);
}

Tensor squant_weight(const Tensor &w, const Tensor &scale, const Tensor &source, const Tensor &depth,
                     const Tensor &offset, int64_t groups, int64_t bits) {
    const auto entry = [=](auto... args) { return ocs_squant_weight_f32(args..., narrow(bits)); };
    return weight_to_integers("squant_weight", w, scale, source, depth, offset, groups, entry);
}

Tensor fold(const Tensor &ints_any, const Tensor &scale_any, const Tensor &source_any, int64_t groups,
            int64_t channels) {
    const Tensor ints = integers("fold", "ints", ints_any, ScalarType::Char, 2);
    const Tensor scale = floats("fold", "scale", scale_any);
    const Tensor source = integers("fold", "source", source_any, ScalarType::Long);
    ocs_shape shape = shape_of("fold", ints, groups);
    if (source.numel() % groups != 0 || source.numel() / groups != shape.C) {
        check("fold", OCS_BAD_PLAN);
    }
    if (channels < 0 || channels > shape.C) {
        fail("fold", "channels must be 0 to the number of expanded channels in a group");
    }
    shape.S = shape.C - channels;
    shape.C = channels;
    auto sizes = sizes_of(ints);
    sizes[1] = channels;
    Tensor w_hat = empty(sizes, ScalarType::Float);
    check("fold", ocs_fold_f32(write<float>(w_hat), read<int8_t>(ints), read<int64_t>(source), read<float>(scale),
                               stride_of("fold", scale, shape.O), &shape));
    return w_hat;
}

// What weight_error and output_error share; `entry` writes the error [size], or of each output channel where size is 0.
template <class Entry> Tensor error_of(const char *op, const Tensor &w_any, const Tensor &ints_any,
                                       const Tensor &scale_any, const Tensor &source_any, int64_t groups, int64_t size,
                                       Entry entry) {
    const Tensor w = floats(op, "w", w_any, 2), ints = integers(op, "ints", ints_any, ScalarType::Char, 2);
    const Tensor scale = floats(op, "scale", scale_any), source = integers(op, "source", source_any, ScalarType::Long);
    ocs_shape shape = shape_of(op, w, groups);
    set_splits(op, source, &shape);
    if (ints.size(0) != shape.O || ints.size(1) != shape.C + shape.S) {
        check(op, OCS_BAD_PLAN);
    }
    check_numel(op, ints, shape.O * (shape.C + shape.S) * shape.K);
    Tensor error = empty({size ? size : shape.O}, ScalarType::Double);
    check(op, entry(write<double>(error), read<float>(w), read<int8_t>(ints), read<int64_t>(source), read<float>(scale),
                    stride_of(op, scale, shape.O), &shape));
    return error;
}

Tensor weight_error(const Tensor &w, const Tensor &ints, const Tensor &scale, const Tensor &source, int64_t groups) {
    const auto entry = [](auto... args) { return ocs_weight_error_f32(args...); };
    return error_of("weight_error", w, ints, scale, source, groups, 2, entry);
}

Tensor output_error(const Tensor &w, const Tensor &ints, const Tensor &scale, const Tensor &source, int64_t groups,
                    double gain) {
    const auto entry = [=](auto... args) { return ocs_output_error_f32(args..., gain); };
    return error_of("output_error", w, ints, scale, source, groups, 0, entry);
}

// --- Any array to the grid and back --------------------------------------------------------------

float one_value(const char *op, const Tensor &scale_any) {
    if (scale_any.numel() != 1) {
        fail(op, "scale must be one number");
    }
    return *read<float>(floats(op, "scale", scale_any));
}

Tensor quantize(const Tensor &x_any, const Tensor &scale, int64_t bits, bool is_signed) {
    const Tensor x = floats("quantize", "x", x_any);
    Tensor q = empty(sizes_of(x), is_signed ? ScalarType::Char : ScalarType::Byte);
    check("quantize", ocs_quantize_f32(q.mutable_data_ptr(), read<float>(x), x.numel(), one_value("quantize", scale),
                                       narrow(bits), is_signed));
    return q;
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

Tensor dequantize(const Tensor &q_any, const Tensor &scale_any) {
    const bool is_signed = q_any.scalar_type() == ScalarType::Char;
    const ScalarType type = is_signed ? ScalarType::Char : ScalarType::Byte;
    const bool in_place = q_any.scalar_type() == type && rows_contiguous(q_any);
    const Tensor q = in_place ? q_any : integers("dequantize", "q", q_any, type, 0);
    const Tensor scale = floats("dequantize", "scale", scale_any);
    const int64_t rows = q.dim() > 0 ? q.size(0) : 1;
    Tensor x = empty(sizes_of(q), ScalarType::Float);
    const int64_t row = rows ? q.numel() / rows : 0;
    check("dequantize",
          ocs_dequantize_f32(write<float>(x), q.const_data_ptr(), read<float>(scale),
                             stride_of("dequantize", scale, rows), rows, row, in_place ? q.stride(0) : row, is_signed));
    return x;
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

// In the dtype and, where it is dense, the memory order of x.
Tensor fake_quantize(const Tensor &x_any, const Tensor &scale, int64_t bits, bool is_signed) {
    if (!is_float(x_any)) {
        fail("fake_quantize", "x must be a float tensor");
    }
    const bool converted = !is_float32(x_any);
    Tensor x = converted ? torch::stable::to(x_any, ScalarType::Float) : x_any;
    const bool dense = is_dense(x);
    Tensor x_hat = dense ? empty_strided(x.dim(), x.sizes().data(), x.strides().data(), ScalarType::Float)
                         : torch::stable::empty_like(x);
    if (!dense) { // into the order of the result, but not into the result: autograd records the copy
        Tensor in_order = torch::stable::empty_like(x);
        x = torch::stable::copy_(in_order, x);
    }
    check("fake_quantize", ocs_fake_quantize_f32(write<float>(x_hat), read<float>(x), x.numel(),
                                                 one_value("fake_quantize", scale), narrow(bits), is_signed));
    return converted ? torch::stable::to(x_hat, x_any.scalar_type()) : x_hat;
}

// --- k bits --------------------------------------------------------------------------------------

Tensor pack(const Tensor &q_any, int64_t bits) {
    const Tensor q = integers("pack", "ints", q_any, ScalarType::Char, 0);
    if (bits < 2 || bits > 8) {
        check("pack", OCS_BAD_BITS);
    }
    Tensor packed = empty({ocs_packed_bytes(q.numel(), narrow(bits))}, ScalarType::Byte);
    check("pack", ocs_pack_i8(write<uint8_t>(packed), read<int8_t>(q), q.numel(), narrow(bits)));
    return packed;
}

Tensor unpack(const Tensor &packed_any, int64_t numel, int64_t bits) {
    const Tensor packed = integers("unpack", "packed", packed_any, ScalarType::Byte);
    if (bits < 2 || bits > 8) {
        check("unpack", OCS_BAD_BITS);
    }
    if (numel < 0 || ocs_packed_bytes(numel, narrow(bits)) != packed.numel()) {
        fail("unpack", "packed has another size than that many integers");
    }
    Tensor q = empty({numel}, ScalarType::Char);
    check("unpack", ocs_unpack_i8(write<int8_t>(q), read<uint8_t>(packed), numel, narrow(bits)));
    return q;
}

// --- Threads -------------------------------------------------------------------------------------

void run_in_torch_threads(int64_t n, int64_t grain, ocs_range_fn fn, void *ctx) {
    torch::stable::parallel_for(0, n, grain, [=](int64_t begin, int64_t end) { fn(begin, end, ctx); });
}

} // namespace

STABLE_TORCH_LIBRARY(ocs, m) {
    ocs_set_parallel_for(run_in_torch_threads);
    m.def("abs_max(Tensor x) -> Tensor");
    m.def("histogram(Tensor x, int bins, float limit) -> Tensor");
    m.def("octave_histogram(Tensor x, float limit) -> Tensor");
    m.def("channel_max(Tensor w, int groups) -> Tensor");
    m.def("split_plan(Tensor channel_max, int groups, int splits) -> (Tensor, Tensor, Tensor, Tensor)");
    m.def("output_max(Tensor w, Tensor source, Tensor depth, int groups) -> Tensor");
    m.def("split_histogram(Tensor w, Tensor source, Tensor depth, int groups, int bins, Tensor limit) -> Tensor");
    m.def("clip_threshold(Tensor counts, Tensor limit, int bits, bool signed, int method) -> Tensor");
    m.def("quantize_weight(Tensor w, Tensor scale, Tensor source, Tensor depth, Tensor offset, int groups, int bits, "
          "bool quantization_aware) -> Tensor");
    m.def("squant_weight(Tensor w, Tensor scale, Tensor source, Tensor depth, Tensor offset, int groups, int bits) -> "
          "Tensor");
    m.def("fold(Tensor ints, Tensor scale, Tensor source, int groups, int channels) -> Tensor");
    m.def("weight_error(Tensor w, Tensor ints, Tensor scale, Tensor source, int groups) -> Tensor");
    m.def("output_error(Tensor w, Tensor ints, Tensor scale, Tensor source, int groups, float gain) -> Tensor");
    m.def("quantize(Tensor x, Tensor scale, int bits, bool signed) -> Tensor");
    m.def("dequantize(Tensor q, Tensor scale) -> Tensor");
    m.def("fake_quantize(Tensor x, Tensor scale, int bits, bool signed) -> Tensor");
    m.def("pack(Tensor ints, int bits) -> Tensor");
    m.def("unpack(Tensor packed, int numel, int bits) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(ocs, CPU, m) {
    m.impl("abs_max", TORCH_BOX(&abs_max));
    m.impl("histogram", TORCH_BOX(&histogram));
    m.impl("octave_histogram", TORCH_BOX(&octave_histogram));
    m.impl("channel_max", TORCH_BOX(&channel_max));
    m.impl("split_plan", TORCH_BOX(&split_plan));
    m.impl("output_max", TORCH_BOX(&output_max));
    m.impl("split_histogram", TORCH_BOX(&split_histogram));
    m.impl("clip_threshold", TORCH_BOX(&clip_threshold));
    m.impl("quantize_weight", TORCH_BOX(&quantize_weight));
    m.impl("squant_weight", TORCH_BOX(&squant_weight));
    m.impl("fold", TORCH_BOX(&fold));
    m.impl("weight_error", TORCH_BOX(&weight_error));
    m.impl("output_error", TORCH_BOX(&output_error));
    m.impl("quantize", TORCH_BOX(&quantize));
    m.impl("dequantize", TORCH_BOX(&dequantize));
    m.impl("fake_quantize", TORCH_BOX(&fake_quantize));
    m.impl("pack", TORCH_BOX(&pack));
    m.impl("unpack", TORCH_BOX(&unpack));
}
