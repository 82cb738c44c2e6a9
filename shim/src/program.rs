//! Has python run a job's program, from C, so that no frame of ours lies below the program's own.
//!
//! Python calls [`run`] in the place of `sys.excepthook`, when the prescript has ended by an exception: its frames
//! are gone, and python's main function is about to exit with code 1. So the program runs where python's own
//! `PyRun_SimpleFile` would run it. That one is not taken, because it ends the process itself when the program
//! raises `SystemExit`, and the prescript has to know of that before.
//!
//! Who waits for whom: the python thread that came here holds the interpreter's lock all the time, and there may be
//! other threads of the operator's imports or of a preload, which wait for it as for any other code in C.

use core::ffi::{c_char, c_int, c_void};
use core::ptr::null_mut;

use std::sync::OnceLock;

/// An object of python's.
#[repr(C)]
pub struct PyObject {
    _opaque: [u8; 0],
}

type Object = *mut PyObject;

/// `Py_file_input`: a whole file.
const FILE_INPUT: c_int = 257;

/// Levels of the interpreter's recursion that calling the hook has taken, up to Python 3.11: a call of the partial
/// object, and one of the function in it. Newer versions count calls in C apart from those of python's functions.
const LEVELS: usize = 2;

macro_rules! python {
    ($($name:ident: fn($($argument:ty),* $(; $rest:tt)?) -> $result:ty,)*) => {
        /// What is called in python.
        #[expect(non_snake_case, reason = "python's own names")]
        struct Python {
            $($name: unsafe extern "C" fn($($argument),* $(, $rest)?) -> $result,)*
        }

        impl Python {
            /// None if this process is no python that has them all.
            fn find() -> Option<Self> {
                Some(Self {
                    $($name: {
                        let name = concat!(stringify!($name), "\0");
                        // SAFETY: the name ends in NUL; looking it up runs no code of python's.
                        let found = unsafe { libc::dlsym(libc::RTLD_DEFAULT, name.as_ptr().cast::<c_char>()) };
                        if found.is_null() {
                            return None;
                        }
                        // SAFETY: it is the function of that name in python's stable interface, whose type this is.
                        unsafe {
                            core::mem::transmute::<
                                *mut c_void,
                                unsafe extern "C" fn($($argument),* $(, $rest)?) -> $result,
                            >(found)
                        }
                    },)*
                })
            }
        }
    };
}

python! {
    PyRun_FileExFlags: fn(*mut libc::FILE, *const c_char, c_int, Object, Object, c_int, *mut c_void) -> Object,
    PyObject_CallFunctionObjArgs: fn(Object; ...) -> Object,
    PyErr_Fetch: fn(*mut Object, *mut Object, *mut Object) -> (),
    PyErr_Restore: fn(Object, Object, Object) -> (),
    PyErr_Print: fn() -> (),
    PyErr_Clear: fn() -> (),
    Py_DecRef: fn(Object) -> (),
    Py_EnterRecursiveCall: fn(*const c_char) -> c_int,
    Py_LeaveRecursiveCall: fn() -> (),
    PyImport_AddModule: fn(*const c_char) -> Object,
    PyModule_GetDict: fn(Object) -> Object,
    Py_IncRef: fn(Object) -> (),
    Py_Exit: fn(c_int) -> (),
    PyArg_ParseTuple: fn(Object, *const c_char; ...) -> c_int,
}

static PYTHON: OnceLock<Option<Python>> = OnceLock::new();

/// Looks for what [`run`] calls. A zygote does it for all that it makes.
pub(crate) fn find_python() -> bool {
    PYTHON.get_or_init(Python::find).is_some()
}

impl Python {
    /// Lets go of a result, or of the exception that there is in its place.
    unsafe fn done(&self, result: Object) {
        // SAFETY: the interpreter's lock is held, and the result is ours, as the caller says.
        unsafe {
            if result.is_null() {
                (self.PyErr_Clear)();
            } else {
                (self.Py_DecRef)(result);
            }
        }
    }
}

/// Runs a program as `__main__`. `begin` says which: it returns the descriptor of its file, which is read from its beginning
/// and closed, and the path that names it. `ended` is called when the program has ended: without arguments if it came to its end, else with the
/// type and the value of what it raised. Returns only if python is to exit as after any uncaught exception.
///
/// # Safety
/// The interpreter's lock must be held, no exception be set, and both objects be alive and callable.
pub(crate) unsafe fn run(begin: Object, ended: Object) {
    let Some(python) = PYTHON.get().and_then(Option::as_ref) else { return };
    let end: Object = null_mut();
    // SAFETY: the lock is held, and what is called takes these arguments; lists of objects end in NULL. The path lives as
    // long as the tuple that it came in, which is never let go of. The stream is closed by python. What is fetched is
    // restored, so nothing is let go of twice. Leaving levels of recursion that the interpreter has entered to come here,
    // and entering them again, is no more than counting.
    unsafe {
        let (mut file, mut path) = (-1, core::ptr::null());
        let begun = (python.PyObject_CallFunctionObjArgs)(begin, end);
        if begun.is_null()
            || (python.PyArg_ParseTuple)(begun, c"is".as_ptr(), &raw mut file, &raw mut path) == 0
        {
            // Ends the process if it is SystemExit.
            (python.PyErr_Print)();
            return;
        }
        libc::lseek(file, 0, libc::SEEK_SET);
        let stream = libc::fdopen(file, c"rb".as_ptr());
        if stream.is_null() {
            libc::_exit(125);
        }
        // Held for so long as python itself holds it: at the end the module must not be alive because of us.
        let main = (python.PyImport_AddModule)(c"__main__".as_ptr());
        if main.is_null() {
            libc::_exit(125);
        }
        (python.Py_IncRef)(main);
        let globals = (python.PyModule_GetDict)(main);
        for _ in 0..LEVELS {
            (python.Py_LeaveRecursiveCall)();
        }
        let result = (python.PyRun_FileExFlags)(stream, path, FILE_INPUT, globals, globals, 1, null_mut());
        (python.Py_DecRef)(main);
        if !result.is_null() {
            (python.Py_DecRef)(result);
            python.done((python.PyObject_CallFunctionObjArgs)(ended, end));
            (python.Py_Exit)(0);
        }
        let (mut kind, mut value, mut trace) = (end, end, end);
        (python.PyErr_Fetch)(&raw mut kind, &raw mut value, &raw mut trace);
        // A value that is not there is the end of the list as well.
        python.done((python.PyObject_CallFunctionObjArgs)(ended, kind, value, end));
        (python.PyErr_Restore)(kind, value, trace);
        // Ends the process if it is SystemExit.
        (python.PyErr_Print)();
        for _ in 0..LEVELS {
            let _ = (python.Py_EnterRecursiveCall)(c"".as_ptr());
        }
    }
}
