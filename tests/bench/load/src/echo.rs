//! A worker that does nothing: takes a message, publishes a reply, and acks when that is confirmed, as
//! Sandpiper does. What goes through it is what the broker can carry.

use std::io::Read;

use anyhow::Context;
use futures_util::StreamExt;
use lapin::options::{
    BasicAckOptions, BasicConsumeOptions, BasicPublishOptions, BasicQosOptions, ConfirmSelectOptions,
    ExchangeDeclareOptions, QueueBindOptions, QueueDeclareOptions,
};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{BasicProperties, Channel, ExchangeKind};
use serde_json::{Value, json};
use tokio::sync::oneshot;

use crate::{arguments, connect, print, short, text};

/// Messages that a consumer holds at one time.
const PREFETCH: u16 = 32;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Queues to declare and consume
    #[arg(long, value_delimiter = ',', required = true)]
    queue: Vec<String>,

    /// quorum, classic or stream
    #[arg(long = "type", default_value = "quorum")]
    kind: String,

    /// A consistent-hash exchange to declare, with all these queues behind it
    #[arg(long)]
    exchange: Option<String>,

    /// Consumers of each queue, with a connection each
    #[arg(long, default_value = "1")]
    consumers: usize,
}

/// Prints `{"ready": true}` when all consumers are there.
pub(crate) async fn run(url: &str, args: &Args) -> anyhow::Result<Value> {
    let (_connection, channel) = connect(url).await?;
    for queue in &args.queue {
        let options = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
        let kind = arguments([("x-queue-type", text(&args.kind))]);
        channel.queue_declare(short(queue)?, options, kind).await?;
    }
    if let Some(exchange) = &args.exchange {
        let kind = ExchangeKind::Custom("x-consistent-hash".into());
        let options = ExchangeDeclareOptions { durable: true, ..ExchangeDeclareOptions::default() };
        channel.exchange_declare(short(exchange)?, kind, options, FieldTable::default()).await?;
        for queue in &args.queue {
            // The key of a binding is its weight.
            let options = QueueBindOptions::default();
            let binding = channel.queue_bind(
                short(queue)?,
                short(exchange)?,
                "1".into(),
                options,
                FieldTable::default(),
            );
            binding.await?;
        }
    }
    let mut consumers = tokio::task::JoinSet::new();
    for queue in &args.queue {
        for at in 0..args.consumers {
            let (connection, channel) = connect(url).await?;
            channel.confirm_select(ConfirmSelectOptions::default()).await?;
            channel.basic_qos(PREFETCH, BasicQosOptions::default()).await?;
            let from = match args.kind.as_str() {
                "stream" => arguments([("x-stream-offset", text("next"))]),
                _ => FieldTable::default(),
            };
            let consuming =
                channel.basic_consume(short(queue)?, "".into(), BasicConsumeOptions::default(), from);
            let messages = consuming.await?;
            let worker = format!("{queue}/{at}");
            consumers.spawn(async move {
                let _open = connection;
                answer(channel, messages, worker).await
            });
        }
    }
    print(&json!({ "ready": true }));
    let (sender, ended) = oneshot::channel();
    std::thread::spawn(move || {
        // Whatever it says, it is over; and nobody listens any more where a consumer ended first.
        let _ = std::io::stdin().read_to_end(&mut Vec::new());
        let _ = sender.send(());
    });
    tokio::select! {
        consumer = consumers.join_next() => consumer.context("no consumer")???,
        _ = ended => {}
    }
    Ok(json!({ "ended": true }))
}

async fn answer(channel: Channel, mut messages: lapin::Consumer, worker: String) -> anyhow::Result<()> {
    let body = json!({ "status": "succeeded", "stdout": "1\n", "worker": worker }).to_string();
    while let Some(message) = messages.next().await {
        let message = message?;
        let asked = &message.properties;
        let Some(reply_to) = asked.reply_to().clone() else { continue };
        let properties = BasicProperties::default()
            .with_content_type("application/json".into())
            .with_delivery_mode(2)
            .with_correlation_id(asked.correlation_id().clone().unwrap_or_default())
            .with_headers(arguments([("attempt", AMQPValue::LongInt(1))]));
        let publishing = channel.basic_publish(
            "".into(),
            reply_to,
            BasicPublishOptions::default(),
            body.as_bytes(),
            properties,
        );
        let confirm = publishing.await?;
        tokio::spawn(async move {
            if confirm.await.is_ok() {
                // One that fails shows: the message comes again, and its result with it.
                let _ = message.acker.ack(BasicAckOptions::default()).await;
            }
        });
    }
    Ok(())
}
