//! Python under the policy: what ordinary programs do must work, and what is refused must raise what they
//! catch. The filter is the one without a listener, which python puts on itself. Needs python3 and no
//! privilege; `SP_TEST_PYTHON` names another interpreter.
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::io::Write as _;
use std::process::Command;

use sandpiper::sandbox::inner_wall::{Options, Policy};

const STRICT: Options<'_> = Options { memory_group: true, cpu_group: true, ..Options::CLOSED };

/// Puts the filter, given as a file, on the interpreter itself.
const PRELUDE: &str = r"
import ctypes, sys
code = open(sys.argv[1], 'rb').read()
class Program(ctypes.Structure):
    _fields_ = [('len', ctypes.c_ushort), ('filter', ctypes.c_char_p)]
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, ctypes.byref(Program(len(code) // 8, code)), 0, 0) == 0, ctypes.get_errno()
";

/// Runs python code under the fallback and returns its output; a forbidden call fails the test.
fn python(options: &Options<'_>, code: &str) -> String {
    let policy = Policy::compile(options).unwrap();
    let [program] = policy.fallback() else { panic!("one program is expected") };
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(&program.bytes()).unwrap();
    let home = tempfile::tempdir().unwrap();
    let interpreter = std::env::var_os("SP_TEST_PYTHON").unwrap_or_else(|| "python3".into());
    let output = Command::new(interpreter)
        .args(["-c", &format!("{PRELUDE}\n{code}")])
        .arg(file.path())
        .current_dir(home.path())
        .env("HOME", home.path())
        .output()
        .expect("python3 is needed: set SP_TEST_PYTHON if it has another name");
    let text = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}: {text}\n{errors}", output.status);
    text
}

#[test]
fn the_standard_library_works() {
    let code = r"
import asyncio, concurrent.futures, ctypes, decimal, glob, hashlib, io, json, logging, mmap, multiprocessing, os
import queue, random, resource, selectors, shutil, signal, sqlite3, ssl, tempfile, threading, time, uuid, zlib
json.dumps({'a': 1}); uuid.uuid1(); uuid.uuid4(); os.urandom(8); hashlib.sha256(b'x').hexdigest()
async def main():
    await asyncio.gather(*(asyncio.sleep(0.01) for _ in range(5)))
    await asyncio.get_running_loop().run_in_executor(None, time.sleep, 0.01)
asyncio.run(main())
done = []
threads = [threading.Thread(target=done.append, args=(i,)) for i in range(8)]
[t.start() for t in threads]; [t.join() for t in threads]
assert len(done) == 8
with tempfile.TemporaryDirectory() as d:
    p = os.path.join(d, 'f'); open(p, 'w').write('x'); shutil.copy2(p, p + '2'); shutil.copytree(d, d + '-copy')
    os.rename(p, p + '3'); os.symlink(p, p + '4'); os.mkfifo(p + '5'); os.chmod(p + '3', 0o600); os.utime(p + '3')
    db = sqlite3.connect(os.path.join(d, 'db')); db.execute('pragma journal_mode=wal')
    db.execute('create table t(x)'); db.execute('insert into t values(1)'); db.commit()
    assert db.execute('select x from t').fetchall() == [(1,)]
    shutil.rmtree(d + '-copy')
ssl.create_default_context(); decimal.Decimal(1) / 3
context = multiprocessing.get_context('fork')
with context.Pool(2) as pool:
    assert pool.map(abs, [-1, 2, -3]) == [1, 2, 3]
q = context.Queue(); w = context.Process(target=q.put, args=(7,)); w.start(); assert q.get() == 7; w.join()
a, b = context.Pipe(); a.send('x'); assert b.recv() == 'x'
assert context.Value('i', 3).value == 3
with concurrent.futures.ProcessPoolExecutor(2, mp_context=context) as e:
    assert list(e.map(len, ['a', 'bb'])) == [1, 2]
caught = []
signal.signal(signal.SIGALRM, lambda *_: caught.append(1)); signal.setitimer(signal.ITIMER_REAL, 0.01)
while not caught: time.sleep(1)
m = mmap.mmap(-1, 8192); m.write(b'x'); m.close()
pid = os.fork()
if pid == 0: os._exit(3)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 3
resource.getrlimit(resource.RLIMIT_NOFILE); resource.setrlimit(resource.RLIMIT_NICE, (0, 0))
shutil.disk_usage('.'); os.sched_getaffinity(0); os.memfd_create('x'); os.pidfd_open(os.getpid())
assert ctypes.CFUNCTYPE(ctypes.c_int)(lambda: 5)() == 5
print('whole')
";
    assert_eq!(python(&STRICT, code), "whole");
}

#[test]
fn refusals_raise_what_python_programs_catch() {
    let code = r"
import os, socket, subprocess, time
def refused(f):
    try: f()
    except PermissionError: return
    raise SystemExit(f'not refused: {f}')
refused(lambda: socket.socket())
refused(lambda: socket.socket(socket.AF_UNIX))
refused(lambda: socket.socketpair(type=socket.SOCK_DGRAM))
refused(lambda: subprocess.run(['true']))
refused(lambda: os.execv('/bin/true', ['true']))
refused(lambda: os.chroot('.'))
refused(lambda: os.setuid(0))
os.nice(1)
refused(lambda: os.setpriority(os.PRIO_PGRP, 0, 5))
refused(lambda: time.clock_settime(time.CLOCK_REALTIME, 0))
refused(lambda: os.chown('.', 0, 0))
started = time.monotonic()
try: socket.gethostbyname('example.com')
except OSError: pass
else: raise SystemExit('resolved')
assert time.monotonic() - started < 2, 'a refused lookup waits for nobody'
assert os.system('true') != 0
print('refused')
";
    assert_eq!(python(&STRICT, code), "refused");
}

#[test]
fn with_the_network_tcp_and_names_work() {
    let options = Options { network: true, exec: false, extra: &[], ..Options::CLOSED };
    let code = r"
import socket, threading
server = socket.create_server(('127.0.0.1', 0))
def serve():
    peer, _ = server.accept(); peer.sendall(b'hello'); peer.close()
t = threading.Thread(target=serve); t.start()
with socket.create_connection(server.getsockname()) as s: assert s.recv(9) == b'hello'
t.join()
assert socket.getaddrinfo('localhost', 80) and socket.if_nameindex()
for family, kind in (socket.AF_UNIX, socket.SOCK_STREAM), (socket.AF_INET, socket.SOCK_RAW), (socket.AF_PACKET, 3):
    try: socket.socket(family, kind)
    except PermissionError: continue
    raise SystemExit(f'{family} {kind}')
print('spoken')
";
    assert_eq!(python(&options, code), "spoken");
}

#[test]
fn with_exec_subprocesses_work() {
    let options = Options { network: false, exec: true, extra: &[], ..Options::CLOSED };
    let code =
        "import subprocess\nprint(subprocess.run(['echo', 'ran'], capture_output=True, text=True).stdout)";
    assert_eq!(python(&options, code), "ran");
}

#[test]
fn scientific_libraries_work() {
    let there = "import importlib.util as u\nprint(all(u.find_spec(name) for name in ('numpy', 'pandas')))";
    if python(&STRICT, there) != "True" {
        assert!(std::env::var_os("CI").is_none(), "numpy and pandas are needed in CI");
        let skipped = "SKIPPED: no numpy and pandas; set SP_TEST_PYTHON to a python that has them";
        writeln!(std::io::stderr(), "{skipped}").unwrap();
        return;
    }
    let code = r"
import importlib.util
import numpy as np, pandas as pd
a = np.random.rand(400, 400); np.linalg.svd(a @ a); np.fft.fft(a)
frame = pd.DataFrame({'a': range(1000), 'b': range(1000)})
frame.groupby('a').sum(); frame.to_csv('x.csv'); pd.read_csv('x.csv')
if importlib.util.find_spec('matplotlib'):
    import matplotlib; matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    plt.plot([1, 2]); plt.savefig('x.png')
if importlib.util.find_spec('scipy'):
    import scipy.optimize; scipy.optimize.minimize(lambda x: (x ** 2).sum(), [1.0, 2.0])
if importlib.util.find_spec('sklearn'):
    import sklearn.cluster; sklearn.cluster.KMeans(3).fit(a)
if importlib.util.find_spec('pyarrow'):
    import pyarrow.parquet; pyarrow.parquet.write_table(pyarrow.Table.from_pandas(frame), 'x.parquet')
if importlib.util.find_spec('polars'):
    import polars; polars.DataFrame({'a': [1, 2]}).lazy().group_by('a').len().collect()
if importlib.util.find_spec('numba'):
    import numba; numba.njit(lambda x: x + 1)(1)
if importlib.util.find_spec('psutil'):
    import psutil; psutil.Process().memory_info(); psutil.cpu_count(); psutil.Process().rlimit(psutil.RLIMIT_CPU)
if importlib.util.find_spec('cryptography'):
    from cryptography.hazmat.primitives.asymmetric import ed25519; ed25519.Ed25519PrivateKey.generate().sign(b'x')
# libuv asks for io_uring when a loop starts, and has to go on without it.
if importlib.util.find_spec('uvloop'):
    import asyncio, uvloop
    loop = uvloop.new_event_loop(); loop.run_until_complete(asyncio.sleep(0.01)); loop.close()
print('computed')
";
    assert_eq!(python(&STRICT, code), "computed");
}
