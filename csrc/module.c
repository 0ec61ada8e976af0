/* ocs._C: the kernels on numpy arrays, through CPython's limited API and numpy's C API.

   Every function checks its arguments, allocates the result and calls one entry of ocs.h with the GIL released.
   Argument order and names are those of torch.ops.ocs (torch_shim.cpp). */
#include "arrays.h"

#include <stdlib.h>

/* --- Where the outliers are ------------------------------------------------------------------- */

static PyObject *py_abs_max(PyObject *self, PyObject *args) {
    (void)self;
    PyObject *x_object;
    if (!PyArg_ParseTuple(args, "O:abs_max", &x_object)) {
        return NULL;
    }
    PyArrayObject *x = input("abs_max", "x", x_object, NPY_FLOAT32, 0);
    PyArrayObject *result = x == NULL ? NULL : output(0, NULL, NPY_FLOAT32);
    if (result != NULL) {
        float *max = PyArray_DATA(result);
        Py_BEGIN_ALLOW_THREADS;
        *max = ocs_abs_max_f32(PyArray_DATA(x), PyArray_SIZE(x));
        Py_END_ALLOW_THREADS;
    }
    return finish("abs_max", OCS_OK, result, &x, 1);
}

static PyObject *py_histogram(PyObject *self, PyObject *args) {
    (void)self;
    PyObject *x_object, *limit_object;
    long long bins;
    float limit;
    if (!PyArg_ParseTuple(args, "OLO:histogram", &x_object, &bins, &limit_object) ||
        !read_number("histogram", "limit", limit_object, &limit)) {
        return NULL;
    }
    if (bins < 1 || bins > 1 << 24) {
        return fail("histogram", OCS_BAD_BINS);
    }
    ocs_status status = OCS_OK;
    PyArrayObject *x = input("histogram", "x", x_object, NPY_FLOAT32, 0);
    PyArrayObject *counts = x == NULL ? NULL : output(1, (npy_intp[]){(npy_intp)bins}, NPY_INT64);
    if (counts != NULL) {
        Py_BEGIN_ALLOW_THREADS;
        status = ocs_histogram_f32(PyArray_DATA(counts), PyArray_DATA(x), PyArray_SIZE(x), bins, limit);
        Py_END_ALLOW_THREADS;
    }
    return finish("histogram", status, counts, &x, 1);
}

static PyObject *py_octave_histogram(PyObject *self, PyObject *args) {
    (void)self;
    PyObject *x_object, *limit_object;
    ocs_shape shape;
    float limit;
    if (!PyArg_ParseTuple(args, "OO:octave_histogram", &x_object, &limit_object) ||
        !read_number("octave_histogram", "limit", limit_object, &limit)) {
        return NULL;
    }
    ocs_status status = OCS_OK;
    PyArrayObject *counts = NULL, *x = input("octave_histogram", "x", x_object, NPY_FLOAT32, 2);
    if (x != NULL && read_shape("octave_histogram", x, 1, &shape)) {
        counts = output(2, (npy_intp[]){(npy_intp)shape.C, OCS_OCTAVE_BINS}, NPY_INT64);
    }
    if (counts != NULL) {
        Py_BEGIN_ALLOW_THREADS;
        status = ocs_octave_histogram_f32(PyArray_DATA(counts), PyArray_DATA(x), shape.O, shape.C, shape.K, limit);
        Py_END_ALLOW_THREADS;
    }
    return finish("octave_histogram", status, counts, &x, 1);
}

static PyObject *py_channel_max(PyObject *self, PyObject *args) {
    (void)self;
    PyObject *w_object;
    ocs_shape shape;
    long long groups;
    if (!PyArg_ParseTuple(args, "OL:channel_max", &w_object, &groups)) {
        return NULL;
    }
    ocs_status status = OCS_OK;
    PyArrayObject *result = NULL, *w = input("channel_max", "w", w_object, NPY_FLOAT32, 2);
    if (w != NULL && read_shape("channel_max", w, groups, &shape)) {
        result = output(1, (npy_intp[]){(npy_intp)(shape.G * shape.C)}, NPY_FLOAT32);
    }
    if (result != NULL) {
        Py_BEGIN_ALLOW_THREADS;
        status = ocs_channel_max_f32(PyArray_DATA(result), PyArray_DATA(w), &shape);
        Py_END_ALLOW_THREADS;
    }
    return finish("channel_max", status, result, &w, 1);
}

/* --- Which channels to split ------------------------------------------------------------------ */

static PyObject *py_split_plan(PyObject *self, PyObject *args) {
    (void)self;
    PyObject *max_object;
    long long groups, splits;
    if (!PyArg_ParseTuple(args, "OLL:split_plan", &max_object, &groups, &splits)) {
        return NULL;
    }
    PyArrayObject *max = input("split_plan", "channel_max", max_object, NPY_FLOAT32, 1);
    if (max == NULL) {
        return NULL;
    }
    const npy_intp size = PyArray_SIZE(max);
    if (groups < 1 || size % groups != 0 || splits < 0 || splits > size / groups) {
        Py_DECREF((PyObject *)max);
        return PyErr_Format(PyExc_ValueError,
                            "split_plan: groups=%lld must divide the %lld channels, and splits=%lld be at "
                            "most their number in a group",
                            groups, (long long)size, splits);
    }
    const npy_intp expanded = size + (npy_intp)(groups * splits);
    ocs_status status = OCS_OK;
    PyArrayObject *source = output(1, &expanded, NPY_INT64), *depth = output(1, &expanded, NPY_INT32);
    PyArrayObject *offset = output(1, &expanded, NPY_INT32), *split_max = output(1, &expanded, NPY_FLOAT32);
    if (source != NULL && depth != NULL && offset != NULL && split_max != NULL) {
        Py_BEGIN_ALLOW_THREADS;
        status = ocs_split_plan(PyArray_DATA(source), PyArray_DATA(depth), PyArray_DATA(offset),
                                PyArray_DATA(split_max), PyArray_DATA(max), groups, size / groups, splits);
        Py_END_ALLOW_THREADS;
    }
    if (status != OCS_OK) {
        fail("split_plan", status);
    }
    PyObject *result = PyErr_Occurred() ? NULL : Py_BuildValue("(OOOO)", source, depth, offset, split_max);
    PyArrayObject *taken[] = {max, source, depth, offset, split_max};
    finish("split_plan", OCS_OK, NULL, taken, COUNT(taken));
    return result;
}

static PyObject *py_output_max(PyObject *self, PyObject *args) {
    (void)self;
    PyObject *w_object, *source_object, *depth_object;
    ocs_shape shape;
    long long groups;
    if (!PyArg_ParseTuple(args, "OOOL:output_max", &w_object, &source_object, &depth_object, &groups)) {
        return NULL;
    }
    ocs_status status = OCS_OK;
    PyArrayObject *result = NULL;
    PyArrayObject *taken[3] = {
        input("output_max", "w", w_object, NPY_FLOAT32, 2),
        input("output_max", "source", source_object, NPY_INT64, 1),
        input("output_max", "depth", depth_object, NPY_INT32, 1),
    };
    PyArrayObject *w = taken[0], *source = taken[1], *depth = taken[2];
    if (w != NULL && source != NULL && depth != NULL && read_shape("output_max", w, groups, &shape) &&
        read_splits("output_max", source, &shape)) {
        status = PyArray_SIZE(depth) == PyArray_SIZE(source) ? OCS_OK : OCS_BAD_PLAN;
        result = output(1, (npy_intp[]){(npy_intp)shape.O}, NPY_FLOAT32);
    }
    if (result != NULL && status == OCS_OK) {
        const ocs_plan plan = {PyArray_DATA(source), PyArray_DATA(depth), NULL};
        Py_BEGIN_ALLOW_THREADS;
        status = ocs_output_max_f32(PyArray_DATA(result), PyArray_DATA(w), &plan, &shape);
        Py_END_ALLOW_THREADS;
    }
    return finish("output_max", status, result, taken, COUNT(taken));
}

/* --- Where to clip ---------------------------------------------------------------------------- */

static PyObject *py_split_histogram(PyObject *self, PyObject *args) {
    (void)self;
    const char *name = "split_histogram";
    PyObject *w_object, *source_object, *depth_object, *limit_object;
    ocs_shape shape;
    long long groups, bins;
    int stride = 0;
    if (!PyArg_ParseTuple(args, "OOOLLO:split_histogram", &w_object, &source_object, &depth_object, &groups, &bins,
                          &limit_object)) {
        return NULL;
    }
    if (bins < 1 || bins > 1 << 24) {
        return fail(name, OCS_BAD_BINS);
    }
    PyArrayObject *counts = NULL;
    PyArrayObject *taken[4] = {
        input(name, "w", w_object, NPY_FLOAT32, 2),
        input(name, "source", source_object, NPY_INT64, 1),
        input(name, "depth", depth_object, NPY_INT32, 1),
        input(name, "limit", limit_object, NPY_FLOAT32, 0),
    };
    PyArrayObject *w = taken[0], *source = taken[1], *depth = taken[2], *limit = taken[3];
    ocs_status status = OCS_OK;
    if (!PyErr_Occurred() && read_shape(name, w, groups, &shape) && read_splits(name, source, &shape) &&
        read_stride(name, "limit", limit, shape.O, &stride)) {
        status = PyArray_SIZE(depth) == PyArray_SIZE(source) ? OCS_OK : OCS_BAD_PLAN;
        const npy_intp dims[2] = {(npy_intp)shape.O, (npy_intp)bins};
        counts = stride == 0 ? output(1, dims + 1, NPY_INT64) : output(2, dims, NPY_INT64);
    }
    if (counts != NULL && status == OCS_OK) {
        const ocs_plan plan = {PyArray_DATA(source), PyArray_DATA(depth), NULL};
        Py_BEGIN_ALLOW_THREADS;
        status = ocs_split_histogram_f32(PyArray_DATA(counts), PyArray_DATA(w), &plan, &shape, PyArray_SIZE(limit),
                                         bins, PyArray_DATA(limit));
        Py_END_ALLOW_THREADS;
    }
    return finish(name, status, counts, taken, COUNT(taken));
}

static PyObject *py_clip_threshold(PyObject *self, PyObject *args) {
    (void)self;
    const char *name = "clip_threshold";
    PyObject *counts_object, *limit_object;
    int bits, is_signed, method;
    if (!PyArg_ParseTuple(args, "OOipi:clip_threshold", &counts_object, &limit_object, &bits, &is_signed, &method)) {
        return NULL;
    }
    if (method < OCS_CLIP_MSE || method > OCS_CLIP_SAWB) {
        return fail(name, OCS_BAD_METHOD);
    }
    PyArrayObject *threshold = NULL;
    PyArrayObject *taken[2] = {
        input(name, "counts", counts_object, NPY_INT64, 1),
        input(name, "limit", limit_object, NPY_FLOAT32, 0),
    };
    PyArrayObject *counts = taken[0], *limit = taken[1];
    ocs_status status = OCS_OK;
    int64_t bins = 0;
    if (!PyErr_Occurred()) {
        bins = PyArray_DIM(counts, PyArray_NDIM(counts) - 1);
        threshold = output(PyArray_NDIM(limit), PyArray_DIMS(limit), NPY_FLOAT32);
        if (PyArray_SIZE(counts) != PyArray_SIZE(limit) * bins) {
            PyErr_Format(PyExc_ValueError, "%s: counts must be [..., bins], and limit hold one number for each", name);
            status = OCS_BAD_SHAPE;
        }
    }
    if (threshold != NULL && status == OCS_OK) {
        Py_BEGIN_ALLOW_THREADS;
        status = ocs_clip_threshold_f32(PyArray_DATA(threshold), PyArray_DATA(counts), PyArray_DATA(limit),
                                        PyArray_SIZE(limit), bins, bits, is_signed, (ocs_clip)method);
        Py_END_ALLOW_THREADS;
    }
    return finish(name, status, threshold, taken, COUNT(taken));
}

/* --- Weights to integers and back ------------------------------------------------------------- */

/* An array shaped like w [O, C, ...] but with `channels` on the second axis. */
static PyArrayObject *output_like(PyArrayObject *w, int64_t channels, int type) {
    npy_intp dims[64]; /* numpy's own limit on dimensions */
    for (int i = 0; i < PyArray_NDIM(w); ++i) {
        dims[i] = i == 1 ? (npy_intp)channels : PyArray_DIM(w, i);
    }
    return output(PyArray_NDIM(w), dims, type);
}

/* quantize_weight and squant_weight, which differ in the last argument. */
static PyObject *weight_to_integers(const char *name, const char *format, PyObject *args, bool squant) {
    PyObject *w_object, *scale_object, *source_object, *depth_object, *offset_object;
    ocs_shape shape;
    long long groups;
    int bits, quantization_aware = 1, stride = 0;
    if (!PyArg_ParseTuple(args, format, &w_object, &scale_object, &source_object, &depth_object, &offset_object,
                          &groups, &bits, &quantization_aware)) {
        return NULL;
    }
    PyArrayObject *ints = NULL;
    PyArrayObject *taken[5] = {
        input(name, "w", w_object, NPY_FLOAT32, 2),         input(name, "scale", scale_object, NPY_FLOAT32, 0),
        input(name, "source", source_object, NPY_INT64, 1), input(name, "depth", depth_object, NPY_INT32, 1),
        input(name, "offset", offset_object, NPY_INT32, 1),
    };
    PyArrayObject *w = taken[0], *scale = taken[1], *source = taken[2], *depth = taken[3], *offset = taken[4];
    ocs_status status = OCS_OK;
    if (!PyErr_Occurred() && read_shape(name, w, groups, &shape) && read_splits(name, source, &shape) &&
        read_stride(name, "scale", scale, shape.O, &stride)) {
        const npy_intp size = PyArray_SIZE(source);
        status = PyArray_SIZE(depth) == size && PyArray_SIZE(offset) == size ? OCS_OK : OCS_BAD_PLAN;
        ints = output_like(w, shape.C + shape.S, NPY_INT8);
    }
    if (ints != NULL && status == OCS_OK) {
        const ocs_plan plan = {PyArray_DATA(source), PyArray_DATA(depth), PyArray_DATA(offset)};
        Py_BEGIN_ALLOW_THREADS;
        status = squant ? ocs_squant_weight_f32(PyArray_DATA(ints), PyArray_DATA(w), &plan, PyArray_DATA(scale), stride,
                                                &shape, bits)
                        : ocs_quantize_weight_f32(PyArray_DATA(ints), PyArray_DATA(w), &plan, PyArray_DATA(scale),
                                                  stride, &shape, bits, quantization_aware);
        Py_END_ALLOW_THREADS;
    }
    return finish(name, status, ints, taken, COUNT(taken));
}

static PyObject *py_quantize_weight(PyObject *self, PyObject *args) {
    (void)self;
    return weight_to_integers("quantize_weight", "OOOOOLip:quantize_weight", args, false);
}

static PyObject *py_squant_weight(PyObject *self, PyObject *args) {
    (void)self;
    return weight_to_integers("squant_weight", "OOOOOLi:squant_weight", args, true);
}

static PyObject *py_fold(PyObject *self, PyObject *args) {
    (void)self;
    PyObject *ints_object, *scale_object, *source_object;
    ocs_shape shape;
    long long groups, channels;
    int stride = 0;
    if (!PyArg_ParseTuple(args, "OOOLL:fold", &ints_object, &scale_object, &source_object, &groups, &channels)) {
        return NULL;
    }
    PyArrayObject *w_hat = NULL;
    PyArrayObject *taken[3] = {
        input("fold", "ints", ints_object, NPY_INT8, 2),
        input("fold", "scale", scale_object, NPY_FLOAT32, 0),
        input("fold", "source", source_object, NPY_INT64, 1),
    };
    PyArrayObject *ints = taken[0], *scale = taken[1], *source = taken[2];
    ocs_status status = OCS_OK;
    if (!PyErr_Occurred() && read_shape("fold", ints, groups, &shape) &&
        read_stride("fold", "scale", scale, shape.O, &stride)) {
        const int64_t expanded = shape.C;
        shape.C = channels;
        shape.S = expanded - channels;
        const npy_intp length = PyArray_SIZE(source);
        bool fits = channels >= 0 && shape.S >= 0 && length % groups == 0 && length / groups == expanded;
        status = fits ? OCS_OK : OCS_BAD_PLAN;
        w_hat = fits ? output_like(ints, channels, NPY_FLOAT32) : NULL;
    }
    if (w_hat != NULL) {
        Py_BEGIN_ALLOW_THREADS;
        status = ocs_fold_f32(PyArray_DATA(w_hat), PyArray_DATA(ints), PyArray_DATA(source), PyArray_DATA(scale),
                              stride, &shape);
        Py_END_ALLOW_THREADS;
    }
    return finish("fold", status, w_hat, taken, COUNT(taken));
}

static PyObject *py_weight_error(PyObject *self, PyObject *args) {
    (void)self;
    const char *name = "weight_error";
    PyObject *w_object, *ints_object, *scale_object, *source_object;
    ocs_shape shape;
    long long groups;
    int stride = 0;
    if (!PyArg_ParseTuple(args, "OOOOL:weight_error", &w_object, &ints_object, &scale_object, &source_object,
                          &groups)) {
        return NULL;
    }
    PyArrayObject *error = NULL;
    PyArrayObject *taken[4] = {
        input(name, "w", w_object, NPY_FLOAT32, 2),
        input(name, "ints", ints_object, NPY_INT8, 2),
        input(name, "scale", scale_object, NPY_FLOAT32, 0),
        input(name, "source", source_object, NPY_INT64, 1),
    };
    PyArrayObject *w = taken[0], *ints = taken[1], *scale = taken[2], *source = taken[3];
    ocs_status status = OCS_OK;
    if (!PyErr_Occurred() && read_shape(name, w, groups, &shape) && read_splits(name, source, &shape) &&
        read_stride(name, "scale", scale, shape.O, &stride)) {
        const npy_intp *dims = PyArray_DIMS(ints);
        bool fits =
            dims[0] == shape.O && dims[1] == shape.C + shape.S && PyArray_SIZE(ints) == shape.O * dims[1] * shape.K;
        status = fits ? OCS_OK : OCS_BAD_PLAN;
        error = output(1, (npy_intp[]){2}, NPY_FLOAT64);
    }
    if (error != NULL && status == OCS_OK) {
        Py_BEGIN_ALLOW_THREADS;
        status = ocs_weight_error_f32(PyArray_DATA(error), PyArray_DATA(w), PyArray_DATA(ints), PyArray_DATA(source),
                                      PyArray_DATA(scale), stride, &shape);
        Py_END_ALLOW_THREADS;
    }
    return finish(name, status, error, taken, COUNT(taken));
}

/* --- Any array to the grid and back ----------------------------------------------------------- */

/* (x, scale, bits, signed) */
static bool read_grid_call(const char *function, const char *format, PyObject *args, PyObject **x, float *scale,
                           int *bits, int *is_signed) {
    PyObject *scale_object;
    return PyArg_ParseTuple(args, format, x, &scale_object, bits, is_signed) &&
           read_number(function, "scale", scale_object, scale);
}

static PyObject *py_quantize(PyObject *self, PyObject *args) {
    (void)self;
    PyObject *x_object;
    int bits, is_signed;
    float scale;
    if (!read_grid_call("quantize", "OOip:quantize", args, &x_object, &scale, &bits, &is_signed)) {
        return NULL;
    }
    ocs_status status = OCS_OK;
    PyArrayObject *q = NULL, *x = input("quantize", "x", x_object, NPY_FLOAT32, 0);
    if (x != NULL) {
        q = output(PyArray_NDIM(x), PyArray_DIMS(x), is_signed ? NPY_INT8 : NPY_UINT8);
    }
    if (q != NULL) {
        Py_BEGIN_ALLOW_THREADS;
        status = ocs_quantize_f32(PyArray_DATA(q), PyArray_DATA(x), PyArray_SIZE(x), scale, bits, is_signed);
        Py_END_ALLOW_THREADS;
    }
    return finish("quantize", status, q, &x, 1);
}

static PyObject *py_dequantize(PyObject *self, PyObject *args) {
    (void)self;
    PyObject *q_object, *scale_object;
    if (!PyArg_ParseTuple(args, "OO:dequantize", &q_object, &scale_object)) {
        return NULL;
    }
    bool is_signed = !(PyArray_Check(q_object) && PyArray_TYPE((PyArrayObject *)q_object) == NPY_UINT8);
    PyArrayObject *x = NULL;
    PyArrayObject *taken[2] = {
        input("dequantize", "q", q_object, is_signed ? NPY_INT8 : NPY_UINT8, 0),
        input("dequantize", "scale", scale_object, NPY_FLOAT32, 0),
    };
    PyArrayObject *q = taken[0], *scale = taken[1];
    ocs_status status = OCS_OK;
    bool fits = false;
    int stride = 0;
    int64_t rows = 1;
    if (!PyErr_Occurred()) {
        rows = PyArray_NDIM(q) > 0 ? PyArray_DIM(q, 0) : 1;
        fits = read_stride("dequantize", "scale", scale, rows, &stride);
    }
    if (fits) {
        x = output(PyArray_NDIM(q), PyArray_DIMS(q), NPY_FLOAT32);
    }
    if (x != NULL) {
        int64_t size = PyArray_SIZE(q), row = rows > 0 ? size / rows : 0;
        Py_BEGIN_ALLOW_THREADS;
        status = ocs_dequantize_f32(PyArray_DATA(x), PyArray_DATA(q), PyArray_DATA(scale), stride, rows, row, row,
                                    is_signed);
        Py_END_ALLOW_THREADS;
    }
    return finish("dequantize", status, x, taken, COUNT(taken));
}

static PyObject *py_fake_quantize(PyObject *self, PyObject *args) {
    (void)self;
    PyObject *x_object;
    int bits, is_signed;
    float scale;
    if (!read_grid_call("fake_quantize", "OOip:fake_quantize", args, &x_object, &scale, &bits, &is_signed)) {
        return NULL;
    }
    ocs_status status = OCS_OK;
    PyArrayObject *x_hat = NULL, *x = input("fake_quantize", "x", x_object, NPY_FLOAT32, 0);
    if (x != NULL) {
        x_hat = output(PyArray_NDIM(x), PyArray_DIMS(x), NPY_FLOAT32);
    }
    if (x_hat != NULL) {
        Py_BEGIN_ALLOW_THREADS;
        status = ocs_fake_quantize_f32(PyArray_DATA(x_hat), PyArray_DATA(x), PyArray_SIZE(x), scale, bits, is_signed);
        Py_END_ALLOW_THREADS;
    }
    return finish("fake_quantize", status, x_hat, &x, 1);
}

/* --- k bits ----------------------------------------------------------------------------------- */

static PyObject *py_pack(PyObject *self, PyObject *args) {
    (void)self;
    PyObject *q_object;
    int bits;
    if (!PyArg_ParseTuple(args, "Oi:pack", &q_object, &bits)) {
        return NULL;
    }
    if (bits < 2 || bits > 8) {
        return fail("pack", OCS_BAD_BITS);
    }
    ocs_status status = OCS_OK;
    PyArrayObject *packed = NULL, *q = input("pack", "ints", q_object, NPY_INT8, 0);
    if (q != NULL) {
        packed = output(1, (npy_intp[]){(npy_intp)ocs_packed_bytes(PyArray_SIZE(q), bits)}, NPY_UINT8);
    }
    if (packed != NULL) {
        Py_BEGIN_ALLOW_THREADS;
        status = ocs_pack_i8(PyArray_DATA(packed), PyArray_DATA(q), PyArray_SIZE(q), bits);
        Py_END_ALLOW_THREADS;
    }
    return finish("pack", status, packed, &q, 1);
}

static PyObject *py_unpack(PyObject *self, PyObject *args) {
    (void)self;
    PyObject *packed_object;
    long long numel;
    int bits;
    if (!PyArg_ParseTuple(args, "OLi:unpack", &packed_object, &numel, &bits)) {
        return NULL;
    }
    if (bits < 2 || bits > 8) {
        return fail("unpack", OCS_BAD_BITS);
    }
    ocs_status status = OCS_OK;
    PyArrayObject *q = NULL, *packed = input("unpack", "packed", packed_object, NPY_UINT8, 1);
    if (packed != NULL) {
        const bool fits = numel >= 0 && ocs_packed_bytes(numel, bits) == PyArray_SIZE(packed);
        status = fits ? OCS_OK : OCS_BAD_SHAPE;
        q = fits ? output(1, (npy_intp[]){(npy_intp)numel}, NPY_INT8) : NULL;
    }
    if (q != NULL) {
        Py_BEGIN_ALLOW_THREADS;
        status = ocs_unpack_i8(PyArray_DATA(q), PyArray_DATA(packed), numel, bits);
        Py_END_ALLOW_THREADS;
    }
    return finish("unpack", status, q, &packed, 1);
}

/* --- The module ------------------------------------------------------------------------------- */

static PyObject *py_isa(PyObject *self, PyObject *args) {
    (void)self, (void)args;
    return PyUnicode_FromString(ocs_isa());
}

static PyObject *py_set_isa(PyObject *self, PyObject *args) {
    (void)self;
    const char *name;
    if (!PyArg_ParseTuple(args, "s:set_isa", &name)) {
        return NULL;
    }
    if (ocs_set_isa(name) != OCS_OK) {
        return PyErr_Format(PyExc_ValueError, "set_isa: %s: '%s'; use 'auto', 'avx2' or 'ref'",
                            ocs_status_text(OCS_BAD_ISA), name);
    }
    return Py_NewRef(Py_None);
}

static PyMethodDef methods[] = {
    {"abs_max", py_abs_max, METH_VARARGS, "abs_max(x) -> float32 []"},
    {"histogram", py_histogram, METH_VARARGS, "histogram(x, bins, limit) -> int64 [bins]"},
    {"octave_histogram", py_octave_histogram, METH_VARARGS, "octave_histogram(x, limit) -> int64 [C, 128]"},
    {"channel_max", py_channel_max, METH_VARARGS, "channel_max(w, groups) -> float32 [C]"},
    {"split_plan", py_split_plan, METH_VARARGS,
     "split_plan(channel_max, groups, splits) -> (source, depth, offset, split_max)"},
    {"output_max", py_output_max, METH_VARARGS, "output_max(w, source, depth, groups) -> float32 [O]"},
    {"split_histogram", py_split_histogram, METH_VARARGS,
     "split_histogram(w, source, depth, groups, bins, limit) -> int64 [bins] or [O, bins]"},
    {"clip_threshold", py_clip_threshold, METH_VARARGS,
     "clip_threshold(counts, limit, bits, signed, method) -> float32, shaped like limit"},
    {"quantize_weight", py_quantize_weight, METH_VARARGS,
     "quantize_weight(w, scale, source, depth, offset, groups, bits, quantization_aware) -> int8 [O, C + n, ...]"},
    {"squant_weight", py_squant_weight, METH_VARARGS,
     "squant_weight(w, scale, source, depth, offset, groups, bits) -> int8 [O, C + n, ...]"},
    {"fold", py_fold, METH_VARARGS, "fold(ints, scale, source, groups, channels) -> float32 [O, C, ...]"},
    {"weight_error", py_weight_error, METH_VARARGS,
     "weight_error(w, ints, scale, source, groups) -> float64 [2]: sums of w^2 and of (w - w_hat)^2"},
    {"quantize", py_quantize, METH_VARARGS, "quantize(x, scale, bits, signed) -> int8 or uint8"},
    {"dequantize", py_dequantize, METH_VARARGS, "dequantize(q, scale) -> float32"},
    {"fake_quantize", py_fake_quantize, METH_VARARGS, "fake_quantize(x, scale, bits, signed) -> float32"},
    {"pack", py_pack, METH_VARARGS, "pack(ints, bits) -> uint8 [ceil(N bits / 8)]"},
    {"unpack", py_unpack, METH_VARARGS, "unpack(packed, numel, bits) -> int8 [numel]"},
    {"isa", py_isa, METH_NOARGS, "isa() -> str: the instruction set in use"},
    {"set_isa", py_set_isa, METH_VARARGS, "set_isa(name): 'auto', 'avx2' or 'ref'"},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_C", "The kernels of ocs on numpy arrays.", -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__C(void) {
    import_array();
    const char *isa = getenv("OCS_ISA");
    if (ocs_set_isa(isa == NULL || *isa == '\0' ? "auto" : isa) != OCS_OK) {
        PyErr_Format(PyExc_ImportError, "OCS_ISA=%s: %s; use 'auto', 'avx2' or 'ref', or unset it", isa,
                     ocs_status_text(OCS_BAD_ISA));
        return NULL;
    }
    return PyModule_Create(&module);
}
