/* module.c - the extension's module, in the shared object of the core: both are the same code over the same nodes. */
#include "extension.h"

static int add_type(PyObject *module, PyType_Spec *spec, PyTypeObject **type)
{
    *type = (PyTypeObject *)PyType_FromModuleAndSpec(module, spec, NULL);
    return *type ? PyModule_AddType(module, *type) : -1;
}

static int module_exec(PyObject *module)
{
#define TEXT(name) #name,
    static const char *const texts[] = {SH_NAMES(TEXT)};
#undef TEXT
    State *state = PyModule_GetState(module);
    PyObject **names = (PyObject **)&state->names;

    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++)
        if (!(names[i] = PyUnicode_InternFromString(texts[i])))
            return -1;
    return !(state->with_context = Py_BuildValue("(s)", "context"))
            || add_type(module, &sh_pump_spec, &state->pump) < 0 || add_type(module, &sh_fast_path_spec, &state->fast_path) < 0
            || add_type(module, &sh_datagram_in_spec, &state->datagram_in) < 0 || add_type(module, &sh_datagram_out_spec, &state->datagram_out) < 0
            || add_type(module, &sh_op_spec, &state->op) < 0 || add_type(module, &sh_method_spec, &state->method) < 0
        ? -1 : 0;
}

static int module_traverse(PyObject *module, visitproc visit, void *arg)
{
    State *state = PyModule_GetState(module);

    for (PyTypeObject **type = &state->pump; state && type <= &state->method; type++)
        Py_VISIT(*type);
    return 0;
}

/* Cycles end where the types let go of the module. Until the last object that has one of them has ended, all is needed. */
static void module_free(void *module)
{
    State *state = PyModule_GetState(module);

    if (!state)
        return;
    while (state->spares)
        PyObject_GC_Del(state->spare[--state->spares]);
    for (PyObject **name = (PyObject **)&state->names; name < (PyObject **)(&state->names + 1); name++)
        Py_CLEAR(*name);
    Py_CLEAR(state->with_context);
    for (PyTypeObject **type = &state->pump; type <= &state->method; type++)
        Py_CLEAR(*type);
}

static PyMethodDef methods[] = {
    {"method", sh_method, METH_VARARGS, "method(name, coroutine function)"},
    {NULL, NULL, 0, NULL},
};

static PyModuleDef_Slot slots[] = {
    {Py_mod_exec, module_exec},
#ifdef Py_mod_multiple_interpreters
    {Py_mod_multiple_interpreters, Py_MOD_PER_INTERPRETER_GIL_SUPPORTED},
#endif
#ifdef Py_mod_gil
    {Py_mod_gil, Py_MOD_GIL_NOT_USED},
#endif
    {0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "shmsock.native._extension",
    .m_doc = "The hot calls, in C.",
    .m_size = sizeof(State),
    .m_methods = methods,
    .m_slots = slots,
    .m_traverse = module_traverse,
    .m_free = module_free,
};

PyMODINIT_FUNC PyInit__extension(void) { return PyModuleDef_Init(&definition); }
