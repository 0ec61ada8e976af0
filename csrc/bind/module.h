/* What module.c, which lists them, needs of the other files of ocs._C. */
#ifndef OCS_MODULE_H
#define OCS_MODULE_H

#include "arrays.h"

PyObject *py_abs_max(PyObject *self, PyObject *args);
PyObject *py_histogram(PyObject *self, PyObject *args);
PyObject *py_octave_histogram(PyObject *self, PyObject *args);
PyObject *py_channel_max(PyObject *self, PyObject *args);
PyObject *py_split_plan(PyObject *self, PyObject *args);
PyObject *py_output_max(PyObject *self, PyObject *args);
PyObject *py_split_histogram(PyObject *self, PyObject *args);
PyObject *py_clip_threshold(PyObject *self, PyObject *args);
PyObject *py_quantize_weight(PyObject *self, PyObject *args);
PyObject *py_squant_weight(PyObject *self, PyObject *args);
PyObject *py_fold(PyObject *self, PyObject *args);
PyObject *py_weight_error(PyObject *self, PyObject *args);
PyObject *py_output_error(PyObject *self, PyObject *args);

#endif
