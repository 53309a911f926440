/* streams.c - the methods of ShmStreamReader, ShmStreamWriter and their protocol that stand for coroutine functions. */
#include "extension.h"

PyObject *sh_slow[SH_OP_KINDS];
const char *const sh_op_names[SH_OP_KINDS] = {"read", "readexactly", "readline", "drain", "_drain_helper"};

static PyObject *ask_for(PyObject *stream, enum sh_op_kind kind, PyObject *number)
{
    Py_ssize_t n = -1;

    if (number && PyLong_CheckExact(number) && (n = PyLong_AsSsize_t(number)) < 0)
        PyErr_Clear();
    if (kind == SH_OP_EXACTLY && n > (Py_ssize_t)SH_COPY_MAX)
        n = -1;
    return sh_op_new(stream, kind, n, number);
}

static PyObject *stream_read(PyObject *stream, PyObject *const *args, Py_ssize_t n, PyObject *keywords)
{
    Py_ssize_t named = keywords ? PyTuple_GET_SIZE(keywords) : 0;

    if (n + named > 1 || (named && PyUnicode_CompareWithASCIIString(PyTuple_GET_ITEM(keywords, 0), "n"))) {
        PyErr_SetString(PyExc_TypeError, "read() takes one argument, n");
        return NULL;
    }
    return ask_for(stream, SH_OP_READ, n + named ? args[0] : NULL);
}

static PyObject *stream_readexactly(PyObject *stream, PyObject *const *args, Py_ssize_t n, PyObject *keywords)
{
    Py_ssize_t named = keywords ? PyTuple_GET_SIZE(keywords) : 0;

    if (n + named != 1 || (named && PyUnicode_CompareWithASCIIString(PyTuple_GET_ITEM(keywords, 0), "n"))) {
        PyErr_SetString(PyExc_TypeError, "readexactly() takes one argument, n");
        return NULL;
    }
    return ask_for(stream, SH_OP_EXACTLY, args[0]);
}

static PyObject *stream_readline(PyObject *stream, PyObject *unused) { (void)unused; return sh_op_new(stream, SH_OP_LINE, 1, NULL); }
static PyObject *stream_drain(PyObject *stream, PyObject *unused) { (void)unused; return sh_op_new(stream, SH_OP_DRAIN, 1, NULL); }
static PyObject *stream_helper(PyObject *protocol, PyObject *unused) { (void)unused; return sh_op_new(protocol, SH_OP_HELPER, 1, NULL); }

#define FAST(function) (PyCFunction)(void (*)(void))(function), METH_FASTCALL | METH_KEYWORDS

static PyMethodDef defs[SH_OP_KINDS] = {
    {"read", FAST(stream_read), "read($self, n=-1)\n--\n\nAs asyncio's: up to n bytes, b\"\" at EOF. Raises ConnectionResetError."},
    {"readexactly", FAST(stream_readexactly), "readexactly($self, n)\n--\n\nAs asyncio's: n bytes, or asyncio.IncompleteReadError."},
    {"readline", (PyCFunction)(void (*)(void))stream_readline, METH_NOARGS, "readline($self)\n--\n\nAs asyncio's."},
    {"drain", (PyCFunction)(void (*)(void))stream_drain, METH_NOARGS,
     "drain($self)\n--\n\nWait until the peer has taken enough. Raises ConnectionResetError, BrokenPipeError. Cancelling loses nothing."},
    {"_drain_helper", (PyCFunction)(void (*)(void))stream_helper, METH_NOARGS, "_drain_helper($self)\n--\n\nWhat asyncio.StreamWriter.drain() awaits."},
};

/* method(name, class, coroutine function) -> a method of the class that stands for the coroutine function, and falls back to it. */
static PyObject *method(PyObject *module, PyObject *args)
{
    const char *name;
    PyObject *type, *function;

    (void)module;
    if (!PyArg_ParseTuple(args, "sO!O", &name, &PyType_Type, &type, &function))
        return NULL;
    for (int i = 0; i < SH_OP_KINDS; i++)
        if (!strcmp(name, sh_op_names[i])) {
            Py_XSETREF(sh_slow[i], Py_NewRef(function));
            return PyDescr_NewMethod((PyTypeObject *)type, &defs[i]);
        }
    PyErr_Format(PyExc_ValueError, "no %s() is known here", name);
    return NULL;
}

static PyMethodDef method_def = {"method", method, METH_VARARGS, "method(name, class, coroutine function)"};

int sh_streams_ready(PyObject *module)
{
    PyObject *made = PyCFunction_New(&method_def, NULL);
    int r = made ? PyModule_AddObjectRef(module, "method", made) : -1;

    Py_XDECREF(made);
    return r;
}
