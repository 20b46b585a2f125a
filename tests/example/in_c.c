/* Layer norm of the rows of a float32 buffer, in place, by the table of functions of normext.h. */
#define PY_SSIZE_T_CLEAN
#include "normext.h"

static const normext_api *api;

static PyObject *layer_norm_in_place(PyObject *module, PyObject *array)
{
    Py_buffer x;
    if (PyObject_GetBuffer(array, &x, PyBUF_WRITABLE | PyBUF_C_CONTIGUOUS | PyBUF_FORMAT) != 0) return NULL;
    double *statistics = NULL;
    PyObject *result = NULL;
    if (x.ndim != 2 || x.format[0] != 'f' || x.format[1] != 0) {
        PyErr_SetString(PyExc_TypeError, "array must be a matrix of float32");
    } else if (!(statistics = PyMem_Malloc(2 * (size_t)x.shape[0] * sizeof *statistics + 1))) {
        PyErr_NoMemory();
    } else {
        int status;
        Py_BEGIN_ALLOW_THREADS
        status = api->normalize_rows(NORMEXT_FLOAT32, x.shape[0], x.shape[1], x.buf, x.shape[1], x.buf, x.shape[1], NULL, NULL, 1, 1e-5,
                                     statistics, statistics + x.shape[0]);
        Py_END_ALLOW_THREADS
        if (status == NORMEXT_OK) result = Py_NewRef(Py_None);
        else PyErr_Format(PyExc_RuntimeError, "normext returned %d", status);
    }
    PyMem_Free(statistics);
    PyBuffer_Release(&x);
    return result;
}

static PyMethodDef methods[] = {{"layer_norm_in_place", layer_norm_in_place, METH_O, NULL}, {NULL, NULL, 0, NULL}};
static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "in_c", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit_in_c(void)
{
    api = normext_import();
    return api ? PyModule_Create(&definition) : NULL;
}
