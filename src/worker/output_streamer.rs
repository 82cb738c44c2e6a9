//! Output of a job while it runs, for a requester that asked to see it.
//!
//! A task beside the job's own takes from the tap and publishes chunk by chunk, each after the one before was
//! confirmed, so that they arrive in order. The job never waits for it: what was not sent in time is sent in
//! larger chunks. The result, which holds all of it once more, follows the last chunk.

use std::time::Duration;

use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::amqp::{Address, Message, Properties, PublishOnce, Publisher};
use crate::job::{Chunk, Outcome, Stream, incomplete_end};
use crate::sandbox::Tap;

/// Output is gathered for so long before it is sent: with the time that it waited in its pipe, there is a message at least
/// every 50 ms while there is output.
const BATCH_DELAY: Duration = Duration::from_millis(40);

/// Or until there is as much as this.
const CHUNK_BYTES: usize = 64 << 10;

/// The largest chunk, if more than a few of the usual size have gathered.
const MAX_CHUNK_BYTES: usize = 1 << 20;

/// Between two attempts at one chunk.
const RETRY_DELAY: Duration = Duration::from_millis(500);

/// The sending of one job's output.
#[derive(Debug)]
pub(super) struct OutputStreamer {
    tap: Tap,
    over: CancellationToken,
    task: JoinHandle<Sender>,
}

/// What it takes to send.
#[derive(Debug)]
pub(super) struct Sender {
    pub(super) publisher: Publisher,
    pub(super) to: Address,
    pub(super) asked: Properties,
    pub(super) id: String,
    pub(super) attempt: u32,
    state: State,
}

#[derive(Debug, Default)]
struct State {
    seq: u64,
    /// Beginnings of characters, of each stream.
    unfinished: [Vec<u8>; 2],
    /// The requester is gone, or cannot be reached: the result has all of it.
    given_up: bool,
}

impl OutputStreamer {
    /// Sends what comes through the tap until [`OutputStreamer::finish`].
    pub(super) fn start(
        publisher: Publisher,
        to: Address,
        asked: Properties,
        id: String,
        attempt: u32,
    ) -> Self {
        let sender = Sender { publisher, to, asked, id, attempt, state: State::default() };
        let (tap, over) = (Tap::default(), CancellationToken::new());
        Self { task: tokio::spawn(sender.run(tap.clone(), over.clone())), tap, over }
    }

    /// Where the output comes from.
    pub(super) fn tap(&self) -> Tap {
        self.tap.clone()
    }

    /// The job is over: sends the rest of its output.
    pub(super) async fn finish(self, outcome: &Outcome) {
        self.over.cancel();
        // A panic in it was reported by the runtime.
        let Ok(mut sender) = self.task.await else { return };
        let truncated = [outcome.stdout.truncated, outcome.stderr.truncated];
        for (stream, truncated) in [Stream::Stdout, Stream::Stderr].into_iter().zip(truncated) {
            let rest = std::mem::take(sender.unfinished(stream));
            // A character that the limit cut in two is not in the result either.
            if !rest.is_empty() && !truncated {
                sender.send(stream, rest, &self.over).await;
            }
        }
    }
}

impl Sender {
    async fn run(mut self, tap: Tap, over: CancellationToken) -> Self {
        loop {
            over.run_until_cancelled(tap.holds(1)).await;
            tokio::select! {
                () = tap.holds(CHUNK_BYTES) => {}
                () = tokio::time::sleep(BATCH_DELAY) => {}
                () = over.cancelled() => {}
            }
            // Asked before the tap is emptied: nothing is added after it is over.
            let last = over.is_cancelled();
            while let Some((stream, bytes)) = {
                let behind = tap.pending() > 4 * CHUNK_BYTES;
                tap.take(if behind { MAX_CHUNK_BYTES } else { CHUNK_BYTES })
            } {
                let mut bytes = [std::mem::take(self.unfinished(stream)), bytes].concat();
                *self.unfinished(stream) = incomplete_end(&mut bytes);
                self.send(stream, bytes, &over).await;
            }
            if last {
                return self;
            }
        }
    }

    fn unfinished(&mut self, stream: Stream) -> &mut Vec<u8> {
        &mut self.state.unfinished[usize::from(stream == Stream::Stderr)]
    }

    /// Sends one chunk. Repeated after a fault while the job runs, with the same number and message id.
    async fn send(&mut self, stream: Stream, bytes: Vec<u8>, over: &CancellationToken) {
        if self.state.given_up || bytes.is_empty() {
            return;
        }
        let chunk = Chunk::new(&self.id, self.state.seq, stream, bytes);
        self.state.seq += 1;
        let message_id = chunk.message_id(self.attempt).to_string();
        // Text and numbers: nothing in it can fail to be JSON.
        let body = serde_json::to_vec(&chunk).unwrap_or_default();
        let message =
            Message::output(self.to.clone(), &self.asked, &message_id, body).of_job(Some(self.id.clone()));
        loop {
            let last = over.is_cancelled();
            match self.publisher.publish_once(&message).await {
                PublishOnce::Confirmed => return,
                PublishOnce::Unknown if !last => {
                    over.run_until_cancelled(tokio::time::sleep(RETRY_DELAY)).await;
                }
                PublishOnce::Unroutable | PublishOnce::Unknown => {
                    self.state.given_up = true;
                    return;
                }
            }
        }
    }
}
