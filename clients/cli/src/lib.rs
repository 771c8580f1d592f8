//! `oc`, the command line of the mesh: a client of the public contract like any other, and the supervisor that
//! runs a whole mesh on one machine (`oc up`). It depends on the contract alone, never on a service.
//!
//! - [`arguments`]: every command and flag.
//! - [`commands`]: what each command does.
//! - [`up`]: `oc up` and `oc down`.
//! - [`config`]: where URL and key come from; [`connection`]: the channel to the gateway.
//! - [`foreground`]: a session in a sandbox as if it ran here; [`attachment`]: what brings its bytes, whatever dies on the
//!   way; [`console`], [`terminal`], [`signals`]: what it needs of this machine.
//! - [`output`], [`json`], [`progress`], [`standard`]: results on standard output, everything else on standard error.
//! - [`failure`]: what went wrong, and the exit code that says so.

pub mod arguments;
pub mod attachment;
pub mod commands;
pub mod config;
pub mod connection;
pub mod console;
pub mod failure;
pub mod foreground;
pub mod json;
pub mod output;
pub mod progress;
pub mod quote;
pub mod signals;
pub mod standard;
pub mod terminal;
pub mod tls;
pub mod up;

use std::{ffi::OsString, process::ExitCode};

use clap::Parser as _;

use crate::{
    arguments::{Cli, Command},
    failure::Failure,
    output::Output,
};

/// Parses the arguments, runs the command, and says how it ended.
pub fn main() -> ExitCode {
    let arguments: Vec<OsString> = std::env::args_os().collect();
    let cli = match Cli::try_parse_from(&arguments) {
        Ok(cli) => cli,
        Err(error) => return refuse(&error, &arguments),
    };
    let output = Output::new(cli.global.json);
    match run(cli, output) {
        Ok(code) => ExitCode::from(code),
        Err(failure) => {
            failure.report(output.is_json());
            ExitCode::from(failure.exit_code())
        }
    }
}

fn run(cli: Cli, output: Output) -> Result<u8, Failure> {
    if let Command::RunService(service) = &cli.command {
        // Becomes the service: nothing of this process, no runtime, no thread, may be left by then.
        return Err(up::shim::become_service(&cli.global.state_dir, service));
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::local("cannot start the runtime", error))?;
    let result = runtime.block_on(async {
        let decides_itself = matches!(
            cli.command,
            Command::Up(_) | Command::Down(_) | Command::Exec(_) | Command::Shell(_) | Command::Agent(_)
        );
        let command = Box::pin(commands::run(cli, output));
        // What a signal means.
        if decides_itself { command.await } else { signals::until_interrupted(command).await }
    });
    // A read of the terminal may still block a thread: it must not hold the exit back.
    runtime.shutdown_background();
    result
}

/// Shows a parse error, or the help that was asked for.
fn refuse(error: &clap::Error, arguments: &[OsString]) -> ExitCode {
    use clap::error::ErrorKind;
    let asked = matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion);
    let json = arguments.iter().take_while(|argument| *argument != "--").any(|argument| argument == "--json");
    if asked || !json {
        // Nothing can be done about a closed terminal.
        let _ = error.print();
        return if asked { ExitCode::SUCCESS } else { ExitCode::from(failure::USAGE) };
    }
    let failure = Failure::Usage(error.render().to_string().trim().to_owned());
    failure.report(true);
    ExitCode::from(failure.exit_code())
}
