//! Files on their way in and out on the command line: named by the user, and named by the job.

use std::fs;
use std::os::unix::fs::symlink;

use crate::support::{Ran, command, finish, run_with_stdin};

fn exec(code: &str, flags: &[&str]) -> Ran {
    run_with_stdin(["exec", "-"].iter().chain(flags), code.as_bytes())
}

/// As [`exec`], on a worker that lets jobs bring a preload.
fn exec_after(preload: &str, code: &str, flags: &[&str]) -> Ran {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("preload.py");
    fs::write(&path, preload).unwrap();
    let args = ["exec", "-", "--json", "--preload", path.to_str().unwrap()];
    let mut command = command(args.iter().chain(flags));
    command.env("SANDPIPER_SANDBOX__ALLOW_PRELOAD", "true").stdin(std::process::Stdio::piped());
    finish(command, code.as_bytes())
}

#[test]
fn a_file_goes_in_and_another_comes_out() {
    let dir = tempfile::tempdir().unwrap();
    let input = dir.path().join("data.csv");
    fs::write(&input, b"a,b\n\xff").unwrap();
    let (input, out) = (input.to_str().unwrap(), dir.path().join("not/there/yet"));
    let renamed = format!("deep/er/x={input}");
    let flags = [
        "--file",
        input,
        "--file",
        &renamed,
        "--artifact",
        "out/**",
        "--artifacts-to",
        out.to_str().unwrap(),
    ];
    let code = "import os\nos.makedirs('out/deep')\nboth = open('data.csv', 'rb').read() + \
                open('deep/er/x', 'rb').read()\nopen('out/deep/f', 'wb').write(both)";
    let ran = exec(code, &flags);
    assert_eq!((ran.code, ran.stderr.as_str()), (0, ""), "{ran:?}");
    assert_eq!(fs::read(out.join("out/deep/f")).unwrap(), b"a,b\n\xffa,b\n\xff");
}

/// A job chooses the names of its files: `.git/config`, a Makefile. None takes the place of what is there unless it was
/// asked for, and a wildcard asks for no hidden one.
#[test]
fn a_returned_file_takes_the_place_of_none() {
    let dir = tempfile::tempdir().unwrap();
    let there = |name: &str| fs::read_to_string(dir.path().join(name)).unwrap();
    fs::create_dir(dir.path().join(".git")).unwrap();
    for name in ["Makefile", ".git/config", ".envrc"] {
        fs::write(dir.path().join(name), "mine").unwrap();
    }
    let code = "import os\nos.mkdir('.git')\n\
                for name in ('Makefile', '.git/config', '.envrc', 'new'): open(name, 'w').write('theirs')";
    let to = ["--artifacts-to", dir.path().to_str().unwrap(), "--artifact", "**"];
    let ran = exec(code, &to);
    assert_eq!(ran.code, 125, "{ran:?}");
    let told = "1 of 2 returned files were not written to ";
    assert!(ran.complaint().starts_with(told), "{ran:?}");
    assert!(ran.complaint().ends_with("\"Makefile\" is there already (--overwrite replaces it)"), "{ran:?}");
    assert_eq!([there("Makefile"), there(".git/config"), there("new")], ["mine", "mine", "theirs"]);
    let ran = exec(code, &[&to[..], &["--overwrite"]].concat());
    assert_eq!((ran.code, ran.stderr.as_str()), (0, ""), "{ran:?}");
    assert_eq!([there("Makefile"), there(".git/config"), there(".envrc")], ["theirs", "mine", "mine"]);
    let ran = exec(code, &[&to[..3], &[".env*", "--overwrite"]].concat());
    assert_eq!((ran.code, there(".envrc").as_str()), (0, "theirs"), "{ran:?}");
}

#[test]
fn no_returned_file_is_written_through_a_link() {
    let dir = tempfile::tempdir().unwrap();
    let (out, elsewhere) = (dir.path().join("out"), dir.path().join("elsewhere"));
    fs::create_dir(&out).unwrap();
    fs::create_dir(&elsewhere).unwrap();
    fs::write(elsewhere.join("file"), "untouched").unwrap();
    symlink(&elsewhere, out.join("dir")).unwrap();
    symlink(elsewhere.join("file"), out.join("link")).unwrap();
    let to = ["--artifacts-to", out.to_str().unwrap(), "--artifact"];
    for (made, pattern) in [("dir/new", "dir/*"), ("link", "link")] {
        let code = format!("import os\nos.makedirs('dir')\nopen('{made}', 'w').write('planted')");
        for flags in [&[pattern][..], &[pattern, "--overwrite"]] {
            let ran = exec(&code, &[&to[..], flags].concat());
            assert_eq!(ran.code, 125, "{ran:?}");
            assert!(ran.complaint().contains(made) && ran.complaint().contains("not written"), "{ran:?}");
        }
    }
    assert_eq!(fs::read(elsewhere.join("file")).unwrap(), b"untouched");
    assert_eq!(fs::read_dir(&elsewhere).unwrap().count(), 1);
}

#[test]
fn what_had_to_be_left_out_is_said() {
    let ran = exec("for n in range(300): open(f'{n}', 'w')", &["--artifact", "*"]);
    assert_eq!((ran.code, ran.stdout.as_str()), (0, ""), "{ran:?}");
    assert!(ran.complaint().starts_with("44 of 300 artifacts were left out"), "{ran:?}");
}

#[test]
fn a_preload_cannot_bend_where_files_go() {
    let dir = tempfile::tempdir().unwrap();
    let input = dir.path().join("f");
    fs::write(&input, "x").unwrap();
    let file = |inside: &str| format!("{inside}={}", input.display());
    let link = "import os\nos.symlink('/tmp', '/work/d')\nopen('/work/taken', 'w')";
    for inside in ["d/f", "d", "taken", "taken/f"] {
        let result = exec_after(link, "print('REACHED')", &["--file", &file(inside)]).json();
        assert_eq!((&result["status"], &result["stdout"]), (&"rejected".into(), &"".into()), "{result}");
        assert!(result["error"].as_str().unwrap().starts_with("`files[0].path` is"), "{result}");
    }
    // Beside what it made there is room.
    let result = exec_after(link, "print(open('f').read())", &["--file", &file("f")]).json();
    assert_eq!((&result["status"], &result["stdout"]), (&"succeeded".into(), &"x\n".into()), "{result}");
}

#[test]
fn a_preload_cannot_pass_another_directory_off_as_its_own() {
    for other in ["/usr/lib", "/", "/work/file"] {
        let swap = format!("import os\nopen('/work/file', 'w')\nos.dup2(os.open('{other}', os.O_PATH), 6)");
        let result = exec_after(&swap, "print('REACHED')", &["--artifact", "**"]).json();
        assert_eq!((&result["status"], &result["stdout"]), (&"worker_error".into(), &"".into()), "{result}");
    }
}

/// A start sends descriptors, and the kernel counts those under way for each user: here both jobs are one.
#[test]
fn a_job_that_floods_its_sockets_with_descriptors_keeps_no_other_from_starting() {
    let flood = "
import socket, time
held = []
while len(held) < 100:
    a, b = socket.socketpair()
    a.setblocking(False)
    held += [a, b]
    try:
        for n in range(5):
            socket.send_fds(a, [b'x'], [a.fileno()] * 250)
    except OSError: pass
time.sleep(1.5)
";
    let flags = ["exec", "-", "--open-files", "1024"];
    let mut command = command(flags);
    command.stdin(std::process::Stdio::piped());
    let flooding = std::thread::spawn(move || finish(command, flood.as_bytes()));
    let mut starts = 0;
    while !flooding.is_finished() {
        let ran = exec("print('started')", &[]);
        assert_eq!((ran.code, ran.stdout.as_str()), (0, "started\n"), "{ran:?}");
        starts += 1;
    }
    let flooded = flooding.join().unwrap();
    assert!(flooded.code == 0 && starts > 1, "{starts} starts beside {flooded:?}");
}
