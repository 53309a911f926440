/* op.c - read(), readexactly(), readline() and drain() of the streams, and what asyncio's own drain() awaits: awaitables with the interface of
 * coroutines. Nothing happens before they are awaited, as with coroutines. What they cannot do in C they leave to the coroutines that they
 * stand for. */
#include "extension.h"

enum state { START, YIELDED, WAITING, DELEGATED, DONE };

typedef struct {
    PyObject_HEAD
    Method *method;         /* that was called */
    PyObject *stream, *arg; /* the StreamReader, StreamWriter or its protocol; the argument of the call, or NULL */
    FastPath *fast_path;
    PyObject *inner;        /* the future's iterator that is waited for, or the coroutine that does the work */
    Py_ssize_t n;
    enum sh_op_kind kind;
    enum state state;
    char running;           /* `inner` is being called */
} Op;

/* ---- bytes ---- */

/* Read from the ring. NULL without an exception: *status says why. */
static PyObject *take(Op *op, int64_t *status)
{
    FastPath *p = op->fast_path;
    uint32_t most = op->kind == SH_OP_LINE || op->n > (Py_ssize_t)SH_COPY_MAX ? SH_COPY_MAX : (uint32_t)op->n;
    Taken taken = SH_TAKEN;
    int how = op->state == YIELDED ? SH_YIELDED : 0;

    if (op->kind == SH_OP_LINE)
        taken = (Taken){{sh_take_line}, NULL, p->limit};
    if (sh_schedule_pump(p->pump) < 0)
        return NULL;
    how |= sh_may_spin(p->pump) ? SH_MAY_SPIN : SH_PASS_FOLLOWS;
    *status = sh_read_step(p->ep, &taken.taker, most, op->kind == SH_OP_EXACTLY ? most : 1, how);
    if (*status >= (int64_t)SH_LARGE)
        sh_keep_memory(p->pump);
    return sh_taken(&taken, *status);
}

/* ---- waiting ---- */

static void stop_waiting(Op *op)
{
    FastPath *p = op->fast_path;
    PyObject *type, *value, *trace;

    PyErr_Fetch(&type, &value, &trace);
    if (type && p->wake_pending) { /* probably cancelled: tell those who use the buffer of the bytes it was woken for */
        PyObject *tell = PyObject_GetAttr(op->stream, op->method->state->names._on_ready);
        if (!tell || sh_call_soon(p->pump, tell) < 0)
            PyErr_Clear();
        Py_XDECREF(tell);
    }
    Py_CLEAR(op->inner);
    Py_CLEAR(p->waiter);
    if (PyObject_SetAttr(op->stream, op->method->state->names._waiter, Py_None) < 0)
        PyErr_Clear();
    if (p->wake_pending) {
        p->wake_pending = 0;
        if (p->pump->queue && sh_runs(p->pump) < 0)
            PyErr_Clear();
    }
    PyErr_Restore(type, value, trace);
}

static int start_waiting(Op *op)
{
    FastPath *p = op->fast_path;
    PyObject *waiter = PyObject_CallNoArgs(p->pump->create_future);
    unaryfunc await_ = waiter && Py_TYPE(waiter)->tp_as_async ? Py_TYPE(waiter)->tp_as_async->am_await : NULL;

    if (!waiter)
        return -1;
    op->inner = await_ ? await_(waiter) : PyObject_CallMethod(waiter, "__await__", NULL);
    if (!op->inner || PyObject_SetAttr(op->stream, op->method->state->names._waiter, waiter) < 0) {
        Py_CLEAR(op->inner);
        Py_DECREF(waiter);
        return -1;
    }
    Py_XSETREF(p->waiter, waiter);
    op->state = WAITING;
    return 0;
}

/* ---- the awaitable ---- */

/* Is it being called already? Then that raises, as with coroutines. */
static int is_running(const Op *op)
{
    if (op->running)
        PyErr_Format(PyExc_ValueError, "%s() already executing", sh_op_names[op->kind]);
    return op->running;
}

static PySendResult send_on(Op *op, PyObject *value, PyObject **out)
{
    PySendResult r;

    op->running = 1;
    r = PyIter_Send(op->inner, value, out);
    op->running = 0;
    return r;
}

static void *already_awaited(const Op *op)
{
    return PyErr_Format(PyExc_RuntimeError, "cannot reuse already awaited %s()", sh_op_names[op->kind]);
}

static PySendResult finish(Op *op, PyObject *result, PyObject **out)
{
    op->state = DONE;
    Py_CLEAR(op->inner);
    *out = result;
    return result ? PYGEN_RETURN : PYGEN_ERROR;
}

static PySendResult delegate(Op *op, PyObject **out)
{
    PyObject *args[] = {op->stream, op->arg};
    PySendResult r;

    op->inner = PyObject_Vectorcall(op->method->function, args, op->arg ? 2 : 1, NULL);
    if (!op->inner)
        return finish(op, NULL, out);
    op->state = DELEGATED;
    r = send_on(op, Py_None, out);
    return r == PYGEN_NEXT ? r : finish(op, *out, out);
}

static int is_eof(Op *op)
{
    PyObject *eof = PyObject_GetAttr(op->stream, op->method->state->names._eof);
    int r = eof ? PyObject_IsTrue(eof) : -1;

    Py_XDECREF(eof);
    return r;
}

/* Read, wait, or leave it to the coroutine. */
static PySendResult go_on(Op *op, PyObject **out)
{
    FastPath *p = op->fast_path;

    while (p->can_read && p->buffer && !p->waiter && !PyByteArray_GET_SIZE(p->buffer)) {
        int64_t status = 0;
        int eof;
        PyObject *data = take(op, &status);

        if (data)
            return finish(op, data, out);
        if (PyErr_Occurred())
            return finish(op, NULL, out);
        if (status == SH_YIELD) {
            op->state = YIELDED;
            *out = Py_NewRef(Py_None);
            return PYGEN_NEXT;
        }
        if (status == SH_STALE) {
            PyObject *r = PyObject_CallMethodNoArgs((PyObject *)p->pump, op->method->state->names.check);
            if (!r)
                return finish(op, NULL, out);
            Py_DECREF(r);
        }
        if (status != SH_EMPTY)
            break;
        if ((eof = is_eof(op)) < 0)
            return finish(op, NULL, out);
        if (eof) /* somebody fed it by hand: nothing is waited for */
            break;
        if (start_waiting(op) < 0)
            return finish(op, NULL, out);
        if (send_on(op, Py_None, out) == PYGEN_NEXT)
            return PYGEN_NEXT;
        stop_waiting(op); /* the future was done before anybody could wait for it: try again */
        if (PyErr_Occurred())
            return finish(op, NULL, out);
        Py_CLEAR(*out);
        op->state = START;
    }
    return delegate(op, out);
}

static PySendResult op_send(Op *op, PyObject *value, PyObject **out)
{
    PySendResult r;
    int eof;

    *out = NULL;
    if (is_running(op))
        return PYGEN_ERROR;
    switch (op->state) {
    case START:
        if (value != Py_None) {
            PyErr_Format(PyExc_TypeError, "can't send non-None value to a just-started %s()", sh_op_names[op->kind]);
            return PYGEN_ERROR;
        }
        if (op->kind >= SH_OP_DRAIN && sh_drained(op->fast_path))
            return finish(op, Py_NewRef(Py_None), out);
        if (op->kind == SH_OP_DRAIN && op->fast_path && op->fast_path->can_write)
            op->fast_path->ep->drains--; /* asyncio's drain() awaits the helper next, which counts this drain */
        if (op->kind >= SH_OP_DRAIN)
            return delegate(op, out);
        return op->fast_path && op->n > 0 ? go_on(op, out) : delegate(op, out);
    case YIELDED:
        return go_on(op, out);
    case WAITING:
        r = send_on(op, value, out);
        if (r == PYGEN_NEXT)
            return r;
        Py_CLEAR(*out);
        stop_waiting(op);
        if (r == PYGEN_ERROR)
            return finish(op, NULL, out);
        op->state = START;
        if ((eof = is_eof(op)) != 0)
            return eof < 0 ? finish(op, NULL, out) : delegate(op, out);
        return go_on(op, out);
    case DELEGATED:
        r = send_on(op, value, out);
        return r == PYGEN_NEXT ? r : finish(op, *out, out);
    case DONE:
        break;
    }
    already_awaited(op);
    return PYGEN_ERROR;
}

/* Return as generators do: a result becomes StopIteration. */
static PyObject *answer(PySendResult r, PyObject *out)
{
    if (r == PYGEN_RETURN) {
        if (out == Py_None)
            PyErr_SetNone(PyExc_StopIteration);
        else
            PyErr_SetObject(PyExc_StopIteration, out);
        Py_DECREF(out);
        return NULL;
    }
    return out;
}

static PyObject *op_send_method(Op *op, PyObject *value)
{
    PyObject *out;
    PySendResult r = op_send(op, value, &out);

    return answer(r, out);
}

static PyObject *op_next(Op *op) { return op_send_method(op, Py_None); }

static PyObject *op_throw(Op *op, PyObject *args)
{
    PyObject *type, *value = NULL, *trace = NULL, *out = NULL, *method;

    if (!PyArg_ParseTuple(args, "O|OO", &type, &value, &trace) || is_running(op))
        return NULL;
    if (op->state == DONE)
        return already_awaited(op);
    if (op->state == WAITING || op->state == DELEGATED) {
        int waited = op->state == WAITING;
        PyObject *inner = Py_NewRef(op->inner);

        method = PyObject_GetAttr(inner, op->method->state->names.throw);
        op->running = 1;
        out = method ? PyObject_Call(method, args, NULL) : NULL;
        op->running = 0;
        Py_XDECREF(method);
        Py_DECREF(inner);
        if (out)
            return out; /* it caught the exception, and goes on */
        if (waited)
            stop_waiting(op);
        op->state = DONE;
        Py_CLEAR(op->inner);
        return NULL;
    }
    if (PyExceptionInstance_Check(type) && value && value != Py_None)
        return PyErr_Format(PyExc_TypeError, "instance exception may not have a separate value");
    op->state = DONE;
    if (PyExceptionInstance_Check(type))
        PyErr_SetObject(PyExceptionInstance_Class(type), type);
    else if (PyExceptionClass_Check(type)) {
        if (value && value != Py_None)
            PyErr_SetObject(type, value);
        else
            PyErr_SetNone(type);
    } else
        PyErr_Format(PyExc_TypeError, "exceptions must be classes or instances deriving from BaseException, not %s", Py_TYPE(type)->tp_name);
    if (PyErr_ExceptionMatches(PyExc_StopIteration)) { /* whoever awaits would take it for an answer (PEP 479) */
        PyErr_Format(PyExc_RuntimeError, "%s() raised StopIteration", sh_op_names[op->kind]);
    }
    return NULL;
}

static PyObject *op_close(Op *op, PyObject *unused)
{
    PyObject *inner, *r;
    int waited = op->state == WAITING;

    (void)unused;
    if (is_running(op))
        return NULL;
    inner = Py_XNewRef(op->inner);
    op->state = DONE;
    if (inner) {
        op->running = 1;
        r = PyObject_CallMethodNoArgs(inner, op->method->state->names.close);
        op->running = 0;
        if (waited)
            stop_waiting(op);
        Py_CLEAR(op->inner);
        Py_DECREF(inner);
        if (!r)
            return NULL;
        Py_DECREF(r);
    }
    Py_RETURN_NONE;
}

static int op_traverse(Op *op, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(op));
    Py_VISIT(op->method);
    Py_VISIT(op->stream);
    Py_VISIT(op->arg);
    Py_VISIT(op->fast_path);
    Py_VISIT(op->inner);
    return 0;
}

static int op_clear(Op *op)
{
    Py_CLEAR(op->stream);
    Py_CLEAR(op->arg);
    Py_CLEAR(op->fast_path);
    Py_CLEAR(op->inner);
    return 0; /* the method stays, for what is called after this */
}

static void op_finalize(Op *op)
{
    PyObject *type, *value, *trace;

    PyErr_Fetch(&type, &value, &trace);
    if (op->state == START && op->stream
        && PyErr_WarnFormat(PyExc_RuntimeWarning, 1, "%s() of %R was never awaited", sh_op_names[op->kind], op->stream) < 0)
        PyErr_WriteUnraisable((PyObject *)op);
    if (op->state == WAITING || op->state == DELEGATED) {
        PyObject *r = op_close(op, NULL);
        if (!r)
            PyErr_WriteUnraisable((PyObject *)op);
        Py_XDECREF(r);
    }
    PyErr_Restore(type, value, trace);
}

static void op_dealloc(Op *op)
{
    PyTypeObject *type = Py_TYPE(op);
    Method *method = op->method;

    if (op->state != DONE && PyObject_CallFinalizerFromDealloc((PyObject *)op) < 0)
        return;
    PyObject_GC_UnTrack(op);
    op_clear(op);
#ifndef Py_GIL_DISABLED /* threads would share them */
    if (method->state->spares < SH_SPARE && !PyObject_GC_IsFinalized((PyObject *)op))
        method->state->spare[method->state->spares++] = (PyObject *)op;
    else
#endif
        type->tp_free(op);
    Py_DECREF(method);
    Py_DECREF(type);
}

static PyObject *op_name(Op *op, void *unused) { (void)unused; return PyUnicode_FromString(sh_op_names[op->kind]); }
static PyObject *op_await(Op *op) { return Py_NewRef(op); }

static PyMethodDef methods[] = {
    {"send", (PyCFunction)(void (*)(void))op_send_method, METH_O, "As coroutine.send()."},
    {"throw", (PyCFunction)(void (*)(void))op_throw, METH_VARARGS, "As coroutine.throw()."},
    {"close", (PyCFunction)(void (*)(void))op_close, METH_NOARGS, "As coroutine.close()."},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef getters[] = {
    {"__name__", (getter)op_name, NULL, "The name of the method that was called.", NULL},
    {"__qualname__", (getter)op_name, NULL, "The name of the method that was called.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_doc, "The awaitable of a stream's method."},
    {Py_am_await, op_await},
    {Py_am_send, op_send},
    {Py_tp_iter, op_await},
    {Py_tp_iternext, op_next},
    {Py_tp_traverse, op_traverse},
    {Py_tp_clear, op_clear},
    {Py_tp_finalize, op_finalize},
    {Py_tp_dealloc, op_dealloc},
    {Py_tp_methods, methods},
    {Py_tp_getset, getters},
    {0, NULL},
};

PyType_Spec sh_op_spec = {
    .name = "shmsock.native._extension.Op",
    .basicsize = sizeof(Op),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = slots,
};

/* Make an awaitable. n: how many bytes to read; negative: leave it to the coroutine. */
PyObject *sh_op_new(Method *method, PyObject *stream, Py_ssize_t n, PyObject *arg)
{
    State *state = method->state;
    PyObject *fast_path = PyObject_GetAttr(stream, state->names._fast_path);
    Op *op;

    if (!fast_path)
        return NULL;
    if (state->spares) {
        op = (Op *)state->spare[--state->spares];
        (void)PyObject_INIT((PyObject *)op, state->op);
    } else if (!(op = PyObject_GC_New(Op, state->op))) {
        Py_DECREF(fast_path);
        return NULL;
    }
    op->method = (Method *)Py_NewRef(method);
    op->stream = Py_NewRef(stream);
    op->arg = Py_XNewRef(arg);
    op->fast_path = Py_IS_TYPE(fast_path, state->fast_path) ? (FastPath *)fast_path : NULL;
    if (!op->fast_path)
        Py_DECREF(fast_path);
    op->inner = NULL;
    op->n = n;
    op->kind = method->kind;
    op->state = START;
    op->running = 0;
    PyObject_GC_Track(op);
    return (PyObject *)op;
}
