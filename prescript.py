# What runs in every python process before a job's code: a template that the worker fills in.
#
# Up to lockdown() only the operator's code and a trusted publisher's preload run, behind the outer wall. The
# job's code is in here from the start, but the key to it arrives only after the worker has seen the filter.
# Imports are few and come first: each one costs every job its time, and none may be found in the job's files.


def sandpiper():
    import binascii
    import ctypes
    import os
    import sys

    main = sys.modules["__main__"].__dict__
    for name in [name for name in main if not name.startswith("__")]:
        del main[name]
    main["__file__"] = "<job>"

    shim = ctypes.CDLL("/run/sandpiper/shim.so")

    def strip(name):
        # The job's tracebacks begin with the job's own first line; what stands above it is ours.
        def hook(kind, error, trace, hook=sys.excepthook):
            while trace is not None and trace.tb_frame.f_code.co_filename != name:
                trace = trace.tb_next
            error.__traceback__ = trace
            if hook is sys.__excepthook__:
                try:
                    # Unlike the interpreter's own, this one shows lines of sources that are not files.
                    import traceback

                    traceback.print_exception(kind, error, trace)
                    return
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
            import tokenize

            return tokenize.detect_encoding(iter(source.splitlines(True)).__next__)[0]

        class Finder:
            @staticmethod
            def find_spec(fullname, path=None, target=None):
                if fullname != "linecache":
                    return None
                sys.meta_path.remove(Finder)
                for finder in sys.meta_path:
                    spec = finder.find_spec(fullname, path, target)
                    if spec is not None:
                        break
                else:
                    return None
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
    sys.path.insert(0, "/work")
    sys.argv[:] = ["<job>", *map(os.fsdecode, arguments)]
    for variable in environment:
        name, _, value = variable.partition(b"=")
        os.environb[name] = value
    if b"TZ" in os.environb:
        import time

        time.tzset()

    # As one big integer: a loop over bytes takes twenty times as long.
    code = binascii.a2b_base64(b"{{code}}")
    size = len(code)
    pad = (key * (size // len(key) + 1))[:size]
    source = (int.from_bytes(code, "little") ^ int.from_bytes(pad, "little")).to_bytes(size, "little")
    del parts, fields, code, pad
    remember("<job>", source)
    run("<job>", source)


sandpiper()
