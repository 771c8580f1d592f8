//! One microVM of this host with its journal: what the pool and the sandboxes' tasks pass to each other.

use std::{
    collections::HashMap,
    fmt, io,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use futures_util::future::BoxFuture;
use oc_proto::mesh::{
    ActivateRequest, QuiesceRequest, WakeRequest, guest_service_client::GuestServiceClient,
};
use parking_lot::Mutex;
use tokio::time::{sleep, timeout};
use tonic::Status;
use tracing::{error, warn};

use crate::{
    backend::{Captured, Circumstances, Condition, Guest, Instance, Wanted},
    fail,
    journal::{Journal, Stage},
    telemetry,
};

/// Every sandbox is called so: clones share one image, and prompts stay short.
const HOSTNAME: &str = "sandbox";
/// Bytes of the host's entropy that a clone gets; the guest wants 32 at least.
const ENTROPY: usize = 64;
/// How long a guest may take to write everything back.
const QUIET_WITHIN: Duration = Duration::from_secs(10);
/// A guest that nobody wakes thaws by itself after this, in its own time, which stands still while it is stored.
const FROZEN_FOR: Duration = Duration::from_secs(8);
/// A guest that goes on answers in milliseconds.
const THAWS_WITHIN: Duration = Duration::from_secs(20);
/// What a guest says of what it has renewed: words, and bytes of each.
const MAX_RENEWED: usize = 32;
const MAX_WORD: usize = 64;
/// A process that was killed may take a moment to let go of its cgroup and files.
const REMOVE_ATTEMPTS: u32 = 6;

/// What a VM is a copy of: one golden snapshot serves all VMs of one kind.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Kind {
    /// The template.
    pub template: String,
    /// Virtual CPUs.
    pub cpu_count: u32,
    /// Memory, MiB.
    pub memory_mb: u32,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}", self.template, self.cpu_count, self.memory_mb)
    }
}

/// Who a guest is told that it is.
#[derive(Clone, Debug, Default)]
pub struct Identity {
    /// Its sandbox; empty in the pool.
    pub sandbox_id: String,
    /// Environment of every command.
    pub envs: HashMap<String, String>,
    /// Size its writable filesystem is grown to, MiB; as it is where 0.
    pub disk_mb: u32,
}

/// Why a VM could not be made, or does not do what it is told.
#[derive(Debug, thiserror::Error)]
pub enum MakeError {
    /// No such template.
    #[error("there is no template {0:?} on this host")]
    NoTemplate(String),
    /// The journal cannot be written.
    #[error("cannot write the journal: {0}")]
    Journal(#[from] io::Error),
    /// The guest refuses.
    #[error("the guest says: {}", .0.message())]
    Guest(#[source] Box<Status>),
    /// The VMM, its home or the golden snapshot.
    #[error("{0}")]
    Backend(String),
    /// This host is told to make no golden snapshots.
    #[error("golden snapshots are off on this host")]
    SnapshotsOff,
    /// What is stored of its memory is no good; its disk may be.
    #[error("its stored memory cannot be used: {0}")]
    Unusable(String),
    /// There is no such snapshot on this host.
    #[error("there is no snapshot {0:?} on this host")]
    NoSnapshot(String),
    /// A snapshot is of a disk alone.
    #[error("snapshot {0:?} holds no memory")]
    NoMemory(String),
    /// It took too long.
    #[error("not done in time")]
    Late,
    /// Nobody wants it any more.
    #[error("given up")]
    Cancelled,
}

/// One microVM. Dropping it ends nothing: a VM outlives the agent unless it is destroyed.
#[derive(Debug)]
pub struct MicroVm {
    id: String,
    journal: Journal,
    instance: Box<dyn Instance>,
    renewed: Mutex<Arc<[String]>>,
}

impl MicroVm {
    /// The VM called `id`, written down in `journal`.
    pub fn new(id: String, journal: Journal, instance: Box<dyn Instance>) -> Self {
        Self { id, journal, instance, renewed: Mutex::default() }
    }

    /// Its name on this host.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// What the backend has of it.
    pub fn instance(&mut self) -> &mut dyn Instance {
        self.instance.as_mut()
    }

    /// Writes down that it enters `stage`: before what the stage announces.
    ///
    /// # Errors
    ///
    /// [`MakeError::Journal`]: then it must not be announced.
    pub fn enter(&self, stage: Stage) -> Result<(), MakeError> {
        Ok(self.journal.enter(&self.id, stage)?)
    }

    /// As [`MicroVm::enter`], and on disk when this returns: what follows survives the machine.
    ///
    /// # Errors
    ///
    /// [`MakeError::Journal`]: then it must not be announced.
    pub async fn enter_for_good(&self, stage: Stage) -> Result<(), MakeError> {
        let (journal, id) = (self.journal.clone(), self.id.clone());
        let entered = tokio::task::spawn_blocking(move || journal.enter_for_good(&id, stage)).await;
        Ok(entered.unwrap_or_else(|panic| Err(io::Error::other(panic)))?)
    }

    /// Forgets its record for good, because another VM has taken its place: whatever is left of this one is nobody's.
    ///
    /// # Errors
    ///
    /// [`MakeError::Journal`]: it is what it was.
    pub async fn forget_for_good(&self) -> Result<(), MakeError> {
        let (journal, id) = (self.journal.clone(), self.id.clone());
        let forgotten = tokio::task::spawn_blocking(move || journal.forget_for_good(&id)).await;
        Ok(forgotten.unwrap_or_else(|panic| Err(io::Error::other(panic)))?)
    }

    /// Writes down what is so already. A failure is only logged: start-up comes to the same by other evidence.
    pub fn note(&self, stage: Stage) {
        if let Err(error) = self.enter(stage) {
            warn!(vm = self.id, %error, "cannot write the journal");
        }
    }

    /// Lets it go on.
    ///
    /// # Errors
    ///
    /// [`MakeError`] of the VMM.
    pub async fn resume(&self) -> Result<(), MakeError> {
        telemetry::step("resume", self.instance.resume()).await
    }

    /// How it fares.
    ///
    /// # Errors
    ///
    /// [`MakeError`] of the VMM.
    pub async fn condition(&self) -> Result<Condition, MakeError> {
        self.instance.condition().await
    }

    /// Halts it.
    ///
    /// # Errors
    ///
    /// [`MakeError`] of the VMM.
    pub async fn pause(&self) -> Result<(), MakeError> {
        self.instance.pause().await
    }

    /// The way to its guest, once there is one.
    pub fn guest(&self) -> Option<Guest> {
        self.instance.guest()
    }

    /// Tells the guest who it is, what time it is, and gives it entropy of its own. The guest has answered then.
    ///
    /// # Errors
    ///
    /// [`MakeError`] if it does not, or refuses.
    pub async fn activate(&self, identity: Identity) -> Result<(), MakeError> {
        if identity.disk_mb > 0 {
            self.instance.grow_disk(identity.disk_mb).await?;
        }
        let request = ActivateRequest {
            unix_time_ns: unix_time_ns(),
            entropy: entropy()?,
            hostname: HOSTNAME.to_owned(),
            sandbox_id: identity.sandbox_id,
            envs: identity.envs,
            disk_mb: i32::try_from(identity.disk_mb).unwrap_or(i32::MAX),
        };
        let activated = telemetry::step("activate", self.guest_service()?.activate(request))
            .await
            .map_err(|status| MakeError::Guest(Box::new(status)))?;
        // Whatever a guest says, it is not much.
        let renewed = activated.into_inner().renewed.into_iter().filter(|word| word.len() <= MAX_WORD);
        *self.renewed.lock() = renewed.take(MAX_RENEWED).collect();
        Ok(())
    }

    /// What its guest says that it has made its own, when it was told who it is.
    pub fn renewed(&self) -> Arc<[String]> {
        self.renewed.lock().clone()
    }

    /// Tells a guest that was away what time it is, gives it entropy, and thaws it. The guest has answered then.
    ///
    /// # Errors
    ///
    /// [`MakeError`] if it does not, or refuses.
    pub async fn wake_guest(&self) -> Result<(), MakeError> {
        let request = WakeRequest { unix_time_ns: unix_time_ns(), entropy: entropy()? };
        telemetry::step("wake", self.guest_service()?.wake(request))
            .await
            .map_err(|status| MakeError::Guest(Box::new(status)))?;
        Ok(())
    }

    /// Makes the guest write everything back and stand still, for [`FROZEN_FOR`] at most.
    ///
    /// # Errors
    ///
    /// [`MakeError`] if it does not.
    pub async fn quiesce(&self) -> Result<(), MakeError> {
        let frozen_for = i32::try_from(FROZEN_FOR.as_millis()).unwrap_or(i32::MAX);
        let request = QuiesceRequest { thaw_after_ms: frozen_for };
        let mut guest = self.guest_service()?;
        match timeout(QUIET_WITHIN, telemetry::step("quiesce", guest.quiesce(request))).await {
            Ok(answer) => answer.map(drop).map_err(|status| MakeError::Guest(Box::new(status))),
            Err(_) => Err(MakeError::Late),
        }
    }

    /// Takes its state down as the snapshot that is `wanted`. It goes on, and its guest is told what time it is, as soon as
    /// all has been taken that changes when it does.
    ///
    /// Not to be dropped half-way.
    ///
    /// # Errors
    ///
    /// [`MakeError`]: there is no snapshot, and it runs on.
    pub async fn capture(&mut self, wanted: &Wanted) -> Result<Captured, MakeError> {
        let begun = Instant::now();
        let is_quiet = match self.quiesce().await {
            Ok(()) => true,
            Err(error) => {
                warn!(vm = self.id, %error, "the guest does not stand still by itself: it is captured as it is");
                false
            }
        };
        let freeze = begun.elapsed();
        fail::reached(fail::CAPTURE_QUIESCED, &self.id);
        let captured = telemetry::step("capture", self.instance.capture(wanted)).await;
        let resumed = Instant::now();
        let thawed = timeout(THAWS_WITHIN, self.wake_guest()).await.unwrap_or(Err(MakeError::Late));
        let freeze = freeze + resumed.elapsed();
        if let Err(error) = thawed {
            // It thaws by itself.
            warn!(vm = self.id, %error, "the guest does not say that it goes on");
        }
        fail::reached(fail::CAPTURE_THAWED, &self.id);
        let circumstances = Circumstances {
            taken_at: SystemTime::now(),
            is_quiet,
            pause: captured?,
            freeze,
            is_ephemeral: wanted.is_ephemeral,
        };
        let kept = self.instance.keep_capture(circumstances).await?;
        fail::reached(fail::CAPTURE_KEPT, &self.id);
        Ok(kept)
    }

    fn guest_service(&self) -> Result<GuestServiceClient<Guest>, MakeError> {
        let guest = self.guest().ok_or_else(|| MakeError::Backend("it has no link to its guest".into()))?;
        Ok(GuestServiceClient::new(guest))
    }

    /// Completes when its process has ended.
    pub fn exit(&self) -> BoxFuture<'static, ()> {
        self.instance.exit()
    }

    /// Ends its process; its record and home stay.
    pub async fn end(&mut self) {
        if let Err(error) = self.instance.kill().await {
            warn!(vm = self.id, %error, "cannot end the VM's process");
        }
    }

    /// Ends it and removes all of it. What resists is tried again, and left to the next start of the agent.
    pub async fn destroy(&mut self) {
        let mut wait = Duration::from_millis(20);
        for attempt in 1..=REMOVE_ATTEMPTS {
            let removed = match self.instance.destroy().await {
                Ok(()) => self.journal.forget(&self.id).map_err(MakeError::from),
                Err(error) => Err(error),
            };
            match removed {
                Ok(()) => return,
                Err(error) if attempt == REMOVE_ATTEMPTS => {
                    error!(vm = self.id, %error, "cannot remove all of the VM; the next start will");
                }
                Err(error) => warn!(vm = self.id, %error, "cannot remove all of the VM yet"),
            }
            sleep(wait).await;
            wait *= 2;
        }
    }

    /// The last lines of the guest's console.
    pub fn console_tail(&self) -> String {
        self.instance.console_tail()
    }
}

/// The wall clock, nanoseconds since 1970; fits until the year 2262.
fn unix_time_ns() -> i64 {
    let now = std::time::UNIX_EPOCH.elapsed().unwrap_or_default();
    i64::try_from(now.as_nanos()).unwrap_or(i64::MAX)
}

fn entropy() -> Result<Vec<u8>, MakeError> {
    let mut entropy = vec![0; ENTROPY];
    getrandom::fill(&mut entropy).map_err(|error| MakeError::Backend(error.to_string()))?;
    Ok(entropy)
}
