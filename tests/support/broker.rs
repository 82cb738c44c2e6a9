//! Private RabbitMQ nodes, by way of `deploy/broker`, in a directory that goes with them; and one that the tests of a
//! run share, which `tests/support/shared-node` starts and ends.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nix::sys::signal::Signal;

/// Names the directory of the node that the tests of this run share.
const SHARED: &str = "SP_TEST_SHARED_NODE";

/// The virtual host whose name is `%2f` in a URL.
const DEFAULT_VHOST: &str = "/";

/// A running node, or a virtual host of the one that tests share.
pub(crate) struct Node {
    directory: PathBuf,
    url: String,
    vhost: String,
    owner: Owner,
}

/// Who ends a node.
enum Owner {
    /// This test, when the [`Node`] is dropped; with everything in its directory.
    Test(#[expect(dead_code, reason = "dropped with the node")] tempfile::TempDir),
    Cluster,
    Run,
}

impl Node {
    /// Starts a node and waits until it answers.
    pub(crate) fn start() -> Self {
        Self::start_with(&[])
    }

    /// The same with further options of `deploy/broker start`.
    pub(crate) fn start_with(options: &[&str]) -> Self {
        let home = tempfile::tempdir().unwrap();
        let mut node = Self {
            directory: home.path().into(),
            url: String::new(),
            vhost: DEFAULT_VHOST.into(),
            owner: Owner::Test(home),
        };
        node.url = start(&node.directory, options);
        node
    }

    /// A virtual host of this test's own on the node that the tests of this run share. Other tests see neither its
    /// queues nor its connections; users and settings of the node are everybody's. A node of its own if the run has
    /// started none, as without nextest.
    pub(crate) fn shared() -> Self {
        let Some(directory) = std::env::var_os(SHARED) else { return Self::start() };
        let vhost = format!("test-{}", std::process::id());
        let mut node = Self { directory: directory.into(), url: String::new(), vhost, owner: Owner::Run };
        let add = format!("rabbit_vhost:add(<<{:?}>>, <<\"test\">>)", node.vhost);
        node.eval(&[add, node.grant("guest", [".*"; 3])]);
        node.url = std::env::var("SP_TEST_SHARED_URL").unwrap().replace("%2f", &node.vhost);
        node
    }

    /// Where it listens, with its user and password. The same after a restart.
    pub(crate) fn url(&self) -> &str {
        &self.url
    }

    /// The same without user, password and virtual host.
    pub(crate) fn address(&self) -> &str {
        self.url.split(['@', '/']).nth(3).unwrap()
    }

    pub(crate) fn vhost(&self) -> &str {
        &self.vhost
    }

    /// Adds a user whose password is its name, and what it may configure, write and read in the virtual host. Returns
    /// its URL.
    pub(crate) fn add_user(&self, name: &str, permissions: [&str; 3]) -> String {
        let add = format!("rabbit_auth_backend_internal:add_user(<<{name:?}>>, <<{name:?}>>, <<\"test\">>)");
        self.eval(&[add, self.grant(name, permissions)]);
        let url = self.url.replacen("guest:guest", &format!("{name}:{name}"), 1);
        assert!(url.contains(name), "{url}");
        url
    }

    /// What lets a user configure, write and read in the virtual host, for [`eval`](Self::eval).
    fn grant(&self, user: &str, permissions: [&str; 3]) -> String {
        let [configure, write, read] = permissions.map(|pattern| format!("<<{pattern:?}>>"));
        let (user, vhost) = (format!("<<{user:?}>>"), format!("<<{:?}>>", self.vhost));
        let set = "rabbit_auth_backend_internal:set_permissions";
        format!("{set}({user}, {vhost}, {configure}, {write}, {read}, <<\"test\">>)")
    }

    /// Has the node evaluate expressions of Erlang, the last of which must give `ok`: several in one call of
    /// rabbitmqctl, each of which takes a second or more. Strings are quoted there as they are here.
    fn eval(&self, expressions: &[String]) {
        let said = self.ctl(&["eval", &format!("{}.", expressions.join(", "))]);
        assert_eq!(said.trim(), "ok", "{expressions:?}");
    }

    /// A line for each queue of the virtual host.
    pub(crate) fn list_queues(&self, columns: &[&str]) -> String {
        self.ctl(&[&["-q", "list_queues", "-p", &self.vhost, "--no-table-headers"][..], columns].concat())
    }

    /// Brings a stopped node back, with its queues.
    pub(crate) fn start_again(&self) {
        assert_eq!(start(&self.directory, &[]), self.url);
    }

    /// Shuts it down in good order.
    pub(crate) fn stop(&self) {
        run("stop", &self.directory, &[]);
    }

    /// Kills it as a crash would.
    pub(crate) fn kill(&self) {
        run("kill", &self.directory, &[]);
    }

    /// Stops its processor: connections stay, and nobody answers.
    pub(crate) fn freeze(&self) {
        self.signal(Signal::SIGSTOP);
    }

    /// Lets a frozen node go on.
    pub(crate) fn thaw(&self) {
        self.signal(Signal::SIGCONT);
    }

    fn signal(&self, signal: Signal) {
        let pid = std::fs::read_to_string(self.directory.join("pid")).unwrap();
        let pid = nix::unistd::Pid::from_raw(pid.trim().parse().unwrap());
        nix::sys::signal::kill(pid, signal).unwrap();
    }

    /// Whether it is RabbitMQ of this version, major and minor, or a later one.
    pub(crate) fn is_at_least(&self, wanted: (u32, u32)) -> bool {
        let version = self.ctl(&["version"]);
        let mut numbers = version.trim().split('.').map(|number| number.parse::<u32>().unwrap());
        (numbers.next().unwrap(), numbers.next().unwrap()) >= wanted
    }

    /// The end of what it has logged.
    fn log(&self) -> String {
        const LINES: usize = 300;
        let files = std::fs::read_dir(self.directory.join("log")).into_iter().flatten().flatten();
        let named = files.filter(|file| file.path().extension().is_some_and(|ending| ending == "log"));
        let text: String = named.filter_map(|file| std::fs::read_to_string(file.path()).ok()).collect();
        let lines: Vec<_> = text.lines().collect();
        lines[lines.len().saturating_sub(LINES)..].join("\n")
    }

    /// `rabbitmqctl`.
    pub(crate) fn ctl(&self, arguments: &[&str]) -> String {
        run("ctl", &self.directory, arguments)
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        // Of a cluster's it is gone already, and shown.
        if std::thread::panicking() && !matches!(self.owner, Owner::Cluster) {
            println!("--- the node's log\n{}", self.log());
        }
        if matches!(self.owner, Owner::Test(_)) {
            clear(&self.directory);
        }
    }
}

/// Three nodes that hold queues together. All of them end when this is dropped.
pub(crate) struct Cluster {
    home: tempfile::TempDir,
    nodes: Vec<Node>,
}

impl Cluster {
    /// Starts them and waits until they have found each other.
    pub(crate) fn start() -> Self {
        let home = tempfile::tempdir().unwrap();
        // First, so that nothing stays where a node does not start.
        let mut cluster = Self { home, nodes: Vec::new() };
        let urls = start(cluster.home.path(), &["--nodes", "3"]);
        let urls: Vec<String> = serde_json::from_str(&urls).unwrap();
        cluster.nodes = urls
            .into_iter()
            .zip(1..)
            .map(|(url, number)| Node {
                directory: cluster.home.path().join(number.to_string()),
                url,
                vhost: DEFAULT_VHOST.into(),
                owner: Owner::Cluster,
            })
            .collect();
        cluster
    }

    pub(crate) fn node(&self, at: usize) -> &Node {
        &self.nodes[at]
    }

    /// Every address, that of node `first` first, as `amqp.url` takes them.
    pub(crate) fn urls(&self, first: usize) -> String {
        let turned = self.nodes[first..].iter().chain(&self.nodes[..first]);
        format!("{:?}", turned.map(Node::url).collect::<Vec<_>>())
    }

    /// Which node leads a quorum queue, as the node `asked` knows it.
    pub(crate) fn leader(&self, asked: usize, queue: &str) -> usize {
        let table = self.nodes[asked].list_queues(&["name", "leader"]);
        let line =
            table.lines().find_map(|line| line.strip_prefix(queue)).unwrap_or_else(|| panic!("{table}"));
        let number = line.trim().split_once('@').and_then(|(name, _)| name.rsplit_once('-')).unwrap().1;
        number.parse::<usize>().unwrap() - 1
    }

    /// Cuts a node off from the others and from nobody else: it knows the others by a wrong cookie from here on,
    /// so that it neither lets them in nor is let in. Unlike a filter of packets this takes no rights and no
    /// firewall, touches nothing else of the machine, and comes at once: both sides see a closed connection,
    /// where packets that are dropped would have to be missed for a minute. It must not find the time to tell one
    /// that it has lost the other: they would believe it, and part as well.
    pub(crate) fn cut_off(&self, at: usize) {
        self.nodes[at].ctl(&[
            "eval",
            "sys:suspend(global_name_server), \
             [begin erlang:set_cookie(N, cut_off), erlang:disconnect_node(N) end \
             || N <- rabbit_nodes:all(), N =/= node()], \
             sys:resume(global_name_server).",
        ]);
    }

    /// Lets it find the others again.
    pub(crate) fn reunite(&self, at: usize) {
        self.nodes[at]
            .ctl(&["eval", "[erlang:set_cookie(N, erlang:get_cookie()) || N <- rabbit_nodes:all()]."]);
    }

    /// How many of them run, as the node `asked` knows it.
    pub(crate) fn running(&self, asked: usize) -> usize {
        let said = self.nodes[asked].ctl(&["eval", "length(rabbit_nodes:all_running())."]);
        said.trim().parse().unwrap_or_else(|_| panic!("{said}"))
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for node in self.nodes.iter().filter(|_| std::thread::panicking()) {
            println!("--- the log of {}\n{}", node.url, node.log());
        }
        // Nobody needs its queues again, and a node in good order would wait for the others.
        drop(broker("kill", self.home.path(), &[]));
        clear(self.home.path());
    }
}

/// The address or addresses that it prints.
fn start(directory: &Path, options: &[&str]) -> String {
    let line = run("start", directory, options);
    let url = line.trim().strip_prefix("SANDPIPER_AMQP__URL=");
    url.unwrap_or_else(|| panic!("deploy/broker start printed {line:?}")).to_owned()
}

fn clear(directory: &Path) {
    drop(broker("stop", directory, &[]));
}

fn run(verb: &str, directory: &Path, arguments: &[&str]) -> String {
    let output = broker(verb, directory, arguments).unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "deploy/broker {verb} {arguments:?} failed: {errors}");
    String::from_utf8(output.stdout).unwrap()
}

/// `SP_TEST_BROKER` names what does the same with another RabbitMQ.
fn broker(verb: &str, directory: &Path, arguments: &[&str]) -> std::io::Result<std::process::Output> {
    let ours = || Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy/broker");
    let script = std::env::var_os("SP_TEST_BROKER").map_or_else(ours, PathBuf::from);
    Command::new(script).arg(verb).arg(directory).args(arguments).stdin(Stdio::null()).output()
}
