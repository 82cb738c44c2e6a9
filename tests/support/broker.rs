//! A private RabbitMQ node, by way of `deploy/broker`, in a directory that goes with it.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// A running node. Stopped, with everything of it, when this is dropped.
pub(crate) struct Node {
    directory: tempfile::TempDir,
    url: String,
}

impl Node {
    /// Starts a node and waits until it answers.
    pub(crate) fn start() -> Self {
        Self::start_with(&[])
    }

    /// The same with further options of `deploy/broker start`.
    pub(crate) fn start_with(options: &[&str]) -> Self {
        let mut node = Self { directory: tempfile::tempdir().unwrap(), url: String::new() };
        node.url = node.start_with_options(options);
        node
    }

    /// Where it listens, with its user and password. The same after a restart.
    pub(crate) fn url(&self) -> &str {
        &self.url
    }

    /// Brings a stopped node back, with its queues.
    pub(crate) fn start_again(&self) -> String {
        self.start_with_options(&[])
    }

    fn start_with_options(&self, options: &[&str]) -> String {
        let line = self.run("start", options);
        let url = line.trim().strip_prefix("SANDPIPER_AMQP__URL=");
        url.unwrap_or_else(|| panic!("deploy/broker start printed {line:?}")).to_owned()
    }

    /// Shuts it down in good order.
    pub(crate) fn stop(&self) {
        self.run("stop", &[]);
    }

    /// Kills it as a crash would.
    pub(crate) fn kill(&self) {
        self.run("kill", &[]);
    }

    /// Stops its processor: connections stay, and nobody answers.
    pub(crate) fn freeze(&self) {
        self.signal(nix::sys::signal::Signal::SIGSTOP);
    }

    /// Lets a frozen node go on.
    pub(crate) fn thaw(&self) {
        self.signal(nix::sys::signal::Signal::SIGCONT);
    }

    fn signal(&self, signal: nix::sys::signal::Signal) {
        let pid = std::fs::read_to_string(self.directory.path().join("pid")).unwrap();
        let pid = nix::unistd::Pid::from_raw(pid.trim().parse().unwrap());
        nix::sys::signal::kill(pid, signal).unwrap();
    }

    /// `rabbitmqctl`.
    pub(crate) fn ctl(&self, arguments: &[&str]) -> String {
        self.run("ctl", arguments)
    }

    fn run(&self, verb: &str, arguments: &[&str]) -> String {
        let script: PathBuf = Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy/broker");
        let output = Command::new(script)
            .arg(verb)
            .arg(self.directory.path())
            .args(arguments)
            .stdin(Stdio::null())
            .output()
            .unwrap();
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "deploy/broker {verb} {arguments:?} failed: {errors}");
        String::from_utf8(output.stdout).unwrap()
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy/broker");
        drop(Command::new(script).arg("stop").arg(self.directory.path()).stderr(Stdio::null()).status());
    }
}
