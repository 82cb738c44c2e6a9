//! `schema`: the contract as JSON Schema, made from the types that read and write it.

use clap::ValueEnum;

use crate::cli::{End, output};
use crate::job::schema;

const EXAMPLES: &str = "\
Examples:
  sandpiper schema job > job.schema.json
  sandpiper schema result | jq '.properties.status'";

/// Print the JSON Schema of a job, of its output or of its result
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Args {
    /// Which of them
    #[arg(value_name = "WHAT")]
    what: What,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum What {
    /// What publishers send
    Job,
    /// What they get before it, of a job with `stream`
    Output,
    /// What they get back
    Result,
}

pub(super) fn run(args: &Args) -> anyhow::Result<End> {
    let schema = match args.what {
        What::Job => schema::job(),
        What::Output => schema::output(),
        What::Result => schema::result(),
    };
    output::print(format!("{schema:#}\n").as_bytes())?;
    Ok(End::Done)
}
