//! What is made once, at the start: everything that jobs share, by what the host gives.

use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::sync::Arc;

use nix::sys::resource::{Resource, getrlimit, setrlimit};

use super::cgroup::{self, Cgroup};
use super::environment::{Environment, Machine};
use super::error::StartError;
use super::host::{Host, Privilege};
use super::identity::uid_claim::UidRangeClaim;
use super::identity::{self, IdentityPool};
use super::outer_wall::{INSIDE, trials};
use super::run::Engine;
use super::start::launcher::Launcher;
use super::start::warm_pool::WarmPool;
use super::start::{StartContext, pid1};
use super::supervise::census::OomKills;
use super::supervise::syscall_trace::Trace;
use crate::config::Config;
use crate::sys::userns::{self, Mapping};
use crate::sys::{fd, launch, probe};

pub(super) fn set_up(config: &Config, trace: Option<Trace>) -> Result<Engine, StartError> {
    let settings = &config.sandbox;
    fd::allow_more()?;
    let host = examine();
    let privilege = host.privilege;
    let standby: usize = config.environments.values().filter(|one| one.warm).map(|one| one.standby).sum();
    // A child that stands by holds a seat, so there are more seats than slots.
    let seats = config.worker.slots.saturating_add(standby);
    let groups = cgroup::start(seats, &config.limits.default).unwrap_or_else(|error| {
        tracing::warn!(
            %error,
            "there are no cgroups: the memory of a job's processes is counted now and then, without what lies in \
             pipes and sockets; CPU time is limited for each process alone"
        );
        Vec::new()
    });
    let oom_kills = groups.is_empty().then(OomKills::find).flatten();
    let seat_count = u32::try_from(seats).unwrap_or(u32::MAX);
    if privilege == Privilege::Full {
        identity::range_exists(settings.uid_base, seat_count)?;
    }
    let zygote_namespace = match privilege {
        Privilege::Full => {
            let (inside, outside) = (INSIDE, settings.uid_base.saturating_add(1));
            userns::make(&[
                Mapping { inside: 0, outside: settings.uid_base, count: 1 },
                Mapping { inside, outside, count: seat_count },
            ])
            .inspect_err(|error| tracing::warn!(%error, "every job starts cold: no user namespace"))
            .inspect(|namespace| trials::limit_watches(namespace.as_fd()))
            .ok()
        }
        Privilege::None => None,
    };
    let claim = (privilege == Privilege::Full).then(|| {
        let first = settings.uid_base.saturating_add(1);
        UidRangeClaim::acquire(first..first.saturating_add(seat_count))
    });
    // What runs an operator's imports is never root of the host.
    let can_start_warm = trace.is_none() && (privilege == Privilege::None || zygote_namespace.is_some());
    let machine = Machine {
        host,
        seats: seat_count,
        memory_group: !groups.is_empty(),
        cpu_group: groups.iter().all(Cgroup::shares_the_processor) && !groups.is_empty(),
        traces: trace.is_some(),
    };
    let (mut environments, mut warm_pools) = (BTreeMap::new(), BTreeMap::new());
    for (name, environment) in &config.environments {
        let prepared = Environment::prepare(name, environment, settings, &machine)
            .map_err(|error| StartError::preparing(name, error))?;
        if environment.warm && can_start_warm {
            warm_pools.insert(name.clone(), Arc::new(WarmPool::new()));
        }
        environments.insert(name.clone(), Arc::new(prepared));
    }
    let proxies = [
        ("HTTP_PROXY", &settings.http_proxy),
        ("http_proxy", &settings.http_proxy),
        ("HTTPS_PROXY", &settings.https_proxy),
        ("https_proxy", &settings.https_proxy),
        ("ALL_PROXY", &settings.socks5_proxy),
        ("all_proxy", &settings.socks5_proxy),
    ];
    let init_program = fd::out_of_the_way(fd::sealed_file(c"init", &pid1::program())?)?;
    let start = StartContext {
        host,
        launcher: Launcher::start(init_program)?,
        seats: IdentityPool::prepare(seats, privilege, settings.uid_base, groups),
        timeout: settings.start_timeout,
        default_limits: config.limits.default,
        zygote_namespace,
    };
    Ok(Engine {
        environments,
        warm_pools,
        start: Arc::new(start),
        shares_the_processor: machine.cpu_group,
        oom_kills,
        trace,
        _claim: claim,
        processes_max: config.limits.maximum.processes,
        // Base64 makes four bytes of three.
        artifacts_max: (config.amqp.max_result_bytes as u64) / 4 * 3,
        proxies: proxies.into_iter().filter_map(|(name, value)| Some((name, value.clone()?))).collect(),
    })
}

/// What this machine and this worker can do. To be called while the process has one thread.
fn examine() -> Host {
    let privilege = Privilege::of_this_process();
    let user = privilege == Privilege::None;
    let oom_score = launch::can(0, trials::oom().bytes());
    if !oom_score {
        tracing::warn!(
            "where memory is over the kernel may end the worker: /proc/self/oom_score_adj is closed"
        );
    }
    Host {
        privilege,
        proc: probe::proc(user).is_ok(),
        landlock: probe::landlock_abi(),
        oom_score,
        watches: user && launch::can(libc::CLONE_NEWUSER, trials::watches().bytes()),
        mount_setattr: probe::mount_setattr(),
        keeps_promises: std::fs::read("/proc/sys/vm/overcommit_memory")
            .is_ok_and(|mode| mode.starts_with(b"2")),
        core: core(),
    }
}

/// No core dump: one byte, for what would be written to a file is then too large, and this one value also holds
/// where the host pipes dumps to a program of its own (`|` in `kernel.core_pattern`), which runs as root of the host
/// and for which every other limit, 0 among them, counts for nothing. 0 where the worker itself has no more.
fn core() -> u64 {
    let hard = getrlimit(Resource::RLIMIT_CORE).map_or(0, |(_, hard)| hard);
    let raised = hard > 0 || setrlimit(Resource::RLIMIT_CORE, 1, 1).is_ok();
    if !raised {
        tracing::warn!("crashes of jobs may be dumped by the host: start the worker with LimitCORE=1");
    }
    raised.into()
}
