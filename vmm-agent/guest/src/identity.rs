//! `oc.mesh.v1.GuestService`: who the guest is, and its snapshots.

use std::{
    collections::HashMap,
    fs, io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use oc_proto::mesh::{
    ActivateRequest, ActivateResponse, QuiesceRequest, QuiesceResponse, WakeRequest, WakeResponse,
    guest_service_server::GuestService,
};
use tokio::{
    task::{JoinHandle, spawn_blocking},
    time::sleep,
};
use tonic::{Request, Response, Status};

use crate::{boot, clock, freeze::Layer, host_keys, refusal::Refusal};

/// Entropy that a clone must be given at least, bytes.
const MIN_ENTROPY: usize = 32;
/// The longest that a guest stays frozen by itself, milliseconds.
const MAX_FROZEN_MS: i32 = 60_000;

/// What the host has told the guest.
#[derive(Clone, Debug, Default)]
pub struct Identity(Arc<Mutex<Known>>);

#[derive(Debug, Default)]
struct Known {
    envs: HashMap<String, String>,
    sandbox_id: String,
}

impl Identity {
    /// The environment that every command has.
    pub fn envs(&self) -> HashMap<String, String> {
        self.lock().envs.clone()
    }

    /// The sandbox that the guest was last told that it is; empty if none.
    pub fn sandbox_id(&self) -> String {
        self.lock().sandbox_id.clone()
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Answers the host.
#[derive(Debug)]
pub struct Guest {
    identity: Identity,
    layer: Layer,
    thaw: Mutex<Option<JoinHandle<()>>>,
}

impl Guest {
    /// A guest whose writes go to `layer`.
    pub fn new(identity: Identity, layer: Layer) -> Self {
        Self { identity, layer, thaw: Mutex::new(None) }
    }

    /// Lets writers go on after `after`, unless another plan is made.
    fn plan_thaw(&self, after: Option<Duration>) {
        let layer = self.layer.clone();
        let plan = after.map(|after| {
            tokio::spawn(async move {
                sleep(after).await;
                layer.thaw();
            })
        });
        let before = std::mem::replace(&mut *self.planned(), plan);
        if let Some(before) = before {
            before.abort();
        }
    }

    fn is_thaw_planned(&self) -> bool {
        self.planned().as_ref().is_some_and(|plan| !plan.is_finished())
    }

    fn planned(&self) -> MutexGuard<'_, Option<JoinHandle<()>>> {
        self.thaw.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[tonic::async_trait]
impl GuestService for Guest {
    async fn activate(
        &self,
        request: Request<ActivateRequest>,
    ) -> Result<Response<ActivateResponse>, Status> {
        let request = request.into_inner();
        enough_entropy(&request.entropy)?;
        self.plan_thaw(None);
        self.identity.lock().envs = request.envs.clone();
        self.layer.thaw();
        let failed = |error: io::Error| Refusal::Internal.status(error.to_string());
        // On this thread: no step waits, and a clone has no other yet that would know its code.
        let (kernel, mut renewed) = renew(&request).map_err(failed)?;
        let owner = self.layer.owner().map_err(failed)?;
        if !request.sandbox_id.is_empty() && owner.is_some_and(|owner| owner != request.sandbox_id) {
            let keys = spawn_blocking(host_keys::renew).await;
            if keys.map_err(|error| Refusal::Internal.status(error.to_string()))?.map_err(failed)? {
                renewed.push("ssh-host-keys");
            }
        }
        self.identity.lock().sandbox_id = request.sandbox_id;
        let mib = u64::try_from(request.disk_mb).unwrap_or_default();
        if self.layer.is_smaller(mib).map_err(failed)? {
            let layer = self.layer.clone();
            let grown = spawn_blocking(move || layer.grow(mib)).await;
            grown.map_err(|error| Refusal::Internal.status(error.to_string()))?.map_err(failed)?;
        }
        let renewed = renewed.into_iter().map(str::to_owned).collect();
        Ok(Response::new(ActivateResponse { version: env!("CARGO_PKG_VERSION").into(), kernel, renewed }))
    }

    async fn wake(&self, request: Request<WakeRequest>) -> Result<Response<WakeResponse>, Status> {
        let request = request.into_inner();
        enough_entropy(&request.entropy)?;
        let renewed = clock::set(request.unix_time_ns).and_then(|()| clock::add_randomness(&request.entropy));
        self.plan_thaw(None);
        self.layer.thaw();
        renewed.map_err(|error| Refusal::Internal.status(error.to_string()))?;
        Ok(Response::new(WakeResponse {}))
    }

    async fn quiesce(&self, request: Request<QuiesceRequest>) -> Result<Response<QuiesceResponse>, Status> {
        let after = request.into_inner().thaw_after_ms.clamp(0, MAX_FROZEN_MS);
        if after > 0 {
            // Before anything is frozen: then nothing stays so, whatever becomes of this call.
            self.plan_thaw(Some(Duration::from_millis(u64::from(after.unsigned_abs()))));
        }
        let layer = self.layer.clone();
        let sandbox_id = self.identity.sandbox_id();
        let ready = spawn_blocking(move || match after {
            0 => layer.write_back(),
            _ => {
                // Whatever begins with this disk is to know whose it was.
                layer.set_owner(&sandbox_id)?;
                layer.freeze()
            }
        });
        ready
            .await
            .map_err(|error| Refusal::Internal.status(error.to_string()))?
            .map_err(|error| Refusal::Internal.status(format!("cannot quiesce: {error}")))?;
        if after > 0 && !self.is_thaw_planned() {
            // It took so long to write all back that the thaw came first.
            self.layer.thaw();
            return Err(Refusal::Internal.status(format!("not quiet within {after} ms")));
        }
        Ok(Response::new(QuiesceResponse {}))
    }
}

fn enough_entropy(entropy: &[u8]) -> Result<(), Status> {
    match entropy.len() {
        MIN_ENTROPY.. => Ok(()),
        _ => Err(Refusal::InvalidArgument.status(format!("entropy is less than {MIN_ENTROPY} bytes"))),
    }
}

/// Makes this guest another than every clone of the same snapshot. Returns the kernel's release, and what was renewed.
fn renew(request: &ActivateRequest) -> io::Result<(String, Vec<&'static str>)> {
    clock::set(request.unix_time_ns)?;
    clock::add_randomness(&request.entropy)?;
    nix::unistd::sethostname(&request.hostname)?;
    let mut renewed = vec!["clock", "entropy", "hostname", "environment"];
    if !request.sandbox_id.is_empty() {
        fs::write(boot::MACHINE_ID, machine_id()?)?;
        fs::write(boot::BOOT_ID, boot_id()?)?;
        renewed.extend(["machine-id", "boot-id"]);
    }
    Ok((nix::sys::utsname::uname()?.release().to_string_lossy().into_owned(), renewed))
}

/// A random UUID (RFC 9562, version 4) and a line end, as the kernel makes one.
fn boot_id() -> io::Result<String> {
    fs::read_to_string("/proc/sys/kernel/random/uuid")
}

/// 32 hexadecimal digits and a line end, from the kernel's renewed generator.
fn machine_id() -> io::Result<String> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).map_err(io::Error::other)?;
    Ok(format!("{:032x}\n", u128::from_be_bytes(bytes)))
}
