//! `dead`: the messages that could not be handled, and what can be done about them.

use std::io::IsTerminal;

use anyhow::{Context, bail};
use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde_json::{Value, json};

use crate::amqp::dead::{Dead, DeadMessage};
use crate::cli::args::ConfigArgs;
use crate::cli::output::one_line;
use crate::cli::{End, output, runtime};
use crate::config::Config;

const EXAMPLES: &str = "\
Examples:
  sandpiper dead list
  sandpiper dead show 4f1c2a9be037
  sandpiper dead replay 4f1c2a9be037
  sandpiper dead replay --all
  sandpiper dead purge --yes

A message is named by its key, which list shows, or by its job's id, which may name several. While
a command looks through the queue, others do not see what it holds; all of it goes back in its
order. Exit code: 0 when it was done, 1 when it could not be, or nothing is of that name.";

/// Look at what could not be handled; give it another chance, or throw it away
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    /// List messages, the oldest first: key, when, reason, job
    List {
        /// At most so many
        #[arg(long, value_name = "N", default_value_t = 100)]
        limit: u32,
        /// Print each as a line of JSON
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        config: ConfigArgs,
    },
    /// Print the body of a message, as it came, with what is known of it on standard error
    Show {
        /// Key, or id of a job
        #[arg(value_name = "KEY|ID")]
        name: String,
        /// Print one JSON document with all that is known of it, the body included
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        config: ConfigArgs,
    },
    /// Put messages back on the queues that they came from, with their properties, as if they were new
    Replay {
        /// Keys, or ids of jobs
        #[arg(value_name = "KEY|ID", required_unless_present = "all")]
        names: Vec<String>,
        /// All that are there now
        #[arg(long, conflicts_with = "names")]
        all: bool,
        #[command(flatten)]
        config: ConfigArgs,
    },
    /// Remove every message for good
    Purge {
        /// Really
        #[arg(long)]
        yes: bool,
        #[command(flatten)]
        config: ConfigArgs,
    },
}

pub(super) fn run(args: &Args) -> anyhow::Result<End> {
    let config = match &args.what {
        What::List { config, .. }
        | What::Show { config, .. }
        | What::Replay { config, .. }
        | What::Purge { config, .. } => config.load()?,
    };
    runtime()?.block_on(async {
        match &args.what {
            What::List { limit, json, .. } => list(&config, *limit, *json).await,
            What::Show { name, json, .. } => show(&config, name, *json).await,
            What::Replay { names, .. } => replay(&config, names).await,
            What::Purge { yes, .. } => purge(&config, *yes).await,
        }
    })
}

async fn open(config: &Config) -> anyhow::Result<Dead> {
    Dead::open(&config.amqp).await.context("failed to open the dead queue")
}

async fn list(config: &Config, limit: u32, as_json: bool) -> anyhow::Result<End> {
    let mut dead = open(config).await?;
    let mut shown = 0;
    while shown < limit
        && let Some(message) = dead.next().await?
    {
        shown += 1;
        if as_json {
            output::print_json(&described(&message))?;
        } else {
            let at = one_line(message.at.as_deref().unwrap_or("-"));
            let reason = one_line(message.reason.as_deref().unwrap_or("-"));
            let id = job_id(&message).unwrap_or_else(|| "-".into());
            output::print(format!("{}  {at}  {}  {reason}\n", message.key, one_line(&id)).as_bytes())?;
        }
    }
    let left = dead.left();
    dead.close().await?;
    if left > 0 {
        output::complain(&format!("{left} more are there; --limit shows more"));
    }
    Ok(End::Done)
}

async fn show(config: &Config, name: &str, as_json: bool) -> anyhow::Result<End> {
    let mut dead = open(config).await?;
    let mut found = None;
    while let Some(message) = dead.next().await? {
        if is_named(&message, name) {
            found = Some(message);
            break;
        }
    }
    dead.close().await?;
    let Some(message) = found else { bail!("the dead queue holds no message of the key or job id {name:?}") };
    let mut about = described(&message);
    if as_json {
        match std::str::from_utf8(&message.body) {
            Ok(text) => about["body"] = text.into(),
            Err(_) => about["body"] = json!({ "base64": BASE64.encode(&message.body) }),
        }
        output::print_json(&about)?;
        return Ok(End::Done);
    }
    for (field, value) in about.as_object().into_iter().flatten() {
        match value {
            Value::Null => {}
            Value::String(text) => output::complain(&format!("{field}: {}", one_line(text))),
            other => output::complain(&format!("{field}: {other}")),
        }
    }
    output::print(&if std::io::stdout().is_terminal() { readable(&message.body) } else { message.body })?;
    Ok(End::Done)
}

async fn replay(config: &Config, names: &[String]) -> anyhow::Result<End> {
    let mut dead = open(config).await?;
    let mut replayed = 0_usize;
    let mut missing: Vec<&String> = names.iter().collect();
    let work = async {
        while let Some(message) = dead.next().await? {
            let named: Vec<&String> = names.iter().filter(|name| is_named(&message, name)).collect();
            if names.is_empty() || !named.is_empty() {
                dead.replay(message).await?;
                replayed += 1;
                missing.retain(|name| !named.contains(name));
            }
        }
        anyhow::Ok(())
    };
    let done = work.await.with_context(|| format!("stopped after {replayed} messages"));
    // Also after a failure: what was only looked at should be seen by others soon.
    let closed = dead.close().await;
    done?;
    closed?;
    output::complain(&format!("{replayed} messages are jobs again"));
    if let Some(name) = missing.first() {
        bail!("the dead queue holds no message of the key or job id {name:?}");
    }
    Ok(End::Done)
}

async fn purge(config: &Config, yes: bool) -> anyhow::Result<End> {
    let mut dead = open(config).await?;
    if !yes {
        let (count, queue) = (dead.left(), &config.amqp.dead_queue);
        dead.close().await?;
        bail!("{count} messages of {queue} would be gone for good; say --yes to remove them");
    }
    let count = dead.purge().await?;
    dead.close().await?;
    output::complain(&format!("{count} messages are gone"));
    Ok(End::Done)
}

/// A stranger's bytes, which must not steer a terminal.
fn readable(body: &[u8]) -> Vec<u8> {
    let text = String::from_utf8_lossy(body);
    let shown: String = text
        .chars()
        .map(
            |char| {
                if char.is_control() && !"\n\t".contains(char) { char::REPLACEMENT_CHARACTER } else { char }
            },
        )
        .collect();
    [shown.as_bytes(), b"\n"].concat()
}

fn is_named(message: &DeadMessage, name: &str) -> bool {
    message.key == name || job_id(message).as_deref() == Some(name)
}

/// The id that the job's results would carry, where it has one.
fn job_id(message: &DeadMessage) -> Option<String> {
    let body: Option<Value> = serde_json::from_slice(&message.body).ok();
    let own = body.as_ref().and_then(|body| body["id"].as_str());
    own.or(message.message_id.as_deref()).map(str::to_owned)
}

fn described(message: &DeadMessage) -> Value {
    json!({
        "key": message.key,
        "id": job_id(message),
        "at": message.at,
        "reason": message.reason,
        "queue": message.queue,
        "attempt": message.attempt,
        "worker": message.worker,
        "message_id": message.message_id,
        "correlation_id": message.correlation_id,
        "reply_to": message.reply_to,
        "bytes": message.body.len(),
    })
}
