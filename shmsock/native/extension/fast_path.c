/* fast_path.c - reads and writes of one connection that need no Python. */
#include "extension.h"

#include <stdlib.h>

/* Bytes that are given to a protocol at once. So many because freeing such a piece teaches malloc to keep memory: pieces of 64 KiB are given back to
 * the kernel each time, and the next take page faults (measured: a third of the throughput). */
#define PIECE (1u << 18)
#define DELIVER_MAX (1u << 18) /* bytes that are given to a protocol in one pass */
#define KEPT (16u << 20)
#define LINE 256u /* bytes in which a line is first searched for */

/* Have the next pass poll this slot. */
void sh_poll_again(Pump *pump, uint32_t slot) { sh_set_add(&pump->nd->ready, slot); }

/* A large piece was taken. Who gathers such pieces frees megabytes of them together; malloc would give those back to the kernel, and the next ones take
 * page faults, for several times as long as the copies take. glibc learns how much to keep from the largest block that was freed: twice as much. One
 * that nobody has touched costs nothing. */
void sh_keep_memory(Pump *pump)
{
    void *volatile block = pump->keeps ? NULL : malloc(KEPT);

    pump->keeps = 1;
    free(block);
}

/* Wake the reader that waits. */
int sh_fast_path_wake(FastPath *p)
{
    PyObject *waiter = Py_NewRef(p->waiter), *done = PyObject_CallMethodNoArgs(waiter, p->pump->state->names.done), *r = NULL;
    int is_done = done ? PyObject_IsTrue(done) : -1;

    if (!is_done) {
        r = PyObject_CallMethodOneArg(waiter, p->pump->state->names.set_result, Py_None);
        if (r && !p->wake_pending) {
            p->wake_pending = 1;
            is_done = sh_will_run(p->pump);
        }
    }
    Py_DECREF(waiter);
    Py_XDECREF(done);
    Py_XDECREF(r);
    return is_done < 0 || PyErr_Occurred() ? -1 : 0;
}

int sh_take_bytes(sh_taker *to, const sh_ep *ep, uint32_t at, uint32_t n)
{
    PyObject *data = PyBytes_FromStringAndSize(NULL, n);

    ((Taken *)to)->data = data;
    if (!data)
        return -1;
    sh_copy_ring(ep, PyBytes_AS_STRING(data), at, n);
    return (int)n;
}

/* What the read took. NULL: the status says why not, or an exception does. */
PyObject *sh_taken(Taken *taken, int64_t status)
{
    if (SH_UNLIKELY(status < 0))
        Py_CLEAR(taken->data); /* the slot changed hands under the copy */
    return taken->data;
}

/* Take the exception that was raised. NULL: it ends the program, and stays. */
static PyObject *caught(void)
{
    PyObject *type, *error, *trace;

    if (PyErr_ExceptionMatches(PyExc_SystemExit) || PyErr_ExceptionMatches(PyExc_KeyboardInterrupt))
        return NULL;
    PyErr_Fetch(&type, &error, &trace);
    PyErr_NormalizeException(&type, &error, &trace);
    if (trace)
        PyException_SetTraceback(error, trace);
    Py_XDECREF(type);
    Py_XDECREF(trace);
    return error;
}

/* protocol.method(data[, source]) in that context: what it returns, or NULL. */
static PyObject *call_in(PyObject *context, PyObject *protocol, PyObject *method, PyObject *data, PyObject *source)
{
    PyObject *args[] = {protocol, data, source}, *r = NULL;

    Py_INCREF(context); /* it may be replaced by another meanwhile */
    Py_INCREF(protocol);
    if (PyContext_Enter(context) == 0) {
        r = PyObject_VectorcallMethod(method, args, source ? 3 : 2, NULL);
        if (PyContext_Exit(context) < 0)
            Py_CLEAR(r);
    }
    Py_DECREF(context);
    Py_DECREF(protocol);
    return r;
}

/* The same. 1: done. 0: it raised *error. -1: an exception that ends the program. */
int sh_hand_over(PyObject *context, PyObject *protocol, PyObject *method, PyObject *data, PyObject *source, PyObject **error)
{
    PyObject *r = call_in(context, protocol, method, data, source);

    Py_XDECREF(r);
    return r ? 1 : (*error = caught()) ? 0 : -1;
}

/* whom.method(error, about): what a protocol raised ends its connection. Steals `whom` (None: it is gone) and `error`. 0, or -1. */
int sh_tell_of(PyObject *whom, PyObject *method, PyObject *error, PyObject *about)
{
    PyObject *r = whom == Py_None ? Py_NewRef(whom) : whom ? PyObject_CallMethodObjArgs(whom, method, error, about, NULL) : NULL;

    Py_XDECREF(whom);
    Py_DECREF(error);
    Py_XDECREF(r);
    return r ? 0 : -1;
}

/* What the protocol raised in `method` ends the connection. 1: it was told. -1: an exception that ends the program. */
static int raised(FastPath *p, PyObject *method)
{
    PyObject *error = caught();

    return !error || sh_tell_of(PyObject_CallNoArgs(p->transport), p->pump->state->names._raised, error, method) < 0 ? -1 : 1;
}

/* Call the protocol, with an argument that is stolen. 1: done, or what it raised was told. -1: an exception that ends the program. */
static int tell(FastPath *p, PyObject *protocol, PyObject *method, PyObject *argument)
{
    PyObject *r = argument ? call_in(p->context, protocol, method, argument, NULL) : NULL;

    Py_XDECREF(argument);
    Py_XDECREF(r);
    return r ? 1 : raised(p, method);
}

/* Read into the buffer that the protocol gave. How many bytes, or a status; 0: an exception, what is wrong with the buffer. */
static int64_t fill_buffer(FastPath *p, PyObject *buffer)
{
    struct sh_plain plain = {{sh_take_plain}, NULL};
    Py_buffer view;
    int64_t n = 0;

    if (PyObject_GetBuffer(buffer, &view, PyBUF_SIMPLE) < 0)
        return 0;
    plain.to = view.buf;
    if (!view.len)
        PyErr_SetString(PyExc_RuntimeError, "get_buffer() returned an empty buffer");
    else if (view.readonly)
        PyErr_SetString(PyExc_TypeError, "get_buffer() returned a buffer that cannot be written");
    else
        n = sh_read_some(p->ep, &plain.taker, view.len < (Py_ssize_t)DELIVER_MAX ? (uint32_t)view.len : DELIVER_MAX);
    PyBuffer_Release(&view); /* it may be resized right afterwards */
    return n;
}

/* Give a BufferedProtocol a piece. How many bytes, or a status; *all: it was all there is. Nothing is taken from the ring for one that paused, or
 * was replaced, in get_buffer(). */
static int64_t give_buffered(FastPath *p, int *all)
{
    int64_t there = sh_available(p->ep), n;
    PyObject *protocol, *hint, *buffer;

    if (there <= 0)
        return there;
    if (!(hint = PyLong_FromLongLong(there)))
        return SH_SLOW;
    protocol = Py_NewRef(p->protocol);
    buffer = call_in(p->context, protocol, p->pump->state->names.get_buffer, hint, NULL);
    Py_DECREF(hint);
    n = !buffer ? 0 : p->protocol == protocol && p->can_write ? fill_buffer(p, buffer) : SH_SLOW;
    Py_XDECREF(buffer);
    *all = n >= there;
    if (n == 0)
        n = raised(p, p->pump->state->names.get_buffer);
    else if (n > 0 && tell(p, protocol, p->pump->state->names.buffer_updated, PyLong_FromLongLong(n)) < 0)
        n = SH_SLOW;
    Py_DECREF(protocol);
    return n;
}

/* Give the protocol's socket a piece, likewise. SH_YIELD: it takes none, and the protocol was told why. */
static int64_t give_socket(FastPath *p, int *all)
{
    int64_t there = sh_available(p->ep), n;

    if (there <= 0)
        return there;
    n = sh_read_socket(p->ep, p->sink, DELIVER_MAX);
    if (n == SH_UNREADABLE)
        return tell(p, p->protocol, p->pump->state->names.sink_refused, PyLong_FromLong(errno)) < 0 ? SH_SLOW : SH_YIELD;
    p->poured += n > 0 ? (uint64_t)n : 0;
    *all = n >= there;
    return n;
}

/* Give any other protocol a piece, likewise. */
static int64_t give_bytes(FastPath *p, int *all)
{
    Taken taken = SH_TAKEN;
    int64_t n = sh_read_some(p->ep, &taken.taker, PIECE);
    PyObject *data = sh_taken(&taken, n);

    *all = n < PIECE;
    if (n >= (int64_t)SH_LARGE)
        sh_keep_memory(p->pump);
    return data && tell(p, p->protocol, p->pump->state->names.data_received, data) < 0 ? SH_SLOW : n;
}

/* Give what is in the ring to the protocol, in the connection's context. 1: that is done. 0: Python does it, and finds out why. (A protocol that
 * paused, or was replaced, asks for what is left itself.) */
int sh_fast_path_deliver(FastPath *p)
{
    uint32_t given = 0;
    int64_t n = 0;

    sh_takes_part(p->ep);
    while (p->protocol && p->can_write && given < DELIVER_MAX) {
        int all = 0;

        n = p->sink >= 0 ? give_socket(p, &all) : p->buffered ? give_buffered(p, &all) : give_bytes(p, &all);
        if (n <= 0)
            return PyErr_Occurred() ? -1 : n == SH_EMPTY || !p->protocol;
        given += (uint32_t)n;
        if (all)
            return 1; /* what came meanwhile is news of its own */
        if (sh_over(p->pump->nd))
            break;
    }
    if (n > 0 && p->protocol)
        sh_poll_again(p->pump, p->slot);
    return n > 0;
}

/* Take out the line that begins there. Its end is searched for in a copy, so it has one end, whatever its writer does meanwhile. The copies are small
 * at first, since many lines may be there, and grow for long lines. -1: no whole line is there, or it is longer than allowed. */
int sh_take_line(sh_taker *to, const sh_ep *ep, uint32_t at, uint32_t n)
{
    Taken *t = (Taken *)to;
    char begin[LINE];
    uint32_t done = 0, size = LINE, most = (Py_ssize_t)n <= t->limit + 1 ? n : (uint32_t)t->limit + 1;
    PyObject *line = NULL;
    char *copy = begin, *end;

    for (;;) {
        if (size > most)
            size = most;
        sh_copy_ring(ep, copy + done, at + done, size - done);
        if ((end = memchr(copy + done, '\n', size - done)) || size == most)
            break;
        done = size;
        size *= 4;
        if (!line) {
            if (!(line = PyBytes_FromStringAndSize(NULL, size)))
                return -1;
            memcpy(PyBytes_AS_STRING(line), begin, done);
        } else if (_PyBytes_Resize(&line, size) < 0)
            return -1;
        copy = PyBytes_AS_STRING(line);
    }
    size = end ? (uint32_t)(end - copy) + 1 : 0;
    if (!size)
        Py_CLEAR(line);
    else if (!line)
        line = PyBytes_FromStringAndSize(begin, size);
    else
        _PyBytes_Resize(&line, size);
    t->data = line;
    return line ? (int)size : -1;
}

/* May drain() return at once? If not, its coroutine checks for the reader's exception as well, and lets the loop turn. */
int sh_drained(FastPath *p)
{
    return p && p->can_write && sh_drain_step(p->ep, p->can_read && p->pump->scheduled);
}

/* Leave the rest to Python, of which `taken` bytes were written. Without a transport the connection is lost, and a write would at most warn. */
static PyObject *write_rest(FastPath *p, PyObject *data, int64_t taken)
{
    PyObject *transport = p->transport ? PyObject_CallNoArgs(p->transport) : Py_NewRef(Py_None);
    PyObject *number = transport ? PyLong_FromLongLong(taken) : NULL, *r = NULL;

    if (number)
        r = transport == Py_None ? Py_NewRef(Py_None) : PyObject_CallMethodObjArgs(transport, p->pump->state->names._write_rest, data, number, NULL);
    Py_XDECREF(transport);
    Py_XDECREF(number);
    return r;
}

/* Returns what sh_write() does. */
static int64_t write_now(FastPath *p, PyObject *data)
{
    Py_ssize_t n = PyBytes_GET_SIZE(data);
    int64_t taken;

    if (n > (Py_ssize_t)KEEP_GIL_MAX) {
        Py_BEGIN_ALLOW_THREADS
        taken = sh_write(p->ep, PyBytes_AS_STRING(data), (uint64_t)n);
        Py_END_ALLOW_THREADS
    } else
        taken = sh_write(p->ep, PyBytes_AS_STRING(data), (uint64_t)n);
    return taken;
}

static PyObject *fast_path_write(FastPath *p, PyObject *data)
{
    int64_t taken = 0;

    if (p->can_write && PyBytes_CheckExact(data) && PyBytes_GET_SIZE(data) <= (Py_ssize_t)SH_COPY_MAX) { /* more would hold the loop: it goes in pieces */
        taken = write_now(p, data);
        if (SH_LIKELY(taken == PyBytes_GET_SIZE(data)))
            return sh_schedule_pump(p->pump) < 0 ? NULL : Py_NewRef(Py_None);
    }
    return write_rest(p, data, taken);
}

/* Read 1 to `most` bytes, for a receive() that has let the loop turn. None: the slow way. */
static PyObject *fast_path_take(FastPath *p, PyObject *most)
{
    Py_ssize_t n = p->can_read ? PyLong_AsSsize_t(most) : 0;
    Taken taken = SH_TAKEN;
    PyObject *data;

    if (n < 1) {
        PyErr_Clear();
        Py_RETURN_NONE;
    }
    if (sh_schedule_pump(p->pump) < 0)
        return NULL;
    data = sh_taken(&taken, sh_read_step(p->ep, &taken.taker, n > SH_COPY_MAX ? SH_COPY_MAX : (uint32_t)n, 1, sh_may_spin(p->pump) ? SH_MAY_SPIN : 0));
    return data || PyErr_Occurred() ? data : Py_NewRef(Py_None);
}

/* Read into `buffer`, for a receive_into() that has let the loop turn. How many bytes; None: the slow way. */
static PyObject *fast_path_take_into(FastPath *p, PyObject *buffer)
{
    Py_buffer view;
    int64_t n;
    int how;

    if (!p->can_read)
        Py_RETURN_NONE;
    if (sh_schedule_pump(p->pump) < 0 || PyObject_GetBuffer(buffer, &view, PyBUF_WRITABLE) < 0)
        return NULL;
    how = sh_may_spin(p->pump) ? SH_MAY_SPIN : 0;
    Py_BEGIN_ALLOW_THREADS
    n = sh_read_wait(p->ep, view.buf, view.len < (Py_ssize_t)INT32_MAX ? (uint32_t)view.len : INT32_MAX, 1, how);
    Py_END_ALLOW_THREADS
    PyBuffer_Release(&view);
    return n > 0 ? PyLong_FromLongLong(n) : Py_NewRef(Py_None);
}

/* Write, for a send(). How many bytes went into the ring; None: all of them, and the loop need not turn yet. */
static PyObject *fast_path_put(FastPath *p, PyObject *data)
{
    int64_t taken = 0;

    if (p->can_write && PyBytes_CheckExact(data) && PyBytes_GET_SIZE(data)) {
        taken = write_now(p, data);
        if (sh_schedule_pump(p->pump) < 0)
            return NULL;
        if (SH_LIKELY(taken == PyBytes_GET_SIZE(data)) && !sh_over(p->pump->nd))
            Py_RETURN_NONE;
    }
    return PyLong_FromLongLong(taken < 0 ? 0 : taken);
}

/* hang_up(): publish FIN and DONE, and let go of the slot, if all that came was read. False: nothing was done. */
static PyObject *fast_path_hang_up(FastPath *p, PyObject *unused)
{
    int64_t there = p->ep->orphan ? SH_SLOW : sh_available(p->ep);

    (void)unused;
    if (there != SH_EMPTY && there != SH_EOF)
        Py_RETURN_FALSE;
    sh_ep_close(p->ep, 1, 0);
    Py_RETURN_TRUE;
}

/* The pump tells this one of its slot's news from now on. */
static void take_place(FastPath *p) { Py_XSETREF(p->pump->fast_paths[p->slot], (FastPath *)Py_NewRef(p)); }

/* attach(reader, is_open): it reads in direct mode, if there is still a ring, and the pump may wake it from C. */
static PyObject *fast_path_attach(FastPath *p, PyObject *const *args, Py_ssize_t n)
{
    PyObject *reader = n == 2 ? args[0] : NULL, *limit, *buffer;

    if (!reader)
        return PyErr_Format(PyExc_TypeError, "attach() takes a reader, and whether the connection is open");
    Py_XSETREF(p->reader, PyWeakref_NewRef(reader, NULL));
    if (!p->reader || args[1] != Py_True)
        return p->reader ? Py_NewRef(Py_None) : NULL;
    p->direct = p->can_read = 1;
    limit = PyObject_GetAttr(reader, p->pump->state->names._limit);
    buffer = PyObject_GetAttr(reader, p->pump->state->names._buffer);
    if (limit && buffer && PyByteArray_CheckExact(buffer)) {
        p->limit = PyLong_AsSsize_t(limit);
        Py_XSETREF(p->buffer, Py_NewRef(buffer));
        take_place(p);
    }
    Py_XDECREF(limit);
    Py_XDECREF(buffer);
    return PyErr_Occurred() ? NULL : Py_NewRef(Py_None);
}

/* receive(protocol, context, buffered): from now on the pump gives bytes to the protocol; None: Python does. */
static PyObject *fast_path_receive(FastPath *p, PyObject *args)
{
    PyObject *protocol, *context;
    int buffered = 0;

    if (!PyArg_ParseTuple(args, "OO!|p", &protocol, &PyContext_Type, &context, &buffered))
        return NULL;
    p->buffered = (char)buffered;
    Py_XSETREF(p->context, Py_NewRef(context));
    Py_XSETREF(p->protocol, protocol == Py_None ? NULL : Py_NewRef(protocol));
    if (p->protocol)
        take_place(p);
    Py_RETURN_NONE;
}

/* pour(): have the socket take a piece. How many bytes; -1: it takes none; 0: there is no socket, or nothing for it. */
static PyObject *fast_path_pour(FastPath *p, PyObject *unused)
{
    int64_t n = 0;
    int all;

    (void)unused;
    if (p->sink >= 0 && p->protocol && p->can_write)
        n = give_socket(p, &all);
    return PyErr_Occurred() ? NULL : PyLong_FromLongLong(n > 0 ? n : n == SH_YIELD ? -1 : 0);
}

/* The pump may be cleared already, as the collector clears objects in any order. */
static void let_go(FastPath *p)
{
    p->can_read = 0;
    if (p->pump && p->pump->fast_paths && p->pump->fast_paths[p->slot] == p)
        Py_CLEAR(p->pump->fast_paths[p->slot]); /* whoever called has it, too */
}

static PyObject *fast_path_detach(FastPath *p, PyObject *unused)
{
    (void)unused;
    p->direct = 0;
    let_go(p);
    Py_CLEAR(p->protocol);
    Py_RETURN_NONE;
}

static PyObject *fast_path_reader(FastPath *p, void *unused)
{
    (void)unused;
    return p->reader ? PyObject_CallNoArgs(p->reader) : Py_NewRef(Py_None); /* its referent, or None */
}

static PyObject *fast_path_used(FastPath *p, void *unused)
{
    (void)unused;
    return PyBool_FromLong(p->reader != NULL);
}

static PyObject *fast_path_forget(FastPath *p, PyObject *unused)
{
    (void)unused;
    Py_CLEAR(p->reader);
    Py_RETURN_NONE;
}

/* The slot of a connection of that node; -1: an exception. */
long sh_slot_of(PyObject *conn, Pump *pump)
{
    PyObject *number = PyObject_GetAttr(conn, pump->state->names.slot);
    long slot = number ? PyLong_AsLong(number) : -1;

    Py_XDECREF(number);
    if (!PyErr_Occurred() && (slot < 0 || slot >= (long)pump->slots))
        PyErr_Format(PyExc_ValueError, "slot %ld: this node has %u", slot, (unsigned)pump->slots);
    return PyErr_Occurred() ? -1 : slot;
}

static int fill(FastPath *p, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"pump", "conn", "transport", NULL};
    State *state = PyType_GetModuleState(Py_TYPE(p));
    PyObject *pump, *conn, *transport;
    long slot;

    if (!state || !PyArg_ParseTupleAndKeywords(args, kwargs, "O!OO", names, state->pump, &pump, &conn, &transport)
        || (slot = sh_slot_of(conn, (Pump *)pump)) < 0)
        return -1;
    p->pump = (Pump *)Py_NewRef(pump);
    if (!(p->transport = PyWeakref_NewRef(transport, NULL)))
        return -1;
    p->slot = (uint32_t)slot;
    p->ep = &p->pump->nd->eps[slot];
    p->can_write = 1;
    p->sink = -1;
    return 0;
}

/* pump and ep are always set, so no method checks them. */
static PyObject *fast_path_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    FastPath *p = (FastPath *)type->tp_alloc(type, 0);

    if (p && fill(p, args, kwargs) < 0)
        Py_CLEAR(p);
    return (PyObject *)p;
}

static int fast_path_traverse(FastPath *p, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(p));
    Py_VISIT(p->pump);
    Py_VISIT(p->transport);
    Py_VISIT(p->reader);
    Py_VISIT(p->buffer);
    Py_VISIT(p->waiter);
    Py_VISIT(p->protocol);
    Py_VISIT(p->context);
    return 0;
}

static int fast_path_clear(FastPath *p)
{
    let_go(p);
    p->can_write = 0;
    Py_CLEAR(p->transport);
    Py_CLEAR(p->reader);
    Py_CLEAR(p->buffer);
    Py_CLEAR(p->waiter);
    Py_CLEAR(p->protocol);
    Py_CLEAR(p->context);
    return 0; /* the pump stays, for methods that are called after this */
}

static void fast_path_dealloc(FastPath *p)
{
    PyTypeObject *type = Py_TYPE(p);

    PyObject_GC_UnTrack(p);
    fast_path_clear(p);
    Py_CLEAR(p->pump);
    type->tp_free(p);
    Py_DECREF(type);
}

static PyMethodDef methods[] = {
    {"write", (PyCFunction)(void (*)(void))fast_path_write, METH_O, "write($self, data, /)\n--\n\nAs ShmTransport.write."},
    {"take", (PyCFunction)(void (*)(void))fast_path_take, METH_O, "Read 1 to so many bytes, for a receive() that has let the loop turn. None: the slow way."},
    {"take_into", (PyCFunction)(void (*)(void))fast_path_take_into, METH_O, "Read into a buffer, for a receive_into() that has let the loop turn. How many bytes; None: the slow way."},
    {"put", (PyCFunction)(void (*)(void))fast_path_put, METH_O, "Write, for a send(). How many bytes went into the ring; None: all, and the loop need not turn yet."},
    {"attach", (PyCFunction)(void (*)(void))fast_path_attach, METH_FASTCALL, "Let this reader take bytes from the ring, if the connection is open."},
    {"receive", (PyCFunction)(void (*)(void))fast_path_receive, METH_VARARGS, "Set the protocol that bytes are given to, its context, and whether it has a buffer of its own."},
    {"pour", (PyCFunction)(void (*)(void))fast_path_pour, METH_NOARGS, "Have `sink` take a piece. How many bytes; -1: it takes none; 0: there is none, or nothing for it."},
    {"hang_up", (PyCFunction)(void (*)(void))fast_path_hang_up, METH_NOARGS, "Publish FIN and DONE, and let go of the slot, if all that came was read. False: nothing was done."},
    {"detach", (PyCFunction)(void (*)(void))fast_path_detach, METH_NOARGS, "Note that no reader and no protocol takes bytes any more."},
    {"forget", (PyCFunction)(void (*)(void))fast_path_forget, METH_NOARGS, "Forget the reader: the connection has another protocol now."},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef members[] = {
    {"can_write", T_BOOL, offsetof(FastPath, can_write), 0, "writes go straight to the ring, and drain() has nothing to wait for"},
    {"can_read", T_BOOL, offsetof(FastPath, can_read), 0, "a reader takes its bytes from the ring, no exception is set, and nobody waits in Python"},
    {"direct", T_BOOL, offsetof(FastPath, direct), READONLY, "its reader takes bytes from the ring, but for a while in which can_read says otherwise"},
    {"sink", T_INT, offsetof(FastPath, sink), 0, "the socket that bytes are sent to in place of the protocol, whose sink_refused(errno) is called when it takes none; -1: none"},
    {"poured", T_ULONGLONG, offsetof(FastPath, poured), READONLY, "bytes that `sink` took"},
    {"wake_pending", T_BOOL, offsetof(FastPath, wake_pending), 0, "the pump has woken the waiting reader, which has not run yet"},
    {NULL, 0, 0, 0, NULL},
};

static PyGetSetDef getters[] = {
    {"reader", (getter)fast_path_reader, NULL, "The reader; None when there was none, or its owner has dropped it.", NULL},
    {"used", (getter)fast_path_used, NULL, "It has, or had, a reader in direct mode.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_doc, "Reads and writes of one connection that need no Python."},
    {Py_tp_new, fast_path_new},
    {Py_tp_traverse, fast_path_traverse},
    {Py_tp_clear, fast_path_clear},
    {Py_tp_dealloc, fast_path_dealloc},
    {Py_tp_methods, methods},
    {Py_tp_members, members},
    {Py_tp_getset, getters},
    {0, NULL},
};

PyType_Spec sh_fast_path_spec = {
    .name = "shmsock.native._extension.FastPath",
    .basicsize = sizeof(FastPath),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
    .slots = slots,
};
