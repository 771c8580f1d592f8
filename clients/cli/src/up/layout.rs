//! The state directory.
//!
//! | path | what | after a stop |
//! | --- | --- | --- |
//! | `api-key` | the key, for its owner only | stays |
//! | `store.db*` | the embedded record store | stays |
//! | `objects/` | the object store: what checkpoints are made of | stays |
//! | `tls/` | what `--tls` made: the authority to trust, the gateway's certificate and key | stays |
//! | `log/` | a log per service | stays |
//! | `agent/` | the vmm-agent's: disks, journals, images made from templates | image caches stay |
//! | `agent.img` | the filesystem that `agent/` is on, with `--data-image-mb` | removed |
//! | `run/` | sockets, journals of the services, `mesh.json` | removed |
//!
//! The directory itself is locked while a supervisor runs. It may be passed through, but not listed, by others:
//! microVMs run as users of their own and reach their disks below `agent/`.

use std::{
    fs::{self, DirBuilder, File},
    io,
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
};

use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};

use crate::{config::write_secret, failure::Failure};

use super::{certificates::Certificates, identity::Identity};

/// A Unix socket's path has no more room: `sun_path` is 108 bytes with its NUL, unix(7).
const SOCKET_PATH_BYTES: usize = 107;
/// How often `run/` is removed while others write there: each of them has no more than one file to write.
const REMOVE_ATTEMPTS: u32 = 10;

/// What runs, for other commands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mesh {
    /// The supervisor.
    pub supervisor: Identity,
    /// URL of the gateway.
    pub url: String,
    /// Name of this machine in the mesh.
    pub host_id: String,
    /// Where the binaries are.
    pub bin_dir: PathBuf,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct MeshFile {
    supervisor: String,
    url: String,
    host_id: String,
    bin_dir: PathBuf,
}

/// Holds the state directory until it is dropped, or its process ends however it ends.
#[derive(Debug)]
pub struct Lock(#[expect(dead_code, reason = "held for its effect")] Flock<File>);

/// Paths in the state directory.
#[derive(Debug, Clone)]
pub struct Layout {
    root: PathBuf,
}

impl Layout {
    /// Of a state directory that may not exist yet.
    pub fn new(root: &Path) -> Result<Self, Failure> {
        let root = std::path::absolute(root)
            .map_err(|error| Failure::local(format!("cannot resolve {}", root.display()), error))?;
        Ok(Self { root })
    }

    /// The directory itself.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The API key.
    pub fn api_key(&self) -> PathBuf {
        self.root.join("api-key")
    }

    /// Where the API key is written before it gets its name: in `run/`, which is removed in the end.
    pub fn new_api_key(&self) -> PathBuf {
        self.run().join("api-key")
    }

    /// The embedded store.
    pub fn store(&self) -> PathBuf {
        self.root.join("store.db")
    }

    /// The object store, if none is named.
    pub fn objects(&self) -> PathBuf {
        self.root.join("objects")
    }

    /// Certificates that were made here.
    pub fn certificates(&self) -> Certificates {
        Certificates::at(&self.root.join("tls"))
    }

    /// The authority that has signed the certificate of the gateway with this URL, if that was made here.
    pub fn ca_of(&self, url: &str) -> Option<PathBuf> {
        let ca = self.certificates().ca;
        (url.starts_with("https://") && ca.is_file()).then_some(ca)
    }

    /// The vmm-agent's directory.
    pub fn agent(&self) -> PathBuf {
        self.root.join("agent")
    }

    /// Log of a service.
    pub fn log(&self, service: &str) -> PathBuf {
        self.root.join("log").join(format!("{service}.log"))
    }

    /// Socket of a service.
    pub fn socket(&self, service: &str) -> PathBuf {
        self.run().join(format!("{service}.sock"))
    }

    /// Journal of a service's process: who it is, while it runs. Every process has one of its own: a shim whose
    /// supervisor is gone cannot spoil what a newer one wrote.
    pub fn journal(&self, service: &str, pid: i32) -> PathBuf {
        self.run().join(format!("{service}.{pid}.pid"))
    }

    fn run(&self) -> PathBuf {
        self.root.join("run")
    }

    fn mesh(&self) -> PathBuf {
        self.run().join("mesh.json")
    }

    /// Makes the directories.
    pub fn prepare(&self) -> Result<(), Failure> {
        let longest = self.socket(super::plan::AGENT);
        if longest.as_os_str().len() > SOCKET_PATH_BYTES {
            let message =
                format!("{} is too long for a Unix socket: choose a shorter --state-dir", longest.display());
            return Err(Failure::Unfit(message));
        }
        let failed = |path: &Path, error: io::Error| {
            let hint = if error.kind() == io::ErrorKind::PermissionDenied {
                " (choose another --state-dir)"
            } else {
                ""
            };
            Failure::local(format!("cannot create {}{hint}", path.display()), error)
        };
        DirBuilder::new()
            .recursive(true)
            .mode(0o711)
            .create(&self.root)
            .map_err(|error| failed(&self.root, error))?;
        for directory in [self.run(), self.root.join("log")] {
            DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(&directory)
                // One that was there already may have been opened up since.
                .and_then(|()| fs::set_permissions(&directory, fs::Permissions::from_mode(0o700)))
                .map_err(|error| failed(&directory, error))?;
        }
        Ok(())
    }

    /// Makes the embedded store's file, empty: whatever service opens it first, only its owner may read it. It
    /// holds the keys that sign tokens.
    pub fn prepare_store(&self) -> Result<(), Failure> {
        fs::OpenOptions::new()
            .append(true)
            .create(true)
            .mode(0o600)
            .open(self.store())
            .map(|_| ())
            .map_err(|error| Failure::local(format!("cannot create {}", self.store().display()), error))
    }

    /// Locks the directory; none if another process holds it.
    pub fn lock(&self) -> Result<Option<Lock>, Failure> {
        let failed = |error: io::Error| Failure::local(format!("cannot lock {}", self.root.display()), error);
        let directory = File::open(&self.root).map_err(failed)?;
        match Flock::lock(directory, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => Ok(Some(Lock(lock))),
            Err((_, nix::errno::Errno::EWOULDBLOCK)) => Ok(None),
            Err((_, errno)) => Err(failed(errno.into())),
        }
    }

    /// Says what runs.
    pub fn write_mesh(&self, mesh: &Mesh) -> Result<(), Failure> {
        let file = MeshFile {
            supervisor: mesh.supervisor.to_string(),
            url: mesh.url.clone(),
            host_id: mesh.host_id.clone(),
            bin_dir: mesh.bin_dir.clone(),
        };
        serde_json::to_vec(&file)
            .map_err(io::Error::from)
            .and_then(|json| write_secret(&self.mesh(), &json))
            .map_err(|error| Failure::local(format!("cannot write {}", self.mesh().display()), error))
    }

    /// What runs, or ran until something was killed; none after a clean stop.
    pub fn read_mesh(&self) -> io::Result<Option<Mesh>> {
        let json = match fs::read(self.mesh()) {
            Ok(json) => json,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let MeshFile { supervisor, url, host_id, bin_dir } = serde_json::from_slice(&json)?;
        Ok(Some(Mesh { supervisor: supervisor.parse()?, url, host_id, bin_dir }))
    }

    /// The processes that a service's journals name, alive or not.
    pub fn journaled(&self, service: &str) -> Vec<Identity> {
        let Ok(entries) = fs::read_dir(self.run()) else { return Vec::new() };
        let of_service = |name: &str| {
            let pid = name.strip_prefix(service)?.strip_prefix('.')?.strip_suffix(".pid")?;
            pid.parse::<i32>().ok()
        };
        entries
            .filter_map(|entry| {
                let entry = entry.ok()?;
                of_service(entry.file_name().to_str()?)?;
                fs::read_to_string(entry.path()).ok()?.parse().ok()
            })
            .collect()
    }

    /// Whether a process of the service is alive.
    pub fn is_alive(&self, service: &str) -> bool {
        self.journaled(service).iter().any(Identity::is_alive)
    }

    /// Removes `run/`, and what a shim whose supervisor was killed still writes there meanwhile.
    pub fn remove_run(&self) -> Result<(), Failure> {
        let mut attempts = 0;
        loop {
            attempts += 1;
            match fs::remove_dir_all(self.run()) {
                Err(error)
                    if error.kind() == io::ErrorKind::DirectoryNotEmpty && attempts < REMOVE_ATTEMPTS => {}
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(Failure::local(format!("cannot remove {}", self.run().display()), error));
                }
                _ => return Ok(()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout() -> (tempfile::TempDir, Layout) {
        let directory = tempfile::tempdir().unwrap();
        let layout = Layout::new(&directory.path().join("state")).unwrap();
        (directory, layout)
    }

    #[test]
    fn secrets_are_private_and_the_way_to_the_disks_is_open() {
        let (_directory, layout) = layout();
        layout.prepare().unwrap();
        layout.prepare_store().unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(layout.root()), 0o711);
        assert_eq!(mode(&layout.run()), 0o700);
        assert_eq!(mode(&layout.store()), 0o600);
    }

    #[test]
    fn what_runs_is_told_and_forgotten() {
        let (_directory, layout) = layout();
        layout.prepare().unwrap();
        assert_eq!(layout.read_mesh().unwrap(), None);
        let mesh = Mesh {
            supervisor: Identity::current().unwrap(),
            url: "http://127.0.0.1:1".into(),
            host_id: "local".into(),
            bin_dir: "/bin".into(),
        };
        layout.write_mesh(&mesh).unwrap();
        assert_eq!(layout.read_mesh().unwrap(), Some(mesh));
        layout.remove_run().unwrap();
        layout.remove_run().unwrap();
        assert_eq!(layout.read_mesh().unwrap(), None);
    }

    #[test]
    fn only_one_can_hold_the_lock() {
        let (_directory, layout) = layout();
        layout.prepare().unwrap();
        let lock = layout.lock().unwrap();
        assert!(lock.is_some());
        assert!(layout.lock().unwrap().is_none());
        drop(lock);
        assert!(layout.lock().unwrap().is_some());
    }

    #[test]
    fn a_path_too_long_for_sockets_is_refused_at_once() {
        let layout = Layout::new(Path::new(&format!("/tmp/{}", "x".repeat(100)))).unwrap();
        assert!(matches!(layout.prepare(), Err(Failure::Unfit(_))));
    }
}
