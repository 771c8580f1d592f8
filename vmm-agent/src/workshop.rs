//! Where microVMs are made, step by step, and where those that were made before are found.

use std::{
    collections::HashSet,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use oc_proto::v1::{RunRequest, exec_service_client::ExecServiceClient};
use tokio::time::sleep;
use tonic::Code;
use tracing::warn;

use crate::{
    backend::Backend,
    fail,
    journal::{JOURNAL_DIR, Journal, Record, Stage},
    microvm::{Identity, Kind, MakeError, MicroVm},
};

/// Commands that a clone for the pool runs once, so that emulation has translated what a first command needs:
/// with a shell and without.
const WARM_UP: [&[&str]; 2] = [&["true"], &["echo", "warm"]];

/// Between two attempts to reach the guest of a VM that is taken over.
const ASKS_AGAIN: Duration = Duration::from_millis(200);

/// Makes the microVMs of this host.
#[derive(Debug)]
pub struct Workshop {
    backend: Arc<dyn Backend>,
    journal: Journal,
    data_dir: PathBuf,
}

/// A VM that an earlier agent left, and what was written down about it.
#[derive(Debug)]
pub struct LeftBehind {
    /// The VM.
    pub microvm: MicroVm,
    /// What its journal says.
    pub record: Option<Record>,
}

impl Workshop {
    /// A workshop on the boot called `boot_id` that keeps its journal in `data_dir`.
    ///
    /// # Errors
    ///
    /// If the journal's directory cannot be made.
    pub fn open(backend: Arc<dyn Backend>, data_dir: &Path, boot_id: String) -> std::io::Result<Self> {
        let journal = Journal::open(data_dir.join(JOURNAL_DIR), boot_id)?;
        Ok(Self { backend, journal, data_dir: data_dir.to_owned() })
    }

    /// What drives VMMs.
    pub fn backend(&self) -> &dyn Backend {
        self.backend.as_ref()
    }

    /// Where everything of this host lies.
    pub fn data_dir(&self) -> &Path {
        &self.data_dir
    }

    /// The host's current boot.
    pub fn boot_id(&self) -> &str {
        self.journal.boot_id()
    }

    /// Whether this host can start `template`.
    pub fn has_template(&self, template: &str) -> bool {
        self.backend.templates().iter().any(|known| known == template)
    }

    /// Readies the golden snapshot of `kind`.
    ///
    /// # Errors
    ///
    /// [`MakeError`]: then VMs of that kind can only be booted.
    pub async fn golden(&self, kind: &Kind) -> Result<(), MakeError> {
        self.backend.golden(kind).await
    }

    /// Makes a home for a new VM and puts it into `slot`, where it is whatever becomes of this future.
    ///
    /// # Errors
    ///
    /// [`MakeError`] of the backend.
    pub async fn create<'a>(
        &self,
        stage: Stage,
        slot: &'a mut Option<MicroVm>,
    ) -> Result<&'a mut MicroVm, MakeError> {
        let id = new_id()?;
        // Before the home, so that nothing exists that no record speaks of.
        self.journal.enter(&id, stage)?;
        let instance = self.backend.open(&id);
        let microvm = slot.insert(MicroVm::new(id, self.journal.clone(), instance));
        microvm.instance().create().await?;
        fail::pass(fail::CREATE_HOME, microvm.id())?;
        Ok(microvm)
    }

    /// Starts a clone of the golden snapshot in the home of `microvm`; it is paused.
    ///
    /// # Errors
    ///
    /// [`MakeError`] of the backend.
    pub async fn restore(&self, kind: &Kind, microvm: &mut MicroVm) -> Result<(), MakeError> {
        microvm.instance().restore(kind).await
    }

    /// Boots a VM in the home of `microvm`.
    ///
    /// # Errors
    ///
    /// [`MakeError`] of the backend.
    pub async fn boot(&self, kind: &Kind, microvm: &mut MicroVm) -> Result<(), MakeError> {
        microvm.instance().boot(kind).await
    }

    /// Makes a clone that waits in the pool: restored, told that it is nobody, warmed up, paused.
    ///
    /// # Errors
    ///
    /// [`MakeError`]; what was made is still in `slot`.
    pub async fn pooled(&self, kind: &Kind, slot: &mut Option<MicroVm>) -> Result<(), MakeError> {
        self.golden(kind).await?;
        let microvm = self.create(Stage::Making, slot).await?;
        self.restore(kind, microvm).await?;
        microvm.resume().await?;
        microvm.activate(Identity::default()).await?;
        warm_up(microvm).await?;
        microvm.pause().await?;
        microvm.enter(Stage::Pooled)
    }

    /// Takes over a VM that an earlier agent left running: its process lives and its guest answers.
    ///
    /// # Errors
    ///
    /// [`MakeError`] says why it counts as lost.
    pub async fn adopt(&self, microvm: &mut MicroVm) -> Result<(), MakeError> {
        if !microvm.instance().adopt().await? {
            return Err(MakeError::Backend("its VMM process ended while no agent ran".into()));
        }
        // It stands still if the earlier agent was about to store it, or had just woken it.
        microvm.resume().await?;
        loop {
            match microvm.wake_guest().await {
                // It is busy, or was halted with half a call on its way. The caller has a deadline.
                Err(MakeError::Guest(status)) if status.code() == Code::Unavailable => {
                    sleep(ASKS_AGAIN).await
                }
                // Any answer is an answer.
                Ok(()) | Err(MakeError::Guest(_)) => break,
                Err(error) => return Err(error),
            }
        }
        // It has gone on since, so what may be stored of it is worth nothing.
        microvm.instance().forget_stored().await
    }

    /// Everything that looks like a VM of this host, with its record.
    ///
    /// # Errors
    ///
    /// [`MakeError`] if the host cannot be searched.
    pub async fn left_behind(&self) -> Result<Vec<LeftBehind>, MakeError> {
        let mut found = Vec::new();
        for id in self.backend.existing().await? {
            let record = self.journal.read(&id)?;
            let instance = self.backend.open(&id);
            found.push(LeftBehind { microvm: MicroVm::new(id, self.journal.clone(), instance), record });
        }
        Ok(found)
    }

    /// Removes the records of VMs other than `kept`.
    pub fn sweep(&self, kept: &HashSet<String>) {
        if let Err(error) = self.journal.retain(|vm| kept.contains(vm)) {
            warn!(%error, "cannot sweep the journal");
        }
    }
}

async fn warm_up(microvm: &MicroVm) -> Result<(), MakeError> {
    let guest = microvm.guest().ok_or_else(|| MakeError::Backend("it has no link to its guest".into()))?;
    let mut exec = ExecServiceClient::new(guest);
    for command in WARM_UP {
        let (cmd, args) = command.split_first().unwrap_or((&"true", &[]));
        let request = RunRequest {
            cmd: (*cmd).to_owned(),
            args: args.iter().map(|&arg| arg.to_owned()).collect(),
            ..Default::default()
        };
        exec.run(request).await.map_err(|status| MakeError::Guest(Box::new(status)))?;
    }
    Ok(())
}

/// A name for a VM: short, because socket paths are (108 bytes, `sun_path` in unix(7)).
fn new_id() -> Result<String, MakeError> {
    let mut bytes = [0; 6];
    getrandom::fill(&mut bytes).map_err(|error| MakeError::Backend(error.to_string()))?;
    Ok(format!("vm-{}", hex::encode(bytes)))
}
