//! What only a start shows, for `doctor`: the sandbox as `serve` sets it up, a job in each environment, the port of
//! metrics and the broker.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use crate::cli::job_args::Asked;
use crate::cli::{local, remote, runtime};
use crate::config::Config;
use crate::job::Status;
use crate::sandbox::Sandbox;
use crate::sandbox::doctor::{Check, demand};

/// A worker on this machine answers at once.
const PATIENCE: Duration = Duration::from_secs(1);

/// Starts what `serve` starts, and ends it again. `checks` are those of the layers.
pub(super) fn rehearse(config: &Config, checks: &[Check]) -> anyhow::Result<Vec<Check>> {
    let mut found = Vec::new();
    let mut small = config.clone();
    small.worker.slots = 1;
    small.environments.values_mut().for_each(|environment| environment.standby = 1);
    let started =
        demand(config, checks, |check| check.required).and_then(|()| Sandbox::start_examined(&small));
    let runtime = runtime()?;
    match started {
        Ok(sandbox) => {
            found.extend(runtime.block_on(environments(&small, &sandbox)));
            runtime.block_on(sandbox.close());
        }
        Err(error) => found.push(Check {
            required: true,
            ..check(
                "sandbox",
                Err(error.to_string()),
                "the worker does not start",
                "what the line above says",
            )
        }),
    }
    if let Some(address) = config.http.listen {
        let remedy = "end what listens there, or set http.listen to another address, or to off";
        found.push(Check {
            required: true,
            ..check("http.listen", port(address), "the worker does not start", remedy)
        });
    }
    let answer = runtime.block_on(remote::connect(config));
    let answer = answer.map(|_| "the broker answers".to_owned()).map_err(|error| format!("{error:#}"));
    let remedy = "start the broker, or set amqp.url to its address with user and password";
    found.push(check("amqp.url", answer, "the worker starts, takes no jobs, and tries again", remedy));
    Ok(found)
}

/// A job in each environment, and whether its jobs start warm.
async fn environments(config: &Config, sandbox: &Sandbox) -> Vec<Check> {
    let mut found = Vec::new();
    for name in config.environments.keys() {
        let ran = first_job(config, sandbox, name).await;
        let remedy = "what the line above says; sandpiper exec --environment shows more";
        found.push(Check {
            required: true,
            ..check(&format!("environments.{name}.job"), ran, "no job of this environment runs", remedy)
        });
    }
    for (name, _) in config.environments.iter().filter(|(_, environment)| environment.warm) {
        let warm =
            sandbox.warmed_up(name).await.map(|()| "its imports are done, and forks stand by".to_owned());
        let remedy =
            format!("mend or leave out what fails in environments.{name}.imports, or set warm to false");
        found.push(check(&format!("environments.{name}.warm"), warm, "its jobs start cold", &remedy));
    }
    found
}

/// Nothing has been warmed up yet, so it starts cold.
async fn first_job(config: &Config, sandbox: &Sandbox, environment: &str) -> Result<String, String> {
    let body = serde_json::json!({ "code": "print('ran')", "environment": environment }).to_string();
    let job = local::admit(Asked::Body(body.into_bytes()), config)
        .map_err(|refused| refused.error.clone().unwrap_or_default())?;
    let reply = local::run(sandbox, job, &CancellationToken::new()).await;
    match (reply.status, reply.error) {
        (Status::Succeeded, _) => Ok("a job ran".into()),
        (_, Some(error)) => Err(error),
        (status, None) => Err(format!("a job was {status:?}")),
    }
}

/// Free, or taken by a worker of this machine already.
fn port(address: SocketAddr) -> Result<String, String> {
    match TcpListener::bind(address) {
        Ok(_) => Ok(format!("{address} is free")),
        Err(error) if error.kind() == ErrorKind::AddrInUse && is_a_worker(address) => {
            Ok(format!("{address} is that of a worker that runs already"))
        }
        Err(error) => Err(format!("{address}: {error}")),
    }
}

fn is_a_worker(address: SocketAddr) -> bool {
    let ask = || {
        let mut stream = TcpStream::connect_timeout(&address, PATIENCE)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")?;
        let mut page = Vec::new();
        stream.take(1 << 16).read_to_end(&mut page)?;
        std::io::Result::Ok(page)
    };
    ask().is_ok_and(|page| String::from_utf8_lossy(&page).contains("sandpiper_"))
}

fn check(name: &str, tried: Result<String, String>, without: &str, remedy: &str) -> Check {
    let ok = tried.is_ok();
    let (Ok(detail) | Err(detail)) = tried;
    Check {
        name: name.to_owned(),
        ok,
        required: false,
        detail,
        without: without.to_owned(),
        remedy: if ok { String::new() } else { remedy.to_owned() },
    }
}
