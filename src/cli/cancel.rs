//! `cancel`: ends jobs by their id, on whichever worker has them.

use anyhow::bail;

use crate::cli::args::ConfigArgs;
use crate::cli::{End, remote, runtime};
use crate::job;
use crate::worker::MAX_CANCELLATIONS;

const EXAMPLES: &str = "\
Example:
  sandpiper cancel 0198c1f2-7a40-7bbd-a2f3-8f6f3c1d2e4a

Every worker is asked at once. A job that runs ends within a second, one that waits never starts;
its requester gets a result with the status cancelled. Workers keep the request for ten minutes,
for a job that is still in the queue, and the last 1,024 of them; a job that is published anew
under such an id within that time is cancelled, too. A job that has ended keeps its result: nobody
says whether there was one to cancel.

Exit code: 0 when the workers were asked; 1 when none is there, or the broker is not.";

/// End jobs, wherever they wait or run
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Args {
    /// Which jobs
    #[arg(value_name = "ID", required = true)]
    ids: Vec<String>,

    #[command(flatten)]
    config: ConfigArgs,
}

pub(super) fn run(args: &Args) -> anyhow::Result<End> {
    if let Some(wrong) = args.ids.iter().find(|id| !job::is_id(id)) {
        bail!("{wrong:?} is no job's id: those have 1 to 128 of A-Z, a-z, 0-9 and ._:-");
    }
    if args.ids.len() > MAX_CANCELLATIONS {
        bail!(
            "{} ids are more than workers remember for jobs that still wait, {MAX_CANCELLATIONS}; ask for fewer at a time, \
             ten minutes apart",
            args.ids.len()
        );
    }
    let config = args.config.load()?;
    runtime()?.block_on(async {
        let client = remote::connect(&config).await?;
        for id in &args.ids {
            client.cancel(id).await?;
        }
        client.close().await;
        Ok(End::Done)
    })
}
