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

typedef struct {
    PyObject_HEAD
    sh_node *nd;
    sh_heartbeat *heartbeat;
    PyObject *memory; /* tuple of the objects in which these two lie: held as long as this one may use them */
    PyObject *owed;   /* tuple of containers: while one of them is not empty, the engine is owed a pass */
    PyObject *owner;  /* the driver, whose check(), heard(), attend() and pump_follows() are called */
    PyObject *queue;  /* what the loop runs next; or a list with an item for each task that the pump woke */
    PyObject *call_soon, *create_future, *context, *pass;
    FastPath **fast_paths;    /* by slot: connections with a reader in direct mode, or with a protocol that is given bytes; borrowed */
    DatagramIn **datagram_ins;  /* by slot: links that bring datagrams; borrowed */
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

extern const char *const sh_op_names[SH_OP_KINDS];
extern PyObject *sh_slow[SH_OP_KINDS]; /* the coroutine functions */
extern PyTypeObject *sh_pump_type, *sh_fast_path_type, *sh_op_type;

int sh_turn_ready(void);
int sh_pump_ready(PyObject *module);
int sh_fast_path_ready(PyObject *module);
int sh_op_ready(PyObject *module);
int sh_streams_ready(PyObject *module);
int sh_datagrams_ready(PyObject *module);

PyObject *sh_op_new(PyObject *stream, enum sh_op_kind kind, Py_ssize_t n, PyObject *arg);

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
