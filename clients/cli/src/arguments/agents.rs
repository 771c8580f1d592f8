//! Flags of `oc agent`.

use clap::{Args, Subcommand};

use super::{exec::signal_number, name_and_value};

/// `oc agent`.
#[derive(Debug, Subcommand)]
pub enum AgentCommand {
    /// Start an agent; with a prompt follow it until it has done that, and end it then
    Start(StartArguments),
    /// Give an agent something to do, and follow it until it has done that
    Prompt {
        /// The agent.
        #[command(flatten)]
        agent: OneAgent,
        /// What it is to do
        text: String,
        /// Do not follow it
        #[arg(short, long)]
        detach: bool,
    },
    /// Print what an agent says, until it ends; Ctrl-C leaves it running
    Attach {
        /// The agent.
        #[command(flatten)]
        agent: OneAgent,
        /// Where to begin
        #[arg(long, value_name = "BYTE", default_value_t = 0)]
        offset: u64,
    },
    /// Stop what an agent is doing; it waits for the next prompt then
    Interrupt(OneAgent),
    /// End an agent
    Kill {
        /// The agent.
        #[command(flatten)]
        agent: OneAgent,
        /// Number or name
        #[arg(long, default_value = "KILL", value_parser = signal_number)]
        signal: i32,
    },
    /// List the agents that run, and those that ended in the last five minutes
    #[command(visible_alias = "ls")]
    List {
        /// ID of the sandbox
        id: String,
    },
}

/// Names an agent.
#[derive(Debug, Clone, Args)]
pub struct OneAgent {
    /// ID of the sandbox
    pub id: String,
    /// ID of the agent's session
    pub session: String,
}

/// `oc agent start`.
#[derive(Debug, Args)]
pub struct StartArguments {
    /// ID of the sandbox
    pub id: String,
    /// What it is to do first; without one its ID is printed, and it waits
    #[arg(long, value_name = "TEXT")]
    pub prompt: Option<String>,
    /// Model
    #[arg(long)]
    pub model: Option<String>,
    /// Replaces the agent's own system prompt
    #[arg(long, value_name = "TEXT")]
    pub system_prompt: Option<String>,
    /// Tools that it may use without being asked [default: any]
    #[arg(long, value_name = "TOOL", value_delimiter = ',')]
    pub allowed_tools: Vec<String>,
    /// default, acceptEdits, bypassPermissions or plan [default: bypassPermissions]
    #[arg(long, value_name = "MODE")]
    pub permission_mode: Option<String>,
    /// Turns until it stops by itself
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(i32).range(1..))]
    pub max_turns: Option<i32>,
    /// Working directory
    #[arg(long, value_name = "DIR")]
    pub cwd: Option<String>,
    /// Conversation to go on with: the ID that an earlier agent of this sandbox named
    #[arg(long, value_name = "CONVERSATION")]
    pub resume: Option<String>,
    /// Environment variable; may be repeated
    #[arg(long, value_name = "NAME=VALUE", value_parser = name_and_value)]
    pub env: Vec<(String, String)>,
    /// Leave it running when it has done what the prompt says
    #[arg(long)]
    pub keep: bool,
    /// Print its ID and leave it running
    #[arg(short, long, conflicts_with = "keep")]
    pub detach: bool,
}
