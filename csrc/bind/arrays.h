/* numpy arrays and Python numbers as arguments of ocs._C, and the exceptions for what does not fit.

   What is wrong with an argument is a TypeError or ValueError that starts with the function's name. */
#ifndef OCS_ARRAYS_H
#define OCS_ARRAYS_H

#define PY_SSIZE_T_CLEAN
#define NPY_NO_DEPRECATED_API NPY_1_22_API_VERSION
#include <Python.h>
#include <numpy/arrayobject.h>

#include "operators.h"

enum { MOST_DIMENSIONS = 64 }; /* numpy's own limit */

static inline int numpy_type(ocs_dtype dtype) {
    switch (dtype) {
    case OCS_FLOAT64: return NPY_FLOAT64;
    case OCS_INT64: return NPY_INT64;
    case OCS_INT32: return NPY_INT32;
    case OCS_INT8: return NPY_INT8;
    case OCS_UINT8: return NPY_UINT8;
    default: return NPY_FLOAT32;
    }
}

static inline bool has_type(PyArrayObject *array, int type) {
    return type == NPY_FLOAT32 ? PyArray_ISFLOAT(array) : PyArray_TYPE(array) == type;
}

/* Whether an object is an array of this type, any float type for float32, and of enough dimensions. */
static inline bool check_array(const char *function, const ocs_argument *argument, PyObject *object, int type) {
    if (!PyArray_Check(object)) {
        PyErr_Format(PyExc_TypeError, "%s: %s must be a numpy array", function, argument->name);
        return false;
    }
    PyArrayObject *array = (PyArrayObject *)object;
    if (!has_type(array, type)) {
        PyObject *wanted = (PyObject *)PyArray_DescrFromType(type);
        PyErr_Format(PyExc_TypeError, "%s: %s must hold %S%s, not %S", function, argument->name, wanted,
                     type == NPY_FLOAT32 ? " (or another float type)" : "", PyArray_DESCR(array));
        Py_XDECREF(wanted);
        return false;
    }
    if (PyArray_NDIM(array) < argument->min_rank) {
        PyErr_Format(PyExc_ValueError, "%s: %s must have at least %d dimensions, not %d", function, argument->name,
                     argument->min_rank, PyArray_NDIM(array));
        return false;
    }
    return true;
}

/* A new reference to a C-contiguous array as the argument's kind says; `sizes` holds its shape. */
static inline PyArrayObject *read_array(const char *function, const ocs_argument *argument, PyObject *object,
                                        ocs_array *view, int64_t *sizes) {
    view->dtype = ocs_dtype_of(argument->kind);
    if (argument->kind == OCS_BYTE_ROWS && PyArray_Check(object) &&
        PyArray_TYPE((PyArrayObject *)object) == NPY_UINT8) {
        view->dtype = OCS_UINT8;
    }
    const int type = numpy_type(view->dtype);
    if (!check_array(function, argument, object, type)) {
        return NULL;
    }
    const int flags = NPY_ARRAY_C_CONTIGUOUS | NPY_ARRAY_ALIGNED | NPY_ARRAY_NOTSWAPPED | NPY_ARRAY_FORCECAST;
    PyArrayObject *array = (PyArrayObject *)object;
    if (PyArray_TYPE(array) == type && PyArray_ISCARRAY_RO(array)) {
        Py_INCREF(object);
    } else {
        array = (PyArrayObject *)PyArray_FromAny(object, PyArray_DescrFromType(type), 0, 0, flags, NULL);
    }
    if (array != NULL) {
        view->data = PyArray_DATA(array);
        view->rank = PyArray_NDIM(array);
        view->numel = PyArray_SIZE(array);
        view->sizes = sizes;
        for (int64_t i = 0; i < view->rank; ++i) {
            sizes[i] = PyArray_DIM(array, (int)i);
        }
        view->row_stride = view->rank > 0 && sizes[0] > 0 ? view->numel / sizes[0] : view->numel;
    }
    return array;
}

/* A number as the argument's kind says. */
static inline bool read_number(const char *function, const ocs_argument *argument, PyObject *object, ocs_value *value) {
    switch (argument->kind) {
    case OCS_INT: value->integer = PyLong_AsLongLong(object); break;
    case OCS_BOOL: value->integer = PyObject_IsTrue(object); break;
    default:
        value->number = PyFloat_AsDouble(object);
        if (PyErr_Occurred()) {
            PyErr_Format(PyExc_TypeError, "%s: %s must be one number", function, argument->name);
        }
    }
    return !PyErr_Occurred();
}

#endif
