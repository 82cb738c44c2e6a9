//! Programs that use what people use, in an environment of its own: the virtual environment that `tests/run` fills
//! and names in `SP_TEST_LIBRARIES`. No call of theirs may be refused but those that a fixture expects.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};

use libtest_mimic::Failed;
use serde_json::json;

use crate::case::Case;
use crate::run;

pub(crate) fn verify(case: &Case) -> Result<(), Failed> {
    let Some(python) = std::env::var_os("SP_TEST_LIBRARIES") else {
        return crate::skip(
            case,
            "SP_TEST_LIBRARIES does not name a python with the libraries; tests/run makes one",
        );
    };
    let mut case = case.clone();
    case.job.entry("environment").or_insert(json!("libraries"));
    case.set.push(format!("environments.libraries.python={}", python.to_str().unwrap()));
    if run::is_warm() {
        case.set.push(format!("environments.libraries.imports={}", json!(case.imports)));
    }
    if case.assert.any.is_empty() {
        case.assert.blocked_exactly.get_or_insert_default();
    }
    if case.server {
        case.job.insert("env".into(), json!({"URL": serve()}));
    }
    crate::verify(&case)
}

/// A server on this host's loopback, for as long as the test's process lives; returns its address. `/json` answers
/// with a document, `/echo` with what it was sent, `/away` leads to `/json`, anything else is not there.
fn serve() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            std::thread::spawn(move || answer(stream.unwrap()));
        }
    });
    address
}

/// One request. What a client does wrong is the client's failure.
fn answer(stream: TcpStream) {
    let mut stream = BufReader::new(stream);
    let mut lines = Vec::new();
    loop {
        let mut line = String::new();
        if stream.read_line(&mut line).unwrap_or(0) == 0 {
            return;
        }
        match line.trim_end() {
            "" => break,
            line => lines.push(line.to_owned()),
        }
    }
    let length = lines
        .iter()
        .find_map(|line| line.to_lowercase().strip_prefix("content-length:")?.trim().parse().ok());
    let mut body = vec![0; length.unwrap_or(0)];
    if stream.read_exact(&mut body).is_err() {
        return;
    }
    let (status, more, body) = match lines[0].split(' ').nth(1) {
        Some("/json") => {
            ("200 OK", "Content-Type: application/json\r\n", br#"{"birds": ["knot", "dunlin"]}"#.to_vec())
        }
        Some("/echo") => ("200 OK", "", body),
        Some("/away") => ("302 Found", "Location: /json\r\n", Vec::new()),
        _ => ("404 Not Found", "", Vec::new()),
    };
    let head =
        format!("HTTP/1.1 {status}\r\n{more}Content-Length: {}\r\nConnection: close\r\n\r\n", body.len());
    // A client that went away has its answer.
    let _ = stream.get_mut().write_all(&[head.as_bytes(), &body].concat());
}
