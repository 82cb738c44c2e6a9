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
    let queues = Queues::of("tls.refused");
    let ca_file = format!("amqp.ca_file={}", authority.display());
    let settings = queues.settings(&[&ca_file, "amqp.connect_timeout_ms=2000"]);
    let mut worker = Worker::start(url, &settings).await;
    let why = eventually("it says why it cannot connect", async || {
        let log = worker.log();
        log.lines().find(|line| line.contains("no connection to the broker")).map(str::to_owned)
    })
    .await;
    println!("{url}: {why}");
    assert!(says.iter().any(|word| why.contains(word)), "{url}: none of {says:?} in {why}");
    assert!(!worker.log().contains("guest:guest"), "a password in the log");
    worker.assert_alive();
    worker.until_not_ready().await;
}

pub(crate) async fn the_right_authority_and_every_wrong_one() {
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
