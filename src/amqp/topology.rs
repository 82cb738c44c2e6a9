//! The queues that workers and publishers share: declared, or only checked.

use lapin::options::{ExchangeDeclareOptions, QueueDeclareOptions};
use lapin::types::{AMQPValue, FieldTable, ShortString};
use lapin::{Channel, ErrorKind, ExchangeKind};

use crate::amqp::connection::link::Link;
use crate::amqp::{Error, chain, short};
use crate::config::{self, QueueType, Topology};

/// Sees to it that every queue and the control exchange are there. Uses up `channel` where it fails.
pub(super) async fn ensure(link: &Link, channel: &Channel, config: &config::Amqp) -> Result<(), Error> {
    // The dead queue first: what a queue of jobs lets go must have a place to go to.
    let dead = of_kind(config.queue_type, &[("x-delivery-limit", AMQPValue::LongLongInt(DEAD_LIMIT))]);
    bounded(link, config, &config.dead_queue, dead, config.dead_max_bytes).await?;
    let results = of_kind(config.queue_type, &[]);
    bounded(link, config, &config.results_queue, results, config.results_max_bytes).await?;
    for jobs in &config.queues {
        queue(link, channel, config.topology, &jobs.name, arguments(jobs, config)).await?;
    }
    control(link, channel, config.topology).await
}

/// Looking at the dead queue takes its messages and puts them back. Newer brokers would drop them after twenty
/// times; older ones do not know "no limit". Nobody looks so often.
const DEAD_LIMIT: i64 = 1_000_000_000;

/// The exchange by which every worker hears of cancelled jobs.
pub const CONTROL: &str = "sandpiper.control";

/// What a queue of jobs is declared with.
fn arguments(queue: &config::Queue, config: &config::Amqp) -> FieldTable {
    let limit = AMQPValue::LongLongInt(config.delivery_limit.into());
    let mut table = of_kind(queue.kind, &[("x-delivery-limit", limit)]);
    table.insert("x-dead-letter-exchange".into(), AMQPValue::LongString("".into()));
    table
        .insert("x-dead-letter-routing-key".into(), AMQPValue::LongString(config.dead_queue.as_str().into()));
    if queue.single_active_consumer {
        table.insert("x-single-active-consumer".into(), AMQPValue::Boolean(true));
    }
    if queue.max_priority > 0 {
        table.insert("x-max-priority".into(), AMQPValue::LongLongInt(queue.max_priority.into()));
    }
    table
}

/// The kind itself, and what only `quorum` queues know.
fn of_kind(kind: QueueType, quorum: &[(&'static str, AMQPValue)]) -> FieldTable {
    let mut table = FieldTable::default();
    table.insert("x-queue-type".into(), AMQPValue::LongString(kind.as_str().into()));
    if kind == QueueType::Quorum {
        for (name, value) in quorum {
            table.insert((*name).into(), value.clone());
        }
    }
    table
}

/// Most bytes of a queue. The oldest messages make room: what nobody reads must not keep the worker from going on.
const MAX_BYTES: &str = "x-max-length-bytes";

/// A queue with a bound on its bytes. One that is there without it, or with another one, is taken as it is: it was
/// declared by an earlier version, or its operator knows better.
async fn bounded(
    link: &Link,
    config: &config::Amqp,
    name: &str,
    arguments: FieldTable,
    most: u64,
) -> Result<(), Error> {
    let is_bound =
        |error: &Error| matches!(error, Error::Mismatch { detail, .. } if detail.contains(MAX_BYTES));
    // A refusal costs the channel.
    let declare = async |topology: Topology, arguments: FieldTable| {
        let channel = link.channel().await?;
        queue(link, &channel, topology, name, arguments).await
    };
    let mut with_bound = arguments.clone();
    if let Some(most) = i64::try_from(most).ok().filter(|most| *most > 0) {
        with_bound.insert(MAX_BYTES.into(), AMQPValue::LongLongInt(most));
    }
    let refused = match declare(config.topology, with_bound).await {
        Err(error) if is_bound(&error) => error,
        declared => return declared,
    };
    match declare(config.topology, arguments.clone()).await {
        Err(error) if is_bound(&error) => declare(Topology::Passive, arguments).await?,
        declared => declared?,
    }
    tracing::warn!(
        queue = name,
        error = chain(&refused),
        "the queue has another bound on its bytes than the configuration says, and is taken as it is; a policy with \
         max-length-bytes bounds it, or delete it while it is empty"
    );
    Ok(())
}

async fn queue(
    link: &Link,
    channel: &Channel,
    topology: Topology,
    name: &str,
    arguments: FieldTable,
) -> Result<(), Error> {
    let passive = topology == Topology::Passive;
    let wanted = format!("a durable queue with the arguments {}", written(&arguments));
    let table = if passive { FieldTable::default() } else { arguments };
    let options = QueueDeclareOptions { passive, durable: true, ..QueueDeclareOptions::default() };
    let declared = link
        .ask(&format!("{} queue {name}", verb(passive)), channel.queue_declare(short(name)?, options, table))
        .await;
    declared.map(drop).map_err(|error| explained(name, wanted, error))
}

/// Arguments as an operator would type them.
fn written(arguments: &FieldTable) -> String {
    let one = |(name, value): (&ShortString, &AMQPValue)| match value {
        AMQPValue::LongString(text) => format!("{name}={text}"),
        AMQPValue::LongLongInt(number) => format!("{name}={number}"),
        AMQPValue::Boolean(yes) => format!("{name}={yes}"),
        other => format!("{name}={other:?}"),
    };
    arguments.inner().iter().map(one).collect::<Vec<_>>().join(", ")
}

async fn control(link: &Link, channel: &Channel, topology: Topology) -> Result<(), Error> {
    let passive = topology == Topology::Passive;
    let options = ExchangeDeclareOptions { passive, durable: true, ..ExchangeDeclareOptions::default() };
    let declaring =
        channel.exchange_declare(CONTROL.into(), ExchangeKind::Fanout, options, FieldTable::default());
    link.ask(&format!("{} exchange {CONTROL}", verb(passive)), declaring)
        .await
        .map_err(|error| explained(CONTROL, "a durable exchange of type fanout".into(), error))
}

fn verb(passive: bool) -> &'static str {
    if passive { "find" } else { "declare" }
}

/// Two refusals are a matter for the operator, not for another try: what is there is something else, and what is
/// only to be checked is not there.
fn explained(name: &str, wanted: String, error: Error) -> Error {
    const NOT_FOUND: u16 = 404;
    const PRECONDITION_FAILED: u16 = 406;
    let Error::Operation { source, .. } = &error else { return error };
    let ErrorKind::ProtocolError(refused) = source.kind() else { return error };
    let name = name.to_owned();
    match refused.get_id() {
        NOT_FOUND => Error::Missing { name, wanted },
        PRECONDITION_FAILED => Error::Mismatch { name, detail: refused.get_message().to_string() },
        _ => error,
    }
}
