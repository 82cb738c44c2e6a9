//! Broker addresses: their form, and the file that holds them as a secret.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use super::{ConfigError, Secret};

/// The addresses in a file, one a line; blank lines do not count.
pub(super) fn read_file(path: &Path) -> Result<Vec<Secret>, ConfigError> {
    let unread = |source| ConfigError::Read { path: path.to_owned(), source };
    let mut file = File::open(path).map_err(unread)?;
    let mode = file.metadata().map_err(unread)?.permissions().mode();
    if mode & 0o002 != 0 {
        let sentence = format!(
            "`amqp.url_file` can be written by everybody (mode {:04o}), who then chooses the broker; chmod 600",
            mode & 0o7777
        );
        return Err(ConfigError::Invalid { origin: path.display().to_string(), sentence });
    }
    let mut text = String::new();
    file.read_to_string(&mut text).map_err(unread)?;
    let urls: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    let fault = match urls.iter().find_map(|url| check(url).err()) {
        Some(fault) => format!("`amqp.url_file` holds an address that {fault}"),
        None if urls.is_empty() => "`amqp.url_file` is empty; give at least one address".into(),
        None => return Ok(urls.into_iter().map(|url| Secret::new(url.to_owned())).collect()),
    };
    Err(ConfigError::Invalid { origin: path.display().to_string(), sentence: fault })
}

/// What is wrong with an address, without repeating any of it.
pub(super) fn check(url: &str) -> Result<(), &'static str> {
    const FORM: &str = "is not of the form amqp://user:password@host:5672/vhost";
    let rest = url.strip_prefix("amqp://").or_else(|| url.strip_prefix("amqps://"));
    let rest = rest.ok_or("does not begin with amqp:// or amqps://")?;
    if rest.chars().any(|char| char.is_whitespace() || char.is_control()) {
        return Err("holds a space or a control character; percent-encode it");
    }
    check_percent(rest)?;
    let (rest, _query) = rest.split_once('?').unwrap_or((rest, ""));
    if rest.contains('#') {
        return Err("holds a `#`; write it as %23");
    }
    let (authority, vhost) = rest.split_once('/').unwrap_or((rest, ""));
    if vhost.contains('/') {
        return Err("holds a `/` in the password or the vhost; write it as %2f");
    }
    if vhost.contains('@') {
        return Err("holds a `/` in the password, or an `@` in the vhost; write them as %2f and %40");
    }
    let host = match authority.rsplit_once('@') {
        Some((user, _)) if user.contains('@') => return Err("holds an `@` in the password; write it as %40"),
        Some((_, host)) => host,
        None => authority,
    };
    let (name, port) = match host.strip_prefix('[') {
        Some(v6) => {
            let (name, port) = v6.split_once(']').ok_or(FORM)?;
            name.parse::<std::net::Ipv6Addr>().map_err(|_| FORM)?;
            (name, port.strip_prefix(':'))
        }
        None => host.split_once(':').map_or((host, None), |(name, port)| (name, Some(port))),
    };
    if name.is_empty() {
        return Err("names no host");
    }
    match port.map(str::parse::<u16>) {
        None | Some(Ok(1..)) => Ok(()),
        Some(_) => Err("has a port that is not a number from 1 to 65535; percent-encode special characters \
                        of the password"),
    }
}

fn check_percent(text: &str) -> Result<(), &'static str> {
    let encoded = |rest: &str| rest.len() >= 2 && rest.bytes().take(2).all(|byte| byte.is_ascii_hexdigit());
    if text.split('%').skip(1).all(encoded) {
        return Ok(());
    }
    Err("holds a `%` without two hexadecimal digits; write it as %25")
}
