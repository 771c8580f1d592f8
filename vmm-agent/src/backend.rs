//! What the lifecycle needs of the part that drives VMMs: the seam at which tests put a host without any.

use std::{
    collections::BTreeSet,
    fmt::Debug,
    io,
    net::SocketAddr,
    sync::{Arc, atomic::AtomicBool},
    time::{Duration, SystemTime},
};

use futures_util::future::BoxFuture;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tonic::{Status, body::Body};
use tower::util::BoxCloneSyncService;

use crate::{
    identity::SandboxId,
    microvm::{Kind, MakeError},
    network::Egress,
};

/// The way to a guest: gRPC calls, as many at a time as wanted. Works as long as the VM runs.
pub type Guest = BoxCloneSyncService<http::Request<Body>, http::Response<Body>, Status>;

/// Makes VMs of one host, and finds those that were made before.
#[tonic::async_trait]
pub trait Backend: Debug + Send + Sync + 'static {
    /// What runs the guests' instructions: `kvm` or `tcg`.
    fn accelerator(&self) -> &'static str;

    /// The VMM and its version.
    fn vmm(&self) -> String;

    /// Templates that this host can start.
    fn templates(&self) -> Vec<String>;

    /// The snapshots that this host can start, of whichever host.
    fn startable(&self) -> Startable;

    /// Readies the golden snapshot of `kind`, which takes a boot the first time. Many may wait for the same one.
    async fn golden(&self, kind: &Kind) -> Result<(), MakeError>;

    /// Names everything that looks like a VM: homes, cgroups, processes.
    async fn existing(&self) -> Result<Vec<String>, MakeError>;

    /// A handle to the VM called `vm`, however much or little of it there is.
    fn open(&self, vm: &str) -> Box<dyn Instance>;

    /// Whether a clone of `kind` that runs warm is better to take a state on than a new VM ([`Instance::graft`]).
    fn grafts(&self, scion: Scion<'_>, kind: &Kind) -> bool;

    /// The snapshots of sandboxes' VMs that are whole.
    fn snapshots(&self) -> Vec<Captured>;

    /// What the object store is called that this host uses, as soon as it has said so.
    fn object_store_id(&self) -> watch::Receiver<Option<Arc<str>>>;

    /// Sees that a snapshot is on this host, and gets it from the object store if it is not. [`MakeError::NoSnapshot`] if it
    /// is in neither.
    async fn provide_snapshot(&self, snapshot_id: &str) -> Result<(), MakeError>;

    /// Removes a snapshot, from the object store, too. What runs of it goes on. Fine if there is none.
    async fn delete_snapshot(&self, snapshot_id: &str) -> Result<(), MakeError>;

    /// Reads all of a snapshot, wherever it is, and compares it with its digests. [`MakeError::Unusable`] says what is
    /// damaged.
    async fn verify_snapshot(&self, snapshot_id: &str) -> Result<Whole, MakeError>;

    /// Has no guest reach these addresses, nor those that it was told before.
    async fn seclude(&self, parts: &BTreeSet<SocketAddr>) -> io::Result<()>;

    /// Removes what belongs to no VM: what the host's VMs share. For a host that ends for good.
    async fn clean_up(&self) -> Result<(), MakeError>;
}

/// What becomes of a VM that nobody has told to halt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Condition {
    /// It runs.
    Runs,
    /// Its VMM has halted it because the host's disk took no more. It goes on from there once it is resumed.
    DiskFull,
    /// Its VMM has halted it for good: why.
    Stopped(String),
}

/// How the state of a VM was taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Circumstances {
    /// When.
    pub taken_at: SystemTime,
    /// Whether the guest had written everything back to its disk and stood still.
    pub is_quiet: bool,
    /// How long the guest did not run.
    pub pause: Duration,
    /// How long it took to freeze and to thaw.
    pub freeze: Duration,
    /// Whether it is for use at once: neither synced nor digested, and void when the agent starts again.
    pub is_ephemeral: bool,
}

/// A snapshot to take.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// What it is to be called.
    pub snapshot_id: String,
    /// Whether it is to be of the disk alone.
    pub disk_only: bool,
    /// Whether it is for use at once.
    pub is_ephemeral: bool,
}

/// A state that a clone takes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scion<'a> {
    /// That of the snapshot called so, with a copy of its disk.
    Snapshot(&'a str),
    /// That of the VM called so, which is stored, with its disk.
    Stored(&'a str),
}

/// What is known of a snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Captured {
    /// What it is called.
    pub snapshot_id: String,
    /// Whether memory and devices are in it.
    pub has_memory: bool,
    /// How it was taken.
    pub circumstances: Circumstances,
    /// What it takes beside what it is laid over, bytes.
    pub bytes: u64,
    /// Memory that its VM had changed of what it maps, bytes.
    pub memory_changed_bytes: u64,
    /// What its disk takes, bytes.
    pub disk_bytes: u64,
    /// SHA-256 of its manifest, hex.
    pub manifest_digest: String,
    /// Digest of all that its memory depends on.
    pub snapshot_key: String,
    /// Digest of the base image of its disk.
    pub base_digest: String,
    /// The object store that has it, too, if one has.
    pub object_store_id: Option<Arc<str>>,
}

/// Which snapshots a host can start.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Startable {
    /// Those whose memory goes on, by [`Captured::snapshot_key`].
    pub snapshot_keys: Vec<String>,
    /// Those whose disk boots, by [`Captured::base_digest`].
    pub base_digests: Vec<String>,
}

/// What of a snapshot was found whole, bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Whole {
    /// On this host.
    pub here: u64,
    /// In its object store.
    pub uploaded: u64,
}

/// One VM of a backend. Every call may be dropped half-way: [`Instance::destroy`] removes whatever there is then.
#[tonic::async_trait]
pub trait Instance: Debug + Send + Sync + 'static {
    /// Makes its home; nothing runs yet.
    async fn create(&mut self) -> Result<(), MakeError>;

    /// Sets what it may reach whenever it runs, before it does. All of the internet, as long as nothing else was said; one that
    /// takes the state of a stored VM on takes that one's.
    async fn restrict(&mut self, egress: Egress) -> Result<(), MakeError>;

    /// Starts a clone of the golden snapshot of `kind`. It is paused then.
    async fn restore(&mut self, kind: &Kind) -> Result<(), MakeError>;

    /// Boots `kind`. Its guest answers then.
    async fn boot(&mut self, kind: &Kind) -> Result<(), MakeError>;

    /// Hangs up on the guest of a VM that runs, and halts it, after what was stored of it earlier is removed for good. It
    /// may be stored then, and [`Instance::resume`] lets it go on.
    async fn halt(&mut self) -> Result<(), MakeError>;

    /// Stores the memory and devices of a VM that was halted, beside its disk; `is_quiet` says whether its guest had
    /// written everything back to it. It stays as it is. Returns what that takes, bytes.
    ///
    /// Dropped half-way, it may go on for a while, and may even be done; whatever else is done with the VM does not
    /// suffer from that, and [`Instance::forget_stored`] waits for it.
    async fn store(&mut self, is_quiet: bool) -> Result<u64, MakeError>;

    /// Takes the state of a VM that runs, which goes on. Returns for how long it did not run. [`Instance::keep_capture`]
    /// makes it a snapshot.
    async fn capture(&mut self, what: &Wanted) -> Result<Duration, MakeError>;

    /// Makes what was captured last a snapshot: whole, and on disk unless it is for use at once.
    async fn keep_capture(&mut self, circumstances: Circumstances) -> Result<Captured, MakeError>;

    /// Starts a VM from a snapshot, with a copy of its disk. It is paused then, as that one was.
    /// [`MakeError::Unusable`] if the snapshot is no good.
    async fn restore_snapshot(&mut self, snapshot_id: &str, kind: &Kind) -> Result<(), MakeError>;

    /// Makes a clone that is paused what [`Instance::restore_snapshot`] would make of a new VM, or [`Instance::restore_stored`]
    /// of the one that is stored: that one's disk is the clone's as well then, and it is as it was until the clone goes on.
    /// If it fails, the clone is only good for being destroyed. [`MakeError::Unusable`] as above.
    async fn graft(&mut self, scion: Scion<'_>, kind: &Kind) -> Result<(), MakeError>;

    /// Boots a VM from a copy of a snapshot's disk. Its guest answers then. [`MakeError::Unusable`] as above.
    async fn boot_snapshot(&mut self, snapshot_id: &str, kind: &Kind) -> Result<(), MakeError>;

    /// Ends a VM that is stored; its disk and what is stored stay. May be repeated.
    async fn release(&mut self) -> Result<(), MakeError>;

    /// Starts a VM where it was when it was stored. It is paused then. [`MakeError::Unusable`] if its memory is no good.
    async fn restore_stored(&mut self, kind: &Kind) -> Result<(), MakeError>;

    /// Boots a VM from its disk as it is. Its guest answers then.
    async fn boot_stored(&mut self, kind: &Kind) -> Result<(), MakeError>;

    /// What [`Instance::shelve`] is to call the snapshot that it makes of a sandbox's VM that is stored: another one each time
    /// that it was stored. `None` if only its disk is.
    async fn shelf_id(&self, sandbox: &SandboxId) -> Result<Option<String>, MakeError>;

    /// Makes a snapshot of a VM that is stored, of its memory and a copy of its disk, which the host keeps as any other, and
    /// for as long as it `sleeps`: it says so no more before it goes on, and then there is none. It takes at most `spare_bytes`
    /// of disk. Fine if there is one. It may go on for a while after it was dropped.
    async fn shelve(
        &self,
        snapshot_id: &str,
        spare_bytes: u64,
        sleeps: Arc<AtomicBool>,
    ) -> Result<(), MakeError>;

    /// Removes what is stored of its memory, which a VM that has gone on makes worthless. Not to be waited for beside
    /// another call.
    fn forget_stored(&self) -> BoxFuture<'static, Result<(), MakeError>>;

    /// Takes over the process that an earlier agent started. `false` if it is gone.
    async fn adopt(&mut self) -> Result<bool, MakeError>;

    /// Lets a paused VM go on.
    async fn resume(&self) -> Result<(), MakeError>;

    /// Halts a VM that runs.
    async fn pause(&self) -> Result<(), MakeError>;

    /// How a VM fares that was let go on.
    async fn condition(&self) -> Result<Condition, MakeError>;

    /// Grows the device of the writable filesystem to `disk_mb` MiB; one that is larger stays as it is.
    async fn grow_disk(&self, disk_mb: u32) -> Result<(), MakeError>;

    /// The way to its guest, once it was started or adopted.
    fn guest(&self) -> Option<Guest>;

    /// Completes when the VM's process has ended; never, if none was started.
    fn exit(&self) -> BoxFuture<'static, ()>;

    /// Ends the VM's process and waits until it is gone. Its home stays.
    async fn kill(&mut self) -> Result<(), MakeError>;

    /// Ends every process of the VM and removes all that it had on this host. May be repeated.
    async fn destroy(&mut self) -> Result<(), MakeError>;

    /// The last lines of the guest's console.
    fn console_tail(&self) -> String;
}
