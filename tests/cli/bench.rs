//! Figures for people and for scripts.

use crate::support::run;

#[test]
fn the_json_holds_the_figures_and_every_status() {
    let bench = run(["bench", "--local", "-n", "4", "--concurrency", "2", "--json"]);
    assert_eq!(bench.code, 0, "{bench:?}");
    let figures = bench.json();
    let names: Vec<&String> = figures.as_object().unwrap().keys().collect();
    assert_eq!(names, ["jobs", "jobs_per_s", "max_ms", "p50_ms", "p90_ms", "p99_ms", "statuses"]);
    assert_eq!(figures["jobs"], 4);
    assert_eq!(figures["statuses"], serde_json::json!({ "succeeded": 4 }));
    let time = |name: &str| figures[name].as_f64().unwrap();
    assert!(time("jobs_per_s") > 0.0 && time("p50_ms") > 0.0, "{figures}");
    assert!(time("p50_ms") <= time("p90_ms") && time("p90_ms") <= time("p99_ms"), "{figures}");
    assert!(time("p99_ms") <= time("max_ms"), "{figures}");
}

#[test]
fn a_program_that_fails_makes_the_figures_worthless() {
    let directory = tempfile::tempdir().unwrap();
    let program = directory.path().join("fails.py");
    std::fs::write(&program, "raise SystemExit(3)").unwrap();
    let bench = run(["bench", "--local", "-n", "2", program.to_str().unwrap()]);
    assert_eq!(bench.code, 1, "{bench:?}");
    assert!(bench.stdout.contains("2 failed"), "{bench:?}");
    assert!(bench.complaint().contains("not every job succeeded"), "{bench:?}");
}

/// A module in site-packages that ends the zygote as soon as it is to make a child, and one that is not there.
#[test]
fn an_environment_that_cannot_start_warm_says_why() {
    // Jobs hide what lies below /tmp.
    let place = tempfile::tempdir_in("/var/tmp").unwrap();
    let asked = std::process::Command::new("/usr/bin/python3")
        .args(["-c", "import sys; print(end='python%d.%d' % sys.version_info[:2])"])
        .output()
        .unwrap();
    let version = String::from_utf8(asked.stdout).unwrap();
    let (bin, library) =
        (place.path().join("bin"), place.path().join("lib").join(version).join("site-packages"));
    std::fs::create_dir_all(&bin).unwrap();
    std::fs::create_dir_all(&library).unwrap();
    std::os::unix::fs::symlink("/usr/bin/python3", bin.join("python")).unwrap();
    std::fs::write(place.path().join("pyvenv.cfg"), "home = /usr/bin\n").unwrap();
    let dies = "import os\nos.register_at_fork(before=lambda: os._exit(1))\n";
    std::fs::write(library.join("dies.py"), dies).unwrap();
    for (module, why) in [("dies", "the zygote has ended"), ("absent", "No module named 'absent'")] {
        let python = format!("environments.default.python={}", bin.join("python").display());
        let imports = format!("environments.default.imports=[\"{module}\"]");
        let bench = run(["bench", "--local", "-n", "1", "--set", &python, "--set", &imports]);
        assert_eq!(bench.code, 1, "{bench:?}");
        assert!(bench.stderr.lines().last().unwrap().contains(why), "{bench:?}");
    }
}

/// The interpreter's own code is a file's no more where its process comes out of a zygote that has moved it.
#[test]
fn warm_jobs_come_out_of_large_pages() {
    assert!(
        std::path::Path::new("/sys/kernel/mm/transparent_hugepage").exists(),
        "this kernel has no transparent huge pages"
    );
    let directory = tempfile::tempdir().unwrap();
    let program = directory.path().join("looks.py");
    let looks = "import os\n\
        for line in open('/proc/self/maps'):\n    \
            name = os.path.basename(line.split()[-1])\n    \
            assert not ('r-xp' in line and name.startswith(('python', 'libpython'))), line\n";
    std::fs::write(&program, looks).unwrap();
    let bench = run(["bench", "--local", "-n", "4", program.to_str().unwrap()]);
    assert_eq!(bench.code, 0, "{bench:?}");
    let cold = ["bench", "--local", "-n", "1", "--set", "environments.default.warm=false"];
    let bench = run(cold.into_iter().chain([program.to_str().unwrap()]));
    assert_eq!(bench.code, 1, "a cold one reads it from its file: {bench:?}");
}
