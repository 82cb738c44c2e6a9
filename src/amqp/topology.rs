//! The queues that workers and publishers share: declared, or only checked.

use lapin::options::{ExchangeDeclareOptions, QueueDeclareOptions};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{Channel, ErrorKind, ExchangeKind};

use crate::amqp::connection::Link;
use crate::amqp::{Error, short};
use crate::config::{self, Topology};

/// Sees to it that every queue and the control exchange are there. Uses up `channel` where it fails.
pub(super) async fn ensure(link: &Link, channel: &Channel, config: &config::Amqp) -> Result<(), Error> {
    let jobs = [
        ("x-delivery-limit", AMQPValue::LongLongInt(config.delivery_limit.into())),
        ("x-dead-letter-exchange", AMQPValue::LongString("".into())),
        ("x-dead-letter-routing-key", AMQPValue::LongString(config.dead_queue.as_str().into())),
    ];
    // The dead queue first: what the jobs queue lets go must have a place to go to.
    let dead = [("x-delivery-limit", AMQPValue::LongLongInt(DEAD_LIMIT))];
    queue(link, channel, config.topology, &config.dead_queue, &dead).await?;
    queue(link, channel, config.topology, &config.results_queue, &[]).await?;
    for jobs_queue in &config.queues {
        queue(link, channel, config.topology, &jobs_queue.name, &jobs).await?;
    }
    control(link, channel, config.topology).await
}

/// Looking at the dead queue takes its messages and puts them back. Newer brokers would drop them after twenty
/// times; older ones do not know "no limit". Nobody looks so often.
const DEAD_LIMIT: i64 = 1_000_000_000;

/// The exchange by which every worker hears of cancelled jobs.
pub const CONTROL: &str = "sandpiper.control";

async fn queue(
    link: &Link,
    channel: &Channel,
    topology: Topology,
    name: &str,
    arguments: &[(&'static str, AMQPValue)],
) -> Result<(), Error> {
    let mut table = FieldTable::default();
    if topology == Topology::Declare {
        table.insert("x-queue-type".into(), AMQPValue::LongString("quorum".into()));
        for (key, value) in arguments {
            table.insert((*key).into(), value.clone());
        }
    }
    let passive = topology == Topology::Passive;
    let options = QueueDeclareOptions { passive, durable: true, ..QueueDeclareOptions::default() };
    let declared = link
        .ask(&format!("{} queue {name}", verb(passive)), channel.queue_declare(short(name)?, options, table))
        .await;
    declared.map(drop).map_err(|error| mismatch(name, error))
}

async fn control(link: &Link, channel: &Channel, topology: Topology) -> Result<(), Error> {
    let passive = topology == Topology::Passive;
    let options = ExchangeDeclareOptions { passive, durable: true, ..ExchangeDeclareOptions::default() };
    let declaring =
        channel.exchange_declare(CONTROL.into(), ExchangeKind::Fanout, options, FieldTable::default());
    link.ask(&format!("{} exchange {CONTROL}", verb(passive)), declaring)
        .await
        .map_err(|error| mismatch(CONTROL, error))
}

fn verb(passive: bool) -> &'static str {
    if passive { "find" } else { "declare" }
}

/// The broker's 406 is a matter for the operator, not for another try: say so.
fn mismatch(name: &str, error: Error) -> Error {
    const PRECONDITION_FAILED: u16 = 406;
    let Error::Operation { source, .. } = &error else { return error };
    match source.kind() {
        ErrorKind::ProtocolError(refused) if refused.get_id() == PRECONDITION_FAILED => {
            Error::Mismatch { name: name.to_owned(), detail: refused.get_message().to_string() }
        }
        _ => error,
    }
}
