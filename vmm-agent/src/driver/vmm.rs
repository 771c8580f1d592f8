//! The seam between the driver, which knows homes, snapshots and guests, and the VMM that runs one VM.
//!
//! Two are behind it: [`super::qemu`] and [`super::firecracker`].
//!
//! ```text
//!   launch(Start::Boot) ────────────► running ──pause──► paused ──save──► paused
//!   launch(Start::Paused) ─► empty ──load──► paused ──resume──► running
//!                                            paused ──graft──► paused
//! ```
//!
//! Each call says in which of these states it is legal. A VMM whose call failed is only good for being killed.

use std::{
    fmt::Debug,
    io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    time::Duration,
};

use tokio::net::UnixStream;

use super::{cgroup::Cgroup, home::Home, process::Process};
use crate::{backend::Condition, microvm::Kind, network::Interface};

/// Why a VMM does not do what it is told.
#[derive(Debug, thiserror::Error)]
pub enum VmmError {
    /// It cannot be started.
    #[error("cannot start the VMM: {0}")]
    Start(#[source] io::Error),
    /// Its control socket broke: it ended, or is about to.
    #[error("lost the VMM: {0}")]
    Lost(#[source] io::Error),
    /// It said no.
    #[error("the VMM refuses {command}: {message}")]
    Refused {
        /// What it was told.
        command: &'static str,
        /// Its answer.
        message: String,
    },
    /// A snapshot cannot be loaded.
    #[error("the snapshot cannot be loaded: {0}")]
    Snapshot(String),
    /// It did not answer.
    #[error("the VMM did not answer {command} within {within:?}")]
    Late {
        /// What it was told.
        command: &'static str,
        /// How long it had.
        within: Duration,
    },
}

/// Where a VM's memory comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Memory {
    /// From nowhere: it is the VM's own, and ends with it.
    Anonymous,
    /// A file that the VM writes through to, as its snapshot.
    Written(PathBuf),
    /// A file that the VM reads and does not change: what it writes is its own ([`super::pages`]).
    CopyOf(PathBuf),
}

/// What a new VMM does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// Boots the kernel.
    Boot,
    /// Waits for [`Machine::load`].
    Paused,
}

/// How much of a guest's memory its VMM writes when it is saved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extent {
    /// All of it.
    All,
    /// What has changed since it was saved before, or since the VMM was launched: over what is in the file already.
    Changed,
}

/// Where a VMM writes the guest's memory when it is saved, if it does so itself ([`Vmm::saves_memory`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SavedMemory<'a> {
    /// A file of its home's user.
    pub file: &'a Path,
    /// How much of it.
    pub extent: Extent,
}

/// Bytes to be written to a guest's memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Patch {
    /// Where the guest sees them.
    pub address: u64,
    /// What is written there.
    pub bytes: Vec<u8>,
}

/// Another VM's state, for a VMM that has run: its layer is in the home already.
#[derive(Debug)]
pub struct Graft<'a> {
    /// The home, with the new layer in it.
    pub home: &'a Home,
    /// What has to be written to make its memory the other VM's.
    pub patches: &'a [Patch],
    /// The other VM's devices, as they were saved.
    pub state: &'a [u8],
}

/// Everything that a VMM needs to start.
#[derive(Debug)]
pub struct Launch<'a> {
    /// Its home, with a layer in it.
    pub home: &'a Home,
    /// Its group.
    pub cgroup: &'a Cgroup,
    /// CPUs and memory.
    pub kind: &'a Kind,
    /// Its kernel, uncompressed.
    pub kernel: &'a Path,
    /// Its initramfs.
    pub initramfs: &'a Path,
    /// The read-only base of its disk.
    pub rootfs: &'a Path,
    /// Where its memory comes from.
    pub memory: Memory,
    /// What it does first.
    pub start: Start,
    /// Its network, if it gets one.
    pub network: Option<Interface>,
    /// Where its console and its own messages go.
    pub console: OwnedFd,
}

/// A kind of VMM, on this host.
#[tonic::async_trait]
pub trait Vmm: Debug + Send + Sync + 'static {
    /// Its name and version.
    fn version(&self) -> &str;

    /// What runs the guests' instructions: `kvm` or `tcg`.
    fn accelerator(&self) -> &'static str;

    /// What a snapshot depends on beside its files: restored elsewhere, the guest would not go on.
    fn snapshot_key(&self) -> String;

    /// What a VMM takes beyond the guest's memory, bytes: for the limit of its group.
    fn overhead_bytes(&self) -> u64;

    /// The format of its snapshots, if that is a thing of its own: another version does not read them.
    fn snapshot_format(&self) -> Option<&str>;

    /// The release of the host's kernel, if a snapshot can be restored only where that is the same.
    fn host_kernel(&self) -> Option<&str>;

    /// Whether it gets its files as links in a directory of its own, for which all must be on one filesystem.
    fn links_files(&self) -> bool;

    /// Whether it writes the guest's memory itself when it is saved. Else that is a file that it writes through to, or is read
    /// from its process ([`super::pages`]).
    fn saves_memory(&self) -> bool;

    /// Whether a VMM that has run is better than a new one for a state that is restored ([`Machine::graft`]): where it has
    /// translated the guest's code, which a new one would do again.
    fn grafts(&self) -> bool;

    /// Starts a VMM in its group, as its home's user. Its sockets are in the home when this returns.
    async fn launch(&self, launch: Launch<'_>) -> Result<(Process, Box<dyn Machine>), VmmError>;

    /// Takes over a VMM that was launched in `home` by an earlier agent.
    async fn attach(&self, home: &Home) -> Result<Box<dyn Machine>, VmmError>;

    /// Connects to the port of the guest in `home` on which its first process waits for its host.
    async fn dial(&self, home: &Home) -> io::Result<UnixStream>;
}

/// A VMM that runs.
#[tonic::async_trait]
pub trait Machine: Debug + Send + Sync + 'static {
    /// Running or paused → running.
    async fn resume(&self) -> Result<(), VmmError>;

    /// Running: how it fares.
    async fn condition(&self) -> Result<Condition, VmmError>;

    /// Running → paused, and all that the guest has said is said.
    async fn pause(&self) -> Result<(), VmmError>;

    /// Paused → the same, with everything but memory and disk in `state`, a file of its own; with its memory in `memory` if it
    /// writes that itself, which it does only where it is told.
    async fn save(&self, state: &Path, memory: Option<SavedMemory<'_>>) -> Result<(), VmmError>;

    /// Launched with [`Start::Paused`], its memory as it was when `state` was saved → paused there.
    async fn load(&self, state: &Path) -> Result<(), VmmError>;

    /// Paused, loaded as a clone, its link to the guest closed → paused, as another VM of the same kind was when its state was saved. The layer that it
    /// had is not used any more.
    async fn graft(&self, graft: &Graft<'_>) -> Result<(), VmmError>;

    /// Any state: where in its process the guest's memory begins.
    async fn memory_address(&self) -> Result<u64, VmmError>;

    /// Any state: grows the writable layer's device.
    async fn grow_layer(&self, bytes: u64) -> Result<(), VmmError>;
}
