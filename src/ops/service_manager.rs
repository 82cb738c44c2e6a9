//! What systemd is told of a service of `Type=notify`: that it is ready, how it is, that it still works.
//!
//! The protocol is datagrams of `KEY=VALUE` lines to the socket that `NOTIFY_SOCKET` names (`sd_notify(3)`).
//! Without that variable nobody is told.

use std::env;
use std::ffi::OsStr;
use std::io;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

/// The socket of the service manager, where there is one.
#[derive(Debug)]
pub struct ServiceManager {
    socket: Option<UnixDatagram>,
    /// It restarts a service of which it has heard nothing for this long.
    patience: Option<Duration>,
}

impl ServiceManager {
    /// Reads where the manager listens, and how long it waits between two signs of life.
    pub fn from_environment() -> Self {
        let socket = env::var_os("NOTIFY_SOCKET").filter(|name| !name.is_empty()).and_then(|name| {
            connect(&name)
                .inspect_err(
                    |error| tracing::warn!(%error, "NOTIFY_SOCKET: the service manager cannot be told"),
                )
                .ok()
        });
        let number = |name| env::var(name).ok()?.parse::<u64>().ok();
        let meant_for_us = number("WATCHDOG_PID").is_none_or(|pid| pid == u64::from(std::process::id()));
        let patience =
            number("WATCHDOG_USEC").filter(|micros| *micros > 0 && meant_for_us).map(Duration::from_micros);
        Self { socket, patience }
    }

    /// How often it wants to hear from a service that works; none where it does not watch.
    pub fn interval(&self) -> Option<Duration> {
        // Half of it is the custom; a third leaves room for a machine that is busy.
        self.patience.filter(|_| self.socket.is_some()).map(|patience| patience / 3)
    }

    /// The service has started.
    pub fn ready(&self) {
        self.tell("READY=1");
    }

    /// How it is, in words for a person.
    pub fn status(&self, status: &str) {
        self.tell(&format!("STATUS={status}"));
    }

    /// It works.
    pub fn alive(&self) {
        self.tell("WATCHDOG=1");
    }

    /// It has begun to end.
    pub fn stopping(&self) {
        self.tell("STOPPING=1");
    }

    fn tell(&self, message: &str) {
        if let Some(Err(error)) = self.socket.as_ref().map(|socket| socket.send(message.as_bytes())) {
            tracing::debug!(%error, "the service manager was not told");
        }
    }
}

fn connect(name: &OsStr) -> io::Result<UnixDatagram> {
    let address = match name.as_bytes().strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name)?,
        None => SocketAddr::from_pathname(name)?,
    };
    let socket = UnixDatagram::unbound()?;
    socket.connect_addr(&address)?;
    // A manager that does not read must not hold us up.
    socket.set_nonblocking(true)?;
    Ok(socket)
}
