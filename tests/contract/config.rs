//! The configuration: its layers, its checks, and the file that documents it.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use sandpiper::config::{Config, Exec, LogFormat, Queue, Topology};

fn written(text: &str) -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("config.toml");
    std::fs::write(&file, text).unwrap();
    (dir, file)
}

fn pairs(of: &[(&str, &str)]) -> Vec<(String, String)> {
    of.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
}

/// The error for a file, without the file's name.
fn fault(text: &str) -> String {
    let (_dir, file) = written(text);
    let error = Config::load(Some(&file), std::iter::empty(), &[]).unwrap_err().to_string();
    let rest = error.strip_prefix(&file.display().to_string()).unwrap_or_else(|| panic!("{error}"));
    rest.trim_start_matches([':', ',', ' ']).to_owned()
}

fn from_env(variables: &[(&str, &str)]) -> Result<Config, String> {
    Config::load(None, pairs(variables).into_iter(), &[]).map_err(|error| error.to_string())
}

#[test]
fn the_documented_file_is_the_default_and_complete() {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("config.toml");
    assert_eq!(Config::load(Some(&file), std::iter::empty(), &[]).unwrap(), Config::default());
    assert_eq!(from_env(&[]).unwrap(), Config::default());
    let text = std::fs::read_to_string(&file).unwrap();
    let documented: toml::Table = text.parse().unwrap();
    assert_eq!(documented, Config::defaults_as_written());
    let (mut keys, mut previous) = (0, "");
    for line in text.lines().filter(|line| !line.is_empty()) {
        if line.contains(" = ") && !line.starts_with('#') {
            assert!(previous.starts_with("# "), "no comment above {line}");
            keys += 1;
        }
        previous = line;
    }
    assert_eq!(keys, lines(&documented), "a key does not stand on a line of its own");
}

/// The lines that the keys of a table take; the two bounds of a limit share one.
fn lines(table: &toml::Table) -> usize {
    let one = |value: &toml::Value| match value.as_table() {
        Some(inner) if !inner.contains_key("maximum") => lines(inner),
        _ => 1,
    };
    table.values().map(one).sum()
}

#[test]
fn the_default_admission_is_that_of_the_default_configuration() {
    assert_eq!(Config::default().admission(), sandpiper::job::Admission::default());
}

#[test]
fn later_layers_win() {
    let (_dir, file) = written("[worker]\nslots = 2\nname = \"file\"\ndrain_timeout_ms = 7\n");
    let env =
        pairs(&[("SANDPIPER_WORKER__SLOTS", "3"), ("SANDPIPER_WORKER__NAME", "env"), ("HOME", "/x__y")]);
    let flags = pairs(&[("worker.slots", "4")]);
    let config = Config::load(Some(&file), env.into_iter(), &flags).unwrap();
    assert_eq!((config.worker.slots, config.worker.name.as_str()), (4, "env"));
    assert_eq!(config.worker.drain_timeout, Duration::from_millis(7));
    let named = pairs(&[("SANDPIPER_CONFIG", file.to_str().unwrap())]);
    assert_eq!(Config::load(None, named.into_iter(), &[]).unwrap().worker.name, "file");
}

#[test]
fn variables_are_read_by_the_type_of_their_key() {
    let config = from_env(&[
        ("SANDPIPER_LIMITS__TIMEOUT_MS__DEFAULT", "1000"),
        ("SANDPIPER_SANDBOX__ALLOW_PRELOAD", "true"),
        ("SANDPIPER_SANDBOX__ALLOW_SYSCALLS", "mincore, getcpu"),
        ("SANDPIPER_SANDBOX__REQUIRE", "[\"landlock\"]"),
        ("SANDPIPER_ENVIRONMENTS__DATA__PYTHON", "/opt/data/bin/python"),
        ("SANDPIPER_AMQP__URL", "amqp://a:b,c@one/, amqps://two:5671/x"),
        ("SANDPIPER_AMQP__TOPOLOGY", "passive"),
        ("SANDPIPER_HTTP__LISTEN", "off"),
        ("SANDPIPER_LOG__FORMAT", "json"),
    ])
    .unwrap();
    assert_eq!((config.limits.default.timeout_ms, config.limits.maximum.timeout_ms), (1_000, 300_000));
    assert!(config.sandbox.allow_preload && config.admission().allow_preload);
    assert_eq!(config.sandbox.allow_syscalls, ["mincore", "getcpu"]);
    assert_eq!(config.sandbox.require, ["landlock"]);
    assert_eq!(config.environments["data"].python, Path::new("/opt/data/bin/python"));
    assert_eq!(config.admission().environments.into_iter().collect::<Vec<_>>(), ["data", "default"]);
    let urls: Vec<&str> = config.amqp.urls.iter().map(|url| url.expose()).collect();
    assert_eq!(urls, ["amqp://a:b,c@one/", "amqps://two:5671/x"]);
    assert_eq!((config.amqp.topology, config.log.format), (Topology::Passive, LogFormat::Json));
    assert_eq!(config.http.listen, None);
}

#[test]
fn programs_are_a_switch_or_a_list() {
    let programs = |list: &[&str]| Exec::Programs(list.iter().map(PathBuf::from).collect());
    let written_as = |text: &str| {
        let (_dir, file) = written(&format!("[environments.x]\nallow_exec = {text}\n"));
        let config = Config::load(Some(&file), std::iter::empty(), &[]).unwrap();
        config.environments["x"].allow_exec.clone()
    };
    for (text, expected) in [
        ("false", Exec::Nothing),
        ("true", Exec::Anything),
        ("[]", Exec::Nothing),
        ("[\"/sbin/ldconfig\", \"/usr/bin/\"]", programs(&["/sbin/ldconfig", "/usr/bin"])),
    ] {
        assert_eq!(written_as(text), expected);
        let set = from_env(&[("SANDPIPER_ENVIRONMENTS__X__ALLOW_EXEC", text)]).unwrap();
        assert_eq!(set.environments["x"].allow_exec, expected);
    }
    let set = from_env(&[("SANDPIPER_ENVIRONMENTS__X__ALLOW_EXEC", "/usr/bin/id, /bin/sh")]).unwrap();
    assert_eq!(set.environments["x"].allow_exec, programs(&["/usr/bin/id", "/bin/sh"]));
    let error = from_env(&[("SANDPIPER_ENVIRONMENTS__X__ALLOW_EXEC", "yes")]).unwrap_err();
    assert!(error.ends_with("`environments.x.allow_exec` must be true or false"), "{error}");
    // A later layer may switch a list off.
    let (_dir, file) = written("[environments.x]\nallow_exec = [\"/bin/sh\"]\n");
    let flags = pairs(&[("environments.x.allow_exec", "false")]);
    let config = Config::load(Some(&file), std::iter::empty(), &flags).unwrap();
    assert_eq!(config.environments["x"].allow_exec, Exec::Nothing);
}

#[test]
fn strange_variables_are_refused_with_the_nearest() {
    let error = |name: &str, value: &str| from_env(&[(name, value)]).unwrap_err();
    assert_eq!(
        error("SANDPIPER_WORKER__SLOT", "4"),
        "environment variable SANDPIPER_WORKER__SLOT: names no key of the configuration; did you mean \
         SANDPIPER_WORKER__SLOTS?"
    );
    assert!(error("SANDPIPER_SLOTS", "4").ends_with("did you mean SANDPIPER_WORKER__SLOTS?"));
    assert!(error("SANDPIPER_WORKER__SLOTS", "four").ends_with("`worker.slots` must be a whole number"));
    assert!(
        error("SANDPIPER_WORKER__SLOTS", "-1").contains("SANDPIPER_WORKER__SLOTS: `worker.slots` must be")
    );
    assert!(error("SANDPIPER_WORKER", "4").contains("names no key"));
    assert!(error("SANDPIPER_LIMITS__CPU_MS", "4").contains("is a section"));
    // What Kubernetes sets for a service of this name.
    for name in
        ["SANDPIPER_SERVICE_HOST", "SANDPIPER_PORT", "SANDPIPER_PORT_9464_TCP_ADDR", "SANDPIPER_METRICS_PORT"]
    {
        assert!(from_env(&[(name, "tcp://10.0.0.1:9464")]).is_ok(), "{name}");
    }
}

#[test]
fn what_is_wrong_is_said_with_its_remedy() {
    let cases = [
        ("[worker]\nslot = 1", "unknown field `worker.slot`; did you mean `worker.slots`?"),
        ("[wroker]\nslots = 1", "unknown field `wroker`; did you mean `worker`?"),
        (
            "[limits]\ncpu_ms = { defualt = 1 }",
            "unknown field `limits.cpu_ms.defualt`; did you mean `limits.cpu_ms.default`?",
        ),
        ("[worker]\nslots = \"4\"", "`worker.slots` must be a whole number, not text"),
        ("[worker]\nslots = -4", "`worker.slots` must be a whole number, 0 or more, not -4"),
        ("[worker]\nslots = 5000", "`worker.slots` is 5000; it must be from 1 to 1024"),
        ("[worker]\nslots = 1\nslots = 2", "line 3: duplicate key"),
        (
            "[limits]\ncpu_ms = { default = 700000 }",
            "`limits.cpu_ms.default` is 700000, above `limits.cpu_ms.maximum` of 600000",
        ),
        (
            "[limits]\ncpu_ms = { default = 0 }",
            "`limits.cpu_ms.default` is 0; it must be from 1 to 9223372036854775807",
        ),
        (
            "[limits]\nopen_files = { default = 15 }",
            "`limits.open_files.default` is 15; it must be from 16 to 9223372036854775807",
        ),
        ("[amqp]\nurl = []", "`amqp.url` is empty; give at least one address"),
        ("[amqp]\ntopology = \"auto\"", "`amqp.topology` is `auto`; it must be `declare` or `passive`"),
        (
            "[amqp]\ndead_queue = \"sandpiper.jobs\"",
            "`amqp.dead_queue` is `sandpiper.jobs`, as another queue is; give each its own",
        ),
        (
            "[amqp]\njobs_queue = \"a\"\nqueues = [{ name = \"b\" }]",
            "`amqp.jobs_queue` is `a`, which is none of `amqp.queues`; add it there",
        ),
        (
            "[[amqp.queues]]\nname = \"a\"\n[[amqp.queues]]\nname = \"a\"",
            "`amqp.queues[1].name` is `a`, as another queue is; give each its own",
        ),
        (
            "[[amqp.queues]]\nname = \"a\"\nweight = 0",
            "`amqp.queues[0].weight` is 0; it must be from 1 to 1000",
        ),
        ("[[amqp.queues]]\nname = \"a\"\nwieght = 2", "unknown field `amqp.queues[0].wieght`; did you mean"),
        ("[[amqp.queues]]\nweight = 2", "`amqp.queues[0].name` is missing and must be given"),
        (
            "[amqp]\nmax_priority = 5",
            "`amqp.max_priority` is for classic queues: set `queue_type` to `classic`",
        ),
        (
            "[[amqp.queues]]\nname = \"a\"\nmax_priority = 5",
            "`amqp.queues[0].max_priority` is for classic queues",
        ),
        (
            "[amqp]\nqueue_type = \"stream\"",
            "`amqp.queue_type` is `stream`; it must be `quorum` or `classic`",
        ),
        ("[amqp]\ncert_file = \"/c.pem\"", "`amqp.cert_file` needs its key: set `amqp.key_file`"),
        ("[amqp]\nkey_file = \"/c.key\"", "`amqp.key_file` needs a certificate: set `amqp.cert_file`"),
        ("[amqp]\nauth = \"external\"", "`amqp.auth` is `external`, by certificate: set `amqp.cert_file`"),
        ("[amqp]\nheartbeat_ms = 1500", "`amqp.heartbeat_ms` must be whole seconds, a multiple of 1000"),
        ("[environments.x]\npython = \"python3\"", "`environments.x.python` must hold absolute paths"),
        (
            "[environments.x]\nallow_exec = [\"env\"]",
            "`environments.x.allow_exec` must be true, false, or a list of programs and directories by absolute",
        ),
        (
            "[environments.x]\nallow_exec = [\"/\"]",
            "`environments.x.allow_exec` must be true, false, or a list",
        ),
        (
            "[environments.x]\nallow_exec = [\"/usr/../work\"]",
            "`environments.x.allow_exec` must be true, false, or a list",
        ),
        (
            "[environments.x]\nallow_exec = [\"/tmp/bin\"]",
            "`environments.x.allow_exec` names `/tmp/bin`; /tmp is each job's own",
        ),
        ("[environments.x]\nallow_exec = 1", "`environments.x.allow_exec` must be true or false, not"),
        (
            "[sandbox]\nallow_syscalls = [\"PTRACE\"]",
            "`sandbox.allow_syscalls` holds `PTRACE`; a name has only a-z 0-9 _ -",
        ),
        ("[sandbox]\nrequire = [1]", "`sandbox.require[0]` must be text, not 1"),
        ("[sandbox]\nuid_base = 0", "`sandbox.uid_base` is 0; it must be from 1001 to"),
        (
            "[http]\nlisten = \":9464\"",
            "`http.listen` is `:9464`; it must be an address and a port such as `127.0.0.1:9464`, or `off`",
        ),
        ("[log]\nformat = \"xml\"", "`log.format` is `xml`; it must be `text` or `json`"),
        ("[log]\nlevel = \"inof\"", "`log.level` is `inof`; it must be a filter such as `info`"),
        ("[log]\nlevel = \"info=debug=x\"", "`log.level` is `info=debug=x`; it must be a filter"),
        (
            "[worker]\nslots = 1\n[limits]\ntimeout_ms = { maximum = 1800000 }",
            "`limits.timeout_ms.maximum` lets a job stay unacked for 5430000 ms (3 rounds",
        ),
    ];
    for (text, expected) in cases {
        let found = fault(text);
        assert!(found.starts_with(expected), "{text}\n  {found}\n  {expected}");
    }
}

#[test]
fn addresses_are_checked_and_never_shown() {
    for (address, expected) in [
        ("http://user:hunter2@host", "does not begin with amqp:// or amqps://"),
        ("amqp://user:hunter2@", "names no host"),
        ("amqp://user:hun/ter2@host", "write them as %2f and %40"),
        ("amqp://user:12/hunter2@host", "write them as %2f and %40"),
        ("amqp://user:hunter2@host:port", "has a port that is not a number"),
        ("amqp://user:hunter2@host:0", "has a port that is not a number"),
        ("amqp://user:hunt@er2@host", "write it as %40"),
        ("amqp://user:hunter2%@host", "write it as %25"),
        ("amqp://user:hunter2#@host", "write it as %23"),
        ("amqp://user:hunter2 @host", "holds a space"),
        ("amqp://user:hunter2@host/a/b", "write it as %2f"),
        ("amqp://user:hunter2@[::g]:5672", "is not of the form"),
    ] {
        let found = fault(&format!("[amqp]\nurl = \"{address}\""));
        assert!(found.contains(expected), "{address}: {found}");
        assert!(!found.contains("hunt"), "{found}");
    }
    let broken = fault("[amqp]\nurl = \"amqp://user:hunter2@host");
    assert!(!broken.contains("hunter2"), "{broken}");
    for good in ["amqp://host", "amqps://u:p%40@host:5671/%2f?heartbeat=5", "amqp://u@[::1]:5672/v"] {
        let config = from_env(&[("SANDPIPER_AMQP__URL", good)]).unwrap();
        assert!(!format!("{config:?}").contains(good), "the address shows in Debug");
    }
}

#[test]
fn addresses_come_from_a_file_and_change_with_it() {
    let (_dir, file) = written("amqp://u:one@a\n\namqp://u:two@b\n");
    let config = from_env(&[("SANDPIPER_AMQP__URL_FILE", file.to_str().unwrap())]).unwrap();
    let exposed = |config: &Config| -> Vec<String> {
        config.amqp.current_urls().unwrap().iter().map(|url| url.expose().to_owned()).collect()
    };
    assert_eq!(exposed(&config), ["amqp://u:one@a", "amqp://u:two@b"]);
    assert_eq!(config.amqp.urls.len(), 2);
    std::fs::write(&file, "amqp://u:three@c").unwrap();
    assert_eq!(exposed(&config), ["amqp://u:three@c"]);
    std::fs::write(&file, "\n").unwrap();
    assert!(
        config.amqp.current_urls().unwrap_err().to_string().ends_with("is empty; give at least one address")
    );
    std::fs::write(&file, "amqp://u:four@d").unwrap();
    let mode = |mode| std::fs::set_permissions(&file, std::fs::Permissions::from_mode(mode)).unwrap();
    mode(0o666);
    let refused = config.amqp.current_urls().unwrap_err().to_string();
    assert!(refused.contains("`amqp.url_file` can be written by everybody (mode 0666)"), "{refused}");
    assert!(!refused.contains("four"), "{refused}");
    mode(0o644);
    assert_eq!(exposed(&config), ["amqp://u:four@d"]);
    let missing = from_env(&[("SANDPIPER_AMQP__URL_FILE", "/nowhere/url")]).unwrap_err();
    assert!(missing.starts_with("/nowhere/url: "), "{missing}");
}

#[test]
fn queues_are_one_or_several() {
    let one = from_env(&[("SANDPIPER_AMQP__JOBS_QUEUE", "mine")]).unwrap().amqp;
    assert_eq!((one.queues, one.jobs_queue.as_str()), (vec![Queue::new("mine")], "mine"));
    let list = "[{ name = \"urgent\", weight = 3 }, { name = \"batch\" }]";
    let two = from_env(&[("SANDPIPER_AMQP__QUEUES", list)]).unwrap().amqp;
    let weights: Vec<_> = two.queues.iter().map(|queue| (queue.name.as_str(), queue.weight)).collect();
    assert_eq!((weights, two.jobs_queue.as_str()), (vec![("urgent", 3), ("batch", 1)], "urgent"));
    let chosen = from_env(&[("SANDPIPER_AMQP__QUEUES", list), ("SANDPIPER_AMQP__JOBS_QUEUE", "batch")]);
    assert_eq!(chosen.unwrap().amqp.jobs_queue, "batch");
    // The lightest of them waits too long for what a job may take.
    let late = from_env(&[("SANDPIPER_AMQP__QUEUES", "[{ name = \"a\", weight = 50 }, { name = \"b\" }]")]);
    assert!(late.unwrap_err().contains("bring the weights together"));
}
