//! What all workers are asked at once: to end a job, or to say what they do.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Semaphore, mpsc};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::amqp::{Addresses, Command, Heard, Message, Pong, Publisher};
use crate::worker::running::{Asker, Running};

/// Questions that are answered at one time. More are passed over: whoever asks in a flood is no operator.
const ANSWERS: usize = 8;

/// How long an answer is worth anything.
const WORTH: Duration = Duration::from_secs(5);

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
    pub(super) running: Running,
    pub(super) publisher: Publisher,
}

impl Control {
    /// Does what is asked, as long as somebody can ask.
    pub(super) async fn obey(self: Arc<Self>, commands: Option<mpsc::Receiver<Heard>>) {
        let Some(mut commands) = commands else { return };
        let answers = Arc::new(Semaphore::new(ANSWERS));
        while let Some(heard) = commands.recv().await {
            match &heard.command {
                Command::Cancel(id) => {
                    let asker = self.asker(&heard);
                    match self.running.cancel(id, &asker) {
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
                        let _ = tokio::time::timeout(WORTH, this.pong(heard)).await;
                    });
                }
            }
        }
    }

    /// Who asks, by the broker's word.
    fn asker(&self, heard: &Heard) -> Asker {
        let user = heard.properties.user_id.clone();
        let operator = user.as_ref().is_some_and(|user| self.operators.contains(user));
        Asker { user, operator }
    }

    async fn pong(&self, heard: Heard) {
        let reply_to = heard.properties.reply_to.as_deref().unwrap_or_default();
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
            jobs: self.running.list(&self.asker(&heard)),
        };
        // Text and numbers: nothing in it can fail to be JSON.
        let body = serde_json::to_vec(&pong).unwrap_or_default();
        let message_id = Uuid::now_v7().to_string();
        self.publisher.tell(&Message::pong(to, &heard.properties, &message_id, body)).await;
    }
}
