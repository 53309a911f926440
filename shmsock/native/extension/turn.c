/* turn.c - turns of the loop: gives one its budget, schedules the pass that follows, and knows whether anything else is to be run. */
#include "extension.h"

/* loop.call_soon(callback), in the pump's context. */
int sh_call_soon(Pump *pump, PyObject *callback)
{
    PyObject *args[] = {callback, pump->context}, *handle;

    if (!pump->call_soon) {
        PyErr_SetString(PyExc_RuntimeError, "this node was never attached, or has been collected");
        return -1;
    }
    handle = PyObject_Vectorcall(pump->call_soon, args, 1, pump->state->with_context);
    Py_XDECREF(handle);
    return handle ? 0 : -1;
}

/* Begin a turn, with a budget of its own, and schedule a pass: it runs in the loop's next turn. */
int sh_begin_turn(Pump *pump)
{
    if (PyThread_get_thread_ident() != pump->ident) {
        PyObject *r = PyObject_CallMethodNoArgs((PyObject *)pump, pump->state->names.check); /* raises */
        Py_XDECREF(r);
        return r ? 0 : -1;
    }
    if (pump->nd) /* else it was never attached, and sh_call_soon() raises */
        sh_turn(pump->nd);
    if (sh_call_soon(pump, pump->pass) < 0) /* no memory, or Ctrl-C: not marked as scheduled, so that the next call tries again */
        return -1;
    pump->scheduled = 1;
    return 0;
}

/* Is nothing but the pass in the loop's queue, or, while that runs, nothing at all? (Callbacks that have nothing left to do are nothing.) */
int sh_may_spin(Pump *pump) { return PyObject_Size(pump->queue) - (pump->queue_visible ? pump->moot : 0) + pump->pumping < 2; }

/* A task was woken and will run. Noted only where the loop's own queue is not known. */
int sh_will_run(Pump *pump) { return pump->queue_visible ? 0 : PyList_Append(pump->queue, Py_None); }

/* It runs. */
int sh_runs(Pump *pump)
{
    Py_ssize_t n = pump->queue_visible || !pump->queue ? 0 : PyList_GET_SIZE(pump->queue);

    return n ? PyList_SetSlice(pump->queue, n - 1, n, NULL) : 0;
}
