//! A cold start: a new python, behind an outer wall of its own.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::job::{Limits, Outcome, Status};
use crate::sandbox::cgroup::{Cgroup, EnterBy};
use crate::sandbox::environment::{Environment, Variant};
use crate::sandbox::identity::IdentityLease;
use crate::sandbox::start::launcher::LaunchRequest;
use crate::sandbox::start::{StartContext, StartFailure, StartedJob};
use crate::sandbox::supervise::{EndReason, JobSupervisor, ParentEnds};
use crate::sandbox::supervise::{events, verdict};
use crate::sandbox::{error, outer_wall};
use crate::script::Payload;
use crate::sys::fd;

/// Starts a new python for one job.
pub(in crate::sandbox) async fn start(
    context: &StartContext,
    payload: &Payload,
    environment: &Environment,
    limits: &Limits,
    stop: &CancellationToken,
    taken: Instant,
) -> Result<StartedJob, StartFailure> {
    let failed = |error: String| {
        tracing::error!(id = payload.id, %error, "a job could not be started");
        Err(StartFailure::Job(Box::new(Outcome::not_run(Status::WorkerError, error))))
    };
    let Some(mut lease) = context.seats.take().await else {
        return failed("the sandbox has been shut down".into());
    };
    if let Some(group) = &mut lease.group {
        group.begin(limits).await.map_err(io::Error::other)?;
    }
    let variant = environment.variant(payload.network);
    let (order, ends) = prepare(context, payload, limits, environment, variant, &lease)?;
    let plans = [order.origin.clone(), order.init.clone(), order.wall.clone()];
    let launched = match context.launcher.launch(order).await {
        Ok(launched) => launched,
        Err(error) => {
            let report = events::read_report(&ends.control).ok().and_then(|(report, _)| report);
            return failed(
                report
                    .map_or_else(|| error::explained(&error), |report| verdict::failed_step(report, &plans)),
            );
        }
    };
    let pid = launched.job.pid();
    let mut supervisor = JobSupervisor::new(launched, ends, lease.outside)?;
    let admitted = async {
        match lease.group.as_ref().filter(|_| !payload.has_preload) {
            Some(group) if matches!(group.entry(), EnterBy::ParentWrite(_)) => {
                let pid = pid.ok_or_else(|| io::Error::other("the kernel does not tell its number"))?;
                group.admit(pid).await
            }
            _ => Ok(()),
        }
    };
    let (started, admitted) = tokio::join!(supervisor.start(taken + context.timeout, limits, stop), admitted);
    let cause = match (started?, admitted) {
        (None, Ok(())) => return Ok(StartedJob { supervisor, lease, _generation: None }),
        (Some(cause), _) => cause,
        (None, Err(error)) => {
            supervisor.finish(EndReason::Cancelled, limits, lease.group.as_ref()).await?;
            return failed(format!("the job's process could not enter its control group: {error}"));
        }
    };
    let explained = match cause {
        EndReason::StartFailed(report) => Some(verdict::failed_step(report, &plans)),
        _ => None,
    };
    let seen = supervisor.finish(cause, limits, lease.group.as_ref()).await?;
    let mut outcome = verdict::judge(seen, limits, payload.has_preload, taken);
    if outcome.status == Status::WorkerError {
        outcome.error = explained.or(outcome.error);
        let error = outcome.error.as_deref();
        let said = String::from_utf8_lossy(&outcome.stderr.bytes);
        tracing::error!(id = payload.id, error, said = %said.trim_end(), "a job could not be started");
    }
    Err(StartFailure::Job(Box::new(outcome)))
}

/// Everything that a launch needs, and the worker's ends of it.
fn prepare(
    context: &StartContext,
    payload: &Payload,
    limits: &Limits,
    environment: &Environment,
    variant: &Variant,
    seat: &IdentityLease,
) -> io::Result<(LaunchRequest, ParentEnds)> {
    let inside = seat.inside(context.host.privilege);
    let script =
        fd::sealed_file(c"script", payload.render(&environment.prescript, inside, inside).as_bytes())?;
    let owner = seat.owner(context.host.privilege);
    let (stdin, stdin_end) = fd::pipe_of(owner)?;
    let (stdout_end, stdout) = fd::pipe_of(owner)?;
    let (stderr_end, stderr) = fd::pipe_of(owner)?;
    let (control_end, control) = fd::socket_pair()?;
    let job = [&script, &stdin, &stdout, &stderr, &control, &variant.policy_file];
    let kept = job.into_iter().map(fd::out_of_the_way).collect::<io::Result<Vec<OwnedFd>>>()?;
    let [script, stdin, stdout, stderr, control, policy] = &kept[..] else {
        return Err(io::Error::other("a descriptor is missing"));
    };
    // What runs code before the lockdown has to be inside from the start.
    let (mut group, mut cgroup_namespace, mut doors) = (None, None, Vec::new());
    match seat.group.as_ref().map(|group| (group, group.entry())) {
        None => {}
        Some((_, EnterBy::CloneIntoCgroup(directory))) => group = Some(directory.try_clone()?),
        Some((_, EnterBy::ParentWrite(namespace))) if !payload.has_preload => {
            cgroup_namespace = Some(namespace.as_fd());
        }
        Some((group, _)) => doors = group.doors().map(outer_wall::plan::number).collect(),
    }
    let job = outer_wall::ConfinedJob {
        host: &context.host,
        inside,
        outside: seat.outside,
        namespace: seat.namespace.as_ref().map(AsFd::as_fd),
        network: payload.network,
        limits,
        memory_by_cgroup: seat.group.is_some(),
        processor_by_cgroup: seat.group.as_ref().is_some_and(Cgroup::shares_the_processor),
        cgroups: &doors,
        cgroup_namespace,
    };
    let descriptors = outer_wall::Descriptors {
        script: script.as_fd(),
        stdin: stdin.as_fd(),
        stdout: stdout.as_fd(),
        stderr: stderr.as_fd(),
        control: control.as_fd(),
        policy: policy.as_fd(),
    };
    let wall =
        outer_wall::cold::wall(&job, &variant.root, variant.prepared.as_ref(), &variant.coarse, &descriptors);
    let order = LaunchRequest {
        origin: outer_wall::cold::origin(&context.host),
        init: outer_wall::cold::init(context.host.privilege, seat.namespace.as_ref(), seat.init_outside),
        wall,
        program: Arc::clone(&environment.program),
        control: fd::out_of_the_way(control)?,
        group,
        _kept: kept,
    };
    let ends = ParentEnds { control: control_end, stdin: stdin_end, stdout: stdout_end, stderr: stderr_end };
    Ok((order, ends))
}
