# What runs in every python process before a job's code: a template that the worker fills in.
#
# Up to lockdown() only the operator's code and a trusted publisher's preload run, behind the outer wall. The
# job's code is in here from the start, but the key to it arrives only after the worker has seen the filter.
# Imports are few and come first: each one costs every job its time, and none may be found in the job's files.


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

                def show():
                    # Unlike the interpreter's own, this one shows lines of sources that are not files.
                    import traceback

                    traceback.print_exception(kind, error, trace)

                try:
                    return library(show)
                except Exception:
                    pass
            hook(kind, error, trace)

        sys.excepthook = hook

    def remember(name, source):
        # Shows the source to whoever asks linecache for it: tracebacks, warnings, inspect. It is not imported
        # for that, since it costs as much as starting python does; it is filled when the job imports it.
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

        class Finder:
            @staticmethod
            def find_spec(fullname, path=None, target=None):
                if fullname != "linecache":
                    return None
                for finder in sys.meta_path:
                    spec = finder is not Finder and finder.find_spec(fullname, path, target)
                    if spec:
                        break
                else:
                    return None
                if spec.origin != os.path.join(os.path.dirname(os.__file__), "linecache.py"):
                    return None  # the job's own
                sys.meta_path.remove(Finder)
                execute = spec.loader.exec_module

                def exec_module(module):
                    execute(module)
                    try:
                        fill(module)
                    except Exception:
                        pass  # a source that cannot be decoded has no lines to show

                spec.loader.exec_module = exec_module
                return spec

        if "linecache" in sys.modules:
            fill(sys.modules["linecache"])
        else:
            sys.meta_path.insert(0, Finder)

    def run(name, source):
        try:
            exec(compile(source, name, "exec", dont_inherit=True), main)
        except BaseException:
            strip(name)
            raise

    preload = binascii.a2b_base64(b"{{preload}}")
    if preload:
        run("<preload>", preload)

    if shim.lockdown({{uid}}, {{gid}}, {{enable_network}}) != 0:
        os._exit(125)

    # The assignment: key, number of arguments, arguments, environment; each ends in NUL.
    parts = []
    while True:
        part = os.read(3, 1 << 20)
        if not part:
            break
        parts.append(part)
    os.close(3)
    fields = b"".join(parts).split(b"\0")
    if len(fields) < 3:
        os._exit(125)  # the worker went away
    key = binascii.a2b_base64(fields[0])
    count = int(fields[1])
    arguments = fields[2 : 2 + count]
    environment = fields[2 + count : -1]

    os.dup2(4, 0)
    os.close(4)
    sys.stdin = sys.__stdin__ = open(0, encoding=sys.stdin.encoding, errors=sys.stdin.errors, closefd=False)
    os.chdir("/work")
    sys.argv[:] = ["<job>", *map(os.fsdecode, arguments)]
    for variable in environment:
        name, _, value = variable.partition(b"=")
        os.environb[name] = value
    if b"TZ" in os.environb:
        import time

        time.tzset()

    # From here on imports find the job's files first. Such a file also wins over a module that only we needed.
    sys.path.insert(0, "/work")
    files = {name.partition(".")[0] for name in os.listdir()}
    for name in [name for name in ours if name.partition(".")[0] in files]:
        del sys.modules[name]

    # As one big integer: a loop over bytes takes twenty times as long.
    code = binascii.a2b_base64(b"{{code}}")
    size = len(code)
    pad = (key * (size // len(key) + 1))[:size]
    source = (int.from_bytes(code, "little") ^ int.from_bytes(pad, "little")).to_bytes(size, "little")
    del parts, fields, code, pad
    remember("<job>", source)
    run("<job>", source)


sandpiper()
