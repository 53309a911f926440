/* module.c - the extension's module, in the shared object of the core: both are the same code over the same nodes. */
#include "extension.h"

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, .m_name = "shmsock.native._extension", .m_doc = "The hot calls, in C.", .m_size = 0,
};
static PyObject *made;

PyMODINIT_FUNC PyInit__extension(void)
{
    PyObject *module;

    /* Types and coroutine functions are one interpreter's. Another interpreter does the same in Python: else objects that ended with it would be called here. */
    if (PyInterpreterState_Get() != PyInterpreterState_Main()) {
        PyErr_SetString(PyExc_ImportError, "the extension serves the main interpreter alone");
        return NULL;
    }
    if (made)
        return Py_NewRef(made);
    module = PyModule_Create(&definition);
    if (module && (sh_turn_ready() < 0 || sh_pump_ready(module) < 0 || sh_fast_path_ready(module) < 0 || sh_op_ready(module) < 0 || sh_streams_ready(module) < 0 || sh_datagrams_ready(module) < 0))
        Py_CLEAR(module);
    made = Py_XNewRef(module);
    return module;
}
