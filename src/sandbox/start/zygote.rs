//! One zygote while it lives: started like a job, then asked over a socket for one process after another.

use std::fs::OpenOptions;
use std::io::{self, BufRead, BufReader};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use sandpiper_shim::abi::Report;
use tokio::io::unix::AsyncFd;
use tokio::time::{Instant, timeout, timeout_at};

use crate::job::Limits;
use crate::sandbox::cgroup::Cgroup;
use crate::sandbox::environment::Environment;
use crate::sandbox::host::Privilege;
use crate::sandbox::identity::Identity;
use crate::sandbox::outer_wall::{self, plan::Plan};
use crate::sandbox::start::StartContext;
use crate::sandbox::start::launcher::LaunchRequest;
use crate::sandbox::supervise::events::{ended, read_report};
use crate::sandbox::supervise::verdict::failed_step;
use crate::sandbox::supervise::{JobSupervisor, ParentEnds};
use crate::script;
use crate::sys::launch::Launched;
use crate::sys::process::Child;
use crate::sys::{fd, ready};

/// A fork takes a few milliseconds; a zygote that does not answer in this time is given up.
const FORK_TIMEOUT: Duration = Duration::from_secs(5);

/// What the prescript says in a zygote begins so; everything else is what imports print.
const ITS_OWN: &str = "sandpiper: ";

/// A zygote that takes orders.
#[derive(Debug)]
pub(in crate::sandbox) struct Process {
    socket: AsyncFd<OwnedFd>,
    job: Child,
    generation: Arc<ZygoteNamespace>,
    forks: u64,
}

/// The pid namespace of a zygote, which holds those of its children: it lasts as long as any of them.
#[derive(Debug)]
pub(in crate::sandbox) struct ZygoteNamespace(Child);

impl Process {
    /// Starts python behind its outer wall and waits until it has done its imports.
    pub(in crate::sandbox) async fn start(
        context: &StartContext,
        environment: &Environment,
    ) -> io::Result<Self> {
        let variant = environment.variant(false);
        let script =
            script::render_zygote(&environment.imports, environment.fast_exit, environment.huge_pages);
        let script = fd::sealed_file(c"script", script.map_err(io::Error::other)?.as_bytes())?;
        let (stdin, _) = fd::pipe()?;
        let (said, output) = fd::pipe()?;
        let (socket, control) = fd::message_socket_pair()?;
        let kept = [&script, &stdin, &output, &control, &variant.policy_file]
            .into_iter()
            .map(fd::out_of_the_way)
            .collect::<io::Result<Vec<OwnedFd>>>()?;
        let descriptors = outer_wall::Descriptors {
            script: kept[0].as_fd(),
            stdin: kept[1].as_fd(),
            stdout: kept[2].as_fd(),
            stderr: kept[2].as_fd(),
            control: kept[3].as_fd(),
            policy: kept[4].as_fd(),
        };
        let namespace = context.zygote_namespace.as_ref();
        let wall = outer_wall::warm::zygote_wall(
            &context.host,
            namespace,
            &variant.root,
            &variant.coarse_zygote,
            &descriptors,
        );
        let order = LaunchRequest {
            origin: outer_wall::warm::zygote_origin(&context.host, namespace, &variant.root),
            init: outer_wall::warm::zygote_init(),
            wall,
            program: Arc::clone(&environment.zygote_program),
            control: fd::out_of_the_way(&control)?,
            group: None,
            _kept: kept,
        };
        let plans = [order.origin.clone(), order.init.clone(), order.wall.clone()];
        drop((output, control, stdin));
        let output = report_output(said, environment.name.clone())?;

        let socket = ready::readable(socket)?;
        let by = Instant::now() + context.timeout;
        let launched = match context.launcher.launch(order).await {
            Ok(launched) => launched,
            Err(error) => {
                let report = read_report(socket.get_ref()).ok().and_then(|(report, _)| report);
                let why = report.map_or_else(|| error.to_string(), |report| failed_step(report, &plans));
                return Err(io::Error::other(why));
            }
        };
        let process = Self {
            socket,
            job: launched.job,
            generation: Arc::new(ZygoteNamespace(launched.init)),
            forks: 0,
        };
        let said = timeout_at(by, process.receive())
            .await
            .map_err(|_| io::Error::other("the zygote was not ready in the time that a start may take"))?;
        match said? {
            (Some(Report::Ready { huge_pages }), _) => {
                let why = (huge_pages != 0).then(|| io::Error::from_raw_os_error(huge_pages).to_string());
                let why = why.filter(|_| environment.huge_pages);
                tracing::debug!(
                    environment = environment.name,
                    huge_pages = environment.huge_pages && huge_pages == 0,
                    why,
                    "a zygote is ready"
                );
                Ok(process)
            }
            (Some(report), _) => Err(io::Error::other(failed_step(report, &plans))),
            (None, _) => {
                let last = tokio::task::spawn_blocking(move || output.join().ok().flatten());
                let last = timeout_at(by, last).await.ok().and_then(Result::ok).flatten();
                let said = last.unwrap_or_else(|| "it said nothing".into());
                Err(io::Error::other(format!("the zygote ended before it was ready: {said}")))
            }
        }
    }

    /// Ends the zygote; with its last child its namespace ends, too.
    pub(in crate::sandbox) async fn end(self) {
        let Self { job, generation, .. } = self;
        // A child that cannot be waited for collects itself when it is dropped.
        let _ = kill(job).await;
        if let Some(ZygoteNamespace(init)) = Arc::into_inner(generation) {
            let _ = kill(init).await;
        }
    }

    pub(in crate::sandbox) fn generation(&self) -> Arc<ZygoteNamespace> {
        Arc::clone(&self.generation)
    }

    pub(in crate::sandbox) fn forks(&self) -> u64 {
        self.forks
    }

    /// Has a job's processes made. What they report is still to be waited for; the plan explains it.
    pub(in crate::sandbox) async fn fork(
        &mut self,
        context: &StartContext,
        environment: &Environment,
        seat: &Identity,
        limits: &Limits,
    ) -> io::Result<(JobSupervisor, Plan)> {
        let owner = seat.owner(context.host.privilege);
        let (stdin, stdin_end) = fd::pipe_of(owner)?;
        let (stdout_end, stdout) = fd::pipe_of(owner)?;
        let (stderr_end, stderr) = fd::pipe_of(owner)?;
        let (control_end, control) = fd::socket_pair()?;
        // In the order of their places, of which the plan knows.
        let doors: Vec<BorrowedFd<'_>> = seat.group.iter().flat_map(Cgroup::doors).collect();
        let streams = [&control, &stdin, &stdout, &stderr].map(AsRawFd::as_raw_fd);
        let mut fds: Vec<RawFd> = streams.into_iter().chain(doors.iter().map(AsRawFd::as_raw_fd)).collect();
        let doors: Vec<u64> = (4..).take(doors.len()).map(outer_wall::plan::place).collect();
        let lent;
        let proc = match (environment.variant(false).root.has_proc(), context.host.privilege) {
            (true, _) => outer_wall::warm::ProcSource::Own,
            (false, Privilege::Full) => outer_wall::warm::ProcSource::None,
            (false, Privilege::None) => {
                let flags = libc::O_PATH | libc::O_DIRECTORY;
                lent = OpenOptions::new().read(true).custom_flags(flags).open("/proc")?;
                fds.push(lent.as_raw_fd());
                outer_wall::warm::ProcSource::Lent(outer_wall::plan::place(fds.len() as u64 - 1))
            }
        };
        let job = outer_wall::ConfinedJob {
            host: &context.host,
            inside: seat.inside_warm(context.host.privilege),
            outside: seat.outside,
            namespace: None,
            network: false,
            limits,
            memory_by_cgroup: seat.group.is_some(),
            processor_by_cgroup: seat.group.as_ref().is_some_and(Cgroup::shares_the_processor),
            cgroups: &doors,
            cgroup_namespace: None,
        };
        let plan = outer_wall::warm::wall(&job, proc);
        fd::send(self.socket.get_ref().as_fd(), plan.bytes(), &fds)?;
        self.forks += 1;
        let answer = timeout(FORK_TIMEOUT, self.receive())
            .await
            .map_err(|_| io::Error::other("the zygote does not answer"))??;
        let [init, job] = match answer {
            (Some(Report::Forked), fds) => <[OwnedFd; 2]>::try_from(fds)
                .map_err(|_| io::Error::other("the zygote's answer lacks a descriptor"))?,
            (Some(report), _) => {
                return Err(io::Error::other(failed_step(report, &[Plan::default(), Plan::default(), plan])));
            }
            (None, _) => return Err(io::Error::other("the zygote has ended")),
        };
        let launched = Launched { init: Child::from_pidfd(init), job: Child::from_pidfd(job) };
        if context.host.oom_score
            && let Some(pid) = launched.job.pid()
        {
            // It has its zygote's, which goes after the jobs. One that has ended already need not go.
            drop(std::fs::write(format!("/proc/{pid}/oom_score_adj"), outer_wall::JOB_GOES));
        }
        let ends =
            ParentEnds { control: control_end, stdin: stdin_end, stdout: stdout_end, stderr: stderr_end };
        Ok((JobSupervisor::new(launched, ends, seat.outside)?, plan))
    }

    async fn receive(&self) -> io::Result<(Option<Report>, Vec<OwnedFd>)> {
        loop {
            let mut ready = self.socket.readable().await?;
            match read_report(self.socket.get_ref()) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => ready.clear_ready(),
                other => return other,
            }
        }
    }
}

async fn kill(child: Child) -> io::Result<()> {
    child.kill();
    ended(&ready::readable(child)?).await.map(drop)
}

/// What the operator's imports print goes to the log. The thread ends with it, and gives back the last line.
fn report_output(pipe: OwnedFd, environment: String) -> io::Result<JoinHandle<Option<String>>> {
    std::thread::Builder::new().name("zygote-output".into()).spawn(move || {
        let lines = BufReader::new(std::fs::File::from(pipe)).lines().map_while(Result::ok);
        let log = |line: &String| match line.strip_prefix(ITS_OWN) {
            Some(line) => tracing::debug!(environment, line, "zygote"),
            None => tracing::warn!(environment, line, "a zygote said"),
        };
        lines.inspect(log).last()
    })
}
