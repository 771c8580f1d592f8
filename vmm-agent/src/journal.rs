//! What one VM is, written down before it becomes true.
//!
//! ```text
//! making ──▶ pooled ──▶ claimed ──▶ running ──▶ deleting
//!    └─────────────────▶ claimed      │ ▲└──▶ failed ──▶ deleting
//!                                     ▼ │
//!                                    paused ──▶ hibernated ──▶ running, deleting
//! ```
//!
//! (`paused` may be skipped, and leads where `hibernated` does.)
//!
//! One record per VM, in a directory that only the agent can write: a VM's home belongs to the user that its VMM
//! runs as, which must not be able to say whose VM it is.
//!
//! The record is replaced whole (a new file renamed over the old one), so a reader finds one stage or the next.
//! It is not fsynced: it has to survive the agent, and a crash of the machine ends every VM that it speaks of,
//! which the boot ID in it tells. Only a VM that is hibernated survives the machine: that it is, and that it is no more, is
//! on disk before anything follows from it ([`Journal::enter_for_good`]). After a crash of the agent, [`Record::recovery`] says what start-up makes of
//! each stage: what no caller was told of is undone, what one was told of goes on.

use std::{
    fs::{self, DirBuilder},
    io,
    os::unix::fs::DirBuilderExt as _,
    path::PathBuf,
    time::SystemTime,
};

use serde::{Deserialize, Serialize};

use crate::{
    identity::{Epoch, SandboxId},
    vm::tier::Paused,
};

/// The journal's directory in a data directory.
pub const JOURNAL_DIR: &str = "journal";

const SUFFIX: &str = ".json";
const NEW_SUFFIX: &str = ".new";

/// What is written down about one VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Boot of the host that the VM belongs to.
    pub boot_id: String,
    /// Where it is in its life.
    pub stage: Stage,
}

/// The sandbox that a VM is for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Owner {
    /// Its ID.
    pub sandbox: SandboxId,
    /// Epoch of the create that made the VM.
    pub epoch: Epoch,
}

/// How the VM of a sandbox came to run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StartPath {
    /// Taken from the pool.
    Warm,
    /// Restored from the golden snapshot on demand.
    Clone,
    /// Booted.
    Cold,
    /// Went on from its memory, which had stayed where it was.
    Paused,
    /// Went on from its stored memory.
    Memory,
    /// Booted from its stored disk.
    Disk,
    /// Went on from a snapshot's memory.
    Restored,
    /// Booted from a snapshot's disk.
    RestoredDisk,
}

impl StartPath {
    /// For metrics and logs.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Warm => "warm",
            Self::Clone => "clone",
            Self::Cold => "cold",
            Self::Paused => "paused",
            Self::Memory => "memory",
            Self::Disk => "disk",
            Self::Restored => "restored",
            Self::RestoredDisk => "restored-disk",
        }
    }
}

/// Where a VM is in its life.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "stage", rename_all = "snake_case")]
pub enum Stage {
    /// Its process is about to be started, or starts.
    Making,
    /// It waits in the pool, paused, and belongs to nobody.
    Pooled,
    /// It is about to become a sandbox; nobody was told that it runs.
    Claimed(Owner),
    /// The create of its sandbox is about to be answered, or was.
    Running {
        /// Its sandbox.
        #[serde(flatten)]
        owner: Owner,
        /// How it was started.
        path: StartPath,
    },
    /// It is hibernated, and its process stands still with its memory. Whatever is stored of that is of this pause.
    Paused {
        /// Its sandbox.
        #[serde(flatten)]
        owner: Owner,
        /// How it was started.
        path: StartPath,
        /// Since when.
        since: SystemTime,
        /// What its memory and devices take on disk, bytes; 0 as long as they are not known to be there.
        stored_bytes: u64,
    },
    /// It is stored, and has no process that counts.
    Hibernated {
        /// Its sandbox.
        #[serde(flatten)]
        owner: Owner,
        /// How it was started.
        path: StartPath,
        /// What its memory and devices take, bytes; 0 if only its disk is there.
        stored_bytes: u64,
    },
    /// It ran and was lost; its sandbox is shown as failed until it is deleted.
    Failed {
        /// Its sandbox.
        #[serde(flatten)]
        owner: Owner,
        /// Why.
        reason: String,
    },
    /// It is about to be taken down.
    Deleting(Owner),
}

/// What start-up does with a VM that an earlier agent left.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Recovery {
    /// Remove all of it: nobody counts on it.
    Remove,
    /// Remember the deletion and finish it.
    FinishDelete(Owner),
    /// Take it over; if its process is gone it has failed.
    Adopt(Owner, StartPath),
    /// Take it over as it is: it stands still.
    KeepPaused(Owner, StartPath, Paused),
    /// End what is left of its process, and keep what is stored.
    KeepStored(Owner, StartPath, u64),
    /// Go on showing that it failed.
    KeepFailed(Owner, String),
}

impl Record {
    /// Decides what becomes of the VM when the agent starts on the boot called `boot_id`.
    ///
    /// One that is stored needs nothing of a boot, and of one that was paused its disk is left. Any other VM of another boot has no process, and its socket, cgroup and clone of the memory are void: whatever
    /// it was, it is removed; the scheduler learns from the missing sandbox that it is lost.
    pub fn recovery(self, boot_id: &str) -> Recovery {
        match self.stage {
            Stage::Deleting(owner) => Recovery::FinishDelete(owner),
            Stage::Hibernated { owner, path, stored_bytes } => {
                Recovery::KeepStored(owner, path, stored_bytes)
            }
            // Its memory went with the machine, unless it was stored by then.
            Stage::Paused { owner, path, stored_bytes, .. } if self.boot_id != boot_id => {
                Recovery::KeepStored(owner, path, stored_bytes)
            }
            Stage::Paused { owner, path, since, stored_bytes } => {
                Recovery::KeepPaused(owner, path, Paused { since, stored_bytes, is_gone: false })
            }
            _ if self.boot_id != boot_id => Recovery::Remove,
            Stage::Making | Stage::Pooled | Stage::Claimed(_) => Recovery::Remove,
            Stage::Running { owner, path } => Recovery::Adopt(owner, path),
            Stage::Failed { owner, reason } => Recovery::KeepFailed(owner, reason),
        }
    }
}

/// The records of all VMs of this host.
#[derive(Clone, Debug)]
pub struct Journal {
    dir: PathBuf,
    boot_id: String,
}

impl Journal {
    /// The journal in `dir`, which is made if need be, for VMs of the boot called `boot_id`.
    ///
    /// # Errors
    ///
    /// If the directory cannot be made.
    pub fn open(dir: PathBuf, boot_id: String) -> io::Result<Self> {
        match DirBuilder::new().mode(0o700).create(&dir) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
        Ok(Self { dir, boot_id })
    }

    /// The boot that VMs are written down for.
    pub fn boot_id(&self) -> &str {
        &self.boot_id
    }

    /// Writes down that `vm` enters `stage`.
    ///
    /// # Errors
    ///
    /// What the file system said; what was written before still stands.
    pub fn enter(&self, vm: &str, stage: Stage) -> io::Result<()> {
        let record = Record { boot_id: self.boot_id.clone(), stage };
        let text = serde_json::to_vec(&record)?;
        let new = self.dir.join(format!("{vm}{NEW_SUFFIX}"));
        fs::write(&new, text)?;
        fs::rename(new, self.path(vm))
    }

    /// As [`Journal::enter`], and on disk when this returns.
    ///
    /// # Errors
    ///
    /// As there: what was written before still stands, on disk too.
    pub fn enter_for_good(&self, vm: &str, stage: Stage) -> io::Result<()> {
        let record = Record { boot_id: self.boot_id.clone(), stage };
        let text = serde_json::to_vec(&record)?;
        let new = self.dir.join(format!("{vm}{NEW_SUFFIX}"));
        let mut file = fs::File::create(&new)?;
        io::Write::write_all(&mut file, &text)?;
        file.sync_all()?;
        let directory = fs::File::open(&self.dir)?;
        fs::rename(new, self.path(vm))?;
        self.sync(&directory, vm);
        Ok(())
    }

    /// Reads what was written last of `vm`. `None` if nothing was, or nothing that this version understands:
    /// either way nobody was told of that VM by an agent that could have written better.
    ///
    /// # Errors
    ///
    /// What the file system said.
    pub fn read(&self, vm: &str) -> io::Result<Option<Record>> {
        match fs::read(self.path(vm)) {
            Ok(bytes) => Ok(serde_json::from_slice(&bytes).ok()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Forgets `vm`, after all of it was removed.
    ///
    /// # Errors
    ///
    /// What the file system said; that there is no record is fine.
    pub fn forget(&self, vm: &str) -> io::Result<()> {
        match fs::remove_file(self.path(vm)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    /// As [`Journal::forget`], and on disk when this returns.
    ///
    /// # Errors
    ///
    /// As there: the record still stands, on disk too.
    pub fn forget_for_good(&self, vm: &str) -> io::Result<()> {
        let directory = fs::File::open(&self.dir)?;
        self.forget(vm)?;
        self.sync(&directory, vm);
        Ok(())
    }

    fn sync(&self, directory: &fs::File, vm: &str) {
        if let Err(error) = directory.sync_all() {
            // What was changed stands, and whoever is told otherwise would act against it. A disk that fails here fails everywhere.
            tracing::error!(vm, %error, "the journal's directory cannot be synced");
        }
    }

    /// Removes every record but those of the VMs for which `keep` holds, and all unfinished ones.
    ///
    /// # Errors
    ///
    /// What the file system said.
    pub fn retain(&self, keep: impl Fn(&str) -> bool) -> io::Result<()> {
        for entry in fs::read_dir(&self.dir)? {
            let entry = entry?;
            let name = entry.file_name();
            let vm = name.to_str().and_then(|name| name.strip_suffix(SUFFIX));
            if !vm.is_some_and(&keep) {
                fs::remove_file(entry.path())?;
            }
        }
        Ok(())
    }

    fn path(&self, vm: &str) -> PathBuf {
        self.dir.join(format!("{vm}{SUFFIX}"))
    }
}

/// Names the host's current boot.
///
/// # Errors
///
/// If the kernel does not say.
pub fn boot_id() -> io::Result<String> {
    Ok(fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn owner() -> Owner {
        Owner { sandbox: SandboxId::parse("sb-1").unwrap(), epoch: Epoch(7) }
    }

    const SINCE: SystemTime = SystemTime::UNIX_EPOCH;

    fn stages() -> Vec<Stage> {
        vec![
            Stage::Making,
            Stage::Pooled,
            Stage::Claimed(owner()),
            Stage::Running { owner: owner(), path: StartPath::Warm },
            Stage::Failed { owner: owner(), reason: "it burnt".into() },
            Stage::Deleting(owner()),
            Stage::Hibernated { owner: owner(), path: StartPath::Clone, stored_bytes: 5 },
            Stage::Paused { owner: owner(), path: StartPath::Warm, since: SINCE, stored_bytes: 7 },
        ]
    }

    #[test]
    fn every_stage_is_read_as_it_was_written() {
        let dir = tempfile::tempdir().unwrap();
        let journal = Journal::open(dir.path().join("journal"), "boot".into()).unwrap();
        assert_eq!(journal.read("vm").unwrap(), None);
        for stage in stages() {
            journal.enter("vm", stage.clone()).unwrap();
            journal.enter_for_good("vm", stage.clone()).unwrap();
            assert_eq!(journal.read("vm").unwrap(), Some(Record { boot_id: "boot".into(), stage }));
        }
        journal.forget("vm").unwrap();
        journal.forget("vm").unwrap();
        assert_eq!(journal.read("vm").unwrap(), None);
    }

    #[test]
    fn an_unfinished_write_leaves_the_stage_before() {
        let dir = tempfile::tempdir().unwrap();
        let journal = Journal::open(dir.path().to_owned(), "boot".into()).unwrap();
        journal.enter("vm", Stage::Pooled).unwrap();
        fs::write(dir.path().join("vm.new"), r#"{"boot_id":"#).unwrap();
        assert_eq!(journal.read("vm").unwrap().unwrap().stage, Stage::Pooled);
    }

    #[test]
    fn records_of_vms_that_are_no_more_are_swept() {
        let dir = tempfile::tempdir().unwrap();
        let journal = Journal::open(dir.path().to_owned(), "boot".into()).unwrap();
        for vm in ["a", "b"] {
            journal.enter(vm, Stage::Pooled).unwrap();
        }
        fs::write(dir.path().join("a.new"), "{").unwrap();
        journal.retain(|vm| vm == "a").unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        assert!(journal.read("a").unwrap().is_some());
    }

    #[test]
    fn only_what_a_caller_was_told_of_goes_on() {
        let expected = [
            Recovery::Remove,
            Recovery::Remove,
            Recovery::Remove,
            Recovery::Adopt(owner(), StartPath::Warm),
            Recovery::KeepFailed(owner(), "it burnt".into()),
            Recovery::FinishDelete(owner()),
            Recovery::KeepStored(owner(), StartPath::Clone, 5),
            Recovery::KeepPaused(
                owner(),
                StartPath::Warm,
                Paused { since: SINCE, stored_bytes: 7, is_gone: false },
            ),
        ];
        for (stage, expected) in stages().into_iter().zip(expected) {
            assert_eq!(Record { boot_id: "now".into(), stage }.recovery("now"), expected);
        }
    }

    #[test]
    fn of_another_boot_only_what_is_stored_goes_on() {
        for stage in stages() {
            let is_stored = matches!(stage, Stage::Hibernated { .. } | Stage::Paused { .. });
            let recovery = Record { boot_id: "before".into(), stage }.recovery("now");
            match recovery {
                Recovery::KeepStored(..) => assert!(is_stored),
                other => {
                    assert!(!is_stored && matches!(other, Recovery::Remove | Recovery::FinishDelete(_)));
                }
            }
        }
    }
}
