//! `kvstore config`: check, show or change the configuration.

use std::collections::HashMap;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context as _;
use clap::Subcommand;

use super::Target;
use super::output::print_json;
use crate::config;

/// Check, show or change the configuration.
#[derive(clap::Args, Debug)]
#[command(after_help = "Examples:
  kvstore config check kvstore.toml
  kvstore config show --sample > kvstore.toml
  kvstore config show
  kvstore config set host.bytes=8GiB host.high_watermark_percent=95")]
pub struct Config {
    #[command(subcommand)]
    action: Action,
}

#[derive(Subcommand, Debug)]
enum Action {
    /// Check a configuration file and the environment that overrides it. This needs no daemon.
    Check {
        /// The file. Without it, the command checks the environment alone.
        file: Option<PathBuf>,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Show the configuration of a running daemon, or a commented sample.
    Show {
        #[command(flatten)]
        target: Target,
        /// Print the sample: every key with its default and its reason.
        #[arg(long)]
        sample: bool,
    },
    /// Change keys of a running daemon that can change live. Either all of them change, or none.
    Set {
        #[command(flatten)]
        target: Target,
        /// The keys to change, and their new values.
        #[arg(required = true, value_name = "KEY=VALUE")]
        settings: Vec<String>,
    },
    /// Make a running daemon read its configuration file again, as SIGHUP does.
    Reload {
        #[command(flatten)]
        target: Target,
    },
}

impl Config {
    pub(super) async fn run(self) -> anyhow::Result<ExitCode> {
        match self.action {
            Action::Check { file, json } => {
                let raw = config::load_raw(file.as_deref(), std::env::vars(), &[])?;
                raw.check()?;
                if json {
                    print_json(&serde_json::json!({ "valid": true, "config": raw }))?;
                } else {
                    println!("{}: valid", file.map_or("the environment".into(), |file| file.display().to_string()));
                }
            }
            Action::Show { sample: true, .. } => print!("{}", config::SAMPLE),
            Action::Show { target, sample: false } => {
                let text = target.connect().await?.config().await?;
                if target.json {
                    print_json(&toml::from_str::<toml::Value>(&text)?)?;
                } else {
                    print!("{text}");
                }
            }
            Action::Set { target, settings } => {
                let pair = |setting: &String| {
                    let (key, value) = setting.split_once('=')?;
                    Some((key.trim().to_owned(), value.trim().to_owned()))
                };
                let values: Option<HashMap<_, _>> = settings.iter().map(pair).collect();
                let values = values.context("a setting must have the form KEY=VALUE")?;
                print_changes(&target, &target.connect().await?.set_config(values).await?)?;
            }
            Action::Reload { target } => print_changes(&target, &target.connect().await?.reload_config().await?)?,
        }
        Ok(ExitCode::SUCCESS)
    }
}

fn print_changes(target: &Target, changes: &[String]) -> anyhow::Result<()> {
    if target.json {
        return print_json(&serde_json::json!({ "changes": changes }));
    }
    if changes.is_empty() {
        println!("nothing changed");
    }
    changes.iter().for_each(|change| println!("{change}"));
    Ok(())
}
