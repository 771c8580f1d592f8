//! Golden snapshots: each kind of VM is booted once, and every other VM of that kind is a copy-on-write clone.
//!
//! A snapshot is a directory: memory, device state and writable layer of one instant, before which the guest had written
//! everything back and its host had hung up. Its files are written and synced under a draft's name, and renamed into place
//! together; nothing changes them afterwards. It is a cache: a missing one costs a boot, and one that depends on what
//! this host no longer has is removed. Clones that run keep its files open, so it may go at any time.

use std::{
    collections::HashMap,
    fs::{DirBuilder, Permissions},
    io,
    os::unix::fs::{DirBuilderExt as _, PermissionsExt as _},
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use fs_err::{self as fs, File, os::unix::fs::chown};
use futures_util::{
    FutureExt as _,
    future::{BoxFuture, Shared},
};
use oc_proto::{
    mesh::{QuiesceRequest, guest_service_client::GuestServiceClient},
    v1::{RunRequest, exec_service_client::ExecServiceClient},
};
use parking_lot::Mutex;
use tokio::time::{sleep, timeout};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::{info, warn};

use super::{
    digests::Digests,
    durable,
    home::{Home, IMAGE_MODE, SNAPSHOT_GID},
    parts::Parts,
    running::{self, Running},
    vmm::{Extent, Memory, SavedMemory},
};
use crate::microvm::{Kind, MakeError};

const MEMORY: &str = "memory.img";
/// Of the memory, where [`super::snapshot::digests_of`] looks for them.
const DIGESTS: &str = "memory.digests";
const STATE: &str = "state.bin";
const LAYER: &str = "layer.img";

/// What every clone would otherwise do once: it leaves files in the page cache, which all clones share.
const WARM_UP: [&str; 2] = ["true", "cat /etc/profile >/dev/null; ls / >/dev/null"];
/// How long each may take.
const WARM_UP_WITHIN: Duration = Duration::from_secs(20);
/// A boot, which has a deadline of its own, and what follows it.
const MADE_WITHIN: Duration = Duration::from_secs(90);
/// The number of the next snapshot.
static NEXT: AtomicU64 = AtomicU64::new(0);
/// A kernel puts some of its start off, by a second the choice of its clock (arch/x86/kernel/tsc.c, `init_tsc_clocksource`).
const SETTLES: Duration = Duration::from_millis(1500);

/// A golden snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Golden {
    dir: PathBuf,
    /// Tells it from one that was made anew at the same place.
    number: u64,
}

impl Golden {
    /// The guest's memory.
    pub fn memory(&self) -> PathBuf {
        self.dir.join(MEMORY)
    }

    /// The devices' state.
    pub fn state(&self) -> PathBuf {
        self.dir.join(STATE)
    }

    fn is_whole(&self) -> bool {
        [self.memory(), self.dir.join(DIGESTS), self.state(), self.layer()].iter().all(|file| file.is_file())
    }

    /// The writable layer.
    pub fn layer(&self) -> PathBuf {
        self.dir.join(LAYER)
    }
}

type Making = Shared<BoxFuture<'static, Result<Golden, String>>>;

/// The golden snapshots of a host, made when they are first wanted.
#[derive(Debug)]
pub struct Goldens {
    parts: Arc<Parts>,
    making: Mutex<HashMap<Kind, Making>>,
    tasks: TaskTracker,
    cancel: CancellationToken,
}

impl Goldens {
    /// Opens the snapshots of `parts`, and removes those that no template of theirs could use.
    ///
    /// # Errors
    ///
    /// If they cannot be listed or removed.
    pub fn open(parts: Arc<Parts>) -> io::Result<Self> {
        let current: Vec<_> = parts.bootables().map(|bootable| bootable.snapshot_key.clone()).collect();
        for entry in fs::read_dir(&parts.places.goldens)? {
            let entry = entry?;
            if current.iter().any(|key| **key == *entry.file_name()) {
                for draft in fs::read_dir(entry.path())? {
                    let draft = draft?;
                    if draft.file_name().as_encoded_bytes().starts_with(b".") {
                        durable::remove(&draft.path())?;
                    }
                }
            } else {
                durable::remove(&entry.path())?;
            }
        }
        let (tasks, cancel) = (TaskTracker::new(), CancellationToken::new());
        Ok(Self { parts, making: Mutex::default(), tasks, cancel })
    }

    /// The snapshot of `kind`, which is made if it is not there. All who wait for the same one share the work, and it
    /// goes on when all of them have given up.
    ///
    /// # Errors
    ///
    /// [`MakeError`]: the next call tries again.
    pub async fn get(&self, kind: &Kind) -> Result<Golden, MakeError> {
        let (mut making, mut made) = self.made(kind).await;
        if made.as_ref().is_ok_and(|golden| !golden.is_whole()) {
            // Somebody has cleared the cache.
            self.forget(kind, &making);
            (making, made) = self.made(kind).await;
        }
        if made.is_err() {
            self.forget(kind, &making);
        }
        made.map_err(MakeError::Backend)
    }

    /// The snapshot of `kind`, if it is there.
    pub fn peek(&self, kind: &Kind) -> Option<Golden> {
        self.making.lock().get(kind).and_then(|making| making.peek()?.as_ref().ok().cloned())
    }

    async fn made(&self, kind: &Kind) -> (Making, Result<Golden, String>) {
        let making = self.making.lock().entry(kind.clone()).or_insert_with(|| self.start(kind)).clone();
        (making.clone(), making.await)
    }

    /// Lets the next caller begin anew, unless somebody has already.
    fn forget(&self, kind: &Kind, making: &Making) {
        let mut all = self.making.lock();
        if all.get(kind).is_some_and(|other| other.ptr_eq(making)) {
            all.remove(kind);
        }
    }

    /// Removes the snapshot of `kind`, which cannot be loaded, unless another is there or in the making already.
    pub fn discard(&self, kind: &Kind, golden: &Golden) {
        let mut all = self.making.lock();
        if all.get(kind).and_then(|making| making.peek()) != Some(&Ok(golden.clone())) {
            return;
        }
        all.remove(kind);
        // Under the lock, so that no other is made at its place meanwhile.
        if let Err(error) = durable::remove_whole(&golden.dir) {
            warn!(%kind, %error, "cannot remove a golden snapshot");
        }
    }

    /// Gives up what is being made, and waits until nothing of it is left.
    pub async fn close(&self) {
        self.cancel.cancel();
        self.tasks.close();
        self.tasks.wait().await;
    }

    fn start(&self, kind: &Kind) -> Making {
        let (parts, kind, cancel) = (self.parts.clone(), kind.clone(), self.cancel.clone());
        let task = self.tasks.spawn(async move { find_or_make(&parts, &kind, cancel).await });
        async { task.await.unwrap_or_else(|panic| Err(panic.to_string())) }.boxed().shared()
    }
}

async fn find_or_make(parts: &Arc<Parts>, kind: &Kind, cancel: CancellationToken) -> Result<Golden, String> {
    let bootable = parts.bootable(&kind.template).map_err(|error| error.to_string())?;
    let family = parts.places.goldens.join(&bootable.snapshot_key);
    let golden = Golden {
        dir: family.join(format!("{}x{}", kind.cpu_count, kind.memory_mb)),
        number: NEXT.fetch_add(1, Ordering::Relaxed),
    };
    if golden.is_whole() {
        return Ok(golden);
    }
    durable::remove_whole(&golden.dir).map_err(|error| error.to_string())?;
    let begun = Instant::now();
    let home = parts.home(&new_name()?);
    let cgroup = parts.cgroups.of(home.dir().file_name().and_then(|name| name.to_str()).unwrap_or_default());
    let made = tokio::select! {
        made = timeout(MADE_WITHIN, make(parts, kind, &home, &cgroup, &golden)) => {
            made.unwrap_or(Err(MakeError::Late)).map_err(|error| error.to_string())
        }
        () = cancel.cancelled() => Err("the host's agent is shutting down".to_owned()),
    };
    let removed = async {
        cgroup.destroy().await?;
        parts.interfaces.unplug(&home).await.map_err(io::Error::other)?;
        durable::remove(home.dir())
    };
    if let Err(error) = removed.await {
        warn!(%kind, %error, "cannot remove all of what made a golden snapshot; the next start will");
    }
    match &made {
        Ok(_) => info!(%kind, elapsed_ms = begun.elapsed().as_millis(), "made a golden snapshot"),
        Err(error) => warn!(%kind, error, "cannot make a golden snapshot"),
    }
    made.map(|()| golden)
}

async fn make(
    parts: &Parts,
    kind: &Kind,
    home: &Home,
    cgroup: &super::cgroup::Cgroup,
    golden: &Golden,
) -> Result<(), MakeError> {
    let layer = parts.empty_layer().await?.to_owned();
    let (memory, state) = running::on_disk(home, move |home| {
        home.create()?;
        home.add_layer(&layer)?;
        Ok((home.add_file(MEMORY)?, home.add_file(STATE)?))
    })
    .await?;
    let vm = Running::boot(
        parts,
        home,
        cgroup,
        (parts.bootable(&kind.template)?, kind),
        Memory::Written(memory.clone()),
    )
    .await?;
    warm_up(&vm).await?;
    // What the kernel puts off is done here once, and not by every clone.
    sleep(SETTLES).await;
    // Not frozen: memory and disk are of one instant, and no clone should have to thaw, which writes to its disk.
    GuestServiceClient::new(vm.link.clone())
        .quiesce(QuiesceRequest { thaw_after_ms: 0 })
        .await
        .map_err(|status| MakeError::Guest(Box::new(status)))?;
    vm.machine.pause().await?;
    vm.link.hang_up().await;
    // Over an empty file: what the guest has never touched is a hole in it.
    let memory = SavedMemory { file: &memory, extent: Extent::Changed };
    vm.machine.save(&state, Some(memory)).await?;
    vm.process.kill().await.map_err(|error| MakeError::Backend(error.to_string()))?;
    let golden = golden.clone();
    running::on_disk(home, move |home| publish(home, &golden)).await
}

async fn warm_up(vm: &Running) -> Result<(), MakeError> {
    let mut exec = ExecServiceClient::new(vm.link.clone());
    for command in WARM_UP {
        let run = exec.run(RunRequest { cmd: command.to_owned(), ..Default::default() });
        // A template need not have them all.
        match timeout(WARM_UP_WITHIN, run).await {
            Ok(Ok(_)) => {}
            Ok(Err(status)) => tracing::debug!(command, %status, "not warmed up"),
            Err(_) => return Err(MakeError::Late),
        }
    }
    Ok(())
}

/// Makes a snapshot of the files in `home`: all of it, or nothing.
fn publish(home: &Home, golden: &Golden) -> io::Result<()> {
    let draft = durable::draft_of(&golden.dir);
    durable::remove(&draft)?;
    DirBuilder::new().recursive(true).mode(0o711).create(draft.parent().unwrap_or(&draft))?;
    DirBuilder::new().mode(0o700).create(&draft)?;
    let memory = std::fs::File::open(home.dir().join(MEMORY))?;
    Digests::of(&memory)?.write(&draft.join(DIGESTS))?;
    for name in [MEMORY, STATE, LAYER] {
        let path = draft.join(name);
        fs::rename(home.dir().join(name), &path)?;
        // Every VM's user reads it, nobody writes it.
        chown(&path, Some(0), Some(SNAPSHOT_GID))?;
        fs::set_permissions(&path, Permissions::from_mode(IMAGE_MODE))?;
        File::open(&path)?.sync_all()?;
    }
    chown(&draft, Some(0), Some(SNAPSHOT_GID))?;
    fs::set_permissions(&draft, Permissions::from_mode(0o710))?;
    File::open(&draft)?.sync_all()?;
    durable::rename(&draft, &golden.dir)
}

fn new_name() -> Result<String, String> {
    let mut bytes = [0; 6];
    getrandom::fill(&mut bytes).map_err(|error| error.to_string())?;
    Ok(format!("vm-{}", hex::encode(bytes)))
}
