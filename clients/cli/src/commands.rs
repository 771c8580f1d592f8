//! What each command does.

pub mod agents;
pub mod checkpoints;
pub mod configure;
pub mod copy;
pub mod directory_watch;
pub mod doctor;
pub mod exec;
pub mod files;
pub mod forks;
pub mod keys;
pub mod network;
pub mod nodes;
pub mod port_forward;
pub mod previews;
pub mod remote_path;
pub mod sandboxes;
pub mod shell;
pub mod watch;

use std::{env, path::PathBuf};

use clap::CommandFactory as _;
use serde_json::json;

use crate::{
    arguments::{Cli, Command, Global, SandboxCommand, nodes::NodeCommand},
    config::{self, Settings, Sources},
    connection::Connection,
    failure::Failure,
    output::{self, Output},
    quote, up,
};

/// Runs the command and returns its exit code.
pub async fn run(cli: Cli, output: Output) -> Result<u8, Failure> {
    let Cli { global, command } = cli;
    match command {
        Command::Up(arguments) => up::up(&global, *arguments, output).await?,
        Command::Down(arguments) => up::down(&global, &arguments, output).await?,
        Command::Env => print_exports(&global, output)?,
        Command::Config(command) => configure::run(&command, home().as_deref(), output)?,
        Command::Create(arguments) => sandboxes::create(&connect(&global).await?, arguments, output).await?,
        Command::Ls => sandboxes::list(&connect(&global).await?, output).await?,
        Command::Get(one) => sandboxes::get(&connect(&global).await?, one.id, output).await?,
        Command::Kill(some) => sandboxes::kill(&connect(&global).await?, some.ids, output).await?,
        Command::Watch(arguments) => watch::run(&connect(&global).await?, arguments, output).await?,
        Command::Sandbox(command) => run_sandbox(&connect(&global).await?, command, output).await?,
        Command::Checkpoint(command) => checkpoints::run(&connect(&global).await?, command, output).await?,
        Command::Fork(arguments) => forks::fork(&connect(&global).await?, arguments, output).await?,
        Command::Exec(arguments) => return exec::run(&global, *arguments, output).await,
        Command::Shell(arguments) => return shell::run(&global, *arguments, output).await,
        Command::PortForward(arguments) => {
            port_forward::run(&connect(&global).await?, arguments, output).await?;
        }
        Command::Network(command) => network::run(&connect(&global).await?, command, output).await?,
        Command::Preview(command) => previews::run(&connect(&global).await?, command, output).await?,
        Command::Agent(command) => return agents::run(&global, *command, output).await,
        Command::Files(command) => files::run(&global, command, output).await?,
        Command::Keys(command) => keys::run(&connect(&global).await?, command, output).await?,
        Command::Nodes => nodes::list(&connect(&global).await?, output).await?,
        Command::Node(NodeCommand::Doctor(arguments)) => {
            return doctor::run(&global, &arguments, output).await;
        }
        Command::Version => {
            let version = env!("CARGO_PKG_VERSION");
            output.show(|| json!({ "version": version }), || format!("oc {version}"))?;
        }
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "oc", &mut script);
            output.bytes(&script)?;
        }
        // Replaced this process before there was a runtime.
        Command::RunService(_) => {}
    }
    Ok(0)
}

async fn run_sandbox(
    connection: &Connection,
    command: SandboxCommand,
    output: Output,
) -> Result<(), Failure> {
    match command {
        SandboxCommand::Create(arguments) => sandboxes::create(connection, arguments, output).await,
        SandboxCommand::List => sandboxes::list(connection, output).await,
        SandboxCommand::Get(one) => sandboxes::get(connection, one.id, output).await,
        SandboxCommand::Kill(some) => sandboxes::kill(connection, some.ids, output).await,
        SandboxCommand::Hibernate(one) => sandboxes::hibernate(connection, one.id, output).await,
        SandboxCommand::Wake(one) => sandboxes::wake(connection, one.id, output).await,
        SandboxCommand::SetTimeout { id, seconds } => {
            sandboxes::set_timeout(connection, id, seconds, output).await
        }
    }
}

/// Connects to the gateway that flags, environment, configuration or the local mesh name.
pub async fn connect(global: &Global) -> Result<Connection, Failure> {
    Connection::open(&sources(global)?.resolve()?).await
}

fn sources(global: &Global) -> Result<Sources, Failure> {
    let file = match config::file_path(home().as_deref()) {
        Some(path) => config::load(&path)?,
        None => Settings::default(),
    };
    Ok(Sources {
        flags: Settings { api_url: global.api_url.clone(), api_key: global.api_key.clone(), ca_file: None },
        environment: config::from_environment(|name| env::var(name).ok()),
        file,
        local: up::local_mesh(&global.state_dir),
    })
}

fn home() -> Option<PathBuf> {
    env::home_dir()
}

fn print_exports(global: &Global, output: Output) -> Result<(), Failure> {
    let target = sources(global)?.resolve_for_export()?;
    let mut variables = vec![
        ("OC_API_URL", target.url.clone()),
        ("OC_API_KEY", target.key.clone()),
        ("OPENCOMPUTER_API_URL", target.url),
        ("OPENCOMPUTER_API_KEY", target.key),
    ];
    if let Some(path) = &target.ca_file {
        // Node adds what this names to what it trusts; curl is told with --cacert.
        variables
            .extend(["OC_CA_FILE", "NODE_EXTRA_CA_CERTS"].map(|name| (name, path.display().to_string())));
    }
    output.show(
        || variables.iter().map(|(name, value)| ((*name).to_owned(), json!(value))).collect(),
        || variables.iter().map(|(name, value)| quote::export(name, value)).collect::<Vec<_>>().join("\n"),
    )?;
    if output.is_json() || !std::io::IsTerminal::is_terminal(&std::io::stdout()) {
        return Ok(());
    }
    output::note("# to set them in this shell: eval \"$(oc env)\"");
    Ok(())
}
