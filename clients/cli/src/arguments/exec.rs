//! Flags of `oc exec` and `oc shell`.

use clap::{Args, Subcommand};

use super::name_and_value;

/// `oc exec`: a command, or what is to be done with the session of an earlier one.
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub struct ExecArguments {
    /// With a session.
    #[command(subcommand)]
    pub session: Option<SessionCommand>,
    /// A new one.
    #[command(flatten)]
    pub command: Option<RunArguments>,
}

/// A command to run.
#[derive(Debug, Args)]
pub struct RunArguments {
    /// ID of the sandbox
    pub id: String,
    /// Wait for the command to end: it always does
    #[arg(long)]
    pub wait: bool,
    /// Working directory
    #[arg(long, value_name = "DIR")]
    pub cwd: Option<String>,
    /// Environment variable; may be repeated
    #[arg(long, value_name = "NAME=VALUE", value_parser = name_and_value)]
    pub env: Vec<(String, String)>,
    /// Seconds until the command is killed, with exit code 124; 0 for no limit [default: 60, and no limit with -i, -t or -d]
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(i32).range(0..))]
    pub timeout: Option<i32>,
    /// User to run as
    #[arg(long)]
    pub user: Option<String>,
    /// Pass our standard input on
    #[arg(short = 'i', long, visible_alias = "interactive")]
    pub stdin: bool,
    /// Run the command on a terminal; with -i it is ours, and Ctrl-P Ctrl-Q leaves the command running
    #[arg(short, long)]
    pub tty: bool,
    /// Print the session's ID and leave the command running
    #[arg(short, long, conflicts_with_all = ["stdin", "tty", "wait"])]
    pub detach: bool,
    /// The program and its arguments; a single word is a script for `sh -c`
    #[arg(last = true, required = true, value_name = "COMMAND")]
    pub command: Vec<String>,
}

/// What to do with the sessions of commands.
#[derive(Debug, Subcommand)]
pub enum SessionCommand {
    /// List the sessions that run, and those that ended in the last five minutes
    #[command(visible_alias = "ls")]
    List {
        /// ID of the sandbox
        id: String,
    },
    /// Follow a session to its end, and end with its exit code; Ctrl-C leaves it running
    Attach(AttachArguments),
    /// Send a signal to a session's processes
    Kill {
        /// ID of the sandbox
        id: String,
        /// ID of the session
        session: String,
        /// Number or name
        #[arg(long, default_value = "KILL", value_parser = signal_number)]
        signal: i32,
    },
    /// Wait for the end of a session, print what it wrote, as far as it is kept, and end with its exit code
    Result {
        /// ID of the sandbox
        id: String,
        /// ID of the session
        session: String,
    },
}

/// `oc exec attach`.
#[derive(Debug, Args)]
pub struct AttachArguments {
    /// ID of the sandbox
    pub id: String,
    /// ID of the session
    pub session: String,
    /// First byte of output that is wanted
    #[arg(long, value_name = "BYTE", default_value_t = 0)]
    pub offset: u64,
    /// Pass our standard input on; Ctrl-P Ctrl-Q leaves a session on a terminal running
    #[arg(short = 'i', long, visible_alias = "interactive")]
    pub stdin: bool,
}

/// `oc shell`.
#[derive(Debug, Args)]
pub struct ShellArguments {
    /// ID of the sandbox
    pub id: String,
    /// The shell [default: the user's own]
    #[arg(long, value_name = "PATH")]
    pub shell: Option<String>,
    /// User to run as
    #[arg(long)]
    pub user: Option<String>,
    /// Working directory
    #[arg(long, value_name = "DIR")]
    pub cwd: Option<String>,
    /// Environment variable; may be repeated
    #[arg(long, value_name = "NAME=VALUE", value_parser = name_and_value)]
    pub env: Vec<(String, String)>,
    /// Leave the shell running when this terminal is closed
    #[arg(long)]
    pub keep: bool,
    /// Come back to a shell that was left running
    #[arg(long, value_name = "SESSION", conflicts_with_all = ["shell", "user", "cwd", "env"])]
    pub attach: Option<String>,
    /// First byte of output that is wanted [default: the last few lines]
    #[arg(long, value_name = "BYTE", requires = "attach")]
    pub offset: Option<u64>,
}

/// A signal's number in Linux, from that or from its name, with `SIG` or without.
pub fn signal_number(text: &str) -> Result<i32, String> {
    if let Ok(number) = text.parse() {
        return if (1..=64).contains(&number) { Ok(number) } else { Err("must be 1 to 64".to_owned()) };
    }
    let name = text.to_ascii_uppercase();
    let name = if name.starts_with("SIG") { name } else { format!("SIG{name}") };
    name.parse::<nix::sys::signal::Signal>()
        .map(|signal| signal as i32)
        .map_err(|_| format!("{text:?} names no signal"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_have_numbers_and_names() {
        for (text, number) in [("9", 9), ("KILL", 9), ("SIGTERM", 15), ("int", 2), ("64", 64)] {
            assert_eq!(signal_number(text), Ok(number));
        }
        for text in ["0", "65", "-1", "SIGSIG", ""] {
            assert!(signal_number(text).is_err(), "{text}");
        }
    }
}
