/* ocs._C: where the outliers are, which channels to split and where to clip; see module.c. */
#include "module.h"

/* --- Where the outliers are ------------------------------------------------------------------- */

PyObject *py_abs_max(PyObject *self, PyObject *args) {
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

PyObject *py_histogram(PyObject *self, PyObject *args) {
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

PyObject *py_octave_histogram(PyObject *self, PyObject *args) {
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

PyObject *py_channel_max(PyObject *self, PyObject *args) {
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

PyObject *py_split_plan(PyObject *self, PyObject *args) {
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

PyObject *py_output_max(PyObject *self, PyObject *args) {
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

PyObject *py_split_histogram(PyObject *self, PyObject *args) {
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

PyObject *py_clip_threshold(PyObject *self, PyObject *args) {
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
