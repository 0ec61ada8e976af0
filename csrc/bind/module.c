/* ocs._C: the kernels on numpy arrays, through CPython's limited API and numpy's C API.

   Every function converts its arguments as operators.c says and runs the operator with the GIL released. Argument
   order and names are those of torch.ops.ocs (torch_shim.cpp). */
#include "arrays.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* --- One call --------------------------------------------------------------------------------- */

typedef struct {
    ocs_call call;
    PyArrayObject *taken[OCS_MOST_ARGUMENTS];
    int64_t sizes[OCS_MOST_ARGUMENTS][MOST_DIMENSIONS];
    PyArrayObject *results[OCS_MOST_RESULTS];
    PyThreadState *released; /* while another thread may run Python */
} numpy_call;

static bool allocate(ocs_call *call) {
    numpy_call *own = (numpy_call *)call;
    for (int i = 0; i < call->result_count; ++i) {
        ocs_result *result = &call->results[i];
        npy_intp dims[MOST_DIMENSIONS];
        for (int64_t axis = 0; axis < result->rank; ++axis) {
            dims[axis] = (npy_intp)ocs_result_size(call, result, axis);
        }
        own->results[i] = (PyArrayObject *)PyArray_SimpleNew((int)result->rank, dims, numpy_type(result->dtype));
        if (own->results[i] == NULL) {
            return false;
        }
        result->data = PyArray_DATA(own->results[i]);
    }
    own->released = PyEval_SaveThread();
    return true;
}

static bool read_arguments(numpy_call *own, const ocs_operator *op, PyObject *const *args, Py_ssize_t count) {
    Py_ssize_t wanted = 0;
    while (op->argument[wanted].name != NULL) {
        ++wanted;
    }
    if (count != wanted) {
        PyErr_Format(PyExc_TypeError, "%s: takes %zd arguments, not %zd", op->name, wanted, count);
        return false;
    }
    for (Py_ssize_t i = 0; i < count; ++i) {
        const ocs_argument *argument = &op->argument[i];
        ocs_value *value = &own->call.arguments[i];
        if (ocs_is_array(argument->kind)) {
            own->taken[i] = read_array(op->name, argument, args[i], &value->array, own->sizes[i]);
        } else {
            read_number(op->name, argument, args[i], value);
        }
        if (PyErr_Occurred()) {
            return false;
        }
    }
    return true;
}

/* The result, or a tuple of all. */
static PyObject *take_results(numpy_call *own) {
    if (own->call.result_count == 1) {
        return Py_NewRef((PyObject *)own->results[0]);
    }
    PyObject *results = PyTuple_New(own->call.result_count);
    for (int i = 0; results != NULL && i < own->call.result_count; ++i) {
        PyTuple_SetItem(results, i, Py_NewRef((PyObject *)own->results[i]));
    }
    return results;
}

static PyObject *call_operator(const ocs_operator *op, PyObject *const *args, Py_ssize_t count) {
    numpy_call own;
    own.call.allocate = allocate;
    own.released = NULL;
    memset(own.taken, 0, sizeof own.taken);
    memset(own.results, 0, sizeof own.results);
    PyObject *result = NULL;
    if (read_arguments(&own, op, args, count)) {
        const char *wrong = ocs_run(op, &own.call);
        if (own.released != NULL) {
            PyEval_RestoreThread(own.released);
        }
        if (wrong == NULL) {
            result = take_results(&own);
        } else if (!PyErr_Occurred()) {
            PyObject *type = own.call.status == OCS_NO_MEMORY ? PyExc_MemoryError : PyExc_ValueError;
            PyErr_Format(type, "%s: %s", op->name, wrong);
        }
    }
    for (int i = 0; i < OCS_MOST_ARGUMENTS; ++i) {
        Py_XDECREF((PyObject *)own.taken[i]);
    }
    for (int i = 0; i < OCS_MOST_RESULTS; ++i) {
        Py_XDECREF((PyObject *)own.results[i]);
    }
    return result;
}

/* Every operator's function; `self` is a capsule that holds which one it is. */
static PyObject *py_operator(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    return call_operator(PyCapsule_GetPointer(self, NULL), args, count);
}

/* --- Instruction sets ------------------------------------------------------------------------- */

static PyObject *py_isa(PyObject *self, PyObject *args) {
    (void)self, (void)args;
    return PyUnicode_FromString(ocs_isa());
}

/* A tuple of name(0), name(1) ... up to the first NULL. */
static PyObject *tuple_of(const char *(*name)(int i)) {
    int count = 0;
    while (name(count) != NULL) {
        ++count;
    }
    PyObject *names = PyTuple_New(count);
    for (int i = 0; names != NULL && i < count; ++i) {
        PyTuple_SetItem(names, i, PyUnicode_FromString(name(i)));
    }
    return names;
}

static PyObject *py_isas(PyObject *self, PyObject *args) {
    (void)self, (void)args;
    return tuple_of(ocs_isa_name);
}

static char choices[200]; /* "'auto', 'avx2' or 'ref'", the best first */

static void write_choices(void) {
    int count = 0;
    while (ocs_isa_name(count) != NULL) {
        ++count;
    }
    int length = snprintf(choices, sizeof choices, "'auto'");
    for (int i = count - 1; i >= 0; --i) {
        const char *separator = i > 0 ? ", " : " or ";
        length += snprintf(choices + length, sizeof choices - (size_t)length, "%s'%s'", separator, ocs_isa_name(i));
    }
}

static PyObject *py_set_isa(PyObject *self, PyObject *args) {
    (void)self;
    const char *name;
    if (!PyArg_ParseTuple(args, "s:set_isa", &name)) {
        return NULL;
    }
    if (ocs_set_isa(name) != OCS_OK) {
        return PyErr_Format(PyExc_ValueError, "set_isa: %s: '%s'; use %s", ocs_status_text(OCS_BAD_ISA), name, choices);
    }
    return Py_NewRef(Py_None);
}

/* --- All or nothing ---------------------------------------------------------------------------- */

/* Calls one half of a pair; NULL where that raises. */
static PyObject *call_half(PyObject *pairs, Py_ssize_t i, Py_ssize_t half) {
    PyObject *function = PySequence_GetItem(PyTuple_GetItem(pairs, i), half);
    PyObject *result = function != NULL ? PyObject_CallNoArgs(function) : NULL;
    Py_XDECREF(function);
    return result;
}

/* Calls the second halves of the first `entered` pairs, the last first, all of them whatever they raise; an exception
   that is on its way goes on, else the last of theirs does. */
static bool leave(PyObject *pairs, Py_ssize_t entered) {
    PyObject *type, *value, *traceback;
    PyErr_Fetch(&type, &value, &traceback);
    while (entered-- > 0) {
        PyObject *result = call_half(pairs, entered, 1);
        if (result == NULL && type == NULL) {
            PyErr_Fetch(&type, &value, &traceback);
        }
        PyErr_Clear();
        Py_XDECREF(result);
    }
    const bool fine = type == NULL;
    PyErr_Restore(type, value, traceback);
    return fine;
}

/* Calls the first half of each pair, then body, then the second half of each pair whose first one was done. Between
   these calls the interpreter runs no line, so that no signal and no trace function can raise there. */
static PyObject *py_between(PyObject *self, PyObject *args) {
    (void)self;
    PyObject *pairs, *body;
    int keep;
    if (!PyArg_ParseTuple(args, "O!Op:between", &PyTuple_Type, &pairs, &body, &keep)) {
        return NULL;
    }
    Py_ssize_t entered = 0;
    PyObject *result = Py_NewRef(Py_None);
    for (const Py_ssize_t count = PyTuple_Size(pairs); result != NULL && entered < count;) {
        Py_DECREF(result);
        result = call_half(pairs, entered, 0);
        entered += result != NULL;
    }
    if (result != NULL) {
        Py_DECREF(result);
        result = PyObject_CallNoArgs(body);
    }
    if ((result == NULL || !keep) && !leave(pairs, entered)) {
        Py_CLEAR(result);
    }
    return result;
}

/* --- The module ------------------------------------------------------------------------------- */

static PyMethodDef methods[] = {
    {"isa", py_isa, METH_NOARGS, "isa() -> str: the instruction set in use"},
    {"isas", py_isas, METH_NOARGS, "isas() -> tuple: those of this build and CPU, the plain one first, the best last"},
    {"set_isa", py_set_isa, METH_VARARGS, "set_isa(name): one of isas(), or 'auto' for the best"},
    {"between", py_between, METH_VARARGS,
     "between(pairs, body, keep): the first of each pair, body(), the second of each; with keep only after failures"},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_C", "The kernels of ocs on numpy arrays.", -1, methods, NULL, NULL, NULL, NULL};

static const char *operator_name(int i) {
    return ocs_operators[i].name;
}

/* A function for each operator. */
static bool add_operators(PyObject *module) {
    static PyMethodDef functions[OCS_MOST_OPERATORS];
    static char help[OCS_MOST_OPERATORS][500];
    PyObject *in_module = PyModule_GetNameObject(module);
    bool added = in_module != NULL;
    for (int i = 0; operator_name(i) != NULL && added; ++i) {
        ocs_write_signature(help[i], sizeof help[i], &ocs_operators[i], false);
        functions[i] =
            (PyMethodDef){operator_name(i), (PyCFunction)(void (*)(void))py_operator, METH_FASTCALL, help[i]};
        PyObject *capsule = PyCapsule_New((void *)&ocs_operators[i], NULL, NULL);
        PyObject *function = capsule != NULL ? PyCFunction_NewEx(&functions[i], capsule, in_module) : NULL;
        added = function != NULL && PyModule_AddObjectRef(module, operator_name(i), function) == 0;
        Py_XDECREF(function);
        Py_XDECREF(capsule);
    }
    Py_XDECREF(in_module);
    return added;
}

static const char *clip_name(int i) {
    return ocs_clip_name(i);
}

static bool add_names(PyObject *module, const char *attribute, const char *(*name)(int i)) {
    PyObject *names = tuple_of(name);
    const bool added = names != NULL && PyModule_AddObjectRef(module, attribute, names) == 0;
    Py_XDECREF(names);
    return added;
}

/* The limits and names of ocs.h. */
static bool add_constants(PyObject *module) {
    return PyModule_AddIntConstant(module, "MIN_BITS", OCS_MIN_BITS) == 0 &&
           PyModule_AddIntConstant(module, "MAX_BITS", OCS_MAX_BITS) == 0 &&
           PyModule_AddIntConstant(module, "MAX_DEPTH", OCS_MAX_DEPTH) == 0 &&
           PyModule_AddIntConstant(module, "MAX_PARTS", OCS_MAX_PARTS) == 0 &&
           PyModule_AddIntConstant(module, "MAX_BINS", OCS_MAX_BINS) == 0 &&
           PyModule_AddIntConstant(module, "MAX_SEARCH_BINS", OCS_MAX_SEARCH_BINS) == 0 &&
           PyModule_AddIntConstant(module, "OCTAVES", OCS_OCTAVES) == 0 &&
           PyModule_AddIntConstant(module, "OCTAVE_BINS", OCS_OCTAVE_BINS) == 0 &&
           add_names(module, "CLIP_METHODS", clip_name) && add_names(module, "OPERATORS", operator_name);
}

PyMODINIT_FUNC PyInit__C(void) {
    import_array();
    write_choices();
    const char *isa = getenv("OCS_ISA");
    if (isa != NULL && *isa != '\0' && ocs_set_isa(isa) != OCS_OK) {
        PyErr_Format(PyExc_ImportError, "OCS_ISA=%s: %s; use %s, or unset it", isa, ocs_status_text(OCS_BAD_ISA),
                     choices);
        return NULL;
    }
    PyObject *module = PyModule_Create(&definition);
    if (module != NULL && !(add_operators(module) && add_constants(module))) {
        Py_CLEAR(module);
    }
    return module;
}
