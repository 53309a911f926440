/* pump.c - when the pump runs, and whom it tells what it found. */
#include "extension.h"

#include <stdlib.h>

#define EVENTS 64
#define GLANCE_NS 2000u /* a poll so short that releasing the GIL for it does not pay */
#define SPIN_NS 50000u  /* the longest poll in one go; then the loop serves others */
#define UNUSUAL (SH_POLL_FIN | SH_POLL_DONE | SH_POLL_RESET | SH_POLL_BAD)

/* owner.method([first[, second]]). */
static PyObject *ask_owner(Pump *pump, PyObject *method, PyObject *first, PyObject *second)
{
    if (!pump->owner) {
        PyErr_SetString(PyExc_RuntimeError, "this node was never attached, or has been collected");
        return NULL;
    }
    return PyObject_CallMethodObjArgs(pump->owner, method, first, second, NULL);
}

static int owed(Pump *pump)
{
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(pump->owed); i++)
        if (PyObject_Size(PyTuple_GET_ITEM(pump->owed, i)))
            return 1;
    return 0;
}

static PyObject *list_of(const uint64_t *words, int n)
{
    PyObject *list = PyList_New(n);

    for (int i = 0; list && i < n; i++) {
        PyObject *word = PyLong_FromUnsignedLongLong(words[i]);
        if (word)
            PyList_SET_ITEM(list, i, word);
        else
            Py_CLEAR(list);
    }
    return list;
}

/* Have Python attend to its part of a pass. n < 0: this node has ended. 1: somebody was told something. */
static int attend(Pump *pump, const uint64_t *words, int n, uint64_t now)
{
    PyObject *list = n < 0 ? Py_NewRef(Py_None) : list_of(words, n), *clock = list ? PyLong_FromUnsignedLongLong(now) : NULL, *r = NULL;
    int told = -1;

    if (clock)
        r = ask_owner(pump, pump->state->names.attend, list, clock);
    if (r)
        told = PyObject_IsTrue(r);
    Py_XDECREF(list);
    Py_XDECREF(clock);
    Py_XDECREF(r);
    return told;
}

/* Have Python take over a connection that the core has accepted. 1; or -1: an exception that ends the program. */
static int accepted(Pump *pump, uint64_t word, uint64_t now)
{
    PyObject *what = PyLong_FromUnsignedLong(word & 0xffffff), *more = PyLong_FromUnsignedLong((uint32_t)(word >> 32)), *clock = PyLong_FromUnsignedLongLong(now), *r = NULL;

    if (what && more && clock && pump->owner)
        r = PyObject_CallMethodObjArgs(pump->owner, pump->state->names.accepted, what, more, clock, NULL);
    Py_XDECREF(what);
    Py_XDECREF(more);
    Py_XDECREF(clock);
    Py_XDECREF(r);
    return r ? 1 : -1;
}

static int fall_asleep(Pump *pump)
{
    return __atomic_load_n(&pump->nd->inert, __ATOMIC_ACQUIRE) || sh_heartbeat_arm(pump->heartbeat, pump->hurry);
}

/* Hand out what a pass found: the usual case, a reader that waits, or a protocol that is given bytes or datagrams, is served here, and Python attends to
 * the rest. 1: somebody was told something. */
static int tell(Pump *pump, uint64_t *words, int n, uint64_t now)
{
    PyObject *type = NULL, *value = NULL, *trace = NULL;
    int left = 0, told = 0;

    for (int i = 0; i < n; i++) {
        uint32_t kind = words[i] >> 24 & 0xff, slot = words[i] & 0xffffff, bits = words[i] >> 32 & 0xff;
        FastPath *p = kind == SH_EV_SLOT && slot < pump->slots ? pump->fast_paths[slot] : NULL;
        DatagramIn *in = kind == SH_EV_SLOT && slot < pump->slots ? pump->datagram_ins[slot] : NULL;
        PyObject *whose = in ? (PyObject *)in : (PyObject *)p;
        int r = 0, last;

        if (kind == SH_EV_ACCEPTED && !pump->closed && !type && sh_ep_is_open(&pump->nd->eps[words[i] & 0xffff])) {
            if ((r = accepted(pump, words[i], now)) < 0)
                PyErr_Fetch(&type, &value, &trace);
            told |= r > 0;
            continue;
        }
        /* before an end come bytes: who is given the last ones mostly closes as well, and then Python has nothing to do */
        last = !in && bits & SH_POLL_DATA && bits & UNUSUAL && !(bits & (SH_POLL_RESET | SH_POLL_BAD));
        if (whose && bits && (last || !(bits & UNUSUAL)) && (in || p->can_write)) {
            const sh_ep *ep = &pump->nd->eps[slot];

            Py_INCREF(whose);
            if (in)
                r = sh_datagram_in_drain(in);
            else if (p->protocol)
                r = sh_fast_path_deliver(p);
            else if (p->waiter && p->can_read && !last)
                r = sh_fast_path_wake(p) < 0 ? -1 : 1;
            Py_DECREF(whose);
            told |= r > 0;
            if (r > 0 && (!last || pump->closed || ep->closing || ep->gen != words[i] >> 40))
                continue;
            if (r < 0 && !type) /* Ctrl-C, say. Raised when all others have been told: a loop may be run again to clean up */
                PyErr_Fetch(&type, &value, &trace);
            else
                PyErr_Clear();
        }
        words[left++] = words[i];
    }
    if (!pump->closed && (n < 0 || left || pump->unlocked || now >= pump->nd->due_ns || owed(pump))) {
        int r = attend(pump, words, n < 0 ? n : left, now);
        if (r < 0 && type) {
            Py_DECREF(type);
            Py_XDECREF(value);
            Py_XDECREF(trace);
        }
        if (r < 0)
            return -1;
        told |= r;
    }
    if (type)
        PyErr_Restore(type, value, trace);
    return type ? -1 : told != 0;
}

/* Is nothing else to be run, so that the pump may go on in this turn? */
static int is_alone(Pump *pump, int owes) { return !owes && pump->queue_visible && PyObject_Size(pump->queue) == 0; }

/* Busy-poll, or nap, for up to `ns` while other threads run. Returns what sh_pump_more() does. */
static int wait_for_more(Pump *pump, uint64_t *words, uint64_t now)
{
    int n;

    Py_BEGIN_ALLOW_THREADS
    n = sh_pump_more(pump->nd, words, EVENTS, now, SPIN_NS);
    Py_END_ALLOW_THREADS
    return n;
}

/* Make the next pass. 1: words[] has what it found. 0: there was none; *again: schedule one, else the loop may sleep. */
static int next_pass(Pump *pump, uint64_t *words, int *n, uint64_t now, int told, int *again)
{
    int owes = owed(pump), alone = is_alone(pump, owes), hot;

    *again = 1;
    *n = 0;
    if (told && !alone) /* those who were told something run first: falling asleep can wait */
        return 0;
    hot = sh_stay_hot(pump->nd, now, owes);
    if (pump->nd->hot_ns && sh_is_crowded(pump->nd, now) && !sh_is_next(pump->nd, now)) {
        /* they may have written to sockets, and uvloop holds such writes back until the turn ends: wait only if no nap was in vain lately */
        if (alone && (!told || sh_nap_ns(pump->nd, now) == SH_NAP_MAX_NS) && (*n = wait_for_more(pump, words, now)))
            return 1;
        hot = owes || !sh_quiet(pump->nd);
    }
    if (!hot)
        *again = told || !fall_asleep(pump);
    if (hot < 2 || (!alone && hot == 2))
        return 0;
    if (alone && (*n = sh_pump_more(pump->nd, words, EVENTS, now, pump->nd->spin_max_ns / 64 > GLANCE_NS ? pump->nd->spin_max_ns / 64 : GLANCE_NS)))
        return 1;
    if (told) /* it may have written to sockets, and uvloop holds such writes back until the turn ends */
        return 0;
    if (alone)
        *n = wait_for_more(pump, words, now);
    else {
        Py_BEGIN_ALLOW_THREADS
        sh_offer(pump->nd, now);
        Py_END_ALLOW_THREADS
    }
    return *n != 0;
}

/* Make a pass, and more of them as long as there are news and nothing else is to be run. */
static int run(Pump *pump)
{
    uint64_t words[EVENTS], now;
    int n, told, again;

    pump->scheduled = 0;
    if (pump->closed)
        return 0;
    now = sh_clock();
    if (pump->polled) {
        pump->polled--;
        if (sh_pumped_just_now(pump->nd, now))
            return sh_begin_turn(pump);
    }
    pump->scheduled = pump->pumping = 1; /* nobody who is called from here need schedule a pass: this one goes on */
    n = sh_pump(pump->nd, words, EVENTS);
    for (;;) {
        told = tell(pump, words, n, now);
        now = sh_clock();
        if (told < 0 || pump->closed || !next_pass(pump, words, &n, now, told, &again))
            break;
    }
    pump->scheduled = pump->pumping = 0;
    if (told < 0 && !pump->closed) {
        PyObject *type, *value, *trace;

        PyErr_Fetch(&type, &value, &trace);
        if (sh_begin_turn(pump) < 0)
            PyErr_Clear();
        PyErr_Restore(type, value, trace);
    }
    if (told < 0 || pump->closed)
        return told < 0 ? -1 : 0;
    return again ? sh_begin_turn(pump) : 0;
}

/* ---- the type ---- */

static PyObject *none_unless(int failed) { return failed < 0 ? NULL : Py_NewRef(Py_None); }

/* Never in a forked child, where the pump is closed. */
static PyObject *pump_fit(Pump *pump, PyObject *unused)
{
    (void)unused;
    return PyBool_FromLong(!pump->closed && PyThread_get_thread_ident() == pump->ident && sh_may_write(pump->nd));
}

static PyObject *pump_begin_turn(Pump *pump, PyObject *unused) { (void)unused; return none_unless(sh_begin_turn(pump)); }
static PyObject *pump_check(Pump *pump, PyObject *unused) { (void)unused; return ask_owner(pump, pump->state->names.check, NULL, NULL); }
static PyObject *pump_stir(Pump *pump, PyObject *unused) { (void)unused; return pump->scheduled || pump->closed ? Py_NewRef(Py_None) : ask_owner(pump, pump->state->names.pump_follows, NULL, NULL); }
/* spin_for_answer(section, slot): busy-poll for messages of that peer, if nothing else is to be run. Returns True: it has accepted the connection of that slot,
 * and that is all; what they said otherwise, words for the engine; None: leave them to the next pass. */
static PyObject *pump_spin_for_answer(Pump *pump, PyObject *const *args, Py_ssize_t count)
{
    unsigned long peer = count == 2 ? PyLong_AsUnsignedLong(args[0]) : 0, slot = count == 2 ? PyLong_AsUnsignedLong(args[1]) : 0;
    uint64_t words[EVENTS];
    int n = -1;

    if (PyErr_Occurred() || count != 2 || pump->closed || peer >= pump->nd->g.peers || !sh_may_spin(pump))
        return PyErr_Occurred() ? NULL : Py_NewRef(Py_None);
    Py_BEGIN_ALLOW_THREADS
    if (sh_spin_for_mail(pump->nd, (uint32_t)peer))
        n = sh_messages(pump->nd, (uint32_t)peer, words, EVENTS);
    Py_END_ALLOW_THREADS
    if (n == 1 && (uint32_t)words[0] == (SH_EV_CONNECTED << 24 | slot) && (words[0] >> 32 & 0xff) == SH_POLL_SPACE)
        Py_RETURN_TRUE;
    return n < 0 ? Py_NewRef(Py_None) : list_of(words, n);
}

/* over(): is this turn's budget used up? Whoever asks goes on in it, so a pass follows. */
static PyObject *pump_over(Pump *pump, PyObject *unused)
{
    (void)unused;
    if (pump->closed)
        Py_RETURN_FALSE;
    return sh_schedule_pump(pump) < 0 ? NULL : PyBool_FromLong(sh_over(pump->nd));
}

static PyObject *pump_may_spin(Pump *pump, PyObject *unused) { (void)unused; return PyBool_FromLong(sh_may_spin(pump)); }
static PyObject *pump_will_run(Pump *pump, PyObject *unused) { (void)unused; return none_unless(sh_will_run(pump)); }
static PyObject *pump_runs(Pump *pump, PyObject *unused) { (void)unused; return none_unless(sh_runs(pump)); }
static PyObject *pump_run(Pump *pump, PyObject *unused) { (void)unused; return none_unless(run(pump)); }
static PyObject *pump_woken(Pump *pump, PyObject *unused) { (void)unused; return none_unless(pump->scheduled ? 0 : run(pump)); }

static PyObject *pump_wake(Pump *pump, PyObject *unused)
{
    int news;

    (void)unused;
    if (pump->closed)
        Py_RETURN_NONE;
    news = sh_heartbeat_heard(pump->heartbeat);
    if (news || pump->listens || pump->hurry) {
        PyObject *number = PyLong_FromLong(news), *r = number ? ask_owner(pump, pump->state->names.heard, number, NULL) : NULL;
        Py_XDECREF(number);
        if (!r)
            return NULL;
        Py_DECREF(r);
    }
    return none_unless(pump->scheduled ? 0 : run(pump));
}

/* *to: the owner's object in C; memory[i]: the Python object that it lies in. */
static int borrow(PyObject *owner, void *to, PyObject *memory, Py_ssize_t i)
{
    PyObject *number = PyObject_GetAttrString(owner, "address"), *private = number ? PyObject_GetAttrString(owner, "private") : NULL;

    if (private) {
        PyTuple_SET_ITEM(memory, i, private);
        *(void **)to = PyLong_AsVoidPtr(number);
    }
    Py_XDECREF(number);
    return private && !PyErr_Occurred() ? 0 : -1;
}

/* Until pump_init() it counts as detached. */
static PyObject *pump_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    PyObject *module = PyType_GetModule(type);
    Pump *pump = module ? (Pump *)type->tp_alloc(type, 0) : NULL;

    (void)args;
    (void)kwargs;
    if (pump) {
        pump->module = Py_NewRef(module);
        pump->state = PyModule_GetState(module);
        pump->closed = 1;
    }
    return (PyObject *)pump;
}

/* Release the GIL if this thread holds it: it does in calls of the extension, and not in those of cffi. */
static void *let_others_run(void)
{
#if PY_VERSION_HEX >= 0x030d0000
    return PyThreadState_GetUnchecked() ? PyEval_SaveThread() : NULL;
#else
    PyThreadState *mine = PyGILState_GetThisThreadState();

    return mine && mine == _PyThreadState_UncheckedGet() ? PyEval_SaveThread() : NULL;
#endif
}

static void go_on(void *mine) { PyEval_RestoreThread(mine); }

static int pump_init(Pump *pump, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"owner", "engine", "heartbeat", "loop", "context", "ident", "queue", NULL};
    PyObject *owner, *engine, *heartbeat, *loop, *context, *queue;

    if (pump->memory) {
        PyErr_SetString(PyExc_RuntimeError, "a node is made once");
        return -1;
    }
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOOOOkO", names, &owner, &engine, &heartbeat, &loop, &context, &pump->ident, &queue)
        || !(pump->memory = PyTuple_New(2)) || borrow(heartbeat, &pump->heartbeat, pump->memory, 0) < 0 || !(pump->owed = PyObject_GetAttrString(engine, "owed"))
        || !(pump->call_soon = PyObject_GetAttrString(loop, "call_soon"))
        || !(pump->create_future = PyObject_GetAttrString(loop, "create_future"))
        || !(pump->pass = PyObject_GetAttrString((PyObject *)pump, "_pump"))
        || borrow(engine, &pump->nd, pump->memory, 1) < 0)
        return -1;
    pump->owner = Py_NewRef(owner);
    pump->context = Py_NewRef(context);
    pump->queue_visible = queue != Py_None;
    pump->queue = pump->queue_visible ? Py_NewRef(queue) : Py_BuildValue("[O]", Py_None);
    pump->slots = pump->nd->g.slots;
    pump->fast_paths = PyMem_Calloc(pump->slots, sizeof *pump->fast_paths);
    pump->datagram_ins = PyMem_Calloc(pump->slots, sizeof *pump->datagram_ins);
    if (!pump->queue || !pump->fast_paths || !pump->datagram_ins || !PyTuple_Check(pump->owed)) {
        PyErr_NoMemory();
        return -1;
    }
    pump->nd->let_go = let_others_run;
    pump->nd->take_back = go_on;
    pump->closed = 0;
    return 0;
}

static int pump_traverse(Pump *pump, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(pump));
    Py_VISIT(pump->module);
    Py_VISIT(pump->memory);
    for (uint32_t i = 0; pump->fast_paths && pump->datagram_ins && i < pump->slots; i++) {
        Py_VISIT(pump->fast_paths[i]);
        Py_VISIT(pump->datagram_ins[i]);
    }
    Py_VISIT(pump->owner);
    Py_VISIT(pump->owed);
    Py_VISIT(pump->queue);
    Py_VISIT(pump->call_soon);
    Py_VISIT(pump->create_future);
    Py_VISIT(pump->context);
    Py_VISIT(pump->pass);
    return 0;
}

static int pump_clear(Pump *pump)
{
    pump->closed = 1; /* what is called from here on finds nothing to work with */
    for (uint32_t i = 0; pump->fast_paths && pump->datagram_ins && i < pump->slots; i++) {
        Py_CLEAR(pump->fast_paths[i]);
        Py_CLEAR(pump->datagram_ins[i]);
    }
    Py_CLEAR(pump->owner);
    Py_CLEAR(pump->owed);
    Py_CLEAR(pump->queue);
    Py_CLEAR(pump->call_soon);
    Py_CLEAR(pump->create_future);
    Py_CLEAR(pump->context);
    Py_CLEAR(pump->pass);
    return 0;
}

static void pump_dealloc(Pump *pump)
{
    PyTypeObject *type = Py_TYPE(pump);

    PyObject_GC_UnTrack(pump);
    pump_clear(pump);
    Py_CLEAR(pump->memory); /* not before: fast paths, DatagramIns and awaitables that end with us, or later, still use it */
    PyMem_Free(pump->fast_paths);
    PyMem_Free(pump->datagram_ins);
    Py_CLEAR(pump->module);
    type->tp_free(pump);
    Py_DECREF(type);
}

#define METHOD(function, text) (PyCFunction)(void (*)(void))(function), METH_NOARGS, text

static PyMethodDef methods[] = {
    {"check", METHOD(pump_check, "Raises when the node may not be used here (any more).")},
    {"fit", METHOD(pump_fit, "May the node be used here? If not, check() says why, if anything is wrong.")},
    {"begin_turn", METHOD(pump_begin_turn, "Give this turn of the loop a budget of its own, and have a pass follow it.")},
    {"stir", METHOD(pump_stir, "Have a pass follow what the engine has done.")},
    {"over", METHOD(pump_over, "Is the budget of this turn, which is begun if need be, used up?")},
    {"may_spin", METHOD(pump_may_spin, "Is nothing else to be run by this loop, as far as can be known?")},
    {"spin_for_answer", (PyCFunction)(void (*)(void))pump_spin_for_answer, METH_FASTCALL, "Busy-poll for the answer of that peer, for that slot: True, what it said otherwise, or None."},
    {"will_run", METHOD(pump_will_run, "Note that the pump woke a task.")},
    {"runs", METHOD(pump_runs, "Note that the task runs.")},
    {"woken", METHOD(pump_woken, "Make a pass, as a doorbell came.")},
    {"_wake", METHOD(pump_wake, "Make a pass, as the heartbeat asks for one.")},
    {"_pump", METHOD(pump_run, "Make a pass, and more of them while there are news and nothing else is to be run.")},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef members[] = {
    {"scheduled", T_BOOL, offsetof(Pump, scheduled), 0, "a pass is scheduled: it runs in the loop's next turn"},
    {"closed", T_BOOL, offsetof(Pump, closed), 0, "detached"},
    {"hurry", T_BOOL, offsetof(Pump, hurry), 0, "the heartbeat's next beat is waited for"},
    {"listens", T_BOOL, offsetof(Pump, listens), 0, "there is more than the heartbeat to hear"},
    {"unlocked", T_ULONGLONG, offsetof(Pump, unlocked), 0, "mask of sections whose lock fell"},
    {"polled", T_INT, offsetof(Pump, polled), 0, "passes that may be left out, soon after the last one"},
    {"moot", T_INT, offsetof(Pump, moot), 0, "callbacks in the loop's queue that have nothing left to do"},
    {"ident", T_ULONG, offsetof(Pump, ident), READONLY, "the ident of the thread that it belongs to"},
    {"context", T_OBJECT_EX, offsetof(Pump, context), READONLY, "the context in which it is called back"},
    {"queue", T_OBJECT_EX, offsetof(Pump, queue), READONLY, "what the loop runs next: with more than one item in it, do not spin"},
    {NULL, 0, 0, 0, NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_doc, "Passes over what peers said, as callbacks of a loop. Pump(owner, engine, heartbeat, loop, context, ident, queue)."},
    {Py_tp_new, pump_new},
    {Py_tp_init, pump_init},
    {Py_tp_traverse, pump_traverse},
    {Py_tp_clear, pump_clear},
    {Py_tp_dealloc, pump_dealloc},
    {Py_tp_methods, methods},
    {Py_tp_members, members},
    {0, NULL},
};

PyType_Spec sh_pump_spec = {
    .name = "shmsock.native._extension.Pump",
    .basicsize = sizeof(Pump),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
    .slots = slots,
};
