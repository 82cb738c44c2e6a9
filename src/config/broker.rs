//! The section `[amqp]`, from what is written to what is used.

use std::path::PathBuf;

use super::check::{Checker, DAY_MS, optional_path};
use super::raw::{OneOrMany, RawAmqp};
use super::{Amqp, Auth, ConfigError, Queue, QueueType, Secret, Topology, url};
use crate::job::explain::quote;

/// So many queues have no sensible shares any more.
const QUEUES_MAX: usize = 64;
/// Beyond this ratio a queue is served so rarely that it may as well wait for the others to be empty.
const WEIGHT_MAX: u32 = 1_000;
/// RabbitMQ's own bound on a message, up to 3.13.
const MESSAGE_MAX: usize = 128 << 20;

impl Checker {
    pub(super) fn amqp(&self, raw: RawAmqp) -> Result<Amqp, ConfigError> {
        let queue_type = self.queue_type("amqp.queue_type", &raw.queue_type)?;
        let (jobs_queue, queues) = self.queues(&raw, queue_type)?;
        let (identity, auth) = self.identity(&raw)?;
        let url_file = optional_path(&raw.url_file);
        let urls = match (&url_file, raw.url) {
            (Some(file), _) => url::read_file(file)?,
            (None, OneOrMany::One(one)) => vec![Secret::new(one)],
            (None, OneOrMany::Many(many)) => many.into_iter().map(Secret::new).collect(),
        };
        if urls.is_empty() {
            return self.fail("amqp.url", "is empty; give at least one address");
        }
        for address in &urls {
            if let Err(fault) = url::check(address.expose()) {
                return self.fail("amqp.url", &format!("holds an address that {fault}"));
            }
        }
        if let Err(error) = globset::Glob::new(&raw.reply_to_allow) {
            return self.fail("amqp.reply_to_allow", &format!("is no glob pattern: {}", error.kind()));
        }
        if raw.operators.iter().any(|user| user.is_empty() || user.len() > 255) {
            return self.fail("amqp.operators", "holds a name that no user has; names have 1 to 255 bytes");
        }
        if !raw.heartbeat_ms.is_multiple_of(1_000) {
            return self.fail("amqp.heartbeat_ms", "must be whole seconds, a multiple of 1000");
        }
        Ok(Amqp {
            urls,
            url_file,
            ca_file: optional_path(&raw.ca_file),
            identity,
            auth,
            topology: self.choice(
                "amqp.topology",
                &raw.topology,
                &[("declare", Topology::Declare), ("passive", Topology::Passive)],
            )?,
            queue_type,
            // Below 2 the worker could not answer a poison job before the broker drops it.
            delivery_limit: self.range("amqp.delivery_limit", raw.delivery_limit, 2..=1_000_000)?,
            prefetch_surplus: self.range("amqp.prefetch_surplus", raw.prefetch_surplus, 0..=1_024)?,
            reply_to_allow: raw.reply_to_allow,
            operators: raw.operators,
            heartbeat: self.duration("amqp.heartbeat_ms", raw.heartbeat_ms, 1_000..=3_600_000)?,
            connect_timeout: self.duration("amqp.connect_timeout_ms", raw.connect_timeout_ms, 1..=DAY_MS)?,
            operation_timeout: self.duration(
                "amqp.operation_timeout_ms",
                raw.operation_timeout_ms,
                1..=DAY_MS,
            )?,
            reconnect_max: self.duration("amqp.reconnect_max_ms", raw.reconnect_max_ms, 1..=DAY_MS)?,
            max_body_bytes: self.range("amqp.max_body_bytes", raw.max_body_bytes, 1_024..=MESSAGE_MAX)?,
            max_result_bytes: self.range(
                "amqp.max_result_bytes",
                raw.max_result_bytes,
                16_384..=MESSAGE_MAX,
            )?,
            jobs_queue,
            queues,
            results_queue: raw.results_queue,
            dead_queue: raw.dead_queue,
            results_max_bytes: self.bound("amqp.results_max_bytes", raw.results_max_bytes)?,
            dead_max_bytes: self.bound("amqp.dead_max_bytes", raw.dead_max_bytes)?,
        })
    }

    /// 0 for none; a queue that holds less than a few messages is a mistake.
    fn bound(&self, key: &str, bytes: u64) -> Result<u64, ConfigError> {
        if bytes == 0 { Ok(0) } else { self.range(key, bytes, 1 << 20..=1 << 50) }
    }

    /// The queues that jobs come from, and the one of them that `submit` puts them into.
    fn queues(&self, raw: &RawAmqp, kind: QueueType) -> Result<(String, Vec<Queue>), ConfigError> {
        let alone = Queue {
            name: raw.jobs_queue.clone(),
            weight: 1,
            kind,
            single_active_consumer: raw.single_active_consumer,
            max_priority: raw.max_priority,
            consumer_priority: raw.consumer_priority,
        };
        let mut queues = Vec::new();
        for (at, queue) in raw.queues.iter().enumerate() {
            let key = |field: &str| format!("amqp.queues[{at}].{field}");
            let kind = match &queue.queue_type {
                Some(kind) => self.queue_type(&key("queue_type"), kind)?,
                None => kind,
            };
            let queue = Queue {
                name: queue.name.clone(),
                weight: self.range(&key("weight"), queue.weight.unwrap_or(1), 1..=WEIGHT_MAX)?,
                kind,
                single_active_consumer: queue.single_active_consumer.unwrap_or(alone.single_active_consumer),
                // What is said for all holds for those that can have it.
                max_priority: queue.max_priority.unwrap_or(match kind {
                    QueueType::Classic => alone.max_priority,
                    QueueType::Quorum => 0,
                }),
                consumer_priority: queue.consumer_priority.unwrap_or(alone.consumer_priority),
            };
            self.priorities(&key("max_priority"), &queue)?;
            queues.push(queue);
        }
        if queues.is_empty() {
            self.priorities("amqp.max_priority", &alone)?;
        }
        if queues.len() > QUEUES_MAX {
            return self.fail("amqp.queues", &format!("has more than {QUEUES_MAX} queues"));
        }
        let jobs_queue = match queues.first() {
            None => raw.jobs_queue.clone(),
            Some(_) if self.origins.is_set("amqp.jobs_queue") => raw.jobs_queue.clone(),
            Some(first) => first.name.clone(),
        };
        let mut names: Vec<(String, &str)> = vec![
            ("amqp.results_queue".into(), &raw.results_queue),
            ("amqp.dead_queue".into(), &raw.dead_queue),
        ];
        if queues.is_empty() {
            names.insert(0, ("amqp.jobs_queue".into(), &raw.jobs_queue));
        }
        names.extend(
            queues.iter().enumerate().map(|(at, queue)| (format!("amqp.queues[{at}].name"), &*queue.name)),
        );
        for (index, (key, name)) in names.iter().enumerate() {
            if name.is_empty() || name.len() > 255 || name.starts_with("amq.") {
                return self.fail(key, "must have 1 to 255 bytes and not begin with `amq.`");
            }
            if names[..index].iter().any(|(_, other)| other == name) {
                return self
                    .fail(key, &format!("is {}, as another queue is; give each its own", quote(name)));
            }
        }
        if queues.is_empty() {
            queues.push(alone);
        } else if queues.iter().all(|queue| queue.name != jobs_queue) {
            let fault = format!(
                "is {}, which is none of `amqp.queues`; add it there, or leave `amqp.jobs_queue` out",
                quote(&jobs_queue)
            );
            return self.fail("amqp.jobs_queue", &fault);
        }
        Ok((jobs_queue, queues))
    }

    fn queue_type(&self, key: &str, kind: &str) -> Result<QueueType, ConfigError> {
        self.choice(key, kind, &[("quorum", QueueType::Quorum), ("classic", QueueType::Classic)])
    }

    fn priorities(&self, key: &str, queue: &Queue) -> Result<(), ConfigError> {
        if queue.max_priority == 0 || queue.kind == QueueType::Classic {
            return Ok(());
        }
        self.fail(
            key,
            "is for classic queues: set `queue_type` to `classic`, or leave it out; a quorum queue of RabbitMQ 4 \
             delivers two messages of a priority above 4 for each other one by itself",
        )
    }

    /// The files of the certificate and its key, and whether the certificate says who we are.
    fn identity(&self, raw: &RawAmqp) -> Result<(Option<(PathBuf, PathBuf)>, Auth), ConfigError> {
        let identity = match (optional_path(&raw.cert_file), optional_path(&raw.key_file)) {
            (Some(certificate), Some(key)) => Some((certificate, key)),
            (None, None) => None,
            (Some(_), None) => return self.fail("amqp.cert_file", "needs its key: set `amqp.key_file`"),
            (None, Some(_)) => {
                return self.fail("amqp.key_file", "needs a certificate: set `amqp.cert_file`");
            }
        };
        let auth =
            self.choice("amqp.auth", &raw.auth, &[("plain", Auth::Plain), ("external", Auth::External)])?;
        if auth == Auth::External && identity.is_none() {
            return self.fail(
                "amqp.auth",
                "is `external`, by certificate: set `amqp.cert_file` and `amqp.key_file`",
            );
        }
        Ok((identity, auth))
    }
}
