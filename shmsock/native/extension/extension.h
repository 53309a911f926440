/* extension.h - what runs at each message, as types of CPython over the core: they translate the core's few answers, and leave everything unusual
 * to Python (shmsock/aio, shmsock/anyio). Each file uses only those before it: turn, fast_path, then op and datagrams, then streams and pump. */
#ifndef SHMSOCK_EXTENSION_H
#define SHMSOCK_EXTENSION_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <structmember.h>

#include "../ring.h"

#define SH_LARGE (1u << 17) /* bytes from which on malloc takes a block from the kernel, at first */
#define KEEP_GIL_MAX (1u << 15) /* bytes that are copied without letting other threads run */

typedef struct fast_path FastPath;
typedef struct datagram_in DatagramIn;

/* Names that are asked for. Interned: CPython's cache of lookups goes by the address of a name, and keeps each name that it was asked for. */
#define SH_NAMES(X) \
    X(_buffer) X(_eof) X(_fast_path) X(_limit) X(_on_ready) X(_raised) X(_send_slowly) X(_waiter) X(_write_rest) X(accepted) X(addr) X(attend) \
    X(buffer_updated) X(check) X(close) X(data) X(data_received) X(datagram_received) X(done) X(get_buffer) X(handler) X(heard) X(paused) \
    X(pump_follows) X(raised) X(set_result) X(sink) X(sink_refused) X(slot) X(throw)

#define SH_SPARE 8

/* All that lasts, of one interpreter: the module's state. What uses it holds a reference to the module: a type that the collector clears has none. */
typedef struct {
#define SH_FIELD(name) PyObject *name;
    struct { SH_NAMES(SH_FIELD) } names;
#undef SH_FIELD
    PyObject *with_context; /* ("context",) */
    PyTypeObject *pump, *fast_path, *datagram_in, *datagram_out, *op, *method;
    PyObject *spare[SH_SPARE]; /* memory of Ops that are over */
    int spares;
} State;

typedef struct {
    PyObject_HEAD
    sh_node *nd;
    sh_heartbeat *heartbeat;
    PyObject *memory; /* tuple of the objects in which these two lie: held as long as this one may use them */
    PyObject *owed;   /* tuple of containers: while one of them is not empty, the engine is owed a pass */
    PyObject *owner;  /* the driver, whose check(), heard(), attend() and pump_follows() are called */
    PyObject *queue;  /* what the loop runs next; or a list with an item for each task that the pump woke */
    PyObject *call_soon, *create_future, *context, *pass;
    PyObject *module; /* holds the state */
    State *state;
    FastPath **fast_paths;    /* by slot: connections with a reader in direct mode, or with a protocol that is given bytes */
    DatagramIn **datagram_ins;  /* by slot: links that bring datagrams */
    uint32_t slots;
    unsigned long ident;
    unsigned long long unlocked;
    int polled, moot;
    char scheduled, closed, hurry, listens, queue_visible, pumping, keeps;
} Pump;

struct fast_path {
    PyObject_HEAD
    Pump *pump;
    PyObject *transport; /* weak: once the transport is gone, writes are dropped */
    PyObject *reader; /* weak: the one in direct mode, which is or was used; NULL: there was none */
    PyObject *buffer, *waiter;
    PyObject *protocol, *context; /* set while the pump hands bytes straight to the protocol */
    sh_ep *ep;
    uint32_t slot;
    Py_ssize_t limit; /* of a line */
    char can_write, can_read, wake_pending;
    char direct; /* the reader may take bytes, unless can_read says otherwise for a while */
    char buffered; /* the protocol has a buffer of its own */
    int sink; /* the socket that takes its bytes in place of the protocol; -1: none */
    unsigned long long poured; /* bytes that it took */
};

struct datagram_in {
    PyObject_HEAD
    Pump *pump;
    PyObject *flows; /* source << 16 | destination port -> (endpoint, address of the source) */
    sh_ep *ep;
    uint32_t slot;
    char open;
};

/* Takes bytes out of a ring as a bytes object. */
typedef struct {
    sh_taker taker;
    PyObject *data;
    Py_ssize_t limit; /* of a line */
} Taken;

#define SH_TAKEN ((Taken){{sh_take_bytes}, NULL, 0})
int sh_take_bytes(sh_taker *to, const sh_ep *ep, uint32_t at, uint32_t n);
int sh_take_line(sh_taker *to, const sh_ep *ep, uint32_t at, uint32_t n);
PyObject *sh_taken(Taken *taken, int64_t status);

enum sh_op_kind { SH_OP_READ, SH_OP_EXACTLY, SH_OP_LINE, SH_OP_DRAIN, SH_OP_HELPER, SH_OP_KINDS };

/* A method of a class of streams that stands for a coroutine function. */
typedef struct {
    PyObject_HEAD
    vectorcallfunc call;
    PyObject *module; /* holds the state */
    State *state;
    PyObject *function;
    enum sh_op_kind kind;
} Method;

extern const char *const sh_op_names[SH_OP_KINDS];
extern PyType_Spec sh_pump_spec, sh_fast_path_spec, sh_datagram_in_spec, sh_datagram_out_spec, sh_op_spec, sh_method_spec;

PyObject *sh_op_new(Method *method, PyObject *stream, Py_ssize_t n, PyObject *arg);
PyObject *sh_method(PyObject *module, PyObject *args);

int sh_call_soon(Pump *pump, PyObject *callback);
int sh_begin_turn(Pump *pump);
int sh_may_spin(Pump *pump);
int sh_will_run(Pump *pump);
int sh_runs(Pump *pump);
void sh_poll_again(Pump *pump, uint32_t slot);
long sh_slot_of(PyObject *conn, Pump *pump);
int sh_hand_over(PyObject *context, PyObject *protocol, PyObject *method, PyObject *data, PyObject *source, PyObject **error);
int sh_tell_of(PyObject *whom, PyObject *method, PyObject *error, PyObject *about);
void sh_keep_memory(Pump *pump);
int sh_fast_path_wake(FastPath *p);
int sh_fast_path_deliver(FastPath *p);
int sh_datagram_in_drain(DatagramIn *in);
int sh_drained(FastPath *p);

/* Have a pass follow, unless one is scheduled; called by all that uses the core. */
static inline int sh_schedule_pump(Pump *pump) { return pump->scheduled ? 0 : sh_begin_turn(pump); }

#endif
