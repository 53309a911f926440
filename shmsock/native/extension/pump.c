/* pump.c - when the pump runs, and whom it tells of what it found. */
#include "extension.h"

#include <sched.h>
#include <stdlib.h>

#define EVENTS 64
#define GLANCE_NS 2000u /* not worth giving the GIL away for */
#define SPIN_NS 50000u  /* in one go; then the loop has to look after others */
#define UNUSUAL (SH_POLL_FIN | SH_POLL_DONE | SH_POLL_RESET | SH_POLL_BAD)

PyTypeObject *sh_pump_type;
static PyObject *s_check, *s_heard, *s_attend, *s_pump_follows;

/* owner.method([first[, second]]): what is seldom done. */
static PyObject *ask_owner(Pump *t, PyObject *method, PyObject *first, PyObject *second)
{
    if (!t->owner) {
        PyErr_SetString(PyExc_RuntimeError, "this node was never attached, or has been collected");
        return NULL;
    }
    return PyObject_CallMethodObjArgs(t->owner, method, first, second, NULL);
}

static int owed(Pump *t)
{
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(t->owed); i++)
        if (PyObject_Size(PyTuple_GET_ITEM(t->owed, i)))
            return 1;
    return 0;
}

/* Python's part of a pass. n < 0: this node is over. 1: somebody was told of something. */
static int attend(Pump *t, const uint64_t *words, int n, uint64_t now)
{
    PyObject *list = n < 0 ? Py_NewRef(Py_None) : PyList_New(n), *clock = list ? PyLong_FromUnsignedLongLong(now) : NULL, *r = NULL;
    int told = -1;

    for (int i = 0; clock && i < n; i++) {
        PyObject *word = PyLong_FromUnsignedLongLong(words[i]);
        if (!word)
            goto out;
        PyList_SET_ITEM(list, i, word);
    }
    if (clock)
        r = ask_owner(t, s_attend, list, clock);
    if (r)
        told = PyObject_IsTrue(r);
out:
    Py_XDECREF(list);
    Py_XDECREF(clock);
    Py_XDECREF(r);
    return told;
}

static int fall_asleep(Pump *t)
{
    return __atomic_load_n(&t->nd->inert, __ATOMIC_ACQUIRE) || sh_heartbeat_arm(t->heartbeat, t->hurry);
}

/* Readers that wait for bytes, and protocols that take them or datagrams, which is what happens most, get theirs from here; Python attends to the rest.
 * 1: somebody was told of something. */
static int tell(Pump *t, uint64_t *words, int n, uint64_t now)
{
    PyObject *type = NULL, *value = NULL, *trace = NULL;
    int left = 0, told = 0;

    for (int i = 0; i < n; i++) {
        uint32_t kind = words[i] >> 24 & 0xff, slot = words[i] & 0xffffff, bits = (uint32_t)(words[i] >> 32);
        FastPath *p = kind == SH_EV_SLOT && slot < t->slots ? t->ports[slot] : NULL;
        DatagramIn *box = kind == SH_EV_SLOT && slot < t->slots ? t->inboxes[slot] : NULL;
        PyObject *whose = box ? (PyObject *)box : (PyObject *)p;
        int r = 0;

        if (whose && bits && !(bits & UNUSUAL) && (box || p->can_write)) {
            Py_INCREF(whose);
            if (box)
                r = sh_datagram_in_drain(box);
            else if (p->protocol)
                r = sh_fast_path_deliver(p);
            else if (p->waiter && p->can_read)
                r = sh_fast_path_wake(p) < 0 ? -1 : 1;
            Py_DECREF(whose);
            told |= r > 0;
            if (r > 0)
                continue;
            if (r < 0 && !type) /* Ctrl-C, say. Raised when the others have been told of theirs: a loop may be run again to clean up */
                PyErr_Fetch(&type, &value, &trace);
            else
                PyErr_Clear();
        }
        words[left++] = words[i];
    }
    if (!t->closed && (n < 0 || left || t->unlocked || now >= t->nd->due_ns || owed(t))) {
        int r = attend(t, words, n < 0 ? n : left, now);
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

/* May this turn of the loop go on with the pump? Nothing else is to be run. */
static int is_alone(Pump *t, int owes) { return !owes && t->queue_visible && PyObject_Size(t->queue) == 0; }

/* The next pass: 1, and what it found; or 0, and whether the loop is to come again (or may sleep). */
static int next_pass(Pump *t, uint64_t *words, int *n, uint64_t now, int told, int *again)
{
    int owes = owed(t), alone = is_alone(t, owes), hot;

    *again = 1;
    *n = 0;
    if (told && !alone) /* who was told of something runs first: going to sleep can wait */
        return 0;
    hot = sh_stay_hot(t->nd, now, owes);
    if (!hot)
        *again = told || !fall_asleep(t);
    if (hot < 2 || (!alone && hot == 2))
        return 0;
    if (alone && (*n = sh_pump_more(t->nd, words, EVENTS, now, t->nd->spin_max_ns / 64 > GLANCE_NS ? t->nd->spin_max_ns / 64 : GLANCE_NS)))
        return 1;
    if (told) /* what it did may be for others, and the loop's to pass on: uvloop holds writes to sockets back until the turn ends */
        return 0;
    Py_BEGIN_ALLOW_THREADS
    if (alone)
        *n = sh_pump_more(t->nd, words, EVENTS, now, SPIN_NS);
    else
        sched_yield();
    Py_END_ALLOW_THREADS
    return *n != 0;
}

/* One turn of the loop: a pass, and more of them as long as there are news and nobody else has anything to do. */
static int pump(Pump *t)
{
    uint64_t words[EVENTS], now;
    int n, told, again;

    t->scheduled = 0;
    if (t->closed)
        return 0;
    now = sh_clock();
    if (t->polled) {
        t->polled--;
        if (sh_pumped_just_now(t->nd, now))
            return sh_begin_turn(t);
    }
    t->scheduled = t->pumping = 1; /* for all that is called from here a pump follows: this one */
    n = sh_pump(t->nd, words, EVENTS);
    for (;;) {
        told = tell(t, words, n, now);
        now = sh_clock();
        if (told < 0 || t->closed || !next_pass(t, words, &n, now, told, &again))
            break;
    }
    t->scheduled = t->pumping = 0;
    if (told < 0 && !t->closed) {
        PyObject *type, *value, *trace;

        PyErr_Fetch(&type, &value, &trace);
        if (sh_begin_turn(t) < 0)
            PyErr_Clear();
        PyErr_Restore(type, value, trace);
    }
    if (told < 0 || t->closed)
        return told < 0 ? -1 : 0;
    return again ? sh_begin_turn(t) : 0;
}

/* ---- the type ---- */

static PyObject *none_unless(int failed) { return failed < 0 ? NULL : Py_NewRef(Py_None); }

static PyObject *turn_begin(Pump *t, PyObject *unused) { (void)unused; return none_unless(sh_begin_turn(t)); }
static PyObject *turn_check(Pump *t, PyObject *unused) { (void)unused; return ask_owner(t, s_check, NULL, NULL); }
static PyObject *turn_stir(Pump *t, PyObject *unused) { (void)unused; return t->scheduled || t->closed ? Py_NewRef(Py_None) : ask_owner(t, s_pump_follows, NULL, NULL); }
static PyObject *turn_may_spin(Pump *t, PyObject *unused) { (void)unused; return PyBool_FromLong(sh_may_spin(t)); }
static PyObject *turn_will_run(Pump *t, PyObject *unused) { (void)unused; return none_unless(sh_will_run(t)); }
static PyObject *turn_runs(Pump *t, PyObject *unused) { (void)unused; return none_unless(sh_runs(t)); }
static PyObject *turn_pump(Pump *t, PyObject *unused) { (void)unused; return none_unless(pump(t)); }
static PyObject *turn_woken(Pump *t, PyObject *unused) { (void)unused; return none_unless(t->scheduled ? 0 : pump(t)); }

static PyObject *turn_wake(Pump *t, PyObject *unused)
{
    int news;

    (void)unused;
    if (t->closed)
        Py_RETURN_NONE;
    news = sh_heartbeat_heard(t->heartbeat);
    if (news || t->listens || t->hurry) {
        PyObject *number = PyLong_FromLong(news), *r = number ? ask_owner(t, s_heard, number, NULL) : NULL;
        Py_XDECREF(number);
        if (!r)
            return NULL;
        Py_DECREF(r);
    }
    return none_unless(t->scheduled ? 0 : pump(t));
}

/* What it has in C, and into memory[] what that lies in. */
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

/* Detached until it is attached. */
static PyObject *turn_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    Pump *t = (Pump *)type->tp_alloc(type, 0);

    (void)args;
    (void)kwargs;
    if (t)
        t->closed = 1;
    return (PyObject *)t;
}

/* Whoever shares an eventfd with us can make writing to it wait. The GIL is held by what is called here, and not by what cffi calls. */
static void *let_others_run(void)
{
    PyThreadState *mine = PyGILState_GetThisThreadState();

    return mine && mine == _PyThreadState_UncheckedGet() ? PyEval_SaveThread() : NULL;
}

static void go_on(void *mine) { PyEval_RestoreThread(mine); }

static int turn_init(Pump *t, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"owner", "engine", "heartbeat", "loop", "context", "ident", "queue", NULL};
    PyObject *owner, *engine, *heartbeat, *loop, *context, *queue;

    if (t->memory) {
        PyErr_SetString(PyExc_RuntimeError, "a node is made once");
        return -1;
    }
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOOOOkO", names, &owner, &engine, &heartbeat, &loop, &context, &t->ident, &queue)
        || !(t->memory = PyTuple_New(2)) || borrow(heartbeat, &t->heartbeat, t->memory, 0) < 0 || !(t->owed = PyObject_GetAttrString(engine, "owed"))
        || !(t->call_soon = PyObject_GetAttrString(loop, "call_soon"))
        || !(t->create_future = PyObject_GetAttrString(loop, "create_future"))
        || !(t->pump = PyObject_GetAttrString((PyObject *)t, "_pump"))
        || borrow(engine, &t->nd, t->memory, 1) < 0)
        return -1;
    t->owner = Py_NewRef(owner);
    t->context = Py_NewRef(context);
    t->queue_visible = queue != Py_None;
    t->queue = t->queue_visible ? Py_NewRef(queue) : Py_BuildValue("[O]", Py_None);
    t->slots = t->nd->g.slots;
    t->ports = PyMem_Calloc(t->slots, sizeof *t->ports);
    t->inboxes = PyMem_Calloc(t->slots, sizeof *t->inboxes);
    if (!t->queue || !t->ports || !t->inboxes || !PyTuple_Check(t->owed)) {
        PyErr_NoMemory();
        return -1;
    }
    t->nd->let_go = let_others_run;
    t->nd->take_back = go_on;
    t->closed = 0;
    return 0;
}

static int turn_traverse(Pump *t, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(t));
    Py_VISIT(t->memory);
    Py_VISIT(t->owner);
    Py_VISIT(t->owed);
    Py_VISIT(t->queue);
    Py_VISIT(t->call_soon);
    Py_VISIT(t->create_future);
    Py_VISIT(t->context);
    Py_VISIT(t->pump);
    return 0;
}

static int turn_clear(Pump *t)
{
    t->closed = 1; /* what is called from here on finds nothing to work with */
    Py_CLEAR(t->owner);
    Py_CLEAR(t->owed);
    Py_CLEAR(t->queue);
    Py_CLEAR(t->call_soon);
    Py_CLEAR(t->create_future);
    Py_CLEAR(t->context);
    Py_CLEAR(t->pump);
    return 0;
}

static void turn_dealloc(Pump *t)
{
    PyTypeObject *type = Py_TYPE(t);

    PyObject_GC_UnTrack(t);
    turn_clear(t);
    Py_CLEAR(t->memory); /* not before: ports, inboxes and awaitables that end with us, or later, still look at it */
    PyMem_Free(t->ports);
    PyMem_Free(t->inboxes);
    type->tp_free(t);
    Py_DECREF(type);
}

#define METHOD(function, text) (PyCFunction)(void (*)(void))(function), METH_NOARGS, text

static PyMethodDef methods[] = {
    {"check", METHOD(turn_check, "Raises when the node may not be used here (any more).")},
    {"begin_turn", METHOD(turn_begin, "Give this turn of the loop a budget of its own, and have a pass follow it.")},
    {"stir", METHOD(turn_stir, "Have a pass follow what the engine has done.")},
    {"may_spin", METHOD(turn_may_spin, "Is nothing else to be run by this loop, as far as can be known?")},
    {"will_run", METHOD(turn_will_run, "Note that the pump woke a task.")},
    {"runs", METHOD(turn_runs, "Note that the task runs.")},
    {"woken", METHOD(turn_woken, "Make a pass, as a doorbell came.")},
    {"_wake", METHOD(turn_wake, "Make a pass, as the heartbeat asks for one.")},
    {"_pump", METHOD(turn_pump, "Make a pass, and more of them while there are news and nothing else is to be run.")},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef members[] = {
    {"scheduled", T_BOOL, offsetof(Pump, scheduled), 0, "the pump will run in the next turn of the loop"},
    {"closed", T_BOOL, offsetof(Pump, closed), 0, "detached"},
    {"hurry", T_BOOL, offsetof(Pump, hurry), 0, "the heartbeat's next beat is waited for"},
    {"listens", T_BOOL, offsetof(Pump, listens), 0, "there is more than the heartbeat to hear"},
    {"unlocked", T_ULONGLONG, offsetof(Pump, unlocked), 0, "mask of sections whose lock fell"},
    {"polled", T_INT, offsetof(Pump, polled), 0, "passes that may be left out, soon after the last one"},
    {"ident", T_ULONG, offsetof(Pump, ident), READONLY, "of the thread that it belongs to"},
    {"context", T_OBJECT_EX, offsetof(Pump, context), READONLY, "in which it is called back"},
    {"queue", T_OBJECT_EX, offsetof(Pump, queue), READONLY, "more than one in it: do not spin"},
    {NULL, 0, 0, 0, NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_doc, "Passes over what peers said, as callbacks of a loop. Pump(owner, engine, heartbeat, loop, context, ident, queue)."},
    {Py_tp_new, turn_new},
    {Py_tp_init, turn_init},
    {Py_tp_traverse, turn_traverse},
    {Py_tp_clear, turn_clear},
    {Py_tp_dealloc, turn_dealloc},
    {Py_tp_methods, methods},
    {Py_tp_members, members},
    {0, NULL},
};

static PyType_Spec spec = {
    .name = "shmsock.native._extension.Pump",
    .basicsize = sizeof(Pump),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
    .slots = slots,
};

int sh_pump_ready(PyObject *module)
{
    s_check = PyUnicode_InternFromString("check");
    s_heard = PyUnicode_InternFromString("heard");
    s_attend = PyUnicode_InternFromString("attend");
    s_pump_follows = PyUnicode_InternFromString("pump_follows");
    sh_pump_type = (PyTypeObject *)PyType_FromSpec(&spec);
    return s_check && s_heard && s_attend && s_pump_follows && sh_pump_type
        ? PyModule_AddObjectRef(module, "Pump", (PyObject *)sh_pump_type) : -1;
}
