/* datagrams.c - datagrams that need no Python: DatagramIn hands over what a link brings (the rest is for Incoming.ready in engine/datagram_links.py),
 * DatagramOut is ShmDatagramTransport.sendto for addresses that were used before. */
#include "extension.h"

#define RECORDS_PER_PASS 64
#define BYTES_PER_PASS (256 << 10)

/* ---- receiving ---- */

/* One datagram, and where it goes: sink is (protocol, context). */
typedef struct {
    Taken taken;
    DatagramIn *in;
    PyObject *sink, *endpoint, *source;
    uint32_t ports;
} Arrival;

/* Find out who gets a datagram with these ports. 0: leave that to Python. */
static int find_sink(Arrival *a)
{
    PyObject *key = PyLong_FromUnsignedLong(a->ports), *flow = key ? PyDict_GetItemWithError(a->in->flows, key) : NULL, *paused;

    Py_XDECREF(key);
    if (!flow || !PyTuple_Check(flow) || PyTuple_GET_SIZE(flow) != 2)
        return 0;
    a->endpoint = Py_NewRef(PyTuple_GET_ITEM(flow, 0));
    a->source = Py_NewRef(PyTuple_GET_ITEM(flow, 1));
    paused = PyObject_GetAttr(a->endpoint, a->in->pump->state->names.paused);
    a->sink = paused == Py_False ? PyObject_GetAttr(a->endpoint, a->in->pump->state->names.sink) : NULL;
    Py_XDECREF(paused);
    return a->sink && PyTuple_Check(a->sink) && PyTuple_GET_SIZE(a->sink) == 2 && PyContext_CheckExact(PyTuple_GET_ITEM(a->sink, 1));
}

static int take_arrival(sh_taker *to, const sh_ep *ep, uint32_t at, uint32_t n)
{
    uint32_t gen = ep->gen, head = ep->head;
    /* Python may have run meanwhile, and closed the link, or the node, whose region is not mapped then. */
    int found = find_sink((Arrival *)to) && sh_may_write(ep->nd) && ep->theirs && ep->gen == gen && ep->head == head;

    return found ? sh_take_bytes(to, ep, at, n) : -1;
}

/* Give one datagram to its endpoint. 1: done. 0: none was given, and *status says why. -1: an exception. */
static int pass_on(DatagramIn *in, int64_t *status)
{
    Arrival a = {.taken.taker.take = take_arrival, .in = in};
    PyObject *data = sh_taken(&a.taken, *status = sh_recv_step(in->ep, &a.taken.taker, &a.ports)), *error;
    int r = PyErr_Occurred() ? -1 : 0;

    if (data) {
        PyObject *protocol = PyTuple_GET_ITEM(a.sink, 0);
        r = sh_hand_over(PyTuple_GET_ITEM(a.sink, 1), protocol, in->pump->state->names.datagram_received, data, a.source, &error);
        if (r == 0)
            r = sh_tell_of(PyObject_GetAttr(a.endpoint, in->pump->state->names.handler), in->pump->state->names.raised, error, protocol);
        Py_DECREF(data);
        r = r < 0 ? -1 : 1;
    }
    Py_XDECREF(a.sink);
    Py_XDECREF(a.endpoint);
    Py_XDECREF(a.source);
    return r;
}

/* Give what the link brings to its endpoints. 1: done. 0: the rest is Python's. -1: an exception. */
int sh_datagram_in_drain(DatagramIn *in)
{
    int64_t given = 0, n;

    sh_takes_part(in->ep);
    for (int records = 0; records < RECORDS_PER_PASS && given < BYTES_PER_PASS && in->open; records++) {
        int r = pass_on(in, &n);

        if (r <= 0)
            return r < 0 ? r : n == SH_EMPTY;
        given += n;
        if (in->ep->tail_seen == in->ep->head)
            return 1; /* that was all: what came meanwhile is news of its own */
        if (sh_over(in->pump->nd))
            break;
    }
    if (in->open)
        sh_poll_again(in->pump, in->slot);
    return 1;
}

static PyObject *datagram_in_close(DatagramIn *in, PyObject *unused)
{
    (void)unused;
    in->open = 0;
    if (in->pump && in->pump->datagram_ins && in->pump->datagram_ins[in->slot] == in)
        Py_CLEAR(in->pump->datagram_ins[in->slot]); /* whoever called has it, too */
    Py_RETURN_NONE;
}

static PyObject *datagram_in_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"pump", "conn", "flows", NULL};
    State *state = PyType_GetModuleState(type);
    PyObject *pump, *conn, *flows;
    DatagramIn *in;
    long slot;

    if (!state || !PyArg_ParseTupleAndKeywords(args, kwargs, "O!OO!", names, state->pump, &pump, &conn, &PyDict_Type, &flows)
        || (slot = sh_slot_of(conn, (Pump *)pump)) < 0 || !(in = (DatagramIn *)type->tp_alloc(type, 0)))
        return NULL;
    in->pump = (Pump *)Py_NewRef(pump);
    in->flows = Py_NewRef(flows);
    in->slot = (uint32_t)slot;
    in->ep = &in->pump->nd->eps[slot];
    in->open = 1;
    Py_XSETREF(in->pump->datagram_ins[slot], (DatagramIn *)Py_NewRef(in));
    return (PyObject *)in;
}

static int datagram_in_traverse(DatagramIn *in, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(in));
    Py_VISIT(in->pump);
    Py_VISIT(in->flows);
    return 0;
}

static int datagram_in_clear(DatagramIn *in)
{
    Py_DECREF(datagram_in_close(in, NULL));
    return 0; /* pump and flows stay: they clear themselves, which ends the cycles they are in */
}

static void datagram_in_dealloc(DatagramIn *in)
{
    PyTypeObject *type = Py_TYPE(in);

    PyObject_GC_UnTrack(in);
    datagram_in_clear(in);
    Py_CLEAR(in->pump);
    Py_CLEAR(in->flows);
    type->tp_free(in);
    Py_DECREF(type);
}

/* ---- sending ---- */

typedef struct {
    PyObject_HEAD
    Pump *pump;
    PyObject *routes;    /* address -> Route (engine/datagram_links.py): (link, port, entry, gate); the gate is the link's FastPath */
    PyObject *transport; /* weak */
    uint32_t port;
    char can_write;
} DatagramOut;

/* Send without Python. 1: sent. 0: the slow way. -1: an exception. */
static int send_now(DatagramOut *out, PyObject *data, PyObject *address)
{
    PyObject *route;
    FastPath *gate;
    uint32_t port, entry;
    Py_ssize_t n;
    int sent;

    if (!out->can_write || !PyBytes_CheckExact(data) || !(PyTuple_CheckExact(address) || address == Py_None))
        return 0;
    route = PyDict_GetItemWithError(out->routes, address);
    if (!route || !PyTuple_Check(route) || PyTuple_GET_SIZE(route) != 4 || !Py_IS_TYPE(PyTuple_GET_ITEM(route, 3), out->pump->state->fast_path)) {
        PyErr_Clear(); /* an address that cannot be looked up: the slow way says so */
        return 0;
    }
    gate = (FastPath *)PyTuple_GET_ITEM(route, 3);
    port = (uint32_t)PyLong_AsUnsignedLong(PyTuple_GET_ITEM(route, 1));
    entry = (uint32_t)PyLong_AsUnsignedLong(PyTuple_GET_ITEM(route, 2));
    n = PyBytes_GET_SIZE(data);
    if (!gate->can_write || gate->pump != out->pump || PyErr_Occurred() || n > (Py_ssize_t)SH_DATAGRAM_MAX)
        return PyErr_Occurred() ? -1 : 0;
    sent = sh_send(gate->ep, out->port, port, entry, PyBytes_AS_STRING(data), (uint32_t)n); /* its kick may release the GIL */
    return sent == 1;
}

static PyObject *datagram_out_sendto(DatagramOut *out, PyObject *const *args, Py_ssize_t n, PyObject *keywords)
{
    PyObject *data = n > 0 ? args[0] : NULL, *address = n > 1 ? args[1] : Py_None, *transport, *r;
    Py_ssize_t named = keywords ? PyTuple_GET_SIZE(keywords) : 0;
    int sent;

    for (Py_ssize_t i = 0; i < named; i++) {
        if (PyUnicode_Compare(PyTuple_GET_ITEM(keywords, i), out->pump->state->names.data) == 0 && n < 1)
            data = args[n + i];
        else if (PyUnicode_Compare(PyTuple_GET_ITEM(keywords, i), out->pump->state->names.addr) == 0 && n < 2)
            address = args[n + i];
        else
            data = NULL;
    }
    if (!data || n > 2 || n + named > 2)
        return PyErr_Format(PyExc_TypeError, "sendto() takes data and, unless connected, addr");
    if ((sent = send_now(out, data, address)) < 0)
        return NULL;
    if (sent)
        return sh_schedule_pump(out->pump) < 0 ? NULL : Py_NewRef(Py_None);
    if (!(transport = PyObject_CallNoArgs(out->transport)))
        return NULL;
    r = transport == Py_None ? Py_NewRef(Py_None) : PyObject_CallMethodObjArgs(transport, out->pump->state->names._send_slowly, data, address, NULL);
    Py_DECREF(transport);
    return r;
}

static PyObject *datagram_out_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"pump", "port", "routes", "transport", NULL};
    State *state = PyType_GetModuleState(type);
    PyObject *pump, *routes, *transport;
    unsigned int port;
    DatagramOut *out;

    if (!state || !PyArg_ParseTupleAndKeywords(args, kwargs, "O!IO!O", names, state->pump, &pump, &port, &PyDict_Type, &routes, &transport)
        || !(out = (DatagramOut *)type->tp_alloc(type, 0)))
        return NULL;
    out->pump = (Pump *)Py_NewRef(pump);
    out->routes = Py_NewRef(routes);
    out->port = port;
    out->can_write = 1;
    if (!(out->transport = PyWeakref_NewRef(transport, NULL)))
        Py_CLEAR(out);
    return (PyObject *)out;
}

static int datagram_out_traverse(DatagramOut *out, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(out));
    Py_VISIT(out->pump);
    Py_VISIT(out->routes);
    Py_VISIT(out->transport);
    return 0;
}

static void datagram_out_dealloc(DatagramOut *out)
{
    PyTypeObject *type = Py_TYPE(out);

    PyObject_GC_UnTrack(out);
    Py_CLEAR(out->pump);
    Py_CLEAR(out->routes);
    Py_CLEAR(out->transport);
    type->tp_free(out);
    Py_DECREF(type);
}

/* ---- the types ---- */

static PyMethodDef datagram_in_methods[] = {
    {"close", (PyCFunction)(void (*)(void))datagram_in_close, METH_NOARGS, "Take nothing from this link any more."},
    {NULL, NULL, 0, NULL},
};

static PyMethodDef datagram_out_methods[] = {
    {"sendto", (PyCFunction)(void (*)(void))datagram_out_sendto, METH_FASTCALL | METH_KEYWORDS, "sendto($self, data, addr=None)\n--\n\nAs ShmDatagramTransport.sendto."},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef datagram_out_members[] = {
    {"can_write", T_BOOL, offsetof(DatagramOut, can_write), 0, "the transport is not being closed"},
    {NULL, 0, 0, 0, NULL},
};

static PyType_Slot datagram_in_slots[] = {
    {Py_tp_doc, "Takes datagrams from a link, for endpoints whose protocols take them at once."},
    {Py_tp_new, datagram_in_new},
    {Py_tp_traverse, datagram_in_traverse},
    {Py_tp_clear, datagram_in_clear},
    {Py_tp_dealloc, datagram_in_dealloc},
    {Py_tp_methods, datagram_in_methods},
    {0, NULL},
};

static PyType_Slot datagram_out_slots[] = {
    {Py_tp_doc, "Sends datagrams to addresses that were used before."},
    {Py_tp_new, datagram_out_new},
    {Py_tp_traverse, datagram_out_traverse},
    {Py_tp_dealloc, datagram_out_dealloc},
    {Py_tp_methods, datagram_out_methods},
    {Py_tp_members, datagram_out_members},
    {0, NULL},
};

#define SPEC(type, its_slots) {.name = "shmsock.native._extension." #type, .basicsize = sizeof(type), .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC, .slots = its_slots}
PyType_Spec sh_datagram_in_spec = SPEC(DatagramIn, datagram_in_slots), sh_datagram_out_spec = SPEC(DatagramOut, datagram_out_slots);
