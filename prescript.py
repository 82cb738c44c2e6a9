"""What runs in every python process before a job's program: a template that the worker fills in.

The way of a process: `main` below. Up to the lockdown only the operator's code and a trusted publisher's preload run, behind
the outer wall. The job's code is in here from the start, encoded; the key to it arrives only after the worker has seen the
filter. Then the program is decoded, written to a file of the job's own, and python runs that file.

- Imports are few and come first: each one costs every job its time, and none may be found among the job's files.
- Nothing of this is in the job's `__main__`: the worker runs it with globals of its own.
- A comment that is nothing but `#name` or `/name` in double braces begins or ends a section. The worker leaves out whole
  sections: a cold process is not given what only a zygote needs. What stands above `start` is the same for all, so it is
  given to them compiled.
- Rendered for uid 0, which no job has, this is a zygote: its preload holds the operator's imports, and from then on it makes
  processes that go on as jobs. Their code comes with the key.
"""

import os
import sys

KNOWN = frozenset(sys.modules)

import _functools  # noqa: E402
import binascii  # noqa: E402

# {{#zygote}}
# ctypes may open a file for good. In a zygote, its number is none of those that a job's process begins with.
SPARE = [os.dup(0) for number in range(3, 7)]
# {{/zygote}}
import ctypes  # noqa: E402

# {{#zygote}}
for number in SPARE:
    os.close(number)
# {{/zygote}}

SHIM = "/run/sandpiper/shim.so"
WORK = "/work"
# Descriptors that the worker gives to a process: the one that the assignment comes through, and the job's standard input.
ASSIGNMENT, STDIN = 3, 4
# The exit code for what is the worker's own trouble. It goes by what it sees, not by this.
OURS = 125


def main(uid, gid, enable_network, preload, payload):
    """What comes before the lockdown. Ends where python takes over, which it does when this script ends by an exception."""
    if uid == 0:
        set_up_zygote(binascii.a2b_base64(preload))
    else:
        PREPARED["shim"] = shim = ctypes.PyDLL(SHIM)
        find_python(shim)
        buffer_lines()
        renew_main()
        if preload:
            run_preload(binascii.a2b_base64(preload))
        PREPARED["ours"] = imported()
    hand_over(lambda: prepare(uid, gid, enable_network, payload))


def prepare(uid, gid, enable_network, payload):
    """From there to the program's first line. Returns the program's file, open, and its path."""
    if uid == 0:
        make_children()
        if PREPARED["shared"]:
            renew()
        uid, gid = os.getuid(), os.getgid()
    if PREPARED["shim"].lockdown(uid, gid, enable_network) != 0:
        os._exit(OURS)

    fields = receive()
    if fields is None:
        os._exit(OURS)  # the worker went away
    key, code, name, arguments, environment = fields
    os.dup2(STDIN, 0)
    os.close(STDIN)
    if sys.stdin is not PREPARED.get("stdin"):
        open_stdin()
    os.chdir(WORK)
    sys.path.insert(0, WORK)
    if environment:
        set_variables(environment)
    make_way(PREPARED["ours"])
    path = f"{WORK}/{name}"
    if path != PREPARED.get("path"):
        describe(path)
    if arguments:
        sys.argv[1:] = map(os.fsdecode, arguments)
    source = decode(binascii.a2b_base64(code or payload), binascii.a2b_base64(key))
    file = write_program(path, source)
    if sys.version_info < (3, 12) and b"\0" in source:
        refuse_nul(path, source)
    return file, path


# --- 1. What a job's process is given ------------------------------------------------------------------------------


# What a zygote has made ready for its children; a cold process makes it when it needs it.
PREPARED = {}


def receive():
    """The assignment: key, code, name of the program's file, number of arguments, arguments, variables. Each ends in NUL."""
    parts = []
    while True:
        part = os.read(ASSIGNMENT, 1 << 16)
        if not part:
            break
        parts.append(part)
    os.close(ASSIGNMENT)
    return take_apart(b"".join(parts))


def take_apart(assignment):
    fields = assignment.split(b"\0")
    if len(fields) < 5:
        return None
    key, code, name, count = fields[:4]
    end = 4 + int(count)
    return key, code, name.decode(), fields[4:end], fields[end:-1]


def decode(code, key):
    # As one big integer: a loop over bytes takes twenty times as long.
    size = len(code)
    pad = (key * (size // len(key) + 1))[:size]
    return (int.from_bytes(code, "little") ^ int.from_bytes(pad, "little")).to_bytes(size, "little")


def set_variables(environment):
    for variable in environment:
        name, _, value = variable.partition(b"=")
        os.environb[name] = value
        if name == b"TZ":
            import time

            time.tzset()
        elif name.startswith(b"PYTHON") and value:
            apply_variable(name.decode(), os.fsdecode(value))


def apply_variable(name, value):
    """Does what python itself would have done with this variable at its start. The worker refuses those that come too late."""
    if name == "PYTHONPATH":
        sys.path[1:1] = [os.path.join(WORK, entry) for entry in value.split(os.pathsep)]
    elif name == "PYTHONSAFEPATH" and sys.version_info >= (3, 11):
        sys.path.remove(WORK)
    elif name == "PYTHONWARNINGS":
        sys.warnoptions[:] = value.split(",")
        known = sys.modules.get("warnings")
        import warnings

        if known:
            warnings._processoptions(sys.warnoptions)
    elif name == "PYTHONIOENCODING":
        set_encoding(*value.split(":", 1))
    elif name == "PYTHONUNBUFFERED":
        import io

        old = sys.stdout
        raw = io.FileIO(1, "w", closefd=False)
        raw.name = old.name
        sys.stdout = sys.__stdout__ = io.TextIOWrapper(raw, old.encoding, old.errors, write_through=True)
        sys.stdout.mode = "w"
    elif name == "PYTHONDONTWRITEBYTECODE":
        sys.dont_write_bytecode = True
    elif name == "PYTHONPYCACHEPREFIX":
        sys.pycache_prefix = value
    elif name == "PYTHONINTMAXSTRDIGITS" and hasattr(sys, "set_int_max_str_digits"):
        sys.set_int_max_str_digits(int(value))
    elif name == "PYTHONFAULTHANDLER":
        import faulthandler

        faulthandler.enable()
    elif name == "PYTHONTRACEMALLOC":
        import tracemalloc

        if int(value):
            tracemalloc.start(int(value))
    elif name == "PYTHONBREAKPOINT":
        sys.breakpointhook = break_at


def set_encoding(encoding, errors=None):
    try:
        for stream in (sys.stdin, sys.stdout):
            stream.reconfigure(encoding=encoding or stream.encoding, errors=errors or "strict")
        sys.stderr.reconfigure(encoding=encoding or sys.stderr.encoding, errors="backslashreplace")
    except LookupError as error:
        sys.stderr.write(f"env.PYTHONIOENCODING: {error}\n")
        sys.exit(1)


def break_at(*arguments, **options):
    module, _, name = os.environ.get("PYTHONBREAKPOINT", "").rpartition(".")
    if name == "0" and not module:
        return None
    if not name:
        module, name = "pdb", "set_trace"
    try:
        found = getattr(__import__(module or "builtins", fromlist=[name]), name)
    except (ImportError, AttributeError, ValueError):
        import warnings

        said = f'Ignoring unimportable $PYTHONBREAKPOINT: "{os.environ["PYTHONBREAKPOINT"]}"'
        warnings.warn(said, RuntimeWarning, stacklevel=2)
        return None
    return found(*arguments, **options)


def open_stdin():
    # Python has read this script from there.
    stdin = open(0, encoding=sys.stdin.encoding, errors=sys.stdin.errors, closefd=False)
    stdin.buffer.raw.name = "<stdin>"
    sys.stdin = sys.__stdin__ = stdin


def buffer_lines():
    # As on a terminal: what was printed is out when something ends the job. Standard error is so by itself.
    for stream in (sys.__stdout__, sys.stdout):
        if hasattr(stream, "reconfigure") and not stream.line_buffering:
            stream.reconfigure(line_buffering=True)


def renew_main():
    # Python is still in the first one, and would hold what a program leaves in there. When it has printed an error it looks
    # into its dictionary once more, without holding it: so that one stays for good.
    module = type(sys)("__main__")
    first = sys.modules["__main__"].__dict__
    PREPARED["hold"](ctypes.py_object(first))
    for name in ("__doc__", "__package__", "__spec__", "__annotations__", "__builtins__"):
        if name in first:
            module.__dict__[name] = first[name]
    sys.modules["__main__"] = module


def imported():
    # What has been imported since the start, by the first part of its name.
    found = {}
    for module in sys.modules.keys() - KNOWN:
        found.setdefault(module.partition(".")[0], []).append(module)
    return found


def make_way(ours):
    # A job's file wins over a module that only we needed, or the operator's imports.
    for file in os.listdir(WORK):
        for module in ours.get(file.partition(".")[0], ()):
            sys.modules.pop(module, None)
    if sys.version_info >= (3, 14):
        start_by_fork()


def run_preload(source):
    try:
        exec(compile(source, "<preload>", "exec", dont_inherit=True), sys.modules["__main__"].__dict__)
    except SystemExit:
        raise
    except BaseException as error:
        trace = error.__traceback__.tb_next  # begins with the preload's own frame
        sys.excepthook(type(error), error.with_traceback(trace), trace)
        sys.exit(1)


class ForkFinder:
    """Makes fork the default of multiprocessing once it is imported.

    Since 3.14 processes come from a server over a Unix socket unless the program says otherwise, and a job has neither such
    sockets nor programs. No setting says it before the import, and importing it takes a cold start half as long again.
    """

    name = "multiprocessing.context"

    @classmethod
    def find_spec(cls, fullname, path=None, target=None):
        if fullname != cls.name:
            return None
        sys.meta_path.remove(cls)
        for finder in sys.meta_path:
            spec = finder.find_spec(fullname, path, target)
            if spec:
                break
        else:
            return None
        if spec.origin == os.path.join(os.path.dirname(os.__file__), *fullname.split(".")) + ".py":
            execute = spec.loader.exec_module

            def exec_module(module):
                execute(module)
                cls.change(module)

            spec.loader.exec_module = exec_module
        return spec  # a job's own is left as it is

    @staticmethod
    def change(module):
        module._default_context._default_context = module._concrete_contexts["fork"]


def start_by_fork():
    if ForkFinder.name in sys.modules:
        ForkFinder.change(sys.modules[ForkFinder.name])
    elif ForkFinder not in sys.meta_path:
        sys.meta_path.insert(0, ForkFinder)


# --- 2. How the program starts and ends ----------------------------------------------------------------------------
#
# Python is to run the program's file as if it had been given on its command line: with no frame of ours below the
# program's own, no name of ours in its tracebacks, and its own way to print what nobody caught. It runs a file so from
# C, where our code cannot be, with one exception: when a script, which is what this is to python, ends by an exception,
# python has left all of its frames, and calls `sys.excepthook` from C. So this script ends by raising `Start`, and the
# hook is a function of the shim's, `run_program`. It calls `prepare`, has python run the file and print its error, calls
# `ended` in between, and ends as python ends: by Py_Exit where the program came to its end or raised SystemExit, by its return
# otherwise, after which python itself exits with code 1, or by SIGINT.
#
# A zygote gets there before it makes its children: what python does at the end of a script is done once for all of them.


NEW_FILE = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC


class Start(BaseException):
    pass


def find_python(shim):
    # Looks for what is called in python, once.
    PREPARED["hold"] = ctypes.pythonapi.Py_IncRef
    PREPARED["run"] = run = shim.run_program
    run.argtypes = [ctypes.py_object] * 5
    if shim.find_python() != 0:
        os._exit(OURS)


def write_program(path, source):
    """Writes the program's file, and returns it open."""
    try:
        file = os.open(path, NEW_FILE, 0o644)
        written = os.write(file, source)
        while written < len(source):
            written += os.write(file, source[written:])
        return file
    except OSError as error:
        sys.stderr.write(f"{path}: {error.strerror}: the program is a file there, and counts in limits.disk_bytes\n")
        sys.stderr.flush()
        os._exit(1)


def refuse_nul(path, source):
    # As newer versions do: older ones leave out the rest of the line without a word, and run what that makes of it.
    line = source[: source.index(b"\0")].count(b"\n") + 1
    error = SyntaxError("source code cannot contain null bytes", (path, line, None, None))
    sys.excepthook(SyntaxError, error, None)
    sys.exit(1)


def describe(path):
    # What python tells a script of itself.
    module = sys.modules["__main__"].__dict__
    module["__file__"] = path
    module["__cached__"] = None
    module["__loader__"] = sys.modules["_frozen_importlib_external"].SourceFileLoader("__main__", path)
    sys.argv[:] = [path]


def hand_over(prepare):
    """Has python call `prepare`, and then run the file that it returns."""
    PREPARED["hook"] = sys.excepthook

    def begin():
        # Nothing has been raised yet, as far as the program is concerned.
        sys.excepthook = PREPARED["hook"]
        for name in ("last_exc", "last_type", "last_value", "last_traceback"):
            sys.__dict__.pop(name, None)
        return prepare()

    # Held here as well: python itself does not hold what it calls, and `begin` puts another in its place.
    PREPARED["start"] = sys.excepthook = _functools.partial(PREPARED["run"], begin, ended)
    raise Start


def ended(kind=None, value=None):
    # With what was raised. As python does before it prints an error or takes itself apart:
    try:
        sys.stderr.flush()
    except BaseException:
        pass
    try:
        sys.stdout.flush()
    except BaseException:
        pass
    code = 0 if kind is None else exit_code(kind, value)
    if code is not None and "leave" in PREPARED:
        PREPARED["leave"](code)


def exit_code(kind, value):
    """The exit code with which python ends after that was raised; none if it has something to print first."""
    if kind is not SystemExit:
        return None
    code = value.code if isinstance(value, SystemExit) else value
    if code is None:
        return 0
    return code if type(code) is int and 0 <= code < 256 else None


# {{#zygote}}
# --- 3. The zygote -------------------------------------------------------------------------------------------------
#
# It does the operator's imports once, and then makes one process after another out of itself, each of which goes on as
# a job. So a job's process begins with all of the zygote's state, of which it must not share what is to be one
# process's own. Libraries notice a fork by the process's number, and that is the same one in every pid namespace.
#
# | what a fork must not share | how it becomes the job's own |
# |---|---|
# | `random` | CPython seeds it anew at the fork (PyOS_AfterFork_Child) |
# | OpenSSL's generator, as `ssl` and `hashlib` have loaded it | RAND_poll |
# | numpy's legacy generator, `numpy.random.seed` | seeded from the system |
# | names of temporary files, `tempfile._name_sequence` | made anew when it is next needed |
# | the time of the last `uuid.uuid1()` | forgotten |
# | positions in files whose code is mapped and that a library maps again | opened anew, under the same number |
# | standard input | opened anew for the job |
# | what standard output has not written yet | written before the fork |
#
# Not covered: generators that an import made for itself (`random.Random()`, numpy's `Generator`), those of torch, jax
# and libsodium, other descriptors that an import has opened.


# Each object that a process touches is a page to copy: in counting who refers to it, python writes to it. So what can be
# made before the fork is, and is held by this module: what a function holds is let go of when it ends.


def set_up_zygote(imports):
    exec(compile(imports, "<imports>", "exec", dont_inherit=True), {"__name__": "<imports>"})
    import linecache
    import traceback

    PREPARED["modules"] = linecache, traceback  # of which tracebacks are made
    for name in [name for name in os.environ if name.endswith("_NUM_THREADS")]:
        del os.environ[name]  # was for the imports, so that they start no thread
    PREPARED["shim"] = ctypes.CDLL(SHIM)
    with_lock = ctypes.PyDLL(SHIM)
    find_fork(PREPARED["shim"], with_lock)
    find_python(with_lock)
    PREPARED["reseeds"] = reseeds()
    pipe, end = os.pipe()  # as the job's own standard input will be
    os.dup2(pipe, 0)
    os.close(pipe)
    os.close(end)
    open_stdin()
    PREPARED["stdin"] = sys.stdin
    PREPARED["ours"] = imported()
    slow = "the environment's fast_exit is false"
    # {{#fast_exit}}
    slow = set_up_fast_exit()
    # {{/fast_exit}}
    if slow:
        print(f"sandpiper: jobs end by python's own way, which takes longer: {slow}", file=sys.stderr)
    PREPARED["held"] = mapped()
    PREPARED["shared"] = PREPARED["reseeds"] or PREPARED["held"] or not sys.modules.keys().isdisjoint(("tempfile", "uuid"))
    if os.path.isdir("/proc/self/task") and len(os.listdir("/proc/self/task")) != 1:
        sys.exit("the environment's imports have started a thread, which a fork would lose")
    for reseed in PREPARED["reseeds"]:
        reseed()  # sets up what it needs
    buffer_lines()


def find_fork(shim, with_lock):
    global ready, await_order, fork, enter, before, after, as_child, trim
    fork = with_lock.zygote_fork
    ready, await_order, enter, _ = shim.zygote_ready, shim.zygote_next, shim.zygote_enter, shim.lockdown
    before, after = ctypes.pythonapi.PyOS_BeforeFork, ctypes.pythonapi.PyOS_AfterFork_Parent
    as_child, trim = ctypes.pythonapi.PyOS_AfterFork_Child, getattr(ctypes.pythonapi, "malloc_trim", int)


HUGE_PAGES = 0
# {{#huge_pages}}
HUGE_PAGES = 1
# {{/huge_pages}}


def make_children():
    """Returns in each of them."""
    import gc

    # What is here now is never collected, so that a collection does not copy its pages; nor does a child that
    # allocates memory put the zygote's free pieces together and in order.
    gc.collect()
    gc.freeze()
    trim(0)
    bytearray(100_000)
    # Nor is what hangs on it finalized. What the job gets for its own comes after it.
    renew_main()
    PREPARED["path"] = f"{WORK}/main.py"
    describe(PREPARED["path"])
    if ready(HUGE_PAGES) != 0:
        os._exit(OURS)
    while True:
        if await_order() != 1:
            os._exit(0)
        before()
        forked = fork()
        if forked == 1:
            as_child()
            break
        after()
        if forked != 0:
            os._exit(OURS)
    if enter() != 0:
        os._exit(OURS)


def renew():
    for reseed in PREPARED["reseeds"]:
        reseed()
    for number, path in PREPARED["held"].items():
        again = os.open(path, os.O_RDONLY)
        if again != number:
            os.dup2(again, number, inheritable=False)
            os.close(again)
    if "tempfile" in sys.modules:
        sys.modules["tempfile"]._name_sequence = None
    if "uuid" in sys.modules:
        sys.modules["uuid"]._last_timestamp = None


def reseeds():
    libraries = [sys.modules[name].__file__ for name in ("_ssl", "_hashlib") if name in sys.modules]
    found = [ctypes.CDLL(library).RAND_poll for library in libraries]
    if "numpy.random" in sys.modules:
        found.append(sys.modules["numpy.random"].seed)
    return found


def mapped():
    # Descriptors of files whose code is mapped: newer versions of what ctypes makes callbacks with hold one of their
    # own library, and map it again by and by. A child has to open it anew, under the same number: it inherits none,
    # since it would share the position in the file with every other job.
    found = {}
    try:
        with open("/proc/self/maps") as maps:
            files = {line.split(maxsplit=5)[5].rstrip("\n") for line in maps if "/" in line and " r-xp " in line}
        for number in os.listdir("/proc/self/fd"):
            try:
                path = os.readlink(f"/proc/self/fd/{number}")
            except FileNotFoundError:
                continue  # that of the listing itself
            if path in files and int(number) > 6:
                found[int(number)] = path
    except OSError:
        pass  # there is no /proc, so that it has not found its own library either
    return found


# {{#fast_exit}}
# --- 4. The fast exit ----------------------------------------------------------------------------------------------
#
# Python ends by taking itself apart, object by object, and each page that it writes for that is one that the job's
# process shares with the zygote until then: this takes longer than most jobs do. So the process is ended as it stands
# if nothing of the job's would notice, and python's own way is taken in every other case.
#
# When it is asked: in the midst of python's own end. Threads have ended, exit handlers have run, garbage is collected;
# the modules come next. Just before them python lets go of a few attributes of `sys`, `__interactivehook__` the last,
# so an object put there by `ended` is finalized at that moment: `Last`. That is CPython's order, and no promise of its,
# so it is relied on only in the versions that were tried, TRIED.
#
# What is asked: whether any object that is alive could do something at its end that is seen outside. Every object that
# the collector knows is looked at, by its type; those that were there at the fork are frozen, and python would never
# finalize them. A type is `quiet` if none of its bases has a `__del__` and each comes from a module in python, or from
# one in C that is known to do nothing (PLAIN). A weak reference with a callback is not quiet, nor is a stream that was
# put in the place of `sys.stdout`, nor an extension that may hold files which are complete only when it closes them
# (`loud`). What is not known is not quiet.

TRIED = ((3, 9), (3, 10), (3, 11), (3, 12), (3, 13), (3, 14))
PLAIN = frozenset(
    "_abc _csv _frozen_importlib _frozen_importlib_external _json _random _struct _thread array builtins collections"
    " contextvars datetime decimal functools itertools numpy operator pandas re types weakref zipimport __main__".split()
)


def set_up_fast_exit():
    """Returns why it cannot be had; none if it can."""
    if sys.version_info[:2] not in TRIED or sys.implementation.name != "cpython":
        return f"it was never tried with Python {sys.version_info[0]}.{sys.version_info[1]}"
    try:
        import gc
        import weakref

        # Held here: a job may change what it likes.
        flush, leave, finalizing, modules = ctypes.pythonapi.fflush, os._exit, sys.is_finalizing, sys.modules
        blocks, objects, streams = sys.getallocatedblocks, gc.get_objects, (sys.stdout, sys.stderr)
        many = blocks() + 50_000  # so many cost no less to look through
        kinds = {kind: quiet(kind, modules) for kind in {type(thing) for thing in objects()}}
        # What calling the program's start keeps alive until the end.
        kinds[Start] = kinds[type(ctypes.byref(ctypes.c_int()))] = True
        extension = next((module.__name__ for module in modules.values() if loud(module)), None)
        if extension:
            return f"{extension} may hold files that it has to close"
    except Exception as error:
        return f"something out of the ordinary was imported: {error!r}"

    def unseen(last):
        if blocks() > many or (sys.stdout, sys.stderr) != streams:
            return False
        for thing in objects():
            kind = type(thing)
            if kind not in kinds:
                kinds[kind] = quiet(kind, modules)
            if not kinds[kind] and thing is not last:
                return False
            if kind is type(sys) and loud(thing):
                return False
            if issubclass(kind, type) and "__del__" in NAMES(thing):
                return False
            if issubclass(kind, weakref.ref) and getattr(thing.__callback__, "__name__", "_destroy") != "_destroy":
                return False
        return True

    class Last:
        def __init__(self, code):
            self.code = code

        def __del__(self):
            nonlocal streams
            try:
                if finalizing() and unseen(self):
                    for stream in streams:
                        stream.closed or stream.flush()
                    flush(None)
                    leave(self.code)
            except BaseException:
                pass
            streams = ()  # the long way: python flushes them when it lets go of them

    def arm(code):
        sys.__interactivehook__ = Last(code)

    PREPARED["leave"] = arm
    return None


# Of a type, whatever its metaclass says.
BASES, NAMES, HOME = (type.__dict__[name].__get__ for name in ("__mro__", "__dict__", "__module__"))
EXTENSIONS = os.path.join(os.path.dirname(os.__file__), "lib-dynload", "")


def file_of(module):
    return str(object.__getattribute__(module, "__dict__").get("__file__"))


def quiet(kind, modules):
    for base in BASES(kind):
        where = str(HOME(base))  # some types in C have an attribute of their own there
        if "__del__" in NAMES(base):
            return False
        if where.partition(".")[0] not in PLAIN:
            module = modules.get(where)
            if not module or not file_of(module).endswith(".py"):
                return False
    return True


def loud(module):
    # An extension may hold files that are complete only when it closes them.
    name, path = module.__name__, file_of(module)
    if not path.endswith(".so") or name.partition(".")[0] in PLAIN:
        return False
    return not path.startswith(EXTENSIONS) or name in ("_dbm", "_gdbm", "_sqlite3")


# {{/fast_exit}}
# {{/zygote}}
# {{#start}}
main({{uid}}, {{gid}}, {{enable_network}}, b"{{preload}}", b"{{code}}")
# {{/start}}
