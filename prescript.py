# What runs in every python process before a job's code: a template that the worker fills in.
#
# Up to lockdown() only the operator's code and a trusted publisher's preload run, behind the outer wall. The
# job's code is in here from the start, but the key to it arrives only after the worker has seen the filter.
# Imports are few and come first: each one costs every job its time, and none may be found in the job's files.
#
# What stands above the last statement is the same for all, and a cold process is given it compiled.
#
# Filled in for uid 0, which no job has, the same script is a zygote: the preload holds the operator's imports,
# and from then on it makes processes that go on as jobs. Their code comes with the key.


def sandpiper(uid, gid, enable_network, preload, payload):
    import os
    import sys

    known = set(sys.modules)
    import binascii

    # ctypes may open a file for good. In a zygote, its number is none of those that a job's process begins with.
    spare = [os.dup(0) for number in range(3, 7)] if uid == 0 else []
    import ctypes

    for number in spare:
        os.close(number)

    def new():
        # What has been imported since, by the first part of its name.
        found = {}
        for module in sys.modules.keys() - known:
            found.setdefault(module.partition(".")[0], []).append(module)
        return found

    source = b""
    main = sys.modules["__main__"].__dict__
    for name in [name for name in main if not name.startswith("__")]:
        del main[name]
    main["__file__"] = "<job>"

    shim = ctypes.CDLL("/run/sandpiper/shim.so")

    def library(action, path=sys.path[:]):
        # Runs what imports from python's own library, which is not to find a file of the job's instead. What the
        # job has loaded under such a name stays its own. Modules are asked in a way that wakes no lazy one.
        theirs, their_path = sys.modules.copy(), sys.path
        try:
            for key, module in theirs.items():
                if isinstance(module, type(sys)):
                    origin = object.__getattribute__(module, "__dict__").get("__file__")
                    if str(origin).startswith("/work/"):
                        del sys.modules[key]
            sys.path = path
            return action()
        finally:
            sys.path = their_path
            for key in sys.modules.keys() - theirs.keys():
                del sys.modules[key]
            sys.modules.update(theirs)

    def strip(name):
        # The job's tracebacks begin with the job's own first line; what stands above it is ours.
        def hook(kind, error, trace, hook=sys.excepthook):
            while trace is not None and trace.tb_frame.f_code.co_filename != name:
                trace = trace.tb_next
            error.__traceback__ = trace
            if hook is sys.__excepthook__:
                show("", lambda: hook(kind, error, trace), kind, error, trace)
            else:
                hook(kind, error, trace)
            if kind is KeyboardInterrupt:
                # Python then ends by SIGINT, unless a string was evaluated meanwhile, as some imports do.
                try:
                    eval("interrupt()", {"interrupt": interrupt})
                except KeyboardInterrupt:
                    pass

        sys.excepthook = hook

    def interrupt():
        raise KeyboardInterrupt

    def show(title, hook, kind, error, trace, chain=True):
        # Unlike the interpreter's own printing, this shows lines of sources that are not files.
        def lines():
            import traceback

            if chain or sys.version_info < (3, 13):
                return "".join(traceback.format_exception(kind, error, trace, chain=chain))
            # Of exceptions that nobody can catch, newer versions mark no columns.
            report = traceback.TracebackException(type(error), error, trace)
            for frame in report.stack:
                frame.colno = None
            return "".join(report.format(chain=chain))

        try:
            sys.stderr.write(title + library(lines))
            sys.stderr.flush()
        except Exception:
            hook()

    def remember():
        # Shows the job's source to whoever asks linecache for it: tracebacks, warnings, inspect. It is not
        # imported for that, since it costs as much as starting python does; it is filled when the job imports
        # it. What prints the exceptions of threads and finalizers shows it as well.
        def hook_unraisable(unraisable, hook=sys.unraisablehook):
            title = ""
            if unraisable.object is not None:
                title = f"{unraisable.err_msg or 'Exception ignored in'}: {unraisable.object!r}\n"
            elif unraisable.err_msg:
                title = f"{unraisable.err_msg}:\n"
            what = unraisable.exc_type, unraisable.exc_value, unraisable.exc_traceback
            show(title, lambda: hook(unraisable), *what, chain=False)

        sys.unraisablehook = hook_unraisable

        def hook_threads(module):
            def excepthook(arguments, hook=module.excepthook):
                if arguments.exc_type is SystemExit or sys.stderr is None:
                    return hook(arguments)
                thread = arguments.thread
                title = f"Exception in thread {thread.name if thread else module.get_ident()}:\n"
                what = arguments.exc_type, arguments.exc_value, arguments.exc_traceback
                show(title, lambda: hook(arguments), *what)

            module.excepthook = excepthook

        class Entry(tuple):
            # Of linecache: size, time, lines, name. The source is taken apart when somebody looks at it.
            def __iter__(self):
                return iter((len(source), None, lines(), "<job>"))

            def __getitem__(self, key):
                return tuple(self)[key]

            def __len__(self):
                return 4

        def fill(module):
            module.cache["<job>"] = Entry()

        def lines():
            import io

            try:
                return io.TextIOWrapper(io.BytesIO(source), encoding(), "replace").read().splitlines(True)
            except Exception:
                return []  # a source that cannot be decoded has no lines to show

        def encoding():
            def detect():
                import tokenize

                return tokenize.detect_encoding(iter(source.splitlines(True)).__next__)[0]

            return library(detect)

        def start_by_fork(module):
            # Since 3.14 processes come from a server over a Unix socket unless the job says otherwise: a job has
            # neither such sockets nor programs.
            module._default_context._default_context = module._concrete_contexts["fork"]

        changes = {"linecache": fill, "threading": hook_threads}
        if sys.version_info >= (3, 14):
            changes["multiprocessing.context"] = start_by_fork

        class Finder:
            @staticmethod
            def find_spec(fullname, path=None, target=None):
                if fullname not in changes:
                    return None
                for finder in sys.meta_path:
                    spec = finder is not Finder and finder.find_spec(fullname, path, target)
                    if spec:
                        break
                else:
                    return None
                if spec.origin != os.path.join(os.path.dirname(os.__file__), *fullname.split(".")) + ".py":
                    return None  # the job's own
                change = changes.pop(fullname)
                if not changes:
                    sys.meta_path.remove(Finder)
                execute = spec.loader.exec_module

                def exec_module(module):
                    execute(module)
                    change(module)

                spec.loader.exec_module = exec_module
                return spec

        for module in [module for module in changes if module in sys.modules]:
            changes.pop(module)(sys.modules[module])
        if changes:
            sys.meta_path.insert(0, Finder)

    leave = None  # or a shorter way out than python's own

    def run(name, source):
        try:
            try:
                code = compile(source, name, "exec", dont_inherit=True)
            except SyntaxError as error:
                # Some of these errors look for their line in a file.
                if error.text is None and error.lineno:
                    line = source.splitlines(True)[error.lineno - 1 : error.lineno]
                    error.text = b"".join(line).decode("utf-8", "replace")
                raise
            exec(code, sys.modules["__main__"].__dict__)
        except BaseException as error:
            code = error.code if type(error) is SystemExit else ""
            if not leave or code is not None and (type(code) is not int or not 0 <= code < 256):
                strip(name)
                raise
        else:
            code = 0
        if leave:
            leave(code or 0)

    def open_stdin():
        # Python has read this script from there.
        stdin = open(0, encoding=sys.stdin.encoding, errors=sys.stdin.errors, closefd=False)
        stdin.buffer.raw.name = "<stdin>"
        sys.stdin = sys.__stdin__ = stdin

    # Only a zygote is given what follows: it would take a cold process as long to read as all the rest.
    def shortcut():
        # Python ends by taking itself apart, object by object, and each page that it writes for that is one that
        # the job's process shares with the zygote until then: this takes longer than most jobs do. So python is
        # left as it stands where nothing of the job's would notice. That is found out in the midst of its end:
        # threads have ended, exit handlers have run, garbage is collected; the modules come next.
        import gc
        import weakref

        end, flush, exit = ctypes.pythonapi.Py_Exit, ctypes.pythonapi.fflush, os._exit
        blocks, objects, finalizing = sys.getallocatedblocks, gc.get_objects, sys.is_finalizing
        modules, streams = sys.modules, (sys.stdout, sys.stderr)
        bases, names, home = (type.__dict__[name].__get__ for name in ("__mro__", "__dict__", "__module__"))
        many = blocks() + 50_000  # so many cost no less to look through
        # Where types in C come from that do nothing at their end, unless they have a finalizer.
        plain = {"_abc", "_csv", "_frozen_importlib", "_frozen_importlib_external", "_json", "_random", "_struct"}
        plain |= {"_thread", "array", "builtins", "collections", "contextvars", "datetime", "decimal", "functools"}
        plain |= {"itertools", "numpy", "operator", "pandas", "re", "types", "weakref", "zipimport", "__main__"}
        extensions = os.path.join(os.path.dirname(os.__file__), "lib-dynload", "")

        def file(module):
            return str(object.__getattribute__(module, "__dict__").get("__file__"))

        def quiet(kind):
            for base in bases(kind):
                where = str(home(base))  # some types in C have an attribute of their own there
                if "__del__" in names(base):
                    return False
                if where.partition(".")[0] not in plain:
                    module = modules.get(where)
                    if not module or not file(module).endswith(".py"):
                        return False
            return True

        def loud(module):
            # An extension may hold files that are complete only when it closes them.
            name, path = module.__name__, file(module)
            if not path.endswith(".so") or name.partition(".")[0] in plain:
                return False
            return not path.startswith(extensions) or name in ("_dbm", "_gdbm", "_sqlite3")

        def unseen(last):
            if blocks() > many or (sys.stdout, sys.stderr) != streams:
                return False
            for thing in objects():
                kind = type(thing)
                if kind not in kinds:
                    kinds[kind] = quiet(kind)
                if not kinds[kind] and thing is not last:
                    return False
                if kind is type(sys) and loud(thing):
                    return False
                if issubclass(kind, type) and "__del__" in names(thing):
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
                        exit(self.code)
                except BaseException:
                    pass
                streams = ()  # the long way: python flushes them when it lets go of them

        def leave(code):
            sys.__interactivehook__ = Last(code)  # what python lets go of last before the modules
            end(code)

        kinds = {kind: quiet(kind) for kind in {type(thing) for thing in objects()}}
        return None if any(loud(module) for module in modules.values()) else leave

    def mapped():
        # Descriptors of files whose code is mapped: newer versions of what ctypes makes callbacks with hold one of
        # their own library, and map it again by and by. A child has to open it anew, under the same number: it
        # inherits none, since it would share the position in the file with every other job.
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

    def zygote(imports):
        nonlocal leave
        exec(compile(imports, "<imports>", "exec", dont_inherit=True), {"__name__": "<imports>"})
        import gc
        import linecache
        import traceback

        # Whatever a child needs is made here, if it can be: each object that a child touches is a page to copy.
        for name in [name for name in os.environ if name.endswith("_NUM_THREADS")]:
            del os.environ[name]  # was for the imports, so that they start no thread
        fork = ctypes.PyDLL("/run/sandpiper/shim.so").zygote_fork
        ready, await_order, enter, _ = shim.zygote_ready, shim.zygote_next, shim.zygote_enter, shim.lockdown
        before, after = ctypes.pythonapi.PyOS_BeforeFork, ctypes.pythonapi.PyOS_AfterFork_Parent
        as_child, trim = ctypes.pythonapi.PyOS_AfterFork_Child, getattr(ctypes.pythonapi, "malloc_trim", int)
        libraries = [sys.modules[name].__file__ for name in ("_ssl", "_hashlib") if name in sys.modules]
        reseeds = [ctypes.CDLL(library).RAND_poll for library in libraries]
        if "numpy.random" in sys.modules:
            reseeds.append(sys.modules["numpy.random"].seed)
        pipe, end = os.pipe()  # as the job's own standard input will be
        os.dup2(pipe, 0)
        os.close(pipe)
        os.close(end)
        open_stdin()
        remember()
        ours = new()
        try:
            leave = shortcut()
        except Exception:
            pass  # something out of the ordinary was imported: every job takes python's own way out
        held = mapped()
        if os.path.isdir("/proc/self/task") and len(os.listdir("/proc/self/task")) != 1:
            sys.exit("the environment's imports have started a thread, which a fork would lose")
        for reseed in reseeds:
            reseed()  # sets up what it needs
        # What is here now is never collected, so that a collection does not copy its pages; nor does a child that
        # allocates memory put the zygote's free pieces together and in order.
        gc.collect()
        gc.freeze()
        trim(0)
        bytearray(100_000)
        # Nor is what hangs on it finalized. What the job gets for its own comes after it.
        sys.modules["__main__"] = type(sys)("__main__")
        sys.modules["__main__"].__dict__.update(main)
        if ready() != 0:
            os._exit(125)
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
                os._exit(125)
        if enter() != 0:
            os._exit(125)
        # Whatever has drawn on chance in the zygote must not go on from there in every job. Libraries notice a
        # fork by the process's number, and that is the same one in every pid namespace. Python's own generator
        # has been told of the fork.
        for reseed in reseeds:
            reseed()
        for number, path in held.items():
            again = os.open(path, os.O_RDONLY)
            if again != number:
                os.dup2(again, number, inheritable=False)
                os.close(again)
        if "tempfile" in sys.modules:
            sys.modules["tempfile"]._name_sequence = None
        if "uuid" in sys.modules:
            sys.modules["uuid"]._last_timestamp = None
        # From here, so that what this function holds is not let go of.
        job(os.getuid(), os.getgid(), ours, False)

    # So far.
    def job(uid, gid, ours, renew):
        # From the lockdown to the end. `renew` where nothing is prepared yet.
        nonlocal source
        if shim.lockdown(uid, gid, enable_network) != 0:
            os._exit(125)

        # The assignment: key, code, number of arguments, arguments, environment; each ends in NUL.
        parts = []
        while True:
            part = os.read(3, 1 << 16)
            if not part:
                break
            parts.append(part)
        os.close(3)
        fields = b"".join(parts).split(b"\0")
        if len(fields) < 4:
            os._exit(125)  # the worker went away
        key = binascii.a2b_base64(fields[0])
        code = binascii.a2b_base64(fields[1] or payload)
        count = int(fields[2])
        arguments = fields[3 : 3 + count]
        environment = fields[3 + count : -1]

        os.dup2(4, 0)
        os.close(4)
        if renew:
            open_stdin()
        os.chdir("/work")
        sys.argv[:] = ["<job>", *map(os.fsdecode, arguments)]
        for variable in environment:
            name, _, value = variable.partition(b"=")
            os.environb[name] = value
            if name == b"TZ":
                import time

                time.tzset()

        # As one big integer: a loop over bytes takes twenty times as long.
        size = len(code)
        pad = (key * (size // len(key) + 1))[:size]
        source = (int.from_bytes(code, "little") ^ int.from_bytes(pad, "little")).to_bytes(size, "little")
        del parts, fields, code, pad
        sys.path.insert(0, "/work")
        # A job's file wins over a module that only we needed, or the operator's imports.
        for file in os.listdir("/work"):
            for module in ours.get(file.partition(".")[0], ()):
                renew |= sys.modules.pop(module, None) is not None
        if renew:
            remember()
        run("<job>", source)

    preload = binascii.a2b_base64(preload)
    if uid == 0:
        zygote(preload)
    else:
        if preload:
            run("<preload>", preload)
        job(uid, gid, new(), True)


# In a namespace of its own: what is left of it must not keep the job's alive when python ends.
type(sandpiper)(sandpiper.__code__, {"__builtins__": __builtins__})(
    {{uid}}, {{gid}}, {{enable_network}}, b"{{preload}}", b"{{code}}"
)
