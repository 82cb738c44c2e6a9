//! Load for the benchmarks in `tests/bench`: one publisher for whichever worker is measured, so that what the
//! measuring itself costs is the same for all of them.
//!
//! `rpc` publishes jobs and reads their results, `fill` leaves jobs in a queue, `echo` is a worker that does
//! nothing, which shows what the broker alone can carry. Each prints one JSON document on standard output.

mod echo;
mod rpc;

use std::time::Duration;

use anyhow::Context;
use clap::Parser;
use lapin::types::{AMQPValue, FieldTable, ShortString};
use lapin::{Channel, Connection, ConnectionProperties};

/// A message that does not come for so long does not come.
const PATIENCE: Duration = Duration::from_secs(120);

#[derive(Debug, Parser)]
struct Args {
    /// The broker
    #[arg(long)]
    url: String,

    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, clap::Subcommand)]
enum Verb {
    /// Publish jobs and read their results
    Rpc(rpc::Args),
    /// Publish jobs whose results nobody waits for
    Fill(rpc::Fill),
    /// Answer every message at once, until standard input ends
    Echo(echo::Args),
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let Args { url, verb } = Args::parse();
    let report = match verb {
        Verb::Rpc(args) => rpc::run(&url, &args).await?,
        Verb::Fill(args) => rpc::fill(&url, &args).await?,
        Verb::Echo(args) => echo::run(&url, &args).await?,
    };
    print(&report);
    Ok(())
}

#[expect(clippy::print_stdout, reason = "the one place that reports")]
fn print(report: &serde_json::Value) {
    println!("{report}");
}

/// A connection and a channel on it; dropping the connection closes both.
async fn connect(url: &str) -> anyhow::Result<(Connection, Channel)> {
    let properties = ConnectionProperties::default().with_connection_name("load".into());
    let connection = Connection::connect(url, properties).await.context("failed to reach the broker")?;
    let channel = connection.create_channel().await?;
    Ok((connection, channel))
}

/// A string of the protocol, at most 255 bytes.
fn short(text: &str) -> anyhow::Result<ShortString> {
    ShortString::try_new(text.to_owned()).ok().with_context(|| format!("{text} is too long"))
}

fn arguments<const N: usize>(pairs: [(&str, AMQPValue); N]) -> FieldTable {
    let mut table = FieldTable::default();
    for (name, value) in pairs {
        table.insert(name.into(), value);
    }
    table
}

fn text(value: &str) -> AMQPValue {
    AMQPValue::LongString(value.into())
}
