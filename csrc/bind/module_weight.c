/* ocs._C: weights to integers and back; see module.c. */
#include "module.h"

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

PyObject *py_quantize_weight(PyObject *self, PyObject *args) {
    (void)self;
    return weight_to_integers("quantize_weight", "OOOOOLip:quantize_weight", args, false);
}

PyObject *py_squant_weight(PyObject *self, PyObject *args) {
    (void)self;
    return weight_to_integers("squant_weight", "OOOOOLi:squant_weight", args, true);
}

PyObject *py_fold(PyObject *self, PyObject *args) {
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

/* weight_error [2] and output_error [O], which has one more argument. */
static PyObject *error_of(const char *name, const char *format, PyObject *args, bool of_output) {
    PyObject *w_object, *ints_object, *scale_object, *source_object;
    ocs_shape shape;
    long long groups;
    double gain = 0.0;
    int stride = 0;
    if (!PyArg_ParseTuple(args, format, &w_object, &ints_object, &scale_object, &source_object, &groups, &gain)) {
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
        error = output(1, (npy_intp[]){of_output ? (npy_intp)shape.O : 2}, NPY_FLOAT64);
    }
    if (error != NULL && status == OCS_OK) {
        Py_BEGIN_ALLOW_THREADS;
        status = of_output ? ocs_output_error_f32(PyArray_DATA(error), PyArray_DATA(w), PyArray_DATA(ints),
                                                  PyArray_DATA(source), PyArray_DATA(scale), stride, &shape, gain)
                           : ocs_weight_error_f32(PyArray_DATA(error), PyArray_DATA(w), PyArray_DATA(ints),
                                                  PyArray_DATA(source), PyArray_DATA(scale), stride, &shape);
        Py_END_ALLOW_THREADS;
    }
    return finish(name, status, error, taken, COUNT(taken));
}

PyObject *py_weight_error(PyObject *self, PyObject *args) {
    (void)self;
    return error_of("weight_error", "OOOOL:weight_error", args, false);
}

PyObject *py_output_error(PyObject *self, PyObject *args) {
    (void)self;
    return error_of("output_error", "OOOOLd:output_error", args, true);
}
