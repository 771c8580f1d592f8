//! Flags of `oc checkpoint` and `oc fork`.

use clap::{Args, Subcommand, ValueEnum};

use super::name_and_value;

/// `oc checkpoint`.
#[derive(Debug, Subcommand)]
pub enum CheckpointCommand {
    /// Take down the state of a sandbox, which goes on
    Create(TakeArguments),
    /// List checkpoints, oldest first
    #[command(visible_alias = "ls")]
    List {
        /// ID of the sandbox they are of; all there are if left out
        sandbox: Option<String>,
        /// Draw which was taken after which
        #[arg(long)]
        tree: bool,
    },
    /// Show one checkpoint
    Get {
        /// ID of the checkpoint
        checkpoint: String,
    },
    /// Delete checkpoints; sandboxes that were made of them stay
    #[command(visible_alias = "rm")]
    Delete {
        /// IDs of the checkpoints
        #[arg(required = true, value_name = "CHECKPOINT")]
        checkpoints: Vec<String>,
    },
    /// Put a sandbox back to one of its checkpoints; calls that are under way end
    Restore {
        /// ID of the sandbox
        sandbox: String,
        /// ID of the checkpoint
        checkpoint: String,
    },
    /// Make new sandboxes of a checkpoint
    Spawn {
        /// ID of the checkpoint
        checkpoint: String,
        /// What they are to be.
        #[command(flatten)]
        branches: Branches,
    },
    /// Read all of each checkpoint and compare it with its digests
    Fsck {
        /// IDs of the checkpoints
        #[arg(required_unless_present = "all", value_name = "CHECKPOINT")]
        checkpoints: Vec<String>,
        /// All there are, but for those that are being taken
        #[arg(long, conflicts_with = "checkpoints")]
        all: bool,
    },
}

/// `oc checkpoint create`.
#[derive(Debug, Args)]
pub struct TakeArguments {
    /// ID of the sandbox
    pub id: String,
    /// Name of the checkpoint, unique among the sandbox's
    #[arg(long)]
    pub name: String,
    /// What it holds
    #[arg(long, value_enum, default_value_t = Kind::Full)]
    pub kind: Kind,
    /// What becomes of the sandbox's older checkpoints of the same kind
    #[arg(long, value_enum, value_name = "POLICY", default_value_t = Retention::None)]
    pub retention_policy: Retention,
    /// With delete-oldest: how many stay, the new one included [default: as many as a sandbox may have]
    #[arg(
        long,
        value_name = "N",
        requires = "retention_policy",
        value_parser = clap::value_parser!(i32).range(1..)
    )]
    pub retention_max_count: Option<i32>,
}

/// What a checkpoint holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Kind {
    /// Disk, memory and CPU: what comes of it goes on where it was
    Full,
    /// The disk: what comes of it boots
    #[value(alias = "disk_only")]
    DiskOnly,
}

/// What becomes of older checkpoints.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Retention {
    /// They stay
    None,
    /// The oldest are deleted
    #[value(alias = "delete_oldest")]
    DeleteOldest,
}

/// `oc fork`.
#[derive(Debug, Args)]
pub struct ForkArguments {
    /// ID of the sandbox, or of the checkpoint
    pub id: String,
    /// What they are to be.
    #[command(flatten)]
    pub branches: Branches,
}

/// What the new sandboxes of a checkpoint or of a sandbox are to be.
#[derive(Debug, Args)]
pub struct Branches {
    /// How many, 1 to 64; all of them are made, or none [default: 1]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(i32).range(1..=64))]
    pub count: Option<i32>,
    /// Go on with the memory, running processes included, instead of booting from the disk
    #[arg(long)]
    pub live: bool,
    /// Seconds each may be idle until it hibernates; 0 for no limit [default: as the sandbox; 300 of a checkpoint]
    #[arg(long, value_name = "SECONDS")]
    pub timeout: Option<i32>,
    /// Environment variable of every command, over what the sandbox had; may be repeated
    #[arg(long, value_name = "NAME=VALUE", value_parser = name_and_value)]
    pub env: Vec<(String, String)>,
    /// Attached to each; may be repeated
    #[arg(long, value_name = "NAME=VALUE", value_parser = name_and_value)]
    pub metadata: Vec<(String, String)>,
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;
    use crate::arguments::{Cli, Command};

    fn parse(line: &str) -> Result<Cli, clap::Error> {
        Cli::try_parse_from(line.split_whitespace())
    }

    #[test]
    fn a_checkpoint_is_full_and_keeps_the_others_unless_told() {
        let cli = parse("oc checkpoint create sb-1 --name a").unwrap();
        let Command::Checkpoint(CheckpointCommand::Create(take)) = cli.command else { panic!("not create") };
        assert_eq!((take.kind, take.retention_policy), (Kind::Full, Retention::None));
        let retention = "--retention-policy delete-oldest --retention-max-count 3";
        let line = &format!("oc cp create sb-1 --name a --kind disk-only {retention}");
        let Command::Checkpoint(CheckpointCommand::Create(take)) = parse(line).unwrap().command else {
            panic!("not create")
        };
        assert_eq!((take.kind, take.retention_policy), (Kind::DiskOnly, Retention::DeleteOldest));
        assert_eq!(take.retention_max_count, Some(3));
        assert!(parse("oc cp create sb-1").is_err());
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        for line in [
            "oc cp create sb-1 --name a --kind memory",
            "oc cp create sb-1 --name a --retention-max-count 3",
            "oc cp create sb-1 --name a --retention-policy delete-oldest --retention-max-count 0",
            "oc cp delete",
            "oc cp restore sb-1",
            "oc cp fsck",
            "oc cp fsck cp-1 --all",
            "oc cp spawn cp-1 --count 65",
            "oc fork sb-1 --count 0",
            "oc fork sb-1 --env A",
            "oc fork",
        ] {
            assert!(parse(line).is_err(), "{line}");
        }
    }

    #[test]
    fn forks_and_spawned_sandboxes_take_the_same_flags() {
        for line in [
            "oc fork sb-1 --count 64 --live --timeout 0 --env A=b --env C= --metadata k=v",
            "oc checkpoint spawn cp-1 --count 64 --live --timeout 0 --env A=b --env C= --metadata k=v",
        ] {
            let branches = match parse(line).unwrap().command {
                Command::Fork(fork) => fork.branches,
                Command::Checkpoint(CheckpointCommand::Spawn { branches, .. }) => branches,
                _ => panic!("neither"),
            };
            assert_eq!((branches.count, branches.live, branches.timeout), (Some(64), true, Some(0)));
            assert_eq!((branches.env.len(), branches.metadata.len()), (2, 1));
        }
    }
}
