//! A VM's home: the directory with its writable layer and the sockets that lead to it.
//!
//! The agent owns the directory and binds the sockets; the VM's user owns the layer only. So a VMM that was taken over by
//! its guest can neither put another file in the place of one that the agent opens, nor reach another VM's.

use std::{
    fs::{DirBuilder, File, Permissions},
    io,
    ops::RangeInclusive,
    os::{
        fd::AsRawFd as _,
        unix::{
            fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _},
            net::UnixListener,
        },
    },
    path::{Path, PathBuf},
};

use fs_err::{self as fs, os::unix::fs::chown};
use sha2::{Digest as _, Sha256};

use super::{durable, layer, snapshot::digests_of};
use crate::network::{Egress, Limits};

/// First of 2^28 user IDs that nobody else uses: systemd's list of reserved ranges (UIDS-GIDS.md) leaves 1879048192 and up
/// to 2147483647 unassigned.
const FIRST_UID: u32 = 1_879_048_193;
const UID_BITS: u32 = 28;
/// Group of all VMs: it may read golden snapshots.
pub const SNAPSHOT_GID: u32 = FIRST_UID - 1;

/// Mode of what many VMs map: each VM's user reads it who comes to it. Their directories let nobody else pass, and a jailed VM
/// has no group but its own.
pub const IMAGE_MODE: u32 = 0o444;

/// The user IDs that VMs run as, with the group IDs of the same numbers.
pub const fn uids() -> RangeInclusive<u32> {
    SNAPSHOT_GID..=FIRST_UID + (1 << UID_BITS) - 2
}

/// The control socket's name.
pub const CONTROL: &str = "control.sock";
/// The name of the socket that leads to the guest's port.
pub const GUEST: &str = "guest.sock";
/// The name of the socket that leads to the VMM's stub for debuggers.
pub const DEBUG: &str = "debug.sock";

/// The number of its network's namespace, and its limits.
const NETWORK: &str = "network";
/// There if the VM may reach nothing.
const NO_EGRESS: &str = "no-egress";
/// There once the VMM was told to write what has changed of its memory.
const ACCOUNT_CLOSED: &str = "account-closed";
/// The state of its devices, while its VMM writes it.
const SAVED: &str = "saved.bin";
/// The state of its devices, while its VMM reads it.
const LOADED: &str = "loaded.bin";

/// Where a VM lives. The value says nothing about what is there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Home {
    dir: PathBuf,
    uid: u32,
}

impl Home {
    /// The home of the VM called `vm` in `homes`.
    pub fn of(homes: &Path, vm: &str) -> Self {
        let digest = Sha256::digest(vm.as_bytes());
        let bits = u32::from_be_bytes([digest[0], digest[1], digest[2], digest[3]]) >> (32 - UID_BITS);
        // The last one is left out, so that the sum stays inside the range.
        Self { dir: homes.join(vm), uid: FIRST_UID + bits.min((1 << UID_BITS) - 2) }
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// What the VM is called.
    pub fn vm(&self) -> &str {
        self.dir.file_name().and_then(|name| name.to_str()).unwrap_or_default()
    }

    /// The user, and the group of that number, that the VM's processes run as.
    pub fn uid(&self) -> u32 {
        self.uid
    }

    /// Its writable layer.
    pub fn layer(&self) -> PathBuf {
        self.dir.join("layer.img")
    }

    /// The image of memory that it maps, if it maps one.
    pub fn base(&self) -> PathBuf {
        self.dir.join("base.img")
    }

    /// What a jailed VMM sees ([`super::firecracker`]).
    pub fn jail(&self) -> PathBuf {
        self.dir.join("jail")
    }

    /// What the capture before has left of the memory, if there was one ([`super::previous`]).
    pub fn previous(&self) -> PathBuf {
        self.dir.join("previous")
    }

    /// What the capture before has left of the disk.
    pub fn previous_disk(&self) -> PathBuf {
        self.dir.join("previous-disk")
    }

    /// The number of the namespace that its VMM has its network in, if it has one.
    ///
    /// # Errors
    ///
    /// If it cannot be read.
    pub fn network(&self) -> io::Result<Option<u32>> {
        Ok(self.network_words()?.first().copied())
    }

    /// What the VM may do there, if that is known: an agent of an earlier version has not written it down.
    ///
    /// # Errors
    ///
    /// If it cannot be read.
    pub fn network_limits(&self) -> io::Result<Option<Limits>> {
        Ok(match self.network_words()?[..] {
            [_, connections, mbit] => Some(Limits { connections, mbit }),
            _ => None,
        })
    }

    /// The numbers of what [`Home::note_network`] has written. What was not written whole was not used.
    fn network_words(&self) -> io::Result<Vec<u32>> {
        match fs::read_to_string(self.dir.join(NETWORK)) {
            Ok(text) if text.ends_with('\n') => {
                Ok(text.split_whitespace().map_while(|word| word.parse().ok()).collect())
            }
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(Vec::new()),
        }
    }

    /// Writes down that its VMM has its network in the namespace of that number, and what it may do there.
    ///
    /// # Errors
    ///
    /// If the disk does not take it.
    pub fn note_network(&self, number: u32, limits: Limits) -> io::Result<()> {
        let Limits { connections, mbit } = limits;
        fs::write(self.dir.join(NETWORK), format!("{number} {connections} {mbit}\n"))
    }

    /// Forgets the namespace.
    ///
    /// # Errors
    ///
    /// If it resists.
    pub fn forget_network(&self) -> io::Result<()> {
        durable::remove(&self.dir.join(NETWORK))
    }

    /// What the VM may reach, whenever it runs.
    ///
    /// # Errors
    ///
    /// If it cannot be read.
    pub fn egress(&self) -> io::Result<Egress> {
        Ok(if self.dir.join(NO_EGRESS).try_exists()? { Egress::Nothing } else { Egress::Open })
    }

    /// Writes down what the VM may reach.
    ///
    /// # Errors
    ///
    /// If the disk does not take it.
    pub fn note_egress(&self, egress: Egress) -> io::Result<()> {
        match egress {
            Egress::Open => durable::remove(&self.dir.join(NO_EGRESS)),
            // There for good before anything runs: after a loss of power it is not open instead. It is empty: its name is all
            // that has to be on disk.
            Egress::Nothing => {
                fs::write(self.dir.join(NO_EGRESS), "")?;
                File::open(&self.dir)?.sync_all()
            }
        }
    }

    /// Makes the directory.
    ///
    /// # Errors
    ///
    /// If it exists, cannot be made, or another VM has the same user: then another name will do.
    pub fn create(&self) -> io::Result<()> {
        DirBuilder::new().mode(0o700).create(&self.dir)?;
        let homes = self.dir.parent().unwrap_or_else(|| Path::new("/"));
        chown(&self.dir, Some(0), Some(self.uid))?;
        for other in fs::read_dir(homes)? {
            let other = other?;
            let taken = match other.metadata() {
                // It goes as we look.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                metadata => metadata?.gid() == self.uid,
            };
            if taken && other.path() != self.dir {
                return Err(io::Error::other(format!("{:?} has the same user ID", other.file_name())));
            }
        }
        // The VM's user comes in by its group, and can change nothing.
        fs::set_permissions(&self.dir, Permissions::from_mode(0o710))
    }

    /// Puts a copy of the layer `from` into the home; whether it shares its blocks with it.
    ///
    /// # Errors
    ///
    /// If there is one already, or the disk is full.
    pub fn add_layer(&self, from: &Path) -> io::Result<bool> {
        let (layer, is_shared) = layer::copy_or_share(from, &self.layer())?;
        self.give(&layer)?;
        Ok(is_shared)
    }

    /// Removes the layer from the home. A VMM that has it open still uses it.
    ///
    /// # Errors
    ///
    /// If it resists.
    pub fn remove_layer(&self) -> io::Result<()> {
        durable::remove(&self.layer())
    }

    /// Makes the layer of another home this one's, too: whichever VM goes on with it. One that has waited for that takes it
    /// for its own again ([`Home::own_layer`]).
    ///
    /// # Errors
    ///
    /// If there is one already.
    pub fn share_layer(&self, other: &Self) -> io::Result<()> {
        fs::hard_link(other.layer(), self.layer())?;
        self.own_layer()
    }

    /// Makes the layer this VM's user's.
    ///
    /// # Errors
    ///
    /// If there is none.
    pub fn own_layer(&self) -> io::Result<()> {
        self.give(&File::open(self.layer())?)
    }

    /// Makes the image `from` the one that the VM maps, and keeps it for as long as the home is there, whatever becomes of
    /// the snapshot that it is of.
    ///
    /// # Errors
    ///
    /// If it cannot be linked.
    pub fn keep_base(&self, from: &Path) -> io::Result<()> {
        self.forget_base()?;
        match fs::hard_link(digests_of(from), digests_of(&self.base())) {
            // A snapshot for use at once has none.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            linked => linked?,
        }
        fs::hard_link(from, self.base())
    }

    /// Lets go of the image that the VM mapped.
    ///
    /// # Errors
    ///
    /// If it resists.
    pub fn forget_base(&self) -> io::Result<()> {
        durable::remove(&self.base())?;
        durable::remove(&digests_of(&self.base()))
    }

    /// Forgets what was captured of a process that is gone, or is about to be replaced.
    ///
    /// # Errors
    ///
    /// If it resists.
    pub fn forget_previous(&self) -> io::Result<()> {
        durable::remove(&self.dir.join(ACCOUNT_CLOSED))?;
        durable::remove_whole(&self.previous())
    }

    /// Whether the VMM that runs was told before to write what has changed of its memory: it tells each change once.
    ///
    /// # Errors
    ///
    /// If it cannot be read.
    pub fn is_account_closed(&self) -> io::Result<bool> {
        self.dir.join(ACCOUNT_CLOSED).try_exists()
    }

    /// Writes down that it is told so: before it is.
    ///
    /// # Errors
    ///
    /// If the disk does not take it.
    pub fn note_account_closed(&self) -> io::Result<()> {
        // It need not survive the machine: the VMM does not.
        fs::write(self.dir.join(ACCOUNT_CLOSED), "")
    }

    /// Makes an empty file that the VMM may write its devices' state to.
    ///
    /// # Errors
    ///
    /// If the disk does not take it.
    pub fn state_to_save(&self) -> io::Result<PathBuf> {
        durable::remove(&self.dir.join(SAVED))?;
        self.add_file(SAVED)
    }

    /// Makes a file that the VMM may read its devices' state from, or write to while it does.
    ///
    /// # Errors
    ///
    /// If the disk does not take it.
    pub fn state_to_load(&self, fill: impl FnOnce(&fs::File) -> io::Result<()>) -> io::Result<PathBuf> {
        durable::remove(&self.dir.join(LOADED))?;
        let path = self.add_file(LOADED)?;
        fill(&fs::OpenOptions::new().write(true).open(&path)?)?;
        Ok(path)
    }

    /// Removes what [`Home::state_to_load`] made.
    ///
    /// # Errors
    ///
    /// If it resists.
    pub fn forget_state(&self) -> io::Result<()> {
        durable::remove(&self.dir.join(LOADED))
    }

    /// Removes the sockets, and the jail, of a VMM that is gone.
    ///
    /// # Errors
    ///
    /// If they resist.
    pub fn remove_sockets(&self) -> io::Result<()> {
        [CONTROL, GUEST, DEBUG].into_iter().try_for_each(|name| durable::remove(&self.dir.join(name)))?;
        durable::remove(&self.jail())
    }

    /// Makes an empty file that the VM's user may write.
    ///
    /// # Errors
    ///
    /// If there is one already.
    pub fn add_file(&self, name: &str) -> io::Result<PathBuf> {
        let path = self.dir.join(name);
        let file = File::create_new(&path)?;
        file.set_permissions(Permissions::from_mode(0o600))?;
        self.give(&file)?;
        Ok(path)
    }

    /// Makes a file the VM's user's.
    ///
    /// # Errors
    ///
    /// If the disk does not take it.
    pub fn give(&self, file: &File) -> io::Result<()> {
        std::os::unix::fs::fchown(file, Some(self.uid), Some(self.uid))
    }

    /// Listens at the socket called `name`; only root can connect.
    ///
    /// # Errors
    ///
    /// If it is there already.
    pub fn listen(&self, name: &str) -> io::Result<UnixListener> {
        let (_open, path) = self.short_path(name)?;
        let listener = UnixListener::bind(&path)?;
        fs::set_permissions(&path, Permissions::from_mode(0o600))?;
        Ok(listener)
    }

    /// Connects to the socket called `name`.
    ///
    /// # Errors
    ///
    /// If nobody listens there.
    pub async fn connect(&self, name: &str) -> io::Result<tokio::net::UnixStream> {
        let (_open, path) = self.short_path(name)?;
        tokio::net::UnixStream::connect(path).await
    }

    /// A socket's path has 107 bytes at most (unix(7)), but homes may lie deep: the way through an open directory is short.
    fn short_path(&self, name: &str) -> io::Result<(File, PathBuf)> {
        let directory = File::open(&self.dir)?;
        let path = format!("/proc/self/fd/{}/{name}", directory.as_raw_fd());
        Ok((directory, path.into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_home_leads_to_its_sockets_however_deep_it_lies() {
        let dir = tempfile::tempdir().unwrap();
        let homes = dir.path().join("x".repeat(200));
        fs::create_dir(&homes).unwrap();
        let home = Home::of(&homes, "vm-000000000001");
        home.create().unwrap();
        let _listener = home.listen(GUEST).unwrap();
        home.connect(GUEST).await.unwrap();
        assert!(home.connect(CONTROL).await.is_err());
        assert!(home.create().is_err());
        let metadata = home.dir().metadata().unwrap();
        assert_eq!((metadata.uid(), metadata.gid(), metadata.mode() & 0o777), (0, home.uid(), 0o710));
    }

    #[test]
    fn users_are_their_vms_own() {
        let dir = tempfile::tempdir().unwrap();
        let home = Home::of(dir.path(), "vm-000000000001");
        assert_ne!(home.uid(), Home::of(dir.path(), "vm-000000000002").uid());
        assert!(home.uid() > SNAPSHOT_GID && home.uid() < 1 << 31);
        // Somebody with the same user.
        fs::create_dir(dir.path().join("vm-other")).unwrap();
        chown(dir.path().join("vm-other"), None, Some(home.uid())).unwrap();
        assert!(home.create().unwrap_err().to_string().contains("vm-other"));
    }
}
