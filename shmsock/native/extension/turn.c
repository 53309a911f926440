/* turn.c - turns of the loop, for whoever uses the core: that one has begun and a pump follows, and what else is to be run in it. */
#include "extension.h"

static PyObject *with_context; /* ("context",) */
static PyObject *s_check;

/* In the context of the pump. */
int sh_call_soon(Pump *t, PyObject *callback)
{
    PyObject *args[] = {callback, t->context}, *handle;

    if (!t->call_soon) {
        PyErr_SetString(PyExc_RuntimeError, "this node was never attached, or has been collected");
        return -1;
    }
    handle = PyObject_Vectorcall(t->call_soon, args, 1, with_context);
    Py_XDECREF(handle);
    return handle ? 0 : -1;
}

int sh_begin_turn(Pump *t)
{
    if (PyThread_get_thread_ident() != t->ident) {
        PyObject *r = PyObject_CallMethodNoArgs((PyObject *)t, s_check); /* raises */
        Py_XDECREF(r);
        return r ? 0 : -1;
    }
    if (t->nd) /* else it was never attached, and call_soon is not to be had either */
        sh_turn(t->nd);
    if (sh_call_soon(t, t->pump) < 0) /* no memory; Ctrl-C in there: not marked, so that the next call tries again */
        return -1;
    t->scheduled = 1;
    return 0;
}

int sh_may_spin(Pump *t) { return PyObject_Size(t->queue) + t->pumping < 2; }

int sh_will_run(Pump *t) { return t->queue_visible ? 0 : PyList_Append(t->queue, Py_None); }

int sh_runs(Pump *t)
{
    Py_ssize_t n = t->queue_visible || !t->queue ? 0 : PyList_GET_SIZE(t->queue);

    return n ? PyList_SetSlice(t->queue, n - 1, n, NULL) : 0;
}

int sh_turn_ready(void)
{
    s_check = PyUnicode_InternFromString("check");
    with_context = Py_BuildValue("(s)", "context");
    return s_check && with_context ? 0 : -1;
}
