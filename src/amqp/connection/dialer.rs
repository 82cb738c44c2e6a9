//! The way to a connection: the configured addresses in turn, each under a timeout of our own.
//!
//! Dialling again after a loss is the supervisor's business.

use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Once};

use lapin::tcp::{AsyncTcpStream, OwnedIdentity, OwnedTLSConfig};
use lapin::uri::{AMQPScheme, AMQPUri, SASLMechanism};
use lapin::{Connection, ConnectionProperties, ErrorKind};

use crate::amqp::Error;
use crate::amqp::connection::link::{Link, Socket};
use crate::amqp::connection::signer::Signer;
use crate::amqp::frames::oversize::Dropped;
use crate::amqp::frames::{filter::FrameFilter, reactor};
use crate::config;
use crate::config::{Auth, Secret};

/// Finds a broker among the configured addresses.
#[derive(Clone, Debug)]
pub(in crate::amqp) struct Dialer {
    config: config::Amqp,
    name: String,
    patient: bool,
    /// The largest body of a delivery that comes through.
    most: Option<usize>,
    /// Which address led to the last connection.
    last: Arc<AtomicUsize>,
    /// Which address is the first to be tried.
    first: Arc<AtomicUsize>,
}

impl Dialer {
    /// `name` is what operators see in the broker's list of connections.
    pub(in crate::amqp) fn new(config: &config::Amqp, name: String) -> Self {
        prepare_lapin();
        let (last, first) = (Arc::default(), Arc::default());
        Self { config: config.clone(), name, patient: true, most: None, last, first }
    }

    /// Bodies of deliveries that have more bytes than this do not come through.
    pub(in crate::amqp) fn limited(self, most: usize) -> Self {
        Self { most: Some(most), ..self }
    }

    /// For a person who waits: a broker that takes no messages is waited for no longer than any other answer.
    pub(in crate::amqp) fn impatient(self) -> Self {
        Self { patient: false, ..self }
    }

    /// Tries each address once, in turn, and returns the first connection that comes up, else the last error.
    pub(in crate::amqp) async fn dial(&self) -> Result<Link, Error> {
        let tls = self.tls().await?;
        let mut last = Error::NoAddress;
        let urls = self.addresses().await?;
        let signer = Signer::new(&self.secret(&urls).await?);
        let first = self.first.load(Ordering::Relaxed);
        for at in (0..urls.len()).map(|at| (first + at) % urls.len()) {
            match self.connect(at + 1, &urls[at], tls.clone()).await {
                Ok(link) => {
                    self.last.store(at, Ordering::Relaxed);
                    return Ok(link.signing(signer));
                }
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    /// Tries the address of the last connection last: its broker may let us in again and be of no use all the same.
    pub(in crate::amqp) fn avoid_last(&self) {
        self.first.store(self.last.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
    }

    /// The addresses as they are now: `url_file` may have been written anew since the last time.
    async fn addresses(&self) -> Result<Vec<Secret>, Error> {
        let config = self.config.clone();
        let read = tokio::task::spawn_blocking(move || config.current_urls()).await;
        // A panic in it was reported by the runtime.
        read.unwrap_or(Ok(Vec::new())).map_err(Error::Addresses)
    }

    /// What workers of one broker have in common, and publishers do not have.
    async fn secret(&self, urls: &[Secret]) -> Result<Vec<u8>, Error> {
        if let (Auth::External, Some((_, key))) = (self.config.auth, &self.config.identity) {
            return Ok(read("amqp.key_file", key).await?.into_bytes());
        }
        let first = urls.first().and_then(|url| url.expose().parse::<AMQPUri>().ok());
        let info = first.map(|uri| uri.authority.userinfo);
        Ok(info.map(|info| [info.username, info.password].join("\0").into_bytes()).unwrap_or_default())
    }

    /// Authorities, certificate and key as they are now.
    async fn tls(&self) -> Result<OwnedTLSConfig, Error> {
        let cert_chain = match &self.config.ca_file {
            Some(path) => Some(certificates("amqp.ca_file", path).await?),
            None => None,
        };
        let identity = match &self.config.identity {
            Some((certificate, key)) => Some(OwnedIdentity::PKCS8 {
                pem: certificates("amqp.cert_file", certificate).await?.into_bytes(),
                key: private_key("amqp.key_file", key).await?.into_bytes(),
            }),
            None => None,
        };
        Ok(OwnedTLSConfig { identity, cert_chain })
    }

    async fn connect(&self, position: usize, url: &Secret, tls: OwnedTLSConfig) -> Result<Link, Error> {
        let mut uri: AMQPUri = url.expose().parse().map_err(|reason: String| {
            // Some reasons quote the whole address, password and all.
            let quoted = reason.contains(url.expose());
            Error::Url { position, reason: if quoted { "not an address".into() } else { reason } }
        })?;
        if self.config.auth == Auth::External {
            if uri.scheme == AMQPScheme::AMQP {
                let reason = "amqp.auth = \"external\" goes by the certificate, and needs amqps://".into();
                return Err(Error::Url { position, reason });
            }
            uri.query.auth_mechanism = Some(SASLMechanism::External);
        }
        let broker = format!("{}:{}", uri.authority.host, uri.authority.port);
        let user = match self.config.auth {
            Auth::Plain => Some(uri.authority.userinfo.username.clone()),
            Auth::External => None,
        };
        let failed = failed(&broker, uri.scheme == AMQPScheme::AMQPS);
        uri.query.heartbeat = Some(u16::try_from(self.config.heartbeat.as_secs()).unwrap_or(u16::MAX));

        let largest_frame = uri.query.frame_max;
        let (socket, dropped) = (Socket::default(), Dropped::default());
        let timeout = self.config.connect_timeout;
        let connecting = Connection::connector(
            uri,
            reactor::runtime(),
            {
                let (socket, runtime) = (socket.clone(), reactor::dialling());
                let limit = self.most.map(|most| (most, dropped.clone()));
                async move |uri: AMQPUri, _| {
                    // Here as well: this runs on a thread of lapin's that no timeout outside reaches.
                    let stream = async {
                        let address = (uri.authority.host.clone(), uri.authority.port);
                        let stream =
                            AsyncTcpStream::connect(&runtime, runtime.to_socket_addrs(address)).await?;
                        if let AsyncTcpStream::Plain(stream) = &stream {
                            socket.keep(stream.get_ref());
                        }
                        match uri.scheme {
                            AMQPScheme::AMQP => Ok(stream),
                            AMQPScheme::AMQPS => stream.into_tls(&uri.authority.host, tls.as_ref()).await,
                        }
                    };
                    let in_time = tokio::time::timeout(timeout, stream).await;
                    let stream = in_time.unwrap_or_else(|_| Err(std::io::ErrorKind::TimedOut.into()))?;
                    let filter = FrameFilter::new(stream, largest_frame);
                    Ok(AsyncTcpStream::Plain(match limit.clone() {
                        Some((most, dropped)) => filter.limited(most, dropped),
                        None => filter,
                    }))
                }
            },
            self.properties(),
        );
        let connection = tokio::time::timeout(timeout, connecting)
            .await
            .map_err(|_| {
                // lapin would wait on for a peer that accepts and then says nothing.
                socket.shut();
                Error::Timeout { what: format!("connect to {broker}"), after: timeout }
            })?
            .map_err(&failed)?;
        let link = Link::new(connection, broker.clone(), socket, self.config.operation_timeout, self.patient);
        Ok(link.noting(dropped).of_user(user))
    }

    fn properties(&self) -> ConnectionProperties {
        ConnectionProperties::default()
            .with_connection_name(self.name.clone().into())
            .with_client_property("product".into(), "sandpiper".into())
            .with_client_property("version".into(), env!("CARGO_PKG_VERSION").into())
            .with_client_property("platform".into(), "Rust".into())
    }
}

/// Makes now what lapin would make at its first need: it lets go of a socket on a thread of its own, and there that
/// takes a second tokio runtime. A worker that has no descriptor or thread left at that moment would panic, then
/// and each time after.
fn prepare_lapin() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let made = std::thread::Builder::new().spawn(|| drop(async_compat::Compat::new(())));
        // Where not even this thread can be had, nothing is lost but the provision.
        let _ = made.map(std::thread::JoinHandle::join);
    });
}

async fn read(key: &'static str, path: &Path) -> Result<String, Error> {
    let read = tokio::fs::read_to_string(path).await;
    read.map_err(|source| Error::File { key, path: path.to_owned(), source })
}

async fn certificates(key: &'static str, path: &Path) -> Result<String, Error> {
    let text = read(key, path).await?;
    if text.contains("-----BEGIN CERTIFICATE-----") {
        return Ok(text);
    }
    Err(Error::Pem { key, path: path.to_owned(), fault: "it holds no certificate in PEM" })
}

async fn private_key(key: &'static str, path: &Path) -> Result<String, Error> {
    let text = read(key, path).await?;
    // Of the two forms of an encrypted key, one says so in its first line and one in its second.
    let fault = if text.contains("BEGIN ENCRYPTED PRIVATE KEY") || text.contains("Proc-Type: 4,ENCRYPTED") {
        "the key is encrypted; write it without a passphrase, readable for the worker alone"
    } else if !text.contains("PRIVATE KEY-----") {
        "it holds no private key in PEM"
    } else {
        return Ok(text);
    };
    Err(Error::Pem { key, path: path.to_owned(), fault })
}

fn failed(broker: &str, tls: bool) -> impl Fn(lapin::Error) -> Error {
    move |source| Error::Connect {
        broker: broker.to_owned(),
        hint: hint(&source, tls),
        source: Box::new(source),
    }
}

/// Mistakes that a person cannot tell from what is said: TLS where there is none, and none where it is; and a key of
/// another certificate.
fn hint(error: &lapin::Error, tls: bool) -> &'static str {
    let error = match error.kind() {
        ErrorKind::IOError(error) => error,
        ErrorKind::ParsingError(_) if !tls => {
            return " (it does not speak AMQP there; does it want TLS, amqps://?)";
        }
        _ => return "",
    };
    let hung_up = [io::ErrorKind::ConnectionReset, io::ErrorKind::UnexpectedEof, io::ErrorKind::BrokenPipe];
    let said = error.to_string();
    if tls && said.contains("InvalidContentType") {
        " (it does not speak TLS there; is amqp:// meant?)"
    } else if tls && said.contains("KeyMismatch") {
        " (amqp.key_file is not the key of the first certificate in amqp.cert_file)"
    } else if tls && said.contains("UnsupportedCertVersion") {
        " (a certificate is of version 1, here or there; make it anew with an extension: openssl x509 -extfile)"
    } else if tls && said.contains("CertificateRequired") {
        " (it wants a certificate of the worker: set amqp.cert_file and amqp.key_file)"
    } else if tls && hung_up.contains(&error.kind()) {
        " (it hung up; does it want a certificate of the worker, or another one? see amqp.cert_file)"
    } else if !tls && hung_up.contains(&error.kind()) {
        " (it hung up at once; does it want TLS there, amqps://?)"
    } else {
        ""
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]
mod tests {
    use super::*;
    use crate::amqp::chain;
    use crate::config::Config;

    #[tokio::test]
    async fn an_address_file_is_read_at_each_attempt_as_at_the_start() {
        // Nobody listens on this port; each address is tried and fails there.
        const GOOD: &str = "amqp://worker:s3cret,two@127.0.0.1:1/%2f\n";
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), GOOD).unwrap();
        let key = ("amqp.url_file".to_owned(), file.path().display().to_string());
        let config = Config::load(None, std::iter::empty(), &[key]).unwrap();
        let dialer = Dialer::new(&config.amqp, "test".into());
        let fault = async || chain(&dialer.dial().await.map(drop).unwrap_err());

        let refused = fault().await;
        assert!(refused.starts_with("connect to 127.0.0.1:1: "), "a comma divides no addresses: {refused}");
        for (text, expected) in [
            (
                "amqp://worker:s3cret@a,amqp://worker:two@b",
                "holds an address that holds a `/` in the password",
            ),
            ("127.0.0.1:5672 s3cret", "holds an address that does not begin with amqp:// or amqps://"),
            ("\n", "is empty; give at least one address"),
        ] {
            std::fs::write(file.path(), text).unwrap();
            let refused = fault().await;
            assert!(refused.starts_with("find a broker address: "), "{refused}");
            assert!(refused.contains(&format!("`amqp.url_file` {expected}")), "{refused}");
            assert!(!refused.contains("s3cret"), "{refused}");
        }
        std::fs::write(file.path(), format!("\n  {GOOD}\n")).unwrap();
        assert!(fault().await.starts_with("connect to 127.0.0.1:1: "));
    }
}
