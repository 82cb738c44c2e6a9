//! What all workers are asked at once: to end a job, or to say what they do.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Semaphore, mpsc};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::amqp::{Addresses, Command, Message, Pong, Publisher, ReceivedCommand};
use crate::worker::in_flight::{Asker, InFlightJobs};

/// Questions that are answered at one time. More are passed over: whoever asks in a flood is no operator.
const MAX_PONGS: usize = 8;

/// How long an answer is of use.
const PONG_TTL: Duration = Duration::from_secs(5);

/// What a worker knows of itself.
#[derive(Debug)]
pub(super) struct Control {
    pub(super) worker: String,
    pub(super) since: jiff::Timestamp,
    pub(super) slots: usize,
    pub(super) queues: Vec<String>,
    pub(super) drain: CancellationToken,
    pub(super) addresses: Addresses,
    /// Users who may see and cancel every job.
    pub(super) operators: Vec<String>,
    pub(super) in_flight: InFlightJobs,
    pub(super) publisher: Publisher,
}

impl Control {
    /// Does what is asked, as long as somebody can ask.
    pub(super) async fn run(self: Arc<Self>, commands: Option<mpsc::Receiver<ReceivedCommand>>) {
        let Some(mut commands) = commands else { return };
        let answers = Arc::new(Semaphore::new(MAX_PONGS));
        while let Some(received) = commands.recv().await {
            match &received.command {
                Command::Cancel(id) => {
                    let asker = self.asker(&received);
                    match self.in_flight.cancel(id, &asker) {
                        // In a flood of those that mean nobody's job here the others would be lost.
                        0 => tracing::debug!(
                            id,
                            asker.user,
                            "asked to end a job that is not here, or another's"
                        ),
                        _ => tracing::info!(id, asker.user, "asked to end a job"),
                    }
                }
                // Apart, so that a broker that takes no answers delays no cancellation.
                Command::Ping {} => {
                    let Ok(permit) = answers.clone().try_acquire_owned() else { continue };
                    let this = Arc::clone(&self);
                    tokio::spawn(async move {
                        let _permit = permit;
                        // One that comes too late is of no use to anybody.
                        let _ = tokio::time::timeout(PONG_TTL, this.pong(received)).await;
                    });
                }
            }
        }
    }

    /// Who asks, by the broker's word.
    fn asker(&self, received: &ReceivedCommand) -> Asker {
        let user = received.properties.user_id.clone();
        let operator = user.as_ref().is_some_and(|user| self.operators.contains(user));
        Asker { user, operator }
    }

    async fn pong(&self, received: ReceivedCommand) {
        let reply_to = received.properties.reply_to.as_deref().unwrap_or_default();
        let to = match self.addresses.of_operator(reply_to) {
            Ok(to) => to,
            Err(error) => {
                tracing::debug!(%error, "a ping could not be answered");
                return;
            }
        };
        let pong = Pong {
            worker: self.worker.clone(),
            version: env!("CARGO_PKG_VERSION").into(),
            since: self.since,
            slots: self.slots,
            queues: self.queues.clone(),
            draining: self.drain.is_cancelled(),
            jobs: self.in_flight.list(&self.asker(&received)),
        };
        // Text and numbers: nothing in it can fail to be JSON.
        let body = serde_json::to_vec(&pong).unwrap_or_default();
        let message_id = Uuid::now_v7().to_string();
        self.publisher.publish_once(&Message::pong(to, &received.properties, &message_id, body)).await;
    }
}
