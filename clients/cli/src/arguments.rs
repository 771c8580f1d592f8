//! Every command and flag of `oc`.

pub mod agents;
pub mod checkpoints;
pub mod exec;
pub mod nodes;
pub mod previews;

use std::{net::SocketAddr, path::PathBuf};

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::{
    arguments::{
        agents::AgentCommand,
        checkpoints::{CheckpointCommand, ForkArguments},
        exec::{ExecArguments, ShellArguments},
        nodes::NodeCommand,
        previews::PreviewCommand,
    },
    commands::port_forward::Forward,
    up::shim::RunService,
};

/// Creates and uses microVM sandboxes, and runs a mesh that makes them.
#[derive(Debug, Parser)]
#[command(name = "oc", version, propagate_version = true, arg_required_else_help = true)]
pub struct Cli {
    /// Flags of every command.
    #[command(flatten)]
    pub global: Global,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// Flags of every command.
#[derive(Debug, Args)]
pub struct Global {
    /// Print results and errors as JSON
    #[arg(long, global = true)]
    pub json: bool,
    /// URL of the gateway [env: OC_API_URL, OPENCOMPUTER_API_URL]
    #[arg(long, global = true, value_name = "URL")]
    pub api_url: Option<String>,
    /// API key [env: OC_API_KEY, OPENCOMPUTER_API_KEY]
    #[arg(long, global = true, value_name = "KEY")]
    pub api_key: Option<String>,
    /// Where `oc up` keeps its state on this machine
    #[arg(
        long,
        global = true,
        value_name = "DIR",
        env = "OC_STATE_DIR",
        default_value = "/var/lib/opencomputer"
    )]
    pub state_dir: PathBuf,
    /// Accepted for compatibility: output has no colours
    #[arg(long, global = true, hide = true)]
    pub no_color: bool,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run a mesh on this machine
    Up(Box<UpArguments>),
    /// Stop the mesh that runs on this machine
    Down(DownArguments),
    /// Print shell commands that export URL and API key: eval "$(oc env)"
    Env,
    /// Show or change ~/.oc/config.json
    #[command(subcommand)]
    Config(ConfigCommand),
    /// Create a sandbox
    Create(CreateArguments),
    /// List sandboxes
    #[command(visible_alias = "list")]
    Ls,
    /// Show one sandbox
    Get(OneSandbox),
    /// Delete sandboxes
    Kill(SomeSandboxes),
    /// Print every change of sandboxes as it happens, until Ctrl-C or until those named are deleted
    Watch(WatchArguments),
    /// Run a command in a sandbox, and end with its exit code; look at, attach to and kill those that run
    Exec(Box<ExecArguments>),
    /// Open a shell in a sandbox; Ctrl-P Ctrl-Q leaves it running
    Shell(Box<ShellArguments>),
    /// Make ports of a sandbox ports of this machine, until Ctrl-C
    PortForward(PortForwardArguments),
    /// Look at how sandboxes are connected
    #[command(subcommand)]
    Network(NetworkCommand),
    /// Show ports of a sandbox to others, by URL
    #[command(subcommand)]
    Preview(PreviewCommand),
    /// Start agents in a sandbox, follow them and tell them what to do
    #[command(subcommand)]
    Agent(Box<AgentCommand>),
    /// Look at, copy, change and watch files in a sandbox
    #[command(subcommand)]
    Files(FilesCommand),
    /// Create, look at and delete sandboxes
    #[command(subcommand)]
    Sandbox(SandboxCommand),
    /// Take checkpoints of sandboxes, go back to them, and make sandboxes of them
    #[command(subcommand, visible_alias = "cp")]
    Checkpoint(CheckpointCommand),
    /// Make new sandboxes of a sandbox as it is now, which goes on, or of a checkpoint
    Fork(ForkArguments),
    /// Manage API keys (needs an administrator's key)
    #[command(subcommand)]
    Keys(KeysCommand),
    /// List the hosts (needs an administrator's key)
    Nodes,
    /// Look at a machine that is to run sandboxes
    #[command(subcommand)]
    Node(NodeCommand),
    /// Print the version
    Version,
    /// Print a completion script for a shell
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// Becomes a service of the mesh; used by `oc up` alone
    #[command(hide = true)]
    RunService(RunService),
}

/// `oc sandbox`.
#[derive(Debug, Subcommand)]
pub enum SandboxCommand {
    /// Create a sandbox
    Create(CreateArguments),
    /// List sandboxes
    #[command(visible_alias = "ls")]
    List,
    /// Show one sandbox
    Get(OneSandbox),
    /// Delete sandboxes
    Kill(SomeSandboxes),
    /// Store a sandbox's memory and disk and release its host; the next call wakes it
    Hibernate(OneSandbox),
    /// Wake a hibernated sandbox
    Wake(OneSandbox),
    /// Set how long a sandbox may be idle until it hibernates
    SetTimeout {
        /// ID of the sandbox
        id: String,
        /// Seconds; 0 for no limit
        seconds: i32,
    },
}

/// Names one sandbox.
#[derive(Debug, Args)]
pub struct OneSandbox {
    /// ID of the sandbox
    pub id: String,
}

/// Names sandboxes.
#[derive(Debug, Args)]
pub struct SomeSandboxes {
    /// IDs of the sandboxes
    #[arg(required = true)]
    pub ids: Vec<String>,
}

/// `oc create`.
#[derive(Debug, Args)]
pub struct CreateArguments {
    /// Template
    #[arg(long)]
    pub template: Option<String>,
    /// Seconds the sandbox may be idle until it hibernates; 0 for no limit [default: 300]
    #[arg(long, value_name = "SECONDS")]
    pub timeout: Option<i32>,
    /// Virtual CPUs
    #[arg(long, value_name = "N")]
    pub cpu: Option<i32>,
    /// Memory, MiB
    #[arg(long, value_name = "MIB")]
    pub memory: Option<i32>,
    /// Writable disk, MiB
    #[arg(long, value_name = "MIB")]
    pub disk: Option<i32>,
    /// Environment variable of every command; may be repeated
    #[arg(long, value_name = "NAME=VALUE", value_parser = name_and_value)]
    pub env: Vec<(String, String)>,
    /// Attached to the sandbox; may be repeated
    #[arg(long, value_name = "NAME=VALUE", value_parser = name_and_value)]
    pub metadata: Vec<(String, String)>,
    /// What it may reach: the internet, or nothing [default: open]
    #[arg(long, value_enum)]
    pub egress: Option<Egress>,
    /// Have the sandbox's ports ask for a token, as bearer: a new one unless --preview-auth-token gives one
    #[arg(long, value_name = "SCHEME")]
    pub preview_auth: Option<String>,
    /// The token that they ask for, 16 characters or more
    #[arg(long, value_name = "TOKEN")]
    pub preview_auth_token: Option<String>,
}

/// `oc network`.
#[derive(Debug, Subcommand)]
pub enum NetworkCommand {
    /// Show what a sandbox has of a network
    Show(OneSandbox),
}

/// What a sandbox may reach.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Egress {
    /// The internet
    Open,
    /// Nothing
    None,
}

/// `oc watch`.
#[derive(Debug, Args)]
pub struct WatchArguments {
    /// IDs of the sandboxes; all of them if left out
    pub ids: Vec<String>,
    /// Only what changed after this revision: the last that was printed
    #[arg(long, value_name = "REVISION")]
    pub after: Option<u64>,
}

/// `oc files`. Wherever one path in a sandbox is meant, `ID:PATH` and `ID PATH` are the same.
#[derive(Debug, Subcommand)]
pub enum FilesCommand {
    /// List a directory
    Ls(RemotePath),
    /// Copy files into or out of a sandbox; one side is ID:PATH, `-` is standard input or output
    Cp(CopyArguments),
    /// Remove a file, or a directory with all it holds
    Rm(RemotePath),
    /// Make a directory and its parents
    Mkdir(RemotePath),
    /// Describe a file, directory or link
    Stat(RemotePath),
    /// Rename a file or directory within a sandbox: ID:FROM TO, or ID FROM TO
    Mv {
        /// ID:FROM TO, or ID FROM TO
        #[arg(required = true, num_args = 2..=3, value_name = "PATH")]
        paths: Vec<String>,
    },
    /// Print what happens in a directory, a line an event, until Ctrl-C
    Watch {
        /// The directory.
        #[command(flatten)]
        path: RemotePath,
        /// Watch the directories in it, too
        #[arg(short, long)]
        recursive: bool,
    },
    /// Print a URL by which anybody may read a file, for a while, without a key
    Url {
        /// The file.
        #[command(flatten)]
        path: RemotePath,
        /// One to write it by, with PUT
        #[arg(long)]
        upload: bool,
        /// For how long it is good [default: 3600]
        #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(i32).range(1..))]
        expires: Option<i32>,
    },
}

/// `oc port-forward`.
#[derive(Debug, Args)]
pub struct PortForwardArguments {
    /// ID of the sandbox
    pub id: String,
    /// Port here, 0 for a free one, and port in the sandbox; [ADDRESS:] to listen elsewhere than on 127.0.0.1
    #[arg(required = true, value_name = "[ADDRESS:]LOCAL:REMOTE")]
    pub ports: Vec<Forward>,
}

/// A path in a sandbox.
#[derive(Debug, Args)]
pub struct RemotePath {
    /// ID:PATH, or ID
    pub target: String,
    /// PATH, after ID; the user's home if left out
    pub path: Option<String>,
}

/// `oc files cp`.
#[derive(Debug, Args)]
pub struct CopyArguments {
    /// Copy directories with all they hold
    #[arg(short, long)]
    pub recursive: bool,
    /// ID:PATH, a path on this machine, or `-` for standard input
    pub source: PathBuf,
    /// ID:PATH, a path on this machine, or `-` for standard output
    pub destination: PathBuf,
}

/// `oc keys`.
#[derive(Debug, Subcommand)]
pub enum KeysCommand {
    /// Create a key; only now can it be read
    Create {
        /// Whom its sandboxes belong to; the caller's own tenant if left out
        #[arg(long)]
        tenant: Option<String>,
        /// Let it manage keys and see the hosts
        #[arg(long)]
        admin: bool,
        /// What it is for
        #[arg(long)]
        description: Option<String>,
    },
    /// List keys, without their values
    #[command(visible_alias = "ls")]
    List,
    /// Revoke a key
    #[command(visible_alias = "rm")]
    Delete {
        /// ID of the key
        key_id: String,
    },
}

/// `oc config`.
#[derive(Debug, Subcommand)]
pub enum ConfigCommand {
    /// Set a value; an empty one forgets it
    Set {
        /// Which value
        name: ConfigName,
        /// The value
        value: String,
    },
    /// Show the file's values
    Show,
}

/// A value in the configuration file.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum ConfigName {
    /// URL of the gateway
    ApiUrl,
    /// API key
    ApiKey,
}

/// `oc up`.
#[derive(Debug, Args)]
pub struct UpArguments {
    /// Address of the gateway; port 0 takes any free one
    #[arg(long, value_name = "ADDRESS:PORT", default_value = "127.0.0.1:8080")]
    pub listen: SocketAddr,
    /// URL that clients reach the gateway by, if it is not the one it listens on
    #[arg(long, value_name = "URL")]
    pub public_url: Option<String>,
    /// Domain under which sandboxes' ports are reached, as ID-pPORT.DOMAIN [default: preview.localhost]
    #[arg(long, value_name = "DOMAIN")]
    pub preview_domain: Option<String>,
    /// Host names of the mesh besides that of --public-url, separated by commas, each with all below it: no preview gets one
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    pub own_names: Vec<String>,
    /// Speak TLS with a certificate that is made here; `oc` on this machine trusts it
    #[arg(long, conflicts_with = "tls_cert")]
    pub tls: bool,
    /// Speak TLS with this certificate chain
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    pub tls_cert: Option<PathBuf>,
    /// Its key
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    pub tls_key: Option<PathBuf>,
    /// NAME.crt and NAME.key for host names of previews
    #[arg(long, value_name = "DIR")]
    pub tls_dir: Option<PathBuf>,
    /// Record store, file:///PATH or etcd://HOST:PORT[,HOST:PORT] [default: store.db in the state directory]
    #[arg(long, value_name = "URL")]
    pub store: Option<String>,
    /// Where checkpoints are put, too: file:///PATH, s3://BUCKET[/PREFIX] with credentials from the environment, or none
    /// [default: objects in the state directory]
    #[arg(long, value_name = "URL", env = "OC_OBJECT_STORE")]
    pub object_store: Option<String>,
    /// Templates [default: /var/cache/opencomputer/images]
    #[arg(long, value_name = "DIR", env = "OC_IMAGE_DIR")]
    pub image_dir: Option<PathBuf>,
    /// Where the services' binaries are [default: beside oc]
    #[arg(long, value_name = "DIR")]
    pub bin_dir: Option<PathBuf>,
    /// Static binary that runs in every microVM [default: oc-init, else oc-guest, beside the services]
    #[arg(long, value_name = "FILE")]
    pub guest_binary: Option<PathBuf>,
    /// Name of this machine in the mesh [default: local, or the host name in a mesh on etcd]
    #[arg(long, value_name = "NAME")]
    pub host_id: Option<String>,
    /// Sandboxes kept ready, restored and paused
    #[arg(long, value_name = "N")]
    pub pool_size: Option<u32>,
    /// Sandboxes this machine takes at most
    #[arg(long, value_name = "N")]
    pub max_sandboxes: Option<u32>,
    /// Seconds a hibernated sandbox's process stays, paused, so that it wakes at once; 0 for none [default: 120]
    #[arg(long, value_name = "SECONDS")]
    pub paused_for: Option<u32>,
    /// Keep sandboxes on an XFS of its own with N MiB, in a file: disks and memory are shared there, not copied
    #[arg(long, value_name = "N")]
    pub data_image_mb: Option<u32>,
    /// Boot every sandbox: no golden snapshots, no clones, no pool
    #[arg(long)]
    pub no_snapshots: bool,
    /// Whether sandboxes have a network
    #[arg(long, value_enum, default_value_t = Network::On)]
    pub network: Network,
    /// Addresses sandboxes reach although they are private or reserved, never this machine's own; may be repeated
    #[arg(long, value_name = "CIDR")]
    pub network_allow: Vec<String>,
    /// What runs the microVMs
    #[arg(long, value_enum, default_value_t = Accelerator::Auto)]
    pub accelerator: Accelerator,
    /// Seconds until a mesh that is not ready counts as failed
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    pub ready_timeout: u64,
    /// Return once the mesh is ready, and leave it running
    #[arg(long)]
    pub detach: bool,
    /// Run in a session of its own and report to the `oc up --detach` that waits for it
    #[arg(long, hide = true)]
    pub detached: bool,
}

/// Whether sandboxes have a network.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Network {
    /// They reach the internet
    On,
    /// They have none: this machine needs neither nftables nor network namespaces
    Off,
}

/// What runs the microVMs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Accelerator {
    /// KVM where it boots a guest, else software emulation
    Auto,
    /// The processor's virtualisation
    Kvm,
    /// Software emulation
    Tcg,
}

/// `oc down`.
#[derive(Debug, Args)]
pub struct DownArguments {
    /// Where the services' binaries are [default: where `oc up` had them]
    #[arg(long, value_name = "DIR")]
    pub bin_dir: Option<PathBuf>,
}

/// `NAME=VALUE`.
fn name_and_value(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
        _ => Err("must be NAME=VALUE".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    fn parse(line: &str) -> Result<Cli, clap::Error> {
        Cli::try_parse_from(line.split_whitespace())
    }

    #[test]
    fn the_definitions_are_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn create_takes_the_published_flags() {
        let line = "oc create --timeout 0 --cpu 2 --memory 8192 --disk 20480 --env A=b=c --env B= --metadata k=v --json";
        let cli = parse(line).unwrap();
        assert!(cli.global.json);
        let Command::Create(create) = cli.command else { panic!("not create") };
        assert_eq!((create.timeout, create.cpu, create.memory), (Some(0), Some(2), Some(8192)));
        assert_eq!(create.env, [("A".into(), "b=c".into()), ("B".into(), String::new())]);
        assert!(parse("oc create --env A").is_err());
        assert!(parse("oc create --env =b").is_err());
    }

    #[test]
    fn exec_leaves_the_commands_own_flags_alone() {
        let cli = parse("oc exec sb-1 --wait --cwd /tmp --timeout 5 -- ls --json -la").unwrap();
        assert!(!cli.global.json);
        let Command::Exec(exec) = cli.command else { panic!("not exec") };
        let run = exec.command.unwrap();
        assert_eq!(run.command, ["ls", "--json", "-la"]);
        assert_eq!(run.timeout, Some(5));
        assert!(parse("oc exec sb-1").is_err());
        assert!(parse("oc exec").is_err());
        assert!(parse("oc exec sb-1 --timeout -1 -- true").is_err());
        assert!(parse("oc exec sb-1 -d -i -- true").is_err());
    }

    #[test]
    fn sessions_of_commands_have_commands_of_their_own() {
        for line in [
            "oc exec list sb-1",
            "oc exec ls sb-1 --json",
            "oc exec attach sb-1 s1 --offset 7 -i",
            "oc exec kill sb-1 s1 --signal term",
            "oc exec result sb-1 s1",
        ] {
            let Command::Exec(exec) = parse(line).unwrap().command else { panic!("not exec") };
            assert!(exec.session.is_some() && exec.command.is_none(), "{line}");
        }
        let Command::Exec(exec) = parse("oc exec -it sb-1 -- list").unwrap().command else { panic!() };
        let run = exec.command.unwrap();
        assert!(run.stdin && run.tty && exec.session.is_none());
        assert!(parse("oc exec attach sb-1").is_err());
        assert!(parse("oc exec kill sb-1 s1 --signal none").is_err());
    }

    #[test]
    fn sandbox_commands_mirror_the_short_ones() {
        for line in [
            "oc sandbox create",
            "oc sandbox list",
            "oc sandbox ls",
            "oc ls",
            "oc list",
            "oc sandbox get sb-1",
            "oc sandbox kill sb-1 sb-2",
            "oc sandbox set-timeout sb-1 0",
            "oc files mv sb-1:a b",
            "oc files mv sb-1 a b",
            "oc files cp - sb-1:a",
            "oc env --state-dir /tmp/x",
        ] {
            parse(line).unwrap();
        }
        assert!(parse("oc kill").is_err());
        assert!(parse("oc files mv sb-1:a").is_err());
    }
}
