//! A case and its companion as jobs of one worker, at the same time: where jobs are forks of one interpreter, they
//! share more than those of two workers do.
//!
//! The worker is this binary once more, with the sandbox as a library: `exec` runs one job only. It has one thread
//! when it starts the sandbox, as it must, and is watched by a supervisor like any other.

use std::io::{Read as _, Write as _};
use std::process::{Command, ExitCode, Stdio};

use sandpiper::config::Config;
use sandpiper::job::{Context, Reply, parse};
use sandpiper::sandbox::Sandbox;
use sandpiper::script::Payload;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio_util::sync::CancellationToken;

use crate::case::{Case, slowness};
use crate::{check, run, supervise};

pub(crate) const FLAG: &str = "--together";

#[derive(Serialize, Deserialize)]
struct Order {
    set: Vec<(String, String)>,
    warm: bool,
    jobs: Vec<Value>,
}

/// What of both is not as it should be.
pub(crate) fn unmet(case: &Case, companion: &Case) -> Vec<String> {
    let split = |key: &String| {
        let (key, value) = key.split_once('=').unwrap();
        (key.to_owned(), value.to_owned())
    };
    let shim = run::worker().with_file_name("libsandpiper_shim.so");
    let mut set: Vec<_> = case.set.iter().chain(&run::patience()).map(split).collect();
    set.push(("sandbox.shim".into(), shim.to_str().unwrap().into()));
    set.push(("worker.slots".into(), "2".into()));
    let order = Order { set, warm: run::is_warm(), jobs: vec![case.job(), companion.job()] };

    let report = tempfile::NamedTempFile::new().unwrap();
    let binary = std::env::current_exe().unwrap();
    let mut command = Command::new(&binary);
    command
        .arg(supervise::FLAG)
        .arg(report.path())
        .arg((60_000 * slowness()).to_string())
        .arg(&binary)
        .arg(FLAG);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    child.stdin.take().unwrap().write_all(&serde_json::to_vec(&order).unwrap()).unwrap();
    let output = child.wait_with_output().unwrap();

    let seen: supervise::Report = serde_json::from_slice(&std::fs::read(report.path()).unwrap()).unwrap();
    let Ok([result, other]) = serde_json::from_slice::<[Value; 2]>(&output.stdout) else {
        return vec![format!("no results: {seen:?} {}", String::from_utf8_lossy(&output.stderr))];
    };
    let mut unmet = check::result_of(case, &result);
    unmet.extend(check::result_of(companion, &other).iter().map(|u| format!("beside: {u}")));
    if seen.hung || !seen.survivors.is_empty() || seen.unreaped > 0 {
        unmet.push(format!("something was left: {seen:?}"));
    }
    if !unmet.is_empty() {
        unmet.push(format!("results: {result} {other}"));
    }
    unmet
}

/// The worker: an order on standard input, both results on standard output.
pub(crate) fn run_both() -> ExitCode {
    let mut order = Vec::new();
    std::io::stdin().read_to_end(&mut order).unwrap();
    let order: Order = serde_json::from_slice(&order).unwrap();
    let mut config = Config::load(None, std::iter::empty(), &order.set).unwrap();
    config.environments.values_mut().for_each(|environment| environment.warm &= order.warm);
    let sandbox = Sandbox::start(&config).unwrap();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let replies = runtime.block_on(async {
        if order.warm {
            sandbox.warmed_up("default").await.unwrap();
        }
        let running: Vec<_> = order
            .jobs
            .iter()
            .map(|job| {
                let job = parse(&serde_json::to_vec(job).unwrap(), None, &config.admission()).unwrap();
                let sandbox = sandbox.clone();
                tokio::spawn(async move {
                    let context = Context {
                        id: job.id.clone(),
                        limits: Some(job.limits),
                        attempt: 1,
                        redelivered: false,
                        worker: "together".into(),
                        queued: None,
                        metadata: None,
                    };
                    let limits = job.limits;
                    Reply::new(
                        context,
                        sandbox.run(Payload::encode(job), &limits, &CancellationToken::new()).await,
                    )
                })
            })
            .collect();
        let mut replies = Vec::new();
        for one in running {
            replies.push(one.await.unwrap());
        }
        sandbox.close().await;
        replies
    });
    std::io::stdout().write_all(&serde_json::to_vec(&replies).unwrap()).unwrap();
    ExitCode::SUCCESS
}
