/* Layer norm of the rows of a float32 buffer, in place, by the table of functions of normext.h. */
#define PY_SSIZE_T_CLEAN
#include "normext.h"

static const normext_api *api;

/* A call that may be made on another thread. */
typedef struct {
    nx_norm norm;
    nx_io io;
    int status;
    PyThread_type_lock done;
} call;

static void run(void *argument)
{
    call *c = argument;
    c->status = api->forward(&c->norm, &c->io);
    if (c->done) PyThread_release_lock(c->done);
}

/* `elsewhere`: on a thread of its own, which this one waits for without letting go of the GIL. */
static int run_call(call *c, int elsewhere)
{
    if (!elsewhere) {
        Py_BEGIN_ALLOW_THREADS
        run(c);
        Py_END_ALLOW_THREADS
        return 0;
    }
    c->done = PyThread_allocate_lock();
    if (!c->done) return -1;
    PyThread_acquire_lock(c->done, WAIT_LOCK);
    if (PyThread_start_new_thread(run, c) == PYTHREAD_INVALID_THREAD_ID) return -1;
    PyThread_acquire_lock(c->done, WAIT_LOCK);
    PyThread_release_lock(c->done);
    PyThread_free_lock(c->done);
    return 0;
}

static PyObject *layer_norm(PyObject *array, int elsewhere)
{
    Py_buffer x;
    if (PyObject_GetBuffer(array, &x, PyBUF_WRITABLE | PyBUF_C_CONTIGUOUS | PyBUF_FORMAT) != 0)
        return NULL;
    double *statistics = NULL;
    PyObject *result = NULL;
    if (x.ndim != 2 || x.format[0] != 'f' || x.format[1] != 0) {
        PyErr_SetString(PyExc_TypeError, "array must be a matrix of float32");
    } else if (!(statistics = PyMem_Malloc(2 * (size_t)x.shape[0] * sizeof *statistics + 1))) {
        PyErr_NoMemory();
    } else {
        call c = {
            .norm = {.kind = NORMEXT_LAYER_NORM,
                     .type = NORMEXT_FLOAT32,
                     .ndim = 2,
                     .shape = x.shape,
                     .axis = 1,
                     .training = 1,
                     .eps = 1e-5},
            .io = {.x = {x.buf},
                   .y = {x.buf},
                   .mean = statistics,
                   .rstd = statistics + x.shape[0]},
        };
        if (run_call(&c, elsewhere) != 0) PyErr_NoMemory();
        else if (c.status == NORMEXT_OK) result = Py_NewRef(Py_None);
        else PyErr_Format(PyExc_RuntimeError, "normext returned %d", c.status);
    }
    PyMem_Free(statistics);
    PyBuffer_Release(&x);
    return result;
}

static PyObject *layer_norm_in_place(PyObject *module, PyObject *array)
{
    return layer_norm(array, 0);
}

static PyObject *layer_norm_on_another_thread(PyObject *module, PyObject *array)
{
    return layer_norm(array, 1);
}

static PyMethodDef methods[] = {
    {"layer_norm_in_place", layer_norm_in_place, METH_O, NULL},
    {"layer_norm_on_another_thread", layer_norm_on_another_thread, METH_O, NULL},
    {NULL, NULL, 0, NULL},
};
static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "in_c", NULL, -1, methods, NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit_in_c(void)
{
    api = normext_import();
    return api ? PyModule_Create(&definition) : NULL;
}
