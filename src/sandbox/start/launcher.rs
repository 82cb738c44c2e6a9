//! The thread that starts processes.
//!
//! A process that is to die with its parent dies with the *thread* that made it, and tokio's threads come and
//! go. So one thread makes them all, and lives as long as the sandbox.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, mpsc};

use tokio::sync::oneshot;

use crate::sandbox::outer_wall::plan::Plan;
use crate::sys::launch::{self, Launch, Launched, Program};

/// One job's processes, to be started.
#[derive(Debug)]
pub(in crate::sandbox) struct LaunchRequest {
    pub(in crate::sandbox) origin: Plan,
    pub(in crate::sandbox) init: Plan,
    pub(in crate::sandbox) wall: Plan,
    pub(in crate::sandbox) program: Arc<Program>,
    pub(in crate::sandbox) control: OwnedFd,
    /// The control group that the job is born in, where that can be.
    pub(in crate::sandbox) group: Option<OwnedFd>,
    /// Descriptors that the plans name, kept open until the processes have them.
    pub(in crate::sandbox) _kept: Vec<OwnedFd>,
}

#[derive(Debug)]
pub(in crate::sandbox) struct Launcher {
    orders: mpsc::Sender<(LaunchRequest, oneshot::Sender<io::Result<Launched>>)>,
}

impl Launcher {
    /// `init_program` is what every job's first process becomes.
    pub(in crate::sandbox) fn start(init_program: OwnedFd) -> io::Result<Self> {
        let (orders, inbox) = mpsc::channel::<(LaunchRequest, oneshot::Sender<io::Result<Launched>>)>();
        std::thread::Builder::new().name("launcher".into()).spawn(move || {
            let blocked = launch::block_signals();
            for (order, reply) in inbox {
                let launched = match &blocked {
                    Ok(()) => start(&order, &init_program),
                    Err(error) => Err(io::Error::new(error.kind(), error.to_string())),
                };
                // Nobody waits any longer: then nobody watches either.
                if let Err(Ok(unwatched)) = reply.send(launched) {
                    unwatched.init.kill();
                    unwatched.job.kill();
                }
            }
        })?;
        Ok(Self { orders })
    }

    pub(in crate::sandbox) async fn launch(&self, order: LaunchRequest) -> io::Result<Launched> {
        let gone = || io::Error::other("the launching thread has ended");
        let (reply, launched) = oneshot::channel();
        self.orders.send((order, reply)).map_err(|_| gone())?;
        launched.await.map_err(|_| gone())?
    }
}

fn start(order: &LaunchRequest, init_program: &OwnedFd) -> io::Result<Launched> {
    launch::launch(&Launch {
        origin: order.origin.bytes(),
        init: order.init.bytes(),
        wall: order.wall.bytes(),
        init_program: init_program.as_fd(),
        program: &order.program,
        control: order.control.as_fd(),
        group: order.group.as_ref().map(AsFd::as_fd),
    })
}
