# What runs in every python process before a job's code: a template that the worker fills in.
#
# Up to lockdown() only the operator's code and a trusted publisher's preload run, behind the outer wall. The
# job's code is in here from the start, but the key to it arrives only after the worker has seen the filter.
# Imports are few and come first: each one costs every job its time, and none may be found in the job's files.
#
# Filled in for uid 0, which no job has, the same script is a zygote: the preload holds the operator's imports,
# and from then on it makes processes that go on as jobs. Their code comes with the key.


def sandpiper():
    import os
    import sys

    known = set(sys.modules)
    import binascii
    import ctypes

    ours = sys.modules.keys() - known
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

            return "".join(traceback.format_exception(kind, error, trace, chain=chain))

        try:
            sys.stderr.write(title + library(lines))
            sys.stderr.flush()
        except Exception:
            hook()

    def remember(name, source, ours):
        # Shows the source to whoever asks linecache for it: tracebacks, warnings, inspect. It is not imported
        # for that, since it costs as much as starting python does; it is filled when the job imports it. What
        # prints the exceptions of threads and finalizers shows it as well.
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

        def fill(module):
            import io

            try:
                text = io.TextIOWrapper(io.BytesIO(source), encoding(source), "replace").read()
            except LookupError:
                return
            module.cache[name] = (len(source), None, text.splitlines(True), name)

        def encoding(source):
            def detect():
                import tokenize

                return tokenize.detect_encoding(iter(source.splitlines(True)).__next__)[0]

            return library(detect)

        changes = {"linecache": fill, "threading": hook_threads}

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
                if spec.origin != os.path.join(os.path.dirname(os.__file__), f"{fullname}.py"):
                    return None  # the job's own
                change = changes.pop(fullname)
                if not changes:
                    sys.meta_path.remove(Finder)
                execute = spec.loader.exec_module

                def exec_module(module):
                    execute(module)
                    try:
                        change(module)
                    except Exception:
                        pass  # a source that cannot be decoded has no lines to show

                spec.loader.exec_module = exec_module
                return spec

        # A job's file wins over a module that only we needed, or the operator's imports.
        files = {file.partition(".")[0] for file in os.listdir("/work")}
        for module in [module for module in ours if module.partition(".")[0] in files]:
            del sys.modules[module]
        for module in [module for module in changes if module in sys.modules]:
            changes.pop(module)(sys.modules[module])
        if changes:
            sys.meta_path.insert(0, Finder)

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
        except BaseException:
            strip(name)
            raise

    def zygote(imports):
        exec(compile(imports, "<imports>", "exec", dont_inherit=True), {"__name__": "<imports>"})
        import gc
        import linecache
        import random
        import tempfile
        import traceback

        fork = ctypes.PyDLL("/run/sandpiper/shim.so").zygote_fork
        interpreter = ctypes.pythonapi
        if os.path.isdir("/proc/self/task") and len(os.listdir("/proc/self/task")) != 1:
            sys.exit("the environment's imports have started a thread, which a fork would lose")
        # What is here now is never collected, so that a collection does not copy its pages.
        gc.collect()
        gc.freeze()
        if shim.zygote_ready() != 0:
            os._exit(125)
        while True:
            if shim.zygote_next() != 1:
                os._exit(0)
            interpreter.PyOS_BeforeFork()
            forked = fork()
            if forked == 1:
                interpreter.PyOS_AfterFork_Child()
                break
            interpreter.PyOS_AfterFork_Parent()
            if forked != 0:
                os._exit(125)
        if shim.zygote_enter() != 0:
            os._exit(125)
        # Whatever has drawn on chance in the zygote must not go on from there in every job. Libraries notice a
        # fork by the process's number, and that is the same one in every pid namespace.
        random.seed()
        tempfile._name_sequence = None
        for name in [name for name in os.environ if name.endswith("_NUM_THREADS")]:
            del os.environ[name]  # was for the imports, so that they start no thread
        for name in "_ssl", "_hashlib":
            if name in sys.modules:
                ctypes.CDLL(sys.modules[name].__file__).RAND_poll()
        if "uuid" in sys.modules:
            sys.modules["uuid"]._last_timestamp = None
        if "numpy.random" in sys.modules:
            sys.modules["numpy.random"].seed()

    uid, gid = {{uid}}, {{gid}}
    preload = binascii.a2b_base64(b"{{preload}}")
    if uid == 0:
        zygote(preload)
        ours = sys.modules.keys() - known
        # The job's own: what was there at the freeze is never collected, nor is what hangs on it finalized.
        sys.modules["__main__"] = type(sys)("__main__")
        sys.modules["__main__"].__dict__.update(main)
        uid, gid = os.getuid(), os.getgid()
    elif preload:
        run("<preload>", preload)

    if shim.lockdown(uid, gid, {{enable_network}}) != 0:
        os._exit(125)

    # The assignment: key, code, number of arguments, arguments, environment; each ends in NUL.
    parts = []
    while True:
        part = os.read(3, 1 << 20)
        if not part:
            break
        parts.append(part)
    os.close(3)
    fields = b"".join(parts).split(b"\0")
    if len(fields) < 4:
        os._exit(125)  # the worker went away
    key = binascii.a2b_base64(fields[0])
    code = binascii.a2b_base64(fields[1] or b"{{code}}")
    count = int(fields[2])
    arguments = fields[3 : 3 + count]
    environment = fields[3 + count : -1]

    os.dup2(4, 0)
    os.close(4)
    sys.stdin = sys.__stdin__ = open(0, encoding=sys.stdin.encoding, errors=sys.stdin.errors, closefd=False)
    sys.stdin.buffer.raw.name = "<stdin>"
    os.chdir("/work")
    sys.argv[:] = ["<job>", *map(os.fsdecode, arguments)]
    for variable in environment:
        name, _, value = variable.partition(b"=")
        os.environb[name] = value
    if b"TZ" in os.environb:
        import time

        time.tzset()

    # As one big integer: a loop over bytes takes twenty times as long.
    size = len(code)
    pad = (key * (size // len(key) + 1))[:size]
    source = (int.from_bytes(code, "little") ^ int.from_bytes(pad, "little")).to_bytes(size, "little")
    del parts, fields, code, pad
    sys.path.insert(0, "/work")
    remember("<job>", source, ours)
    run("<job>", source)


# In a namespace of its own: what is left of it must not keep the job's alive when python ends.
type(sandpiper)(sandpiper.__code__, {"__builtins__": __builtins__})()
