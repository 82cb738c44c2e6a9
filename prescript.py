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
        try:
            import traceback

            text = "".join(traceback.format_exception(kind, error, trace, chain=chain))
            sys.stderr.write(title + text)
            sys.stderr.flush()
        except Exception:
            hook()

    def remember(name, source):
        # Shows the source to whoever asks for it: linecache (tracebacks, warnings, inspect), and what prints the
        # exceptions of threads and finalizers. No module is imported for that, since linecache alone costs as
        # much as starting python does; what the job imports is changed then.
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
            import tokenize

            return tokenize.detect_encoding(iter(source.splitlines(True)).__next__)[0]

        changes = {"linecache": fill, "threading": hook_threads}

        class Finder:
            @staticmethod
            def find_spec(fullname, path=None, target=None):
                change = changes.pop(fullname, None)
                if change is None:
                    return None
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
                        change(module)
                    except Exception:
                        pass  # a source that cannot be decoded has no lines to show

                spec.loader.exec_module = exec_module
                return spec

        for loaded in [loaded for loaded in changes if loaded in sys.modules]:
            changes.pop(loaded)(sys.modules[loaded])
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
            exec(code, main)
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
    sys.stdin.buffer.raw.name = "<stdin>"
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


# In a namespace of its own: what is left of it must not keep the job's alive when python ends.
type(sandpiper)(sandpiper.__code__, {"__builtins__": __builtins__})()
