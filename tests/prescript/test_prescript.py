"""What of prescript.py can be tried outside a sandbox. Run by tests/prescript/main.rs, and by
`python3 -m unittest discover tests/prescript` with any python.

The template is loaded as a module with all of its sections but the call at its end.
"""

import contextlib
import io
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import textwrap
import types
import unittest
import unittest.mock

ROOT = pathlib.Path(__file__).parents[2]
SHIM = os.environ.get("SP_TEST_SHIM", str(ROOT / "target/debug/libsandpiper_shim.so"))


def head():
    head, mark, call = (ROOT / "prescript.py").read_text().partition("# {{#start}}\n")
    assert mark and call.startswith("main("), "the template ends in the call of main"
    return head


def load():
    module = types.ModuleType("sandpiper")
    exec(compile(head(), "<sandpiper>", "exec"), module.__dict__)
    return module


class Assignment(unittest.TestCase):
    def test_fields_arguments_and_variables(self):
        fields = load().take_apart(b"key\0code\0main.py\x002\0one\0\0A=1\0B=\0")
        self.assertEqual(fields, (b"key", b"code", "main.py", [b"one", b""], [b"A=1", b"B="]))

    def test_nothing_but_an_end_is_no_assignment(self):
        self.assertIsNone(load().take_apart(b""))
        self.assertIsNone(load().take_apart(b"key\0code"))

    def test_decoding_repeats_the_key(self):
        key = bytes(range(64))
        for size in (0, 1, 63, 64, 65, 1000):
            code = bytes(number * 7 & 255 for number in range(size))
            encoded = bytes(byte ^ key[at % 64] for at, byte in enumerate(code))
            self.assertEqual(load().decode(encoded, key), code, size)

    def test_variables_are_bytes(self):
        with unittest.mock.patch.dict(os.environ):
            load().set_variables([b"SP_A=1=2", b"SP_B=\xff"])
            self.assertEqual(os.environb[b"SP_A"], b"1=2")
            self.assertEqual(os.environb[b"SP_B"], b"\xff")


class ExitCode(unittest.TestCase):
    def test_only_what_prints_nothing_has_one(self):
        code = load().exit_code
        for value, expected in [(None, 0), (0, 0), (255, 255), (256, None), (-1, None), (True, None), ("no", None)]:
            self.assertEqual(code(SystemExit, value), expected, value)
            self.assertEqual(code(SystemExit, SystemExit(value)), expected, value)
        self.assertIsNone(code(ValueError, ValueError("x")))
        self.assertIsNone(code(type("Mine", (SystemExit,), {}), None))


class File(unittest.TestCase):
    def test_it_is_written_whole_and_open(self):
        with tempfile.TemporaryDirectory() as folder:
            path = folder + "/main.py"
            for source in (b"", b"\xef\xbb\xbfprint(1)\n", b"x\0y\f", b"a" * 200_000):
                file = load().write_program(path, source)
                self.assertEqual(os.pread(file, 1 << 20, 0), source)
                os.close(file)

    def test_no_room_is_said(self):
        module = load()
        with self.assertRaises(SystemExit), contextlib.redirect_stderr(io.StringIO()) as said:
            module.os = types.SimpleNamespace(**vars(os))
            module.os._exit = sys.exit
            module.write_program("/dev/full/main.py", b"1")
        self.assertIn("limits.disk_bytes", said.getvalue())


class Modules(unittest.TestCase):
    def test_a_jobs_file_wins(self):
        with tempfile.TemporaryDirectory() as folder:
            module = load()
            module.WORK = folder
            pathlib.Path(folder, "mine.py").touch()
            pathlib.Path(folder, "package").mkdir()
            loaded = {name: types.ModuleType(name) for name in ("mine", "package", "package.part", "other")}
            with unittest.mock.patch.dict(sys.modules, loaded):
                module.KNOWN = frozenset(sys.modules.keys() - loaded.keys())
                module.make_way(module.imported())
                self.assertEqual([name for name in loaded if name in sys.modules], ["other"])

    def test_fork_is_made_the_default_of_multiprocessing(self):
        program = textwrap.dedent("""
            import sys
            sys.path.insert(0, "")
            prescript = __import__("test_prescript").load()
            prescript.start_by_fork()
            before = list(sys.meta_path)
            import multiprocessing
            print(multiprocessing.get_start_method(), prescript.ForkFinder in sys.meta_path, len(before) - len(sys.meta_path))
            print(multiprocessing.context._default_context._default_context is multiprocessing.get_context("fork"))
        """)
        here = pathlib.Path(__file__).parent
        ran = subprocess.run([sys.executable, "-c", program], cwd=here, capture_output=True, text=True)
        self.assertEqual((ran.stdout, ran.stderr), ("fork False 1\nTrue\n", ""))


class Preload(unittest.TestCase):
    def test_its_traceback_begins_with_itself(self):
        module = load()
        with self.assertRaises(SystemExit) as ended, contextlib.redirect_stderr(io.StringIO()) as said:
            module.run_preload(b"def f():\n    1 / 0\nf()\n")
        self.assertEqual(ended.exception.code, 1)
        lines = [line for line in said.getvalue().splitlines() if "^" not in line]
        self.assertEqual(lines[:1], ["Traceback (most recent call last):"])
        self.assertEqual(lines[1:3], ['  File "<preload>", line 3, in <module>', '  File "<preload>", line 2, in f'])

    def test_it_leaves_its_names_to_the_program(self):
        load().run_preload(b"given = 1\n")
        self.assertEqual(vars(sys.modules["__main__"]).pop("given"), 1)


class FastExit(unittest.TestCase):
    def test_what_is_quiet(self):
        module = load()
        with_del = type("WithDel", (), {"__del__": lambda self: None, "__module__": "test_prescript"})
        for kind, expected in [(int, True), (dict, True), (types.FunctionType, True), (with_del, False)]:
            self.assertEqual(module.quiet(kind, sys.modules), expected, kind)
        self.assertFalse(module.quiet(type("Nowhere", (), {"__module__": "no.such"}), sys.modules))
        self.assertTrue(module.quiet(type("Plain", (), {"__module__": "textwrap"}), sys.modules))

    def test_what_is_loud(self):
        module = load()
        for name, expected in [("textwrap", False), ("_sqlite3", True), ("_heapq", False)]:
            with contextlib.suppress(ImportError):
                loaded = __import__(name)
                if getattr(loaded, "__file__", None):
                    self.assertEqual(module.loud(loaded), expected, name)
        stranger = types.ModuleType("stranger")
        stranger.__file__ = "/usr/lib/python3/dist-packages/stranger.so"
        self.assertTrue(module.loud(stranger))

    def test_it_is_off_where_it_was_never_tried(self):
        module = load()
        module.TRIED = ((3, 0),)
        self.assertIn("never tried", module.set_up_fast_exit())
        self.assertNotIn("leave", module.PREPARED)


@unittest.skipUnless(os.path.exists(SHIM), "the shim is not built")
class Start(unittest.TestCase):
    """A program as the prescript has python run it, and as python does by itself."""

    # The prescript's end, without walls: what follows the lockdown.
    SCRIPT = """
(lambda space: exec(compile(open({head!r}).read(), "<sandpiper>", "exec"), space) or exec('''
SHIM = {shim!r}
def main():
    find_python(ctypes.PyDLL(SHIM))
    buffer_lines()
{prepared}
    renew_main()
    hand_over(prepare)
def prepare():
    path = {path!r}
    sys.path.insert(0, os.path.dirname(path))
    describe(path)
    sys.argv[1:] = ["argument"]
    return os.open(path, os.O_RDONLY), path
main()
''', space))({{"__builtins__": __builtins__, "__name__": "sandpiper"}})
"""

    PREPARED = ""

    def both(self, program, **options):
        with tempfile.TemporaryDirectory() as folder:
            path, script = folder + "/main.py", folder + "/head"
            pathlib.Path(path).write_bytes(program if isinstance(program, bytes) else textwrap.dedent(program).encode())
            pathlib.Path(script).write_text(head())
            prepared = textwrap.indent(textwrap.dedent(self.PREPARED.replace("MARK", folder + "/fast")), "    ")
            launcher = self.SCRIPT.format(head=script, shim=SHIM, path=path, prepared=prepared)
            options = {"capture_output": True, "text": True, "timeout": 60, **options}
            # -u -X utf8 is what a terminal's line buffering comes to for what is seen here.
            plain = subprocess.run([sys.executable, "-I", path, "argument"], stdin=subprocess.DEVNULL, **options)
            job = subprocess.run([sys.executable, "-I", "-"], input=launcher, **options)
            self.was_fast = os.path.exists(folder + "/fast")
        return [(ran.returncode, ran.stdout, ran.stderr) for ran in (plain, job)]

    def same(self, program, **options):
        plain, job = self.both(program, **options)
        self.assertEqual(plain, job, program)
        return plain

    def test_no_frame_and_no_name_of_ours(self):
        _, out, err = self.same("""
            import inspect, sys, traceback
            print(sys._getframe().f_back, len(inspect.stack()), sys.argv[1:], __file__ == sys.argv[0])
            print(sorted(globals()), type(__loader__).__name__, __spec__, __package__, __cached__)
            print([name for name in dir(sys) if name.startswith("last_")], sys.excepthook is sys.__excepthook__)
            traceback.print_stack()
        """)
        self.assertIn("None 1 ['argument'] True", out)
        self.assertNotIn("<sandpiper>", out + err)

    def test_as_deep_as_python_itself(self):
        self.same("""
            def depth(n=1):
                try:
                    return depth(n + 1)
                except RecursionError:
                    return n
            print(depth())
        """)

    def test_errors_are_pythons_own(self):
        for program in (
            "import collections\ncollections.OrderedDct()\n",
            "def f(x):\n    return x['a'] + 1\nprint(f({}))",
            "x = 1\n\f\ndef f():\n    raise ValueError('here')\nf()\n",
            "if 1:\n        x = 1\n\ty = 2\n",
            "print('a'\n",
            "def f(:\n",
            "x = '''never\nended\n",
            "try:\n    1/0\nexcept Exception as e:\n    raise ValueError('chained') from e\n",
            "def f():\n    f()\nf()\n",
            "raise type('Mine', (BaseException,), {})('x')\n",
            "import sys\nsys.excepthook = lambda *a: print('mine', a[0].__name__)\n1/0\n",
            "import sys\ndef hook(*a):\n    raise KeyError\nsys.excepthook = hook\n1/0\n",
            "import sys\nsys.stderr = None\n1/0\n",
            "import sys\nsys.tracebacklimit = 1\ndef f():\n    1/0\nf()\n",
            "print('before', end='')\n1/0\n",
            "import gc\ngc.collect()\n1/0\n",
        ):
            code, _, _ = self.same(program)
            self.assertEqual(code, 1, program)

    def test_sources_are_read_as_files_are(self):
        for program in (
            b"",
            b"print(__name__)",
            b"\xef\xbb\xbfprint('\xc3\xa9')\n",
            b"# coding: latin-1\nprint(ascii('\xe9'))\n",
            b"# coding: nonsense\nprint(1)\n",
            b"print('\xff')\n",
            b"print(1)\0\n",
            b"print(1)\r\nprint(2)\rprint(3)\n",
            b"from __future__ import annotations\nx: nope = 1\nprint(__annotations__)\n",
        ):
            self.same(program)

    def test_it_ends_as_python_ends(self):
        for program, code in (
            ("import sys\nsys.exit(3)\n", 3),
            ("import sys\nsys.exit('bye')\n", 1),
            ("raise SystemExit\n", 0),
            ("raise SystemExit(2**70)\n", 255),
            ("import atexit\natexit.register(print, 'at exit')\nprint('main')\n", 0),
            ("import atexit\natexit.register(print, 'at exit')\n1/0\n", 1),
            ("import threading, time\nthreading.Thread(target=lambda: (time.sleep(.1), print('late'))).start()\n", 0),
            ("class A:\n    def __del__(self):\n        print('del')\na = A()\na.a = a\nprint('main')\n", 0),
            ("raise KeyboardInterrupt\n", -signal.SIGINT),
            ("import sys, os\nos.close(1)\nprint('x', end='')\n", 120),
            ("import os\nprint('lost', end='')\nos._exit(5)\n", 5),
        ):
            self.assertEqual(self.same(program)[0], code, program)

    def test_lines_are_out_before_the_end(self):
        for program, seen in (
            ("import os\nprint('a')\nprint('b', end='')\nos._exit(0)\n", "a\n"),
            ("import os, sys\nprint(sys.stdout.line_buffering, sys.stdout.write_through)\nos._exit(0)\n", "True False\n"),
            (
                "import os\npid = os.fork()\nif not pid:\n    print('child')\n    os._exit(0)\nos.waitpid(pid, 0)\nos._exit(0)\n",
                "child\n",
            ),
        ):
            self.assertEqual(self.both(program)[1][1], seen, program)


class StartWithFastExit(Start):
    """The same once more, and each must be the same. The interpreter is prepared as a zygote prepares it."""

    PREPARED = """
        import gc
        leave = os._exit
        def marked(code):
            os.close(os.open("MARK", os.O_CREAT | os.O_WRONLY))
            leave(code)
        os._exit = marked
        assert set_up_fast_exit() is None, set_up_fast_exit()
        os._exit = leave
        gc.collect()
        gc.freeze()
    """

    def test_it_is_taken_where_nothing_would_notice(self):
        for program, fast in (
            ("print(1)\n", True),
            ("import sys\nprint('a', end='')\nsys.exit(3)\n", True),
            ("class A: pass\na = A()\nprint(len([A(), {}, a]))\n", True),
            ("1/0\n", False),
            ("import sys\nsys.exit('bye')\n", False),
            ("class A:\n    def __del__(self): print('del')\na = A()\n", False),
            ("import sys\nsys.stdout = open(1, 'w', closefd=False)\nprint(1)\n", False),
            ("import weakref\nclass A: pass\na = A()\nr = weakref.ref(a, lambda _: print('gone'))\n", False),
        ):
            self.same(program)
            self.assertEqual(self.was_fast, fast, program)


if __name__ == "__main__":
    unittest.main()
