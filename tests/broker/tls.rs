//! TLS to a real node, and every way in which it may be wrong. Certificates are made on the spot.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use crate::broker::Node;
use crate::requester::{Requester, collect};
use crate::worker::Worker;
use crate::{Queues, eventually};

/// Keys and certificates, in a directory that goes with them.
struct Papers(tempfile::TempDir);

impl Papers {
    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn openssl(&self, arguments: &str) {
        let output = Command::new("openssl")
            .args(arguments.split(' '))
            .current_dir(self.0.path())
            .stdin(Stdio::null())
            .output()
            .expect("openssl is not here: apt-get install openssl");
        assert!(output.status.success(), "openssl {arguments}: {}", String::from_utf8_lossy(&output.stderr));
    }

    /// Two authorities that do not know each other; of the first, a good certificate and one of the past.
    fn make() -> Self {
        let papers = Self(tempfile::tempdir().unwrap());
        for authority in ["ca", "stranger"] {
            papers.openssl(&format!(
                "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN={authority} \
                 -addext basicConstraints=critical,CA:TRUE -keyout {authority}.key -out {authority}.pem"
            ));
        }
        std::fs::write(papers.path("extensions"), "subjectAltName=DNS:localhost,IP:127.0.0.1\n").unwrap();
        papers.openssl(
            "req -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj /CN=localhost -keyout server.key \
             -out server.csr",
        );
        let sign = "x509 -req -in server.csr -CA ca.pem -CAkey ca.key -CAcreateserial -extfile extensions";
        papers.openssl(&format!("{sign} -days 2 -out server.pem"));
        papers.expire("server.csr", "expired.pem");
        papers
    }

    /// Key and certificate for `name`, of that authority.
    fn client(&self, name: &str, authority: &str) {
        self.openssl(&format!(
            "req -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj /CN={name} -keyout {name}.key -out \
             {name}.csr"
        ));
        self.openssl(&format!(
            "x509 -req -in {name}.csr -CA {authority}.pem -CAkey {authority}.key -CAcreateserial -days 2 \
             -extfile extensions -out {name}.pem"
        ));
    }

    /// A certificate whose time is over: `openssl x509` counts days from now only, `openssl ca` takes dates.
    fn expire(&self, request: &str, certificate: &str) {
        std::fs::create_dir(self.path("issued")).unwrap();
        std::fs::write(self.path("index.txt"), "").unwrap();
        std::fs::write(self.path("serial"), "01\n").unwrap();
        let configuration = "[ca]\ndefault_ca = one\n[one]\ndatabase = index.txt\nserial = serial\n\
            new_certs_dir = issued\ndefault_md = sha256\npolicy = any\n[any]\ncommonName = supplied\n";
        std::fs::write(self.path("ca.conf"), configuration).unwrap();
        self.openssl(&format!(
            "ca -batch -config ca.conf -cert ca.pem -keyfile ca.key -startdate 20200101000000Z -enddate \
             20200102000000Z -extfile extensions -in {request} -out {certificate} -notext"
        ));
    }
}

/// A server that only knows TLS: a certificate is refused long before AMQP.
struct Server(Child);

impl Server {
    fn start(papers: &Papers, certificate: &str, port: u16) -> Self {
        let mut command = Command::new("openssl");
        command
            .args([
                "s_server",
                "-quiet",
                "-key",
                "server.key",
                "-cert",
                certificate,
                "-accept",
                &port.to_string(),
            ])
            .current_dir(papers.0.path())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        Self(command.spawn().unwrap())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// A worker that cannot get in says why, stays alive, and shows no password.
async fn refused(url: &str, authority: &Path, says: &[&str]) {
    refused_with(url, &[&format!("amqp.ca_file={}", authority.display())], says).await;
}

async fn refused_with(url: &str, settings: &[&str], says: &[&str]) {
    let queues = Queues::of("tls.refused");
    let settings = queues.settings(&[settings, &["amqp.connect_timeout_ms=2000"]].concat());
    let mut worker = Worker::start(url, &settings).await;
    // Not each time: what a server says in its last moment may be lost with the connection.
    let why = eventually(&format!("it says one of {says:?} of {url}"), async || {
        let log = worker.log();
        let mut lines = log.lines().filter(|line| line.contains("no connection to the broker"));
        lines.find(|line| says.iter().any(|word| line.contains(word))).map(str::to_owned)
    })
    .await;
    println!("{url}: {why}");
    assert!(!worker.log().contains("guest:guest"), "a password in the log");
    worker.assert_alive();
    worker.until_not_ready().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_right_authority_and_every_wrong_one() {
    let papers = Papers::make();
    let port = free_port();
    let configuration = papers.path("extra.conf");
    let path = |name: &str| papers.path(name).display().to_string();
    let lines = format!(
        "listeners.ssl.1 = 127.0.0.1:{port}\nssl_options.cacertfile = {}\nssl_options.certfile = {}\n\
         ssl_options.keyfile = {}\nssl_options.verify = verify_none\n",
        path("ca.pem"),
        path("server.pem"),
        path("server.key"),
    );
    std::fs::write(&configuration, lines).unwrap();
    let node = Node::start_with(&["--config", &configuration.display().to_string()]);
    let url = format!("amqps://guest:guest@localhost:{port}/%2f");

    let queues = Queues::of("tls");
    let ca_file = format!("amqp.ca_file={}", path("ca.pem"));
    let worker = Worker::ready(&url, &queues.settings(&[&ca_file])).await;
    let requester = Requester::connect(node.url()).await;
    let mut replies = requester.replies(&queues.replies).await;
    requester.submit(&queues.jobs, "sealed", &queues.replies).await;
    collect(&mut replies, &["sealed".into()]).await;
    drop(worker);

    refused(&url, &papers.path("stranger.pem"), &["UnknownIssuer"]).await;
    let plain = format!("amqp://guest:guest@localhost:{port}/%2f");
    refused(&plain, &papers.path("ca.pem"), &["TLS"]).await;
    let sealed_to_plain = node.url().replace("amqp://", "amqps://");
    refused(&sealed_to_plain, &papers.path("ca.pem"), &["TLS", "InvalidContentType"]).await;
    let expired = free_port();
    let _server = Server::start(&papers, "expired.pem", expired);
    let url = format!("amqps://guest:guest@localhost:{expired}/%2f");
    refused(&url, &papers.path("ca.pem"), &["Expired", "expired"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_workers_own_certificate_and_every_wrong_one() {
    let papers = Papers::make();
    papers.client("worker", "ca");
    papers.client("second", "ca");
    papers.client("outsider", "stranger");
    papers.openssl("x509 -req -in worker.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 -out old.pem");
    papers.openssl("pkcs8 -topk8 -in worker.key -out locked.key -passout pass:secret");
    let port = free_port();
    let configuration = papers.path("extra.conf");
    let path = |name: &str| papers.path(name).display().to_string();
    let lines = format!(
        "listeners.ssl.1 = 127.0.0.1:{port}\nssl_options.cacertfile = {}\nssl_options.certfile = {}\n\
         ssl_options.keyfile = {}\nssl_options.verify = verify_peer\nssl_options.fail_if_no_peer_cert = true\n\
         ssl_cert_login_from = common_name\nauth_mechanisms.1 = EXTERNAL\nauth_mechanisms.2 = PLAIN\n",
        path("ca.pem"),
        path("server.pem"),
        path("server.key"),
    );
    std::fs::write(&configuration, lines).unwrap();
    let options =
        ["--config", &configuration.display().to_string(), "--plugins", "rabbitmq_auth_mechanism_ssl"];
    let node = Node::start_with(&options);
    for name in ["worker", "second"] {
        node.ctl(&["add_user", name, "none"]);
        node.ctl(&["clear_password", name]);
    }
    node.ctl(&["set_permissions", "worker", ".*", ".*", ".*"]);
    let url = format!("amqps://localhost:{port}/%2f");
    let authority = format!("amqp.ca_file={}", path("ca.pem"));
    let identity = |certificate: &str, key: &str| {
        let key = format!("amqp.key_file={}", path(key));
        [authority.clone(), format!("amqp.cert_file={}", path(certificate)), key, "amqp.auth=external".into()]
    };
    let refuse = async |certificate: &str, key: &str, says: &[&str]| {
        let settings = identity(certificate, key);
        refused_with(&url, &settings.each_ref().map(String::as_str), says).await;
    };

    // Files that change under the worker, as a rotation does it.
    let lay = |name: &str| {
        for ending in ["pem", "key"] {
            std::fs::copy(papers.path(&format!("{name}.{ending}")), papers.path(&format!("mine.{ending}")))
                .unwrap();
        }
    };
    lay("worker");
    let queues = Queues::of("mutual");
    let settings = queues.settings(&identity("mine.pem", "mine.key").each_ref().map(String::as_str));
    let mut worker = Worker::ready(&url, &settings).await;
    let users = node.ctl(&["-q", "list_connections", "user", "auth_mechanism"]);
    assert!(users.contains("worker\tEXTERNAL"), "{users}");
    let requester = Requester::connect(node.url()).await;
    let mut replies = requester.replies(&queues.replies).await;
    requester.submit(&queues.jobs, "sealed", &queues.replies).await;
    collect(&mut replies, &["sealed".into()]).await;

    node.ctl(&["clear_permissions", "worker"]);
    node.ctl(&["close_all_connections", "--global", "rotated"]);
    worker.until_not_ready().await;
    node.ctl(&["set_permissions", "second", ".*", ".*", ".*"]);
    lay("second");
    worker.until_ready().await;
    // Those that were refused meanwhile stay in the list for a moment.
    eventually("the worker is another user", async || {
        let users = node.ctl(&["-q", "list_connections", "user", "auth_mechanism"]);
        (users.contains("second\tEXTERNAL") && !users.contains("worker\tEXTERNAL")).then_some(())
    })
    .await;
    worker.assert_alive();
    drop(worker);

    // By password over the same port, with the certificate as the broker demands it.
    let by_password =
        identity("worker.pem", "worker.key").map(|setting| setting.replace("external", "plain"));
    let plain = format!("amqps://guest:guest@localhost:{port}/%2f");
    let settings = Queues::of("mutual.plain").settings(&by_password.each_ref().map(String::as_str));
    drop(Worker::ready(&plain, &settings).await);

    refused(&plain, &papers.path("ca.pem"), &["it wants a certificate of the worker"]).await;
    refuse("worker.pem", "second.key", &["amqp.key_file is not the key"]).await;
    refuse("worker.pem", "missing.key", &["read amqp.key_file", "missing.key"]).await;
    refuse("missing.pem", "worker.key", &["read amqp.cert_file"]).await;
    refuse("worker.key", "worker.key", &["amqp.cert_file", "no certificate"]).await;
    refuse("worker.pem", "worker.pem", &["it holds no private key"]).await;
    refuse("worker.pem", "locked.key", &["the key is encrypted"]).await;
    refuse("old.pem", "worker.key", &["of version 1"]).await;
    refuse("outsider.pem", "outsider.key", &["UnknownCA"]).await;
    node.ctl(&["delete_user", "worker"]);
    refuse("worker.pem", "worker.key", &["ACCESS_REFUSED", "ACCESS-REFUSED"]).await;
    let settings = identity("second.pem", "second.key");
    let settings = settings.each_ref().map(String::as_str);
    refused_with(&node.url().replace("guest:guest@", ""), &settings, &["needs amqps://"]).await;
}
