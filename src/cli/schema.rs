//! `schema`: the contract as JSON Schema or as AsyncAPI, made from the types that read and write it.

use clap::ValueEnum;

use crate::amqp::{CONTROL, Command, Pong};
use crate::cli::args::ConfigArgs;
use crate::cli::{End, output};
use crate::job::asyncapi::{self, BrokerNames};
use crate::job::schema;

const EXAMPLES: &str = "\
Examples:
  sandpiper schema job > job.schema.json
  sandpiper schema result | jq '.properties.status'
  sandpiper schema asyncapi -c config.toml > sandpiper.asyncapi.json";

/// Print the JSON Schema of a job, of its output or of its result; or all of it as AsyncAPI
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Args {
    /// Which of them
    #[arg(value_name = "WHAT")]
    what: What,

    #[command(flatten)]
    config: ConfigArgs,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum What {
    /// What publishers send
    Job,
    /// What they get before it, of a job with `stream`
    Output,
    /// What they get back
    Result,
    /// AsyncAPI 3: these, and the queues as configured
    Asyncapi,
}

pub(super) fn run(args: &Args) -> anyhow::Result<End> {
    let schema = match args.what {
        What::Job => schema::job(),
        What::Output => schema::output(),
        What::Result => schema::result(),
        What::Asyncapi => {
            let amqp = args.config.load()?.amqp;
            let others = amqp.queues.iter().map(|queue| &*queue.name).filter(|name| *name != amqp.jobs_queue);
            let jobs: Vec<&str> = std::iter::once(&*amqp.jobs_queue).chain(others).collect();
            asyncapi::document::<Command, Pong>(&BrokerNames {
                jobs: &jobs,
                results: &amqp.results_queue,
                dead: &amqp.dead_queue,
                control: CONTROL,
            })
        }
    };
    output::print(format!("{schema:#}\n").as_bytes())?;
    Ok(End::Done)
}
