/* ocs._C: the kernels on numpy arrays, through CPython's limited API and numpy's C API.

   Every function checks its arguments, allocates the result and calls one entry of ocs.h with the GIL released.
   Argument order and names are those of torch.ops.ocs (torch_shim.cpp). Here is what works on any array, and the module
   itself; module_plan.c and module_weight.c have the rest. */
#define OCS_IMPORTS_NUMPY
#include "module.h"

#include <stdlib.h>

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
    {"output_error", py_output_error, METH_VARARGS,
     "output_error(w, ints, scale, source, groups, gain) -> float64 [O]"},
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
