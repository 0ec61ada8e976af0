/* numpy arrays in and out of ocs._C, and the exceptions for what does not fit.

   What is wrong with an argument is a TypeError or ValueError that starts with the function's name. */
#ifndef OCS_ARRAYS_H
#define OCS_ARRAYS_H

#define PY_SSIZE_T_CLEAN
#define NPY_NO_DEPRECATED_API NPY_1_22_API_VERSION
#include <Python.h>

#define PY_ARRAY_UNIQUE_SYMBOL ocs_numpy
#ifndef OCS_IMPORTS_NUMPY /* as module.c does for all files */
#define NO_IMPORT_ARRAY
#endif
#include <numpy/arrayobject.h>

#include "ocs.h"

#include <float.h>
#include <math.h>

/* The exception for a status; NULL, so that a caller can return it. */
static inline PyObject *fail(const char *function, ocs_status status) {
    PyObject *type = status == OCS_NO_MEMORY ? PyExc_MemoryError : PyExc_ValueError;
    return PyErr_Format(type, "%s: %s", function, ocs_status_text(status));
}

/* A new reference to a C-contiguous array of `type`, converted if need be: floats to float32, integers as they are. */
static inline PyArrayObject *input(const char *function, const char *name, PyObject *object, int type, int min_rank) {
    if (PyErr_Occurred()) { /* an argument before this one is wrong */
        return NULL;
    }
    if (!PyArray_Check(object)) {
        return (PyArrayObject *)PyErr_Format(PyExc_TypeError, "%s: %s must be a numpy array", function, name);
    }
    PyArrayObject *array = (PyArrayObject *)object;
    if (type == NPY_FLOAT32 ? !PyArray_ISFLOAT(array) : PyArray_TYPE(array) != type) {
        PyObject *wanted = (PyObject *)PyArray_DescrFromType(type);
        PyErr_Format(PyExc_TypeError, "%s: %s must hold %S%s, not %S", function, name, wanted,
                     type == NPY_FLOAT32 ? " (or another float type)" : "", PyArray_DESCR(array));
        Py_XDECREF(wanted);
        return NULL;
    }
    if (PyArray_NDIM(array) < min_rank) {
        return (PyArrayObject *)PyErr_Format(PyExc_ValueError, "%s: %s must have at least %d dimensions, not %d",
                                             function, name, min_rank, PyArray_NDIM(array));
    }
    int flags = NPY_ARRAY_C_CONTIGUOUS | NPY_ARRAY_ALIGNED | NPY_ARRAY_NOTSWAPPED | NPY_ARRAY_FORCECAST;
    return (PyArrayObject *)PyArray_FromAny(object, PyArray_DescrFromType(type), 0, 0, flags, NULL);
}

static inline PyArrayObject *output(int rank, const npy_intp *dims, int type) {
    return (PyArrayObject *)PyArray_SimpleNew(rank, (npy_intp *)dims, type);
}

/* Returns the result and drops what was taken; on a bad status, or where no result could be made, the exception. */
static inline PyObject *finish(const char *function, ocs_status status, PyArrayObject *result,
                               PyArrayObject *const *taken, int count) {
    for (int i = 0; i < count; ++i) {
        Py_XDECREF((PyObject *)taken[i]);
    }
    if (status != OCS_OK && !PyErr_Occurred()) {
        fail(function, status);
    }
    if (PyErr_Occurred()) {
        Py_XDECREF((PyObject *)result);
        return NULL;
    }
    return (PyObject *)result;
}
#define COUNT(array) ((int)(sizeof(array) / sizeof(array)[0]))

/* O, C and K of a weight or of expanded integers [O, C, ...]. */
static inline bool read_shape(const char *function, PyArrayObject *w, long long groups, ocs_shape *shape) {
    const npy_intp *dims = PyArray_DIMS(w);
    *shape = (ocs_shape){.G = groups, .O = dims[0], .C = dims[1], .K = 1};
    for (int i = 2; i < PyArray_NDIM(w); ++i) {
        shape->K *= dims[i];
    }
    bool valid = groups == 1 || (groups > 1 && groups <= shape->O && shape->O % groups == 0);
    if (!valid) {
        PyErr_Format(PyExc_ValueError, "%s: groups=%lld must divide the %lld output channels", function, groups,
                     (long long)shape->O);
    }
    return valid;
}

/* S from the length of a plan's array. */
static inline bool read_splits(const char *function, PyArrayObject *source, ocs_shape *shape) {
    npy_intp length = PyArray_SIZE(source);
    shape->S = length / shape->G - shape->C;
    if (length % shape->G != 0 || shape->S < 0) {
        PyErr_Format(PyExc_ValueError, "%s: a source of %lld channels does not fit %lld groups of %lld", function,
                     (long long)length, (long long)shape->G, (long long)shape->C);
        return false;
    }
    return true;
}

/* 0 where one number (a scale, say) serves all, 1 where each output channel has its own. */
static inline bool read_stride(const char *function, const char *name, PyArrayObject *numbers, npy_intp rows,
                               int *stride) {
    *stride = PyArray_NDIM(numbers);
    bool valid = *stride == 0 || (*stride == 1 && PyArray_SIZE(numbers) == rows);
    if (!valid) {
        PyErr_Format(PyExc_ValueError, "%s: %s must have no dimension, or one of the %lld output channels", function,
                     name, (long long)rows);
    }
    return valid;
}

/* A number as float32; beyond its range it becomes Inf, which the entries refuse. */
static inline bool read_number(const char *function, const char *name, PyObject *object, float *value) {
    double number = PyFloat_AsDouble(object);
    if (PyErr_Occurred()) {
        PyErr_Format(PyExc_TypeError, "%s: %s must be one number", function, name);
        return false;
    }
    *value = fabs(number) > FLT_MAX ? (float)copysign(INFINITY, number) : (float)number;
    return true;
}

#endif
