//! The command line: arguments in, printing out. Each command is one file with its arguments and a `run`; what it does
//! is done below, in [`crate::daemon`]. Data goes to standard output, all else to standard error.

mod cache;
mod cat;
mod config;
mod context;
mod convert;
mod daemon;
mod demo_registry;
mod digest;
mod get;
mod globals;
mod index;
mod info;
mod ls;
mod manifest;
mod mount;
mod mount8;
mod mount_options;
mod output;
mod prefetch;
mod profile;
mod progress;
mod record;
mod repos;
mod status;
mod tags;
mod target;
mod text;
mod umount;

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use tokio::signal::unix::{SignalKind, signal};

use self::context::Context;
use self::globals::Globals;
use self::output::Output;
use crate::daemon::log::{self, Speaker};
use crate::daemon::{SHUTDOWN_WITHIN, runtime};
use crate::error::{Error, Result};

/// Container registries as a directory tree: every image of every registry, read lazily and verified.
#[derive(Debug, Parser)]
#[command(
    name = "registryfs",
    version,
    propagate_version = true,
    infer_long_args = false
)]
struct Cli {
    #[command(flatten)]
    globals: Globals,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Mount(mount::Mount),
    Umount(umount::Umount),
    Daemon(daemon::Daemon),
    Status(status::Status),
    Repos(repos::Repos),
    Tags(tags::Tags),
    Manifest(manifest::Manifest),
    Config(config::Config),
    Digest(digest::Digest),
    Info(info::Info),
    Ls(ls::Ls),
    Cat(cat::Cat),
    Get(get::Get),
    Prefetch(prefetch::Prefetch),
    Record(record::Record),
    Convert(convert::Convert),
    Cache(cache::Cache),
    Index(index::Index),
    DemoRegistry(demo_registry::DemoRegistry),
}

/// Runs the command that this process was started with, or does what mount(8) started it for, and says how it exits.
#[must_use]
pub fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args_os().collect();
    if let Some(helper) = arguments
        .first()
        .and_then(|program| mount8::Helper::named(program))
    {
        return helper.main(arguments);
    }
    let cli = match Cli::try_parse_from(arguments) {
        Ok(cli) => cli,
        Err(error) => {
            // Help goes to standard output, mistakes to standard error; where neither can be written there is no one
            // to tell.
            let _ = error.print();
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2));
        }
    };
    match cli.run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if output::is_closed_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            if error != Error::Interrupted {
                output::note(&error.to_string());
            }
            ExitCode::from(error.exit_code())
        }
    }
}

impl Cli {
    fn run(&self) -> Result<()> {
        // Daemons bring a runtime of their own, whose end is part of their life.
        if let Command::Daemon(command) = &self.command
            && command.is_spawned()
        {
            return crate::daemon::spawned();
        }
        log::to_stderr(self.globals.verbosity(), self.command.speaker());
        let mut context = Context::new(&self.globals)?;
        match &self.command {
            Command::Daemon(command) => command.run(&context),
            Command::Mount(command) if command.is_foreground() => command.run_foreground(&mut context),
            command => {
                let runtime = runtime()?;
                let result = runtime.block_on(async {
                    tokio::select! {
                        result = command.run(&mut context) => result,
                        () = interruption() => Err(Error::Interrupted),
                    }
                });
                runtime.shutdown_timeout(SHUTDOWN_WITHIN);
                result
            }
        }
    }
}

/// Waits for a signal that asks this process to end: what is unfinished is cleaned up then.
async fn interruption() {
    let terminate = async {
        match signal(SignalKind::terminate()) {
            Ok(mut signals) => drop(signals.recv().await),
            Err(_) => std::future::pending().await,
        }
    };
    tokio::select! {
        _ = tokio::signal::ctrl_c() => {}
        () = terminate => {}
    }
}

impl Command {
    fn speaker(&self) -> Speaker {
        match self {
            Self::Daemon(_) => Speaker::Daemon,
            Self::Mount(command) if command.is_foreground() => Speaker::Daemon,
            _ => Speaker::Command,
        }
    }

    async fn run(&self, context: &mut Context) -> Result<()> {
        let mut out = Output::new(context.globals.format);
        match self {
            Self::Mount(command) => command.run(context).await,
            Self::Umount(command) => command.run(context).await,
            Self::Daemon(command) => command.run(context),
            Self::Status(command) => command.run(context, &mut out).await,
            Self::Repos(command) => command.run(context, &mut out).await,
            Self::Tags(command) => command.run(context, &mut out).await,
            Self::Manifest(command) => command.run(context, &mut out).await,
            Self::Config(command) => command.run(context, &mut out).await,
            Self::Digest(command) => command.run(context, &mut out).await,
            Self::Info(command) => command.run(context, &mut out).await,
            Self::Ls(command) => command.run(context, &mut out).await,
            Self::Cat(command) => command.run(context, &mut out).await,
            Self::Get(command) => command.run(context, &mut out).await,
            Self::Prefetch(command) => command.run(context, &mut out).await,
            Self::Record(command) => command.run(context, &mut out).await,
            Self::Convert(command) => command.run(context, &mut out).await,
            Self::Cache(command) => command.run(context, &mut out).await,
            Self::Index(command) => command.run(context, &mut out).await,
            Self::DemoRegistry(command) => command.run(&mut out).await,
        }?;
        out.finish()
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
    }
}
