//! A delivery as a request: the job or what its body lacks to be one, where the result goes, and what is told of both.

use std::time::SystemTime;

use crate::amqp::{Address, AddressError, Addresses, Delivery, Properties};
use crate::job::{self, Admission, Context, Job, Outcome, Refusal, RefusalKind, Status};
use crate::ops::metrics::{DeadReason, Metrics};
use crate::sandbox::Sandbox;
use crate::worker::blocking::blocking;
use crate::worker::coding;
use crate::worker::disposition::NotRun;
use crate::worker::recent_results::MessageFingerprint;

/// What is known of a job beside the job.
#[derive(Debug)]
pub(super) struct Request {
    pub(super) context: Context,
    pub(super) reply_to: Result<Address, AddressError>,
    /// None for a job without a name: two of the same words are two jobs, and neither answers for the other.
    pub(super) fingerprint: Option<MessageFingerprint>,
}

/// Reads requests.
#[derive(Debug)]
pub(super) struct Requests {
    pub(super) worker: String,
    pub(super) admission: Admission,
    pub(super) addresses: Addresses,
    pub(super) metrics: Metrics,
}

impl Requests {
    /// Reads a delivery, and gives it the job's id.
    pub(super) fn read(&self, delivery: &mut Delivery, sandbox: &Sandbox) -> (Request, Result<Job, NotRun>) {
        let reply_to = self.addresses.check(delivery.properties.reply_to.as_deref());
        let mut context = self.context(delivery);
        // A compressed body can become as large as any.
        let bytes = match delivery.properties.content_encoding {
            Some(_) => self.admission.max_body_bytes,
            None => delivery.body.len(),
        };
        let job = blocking(bytes, || self.parse(delivery, sandbox, &mut context));
        delivery.id = Some(context.id.clone());
        let named = job.as_ref().is_ok_and(|job| job.named);
        let fingerprint = named.then(|| blocking(delivery.body.len(), || MessageFingerprint::of(delivery)));
        (Request { context, reply_to, fingerprint }, job)
    }

    /// What is known of the job before its body is read.
    fn context(&self, delivery: &Delivery) -> Context {
        let queued = delivery.properties.queued(SystemTime::now());
        if let Some(queued) = queued {
            self.metrics.queue_wait(queued);
        }
        Context {
            id: String::new(),
            limits: None,
            attempt: delivery.attempt,
            redelivered: delivery.redelivered,
            worker: self.worker.clone(),
            queued,
            metadata: None,
        }
    }

    fn parse(&self, delivery: &Delivery, sandbox: &Sandbox, context: &mut Context) -> Result<Job, NotRun> {
        if let Some(bytes) = delivery.dropped {
            return Err(self.too_large(bytes, delivery, context));
        }
        let Properties { content_encoding, message_id, .. } = &delivery.properties;
        let encoding = content_encoding.as_deref();
        match coding::parse(&delivery.body, encoding, message_id.as_deref(), &self.admission) {
            Ok(job) => {
                context.id.clone_from(&job.id);
                context.limits = Some(sandbox.in_force(job.limits));
                context.metadata.clone_from(&job.metadata);
                Ok(job)
            }
            Err(Refusal { id, metadata, kind, reason }) => {
                (context.id, context.metadata) = (id, metadata);
                let outcome = Box::new(Outcome::not_run(Status::Rejected, reason));
                Err(match kind {
                    RefusalKind::Malformed => NotRun::DeadLetter(DeadReason::Malformed, outcome),
                    RefusalKind::Unacceptable => NotRun::Answer(outcome),
                })
            }
        }
    }

    /// The body was dropped on its way: the job's id is what stands in the message's properties.
    fn too_large(&self, bytes: usize, delivery: &Delivery, context: &mut Context) -> NotRun {
        if let Err(Refusal { id, .. }) =
            job::parse(b"", delivery.properties.message_id.as_deref(), &self.admission)
        {
            context.id = id;
        }
        let most = self.admission.max_body_bytes;
        let why = format!("the body has {bytes} bytes, above this worker's maximum of {most}");
        NotRun::DeadLetter(DeadReason::TooLarge, Box::new(Outcome::not_run(Status::Rejected, why)))
    }
}
