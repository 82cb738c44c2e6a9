//! What several verbs share: where the configuration comes from, and what of it is said on the command line.

use std::ffi::OsString;
use std::path::PathBuf;

use anyhow::Context;
use clap::Args;

use crate::config::{Config, LogFormat};
use crate::ops::telemetry;

/// Where the configuration comes from.
#[derive(Debug, Default, Args)]
#[command(next_help_heading = "Configuration")]
pub(super) struct ConfigArgs {
    /// Configuration file; else the one that SANDPIPER_CONFIG names, else the defaults hold
    #[arg(long, short = 'c', value_name = "FILE")]
    config: Option<PathBuf>,

    /// Set any key, above file and environment: --set worker.slots=4 (repeatable)
    #[arg(long = "set", value_name = "SECTION.KEY=VALUE")]
    set: Vec<String>,

    /// Log as configured; without it this verb logs errors only
    #[arg(long, short)]
    verbose: bool,
}

impl ConfigArgs {
    /// Reads the configuration, `shorthands` above everything else, and starts logging as configured.
    pub(super) fn load_for_service(&self, shorthands: &[(&str, Option<String>)]) -> anyhow::Result<Config> {
        let config = self.read(shorthands)?;
        telemetry::start(&config.log)?;
        Ok(config)
    }

    /// Reads the configuration. What a person runs by hand logs errors only, unless told otherwise, so that
    /// standard error belongs to the job.
    pub(super) fn load(&self) -> anyhow::Result<Config> {
        let mut config = self.read(&[])?;
        if !self.verbose {
            config.log.level = "error".into();
            config.log.format = LogFormat::Text;
        }
        telemetry::start(&config.log)?;
        Ok(config)
    }

    fn read(&self, shorthands: &[(&str, Option<String>)]) -> anyhow::Result<Config> {
        let mut overrides = Vec::new();
        for set in &self.set {
            let (key, value) = set
                .split_once('=')
                // Not repeated: it may be a password.
                .context("--set: write it as SECTION.KEY=VALUE, such as worker.slots=4")?;
            overrides.push((key.trim().to_owned(), value.to_owned()));
        }
        for (key, value) in shorthands {
            overrides.extend(value.clone().map(|value| ((*key).to_owned(), value)));
        }
        // One that is not UTF-8 is read all the same, so that it is refused and not passed over.
        let text = |text: OsString| text.to_string_lossy().into_owned();
        let env = std::env::vars_os().map(|(name, value)| (text(name), text(value)));
        Config::load(self.config.as_deref(), env, &overrides).context("failed to read the configuration")
    }
}
