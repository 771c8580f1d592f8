//! `oc node`.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};

use super::Network;

/// `oc node`.
#[derive(Debug, Subcommand)]
pub enum NodeCommand {
    /// Say what keeps this machine from running sandboxes, and what would be better otherwise; ends with 1 if none can run
    Doctor(DoctorArguments),
}

/// `oc node doctor`.
#[derive(Debug, Args)]
pub struct DoctorArguments {
    /// What is to run microVMs; any that can, unless told
    #[arg(long, value_enum, default_value_t = Vmm::Auto)]
    pub vmm: Vmm,
    /// Where the agent keeps, or is to keep, what it makes [default: agent in the state directory]
    #[arg(long, value_name = "DIR")]
    pub data_dir: Option<PathBuf>,
    /// Templates [default: /var/cache/opencomputer/images]
    #[arg(long, value_name = "DIR", env = "OC_IMAGE_DIR")]
    pub image_dir: Option<PathBuf>,
    /// Where the services' binaries are [default: beside oc]
    #[arg(long, value_name = "DIR")]
    pub bin_dir: Option<PathBuf>,
    /// Whether sandboxes are to have a network
    #[arg(long, value_enum, default_value_t = Network::On)]
    pub network: Network,
    /// Firecracker's program [default: the one in PATH]
    #[arg(long, value_name = "PATH")]
    pub firecracker: Option<PathBuf>,
    /// Its jailer [default: the one in PATH]
    #[arg(long, value_name = "PATH")]
    pub jailer: Option<PathBuf>,
}

/// What runs microVMs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Vmm {
    /// Whatever can
    Auto,
    /// QEMU
    Qemu,
    /// Firecracker
    Firecracker,
}
