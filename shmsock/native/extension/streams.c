/* streams.c - the methods of ShmStreamReader, ShmStreamWriter and their protocol that stand for coroutine functions. */
#include "extension.h"

const char *const sh_op_names[SH_OP_KINDS] = {"read", "readexactly", "readline", "drain", "_drain_helper"};

static PyObject *method_call(Method *method, PyObject *const *args, size_t how_many, PyObject *keywords)
{
    Py_ssize_t named = keywords ? PyTuple_GET_SIZE(keywords) : 0, count = PyVectorcall_NARGS(how_many) + named, n = 1;
    PyObject *number = count == 2 ? args[1] : NULL;

    if (count - named < 1 || count > 2 || (named && PyUnicode_CompareWithASCIIString(PyTuple_GET_ITEM(keywords, 0), "n"))
        || (method->kind == SH_OP_EXACTLY ? !number : number && method->kind != SH_OP_READ))
        return PyErr_Format(PyExc_TypeError, method->kind <= SH_OP_EXACTLY ? "%s() takes one argument, n" : "%s() takes no arguments", sh_op_names[method->kind]);
    if (method->kind <= SH_OP_EXACTLY) {
        n = -1;
        if (number && PyLong_CheckExact(number) && (n = PyLong_AsSsize_t(number)) < 0)
            PyErr_Clear();
        if (method->kind == SH_OP_EXACTLY && n > (Py_ssize_t)SH_COPY_MAX)
            n = -1;
    }
    return sh_op_new(method, args[0], n, number);
}

static PyObject *method_bind(PyObject *method, PyObject *object, PyObject *type)
{
    (void)type;
    return object && object != Py_None ? PyMethod_New(method, object) : Py_NewRef(method);
}

static int method_traverse(Method *method, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(method));
    Py_VISIT(method->module);
    Py_VISIT(method->function);
    return 0;
}

static int method_clear(Method *method)
{
    Py_CLEAR(method->function);
    return 0; /* the module stays, for awaitables that end after this */
}

static void method_dealloc(Method *method)
{
    PyTypeObject *type = Py_TYPE(method);

    PyObject_GC_UnTrack(method);
    method_clear(method);
    Py_CLEAR(method->module);
    type->tp_free(method);
    Py_DECREF(type);
}

static PyObject *of_function(Method *method, void *name) { return PyObject_GetAttrString(method->function, name); }

/* method(name, coroutine function) -> a method that stands for the coroutine function, and falls back to it. */
PyObject *sh_method(PyObject *module, PyObject *args)
{
    State *state = PyModule_GetState(module);
    PyObject *function;
    const char *name;
    Method *method;
    int kind = 0;

    if (!PyArg_ParseTuple(args, "sO", &name, &function))
        return NULL;
    while (kind < SH_OP_KINDS && strcmp(name, sh_op_names[kind]))
        kind++;
    if (kind == SH_OP_KINDS)
        return PyErr_Format(PyExc_ValueError, "no %s() is known here", name);
    if (!(method = PyObject_GC_New(Method, state->method)))
        return NULL;
    method->call = (vectorcallfunc)(void (*)(void))method_call;
    method->module = Py_NewRef(module);
    method->state = state;
    method->function = Py_NewRef(function);
    method->kind = (enum sh_op_kind)kind;
    PyObject_GC_Track(method);
    return (PyObject *)method;
}

static PyMemberDef members[] = {
    {"__vectorcalloffset__", T_PYSSIZET, offsetof(Method, call), READONLY, NULL},
    {"__wrapped__", T_OBJECT_EX, offsetof(Method, function), READONLY, "the coroutine function"},
    {NULL, 0, 0, 0, NULL},
};

static PyGetSetDef getters[] = {
    {"__name__", (getter)of_function, NULL, NULL, "__name__"},
    {"__qualname__", (getter)of_function, NULL, NULL, "__qualname__"},
    {"__doc__", (getter)of_function, NULL, NULL, "__doc__"},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_call, PyVectorcall_Call},
    {Py_tp_descr_get, method_bind},
    {Py_tp_traverse, method_traverse},
    {Py_tp_clear, method_clear},
    {Py_tp_dealloc, method_dealloc},
    {Py_tp_members, members},
    {Py_tp_getset, getters},
    {0, NULL},
};

PyType_Spec sh_method_spec = {
    .name = "shmsock.native._extension.Method",
    .basicsize = sizeof(Method),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_HAVE_VECTORCALL | Py_TPFLAGS_METHOD_DESCRIPTOR | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = slots,
};
