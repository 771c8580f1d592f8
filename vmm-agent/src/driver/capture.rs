//! Taking a snapshot of a VM: what can be done while it runs, what must be done while it is paused, and the rest.

use std::{path::PathBuf, sync::Arc};

use super::{
    home::Home,
    pages::GuestMemory,
    parts::Parts,
    running::on_disk,
    snapshot::{Draft, Manifest, Origin, Place},
    vmm::Machine,
};
use crate::{backend::Circumstances, microvm::MakeError, telemetry};

/// A snapshot in the making.
#[derive(Debug)]
pub struct Capture {
    home: Home,
    draft: Draft,
    memory: Option<GuestMemory>,
    layer: Option<PathBuf>,
}

impl Capture {
    /// Begins to take the VM in `home` down at `place`: its `memory`, if given, and a copy of its disk, if wanted. It runs.
    ///
    /// # Errors
    ///
    /// [`MakeError`] if the disk does not take it.
    pub async fn begin(
        place: Place,
        home: &Home,
        memory: Option<GuestMemory>,
        with_layer: bool,
    ) -> Result<Self, MakeError> {
        let layer = with_layer.then(|| home.layer());
        let (of, from) = (memory.clone(), layer.clone());
        let begun = on_disk(home, move |home| Draft::begin(&place, home, of.as_ref(), from.as_deref()));
        let draft = telemetry::step("capture_begin", begun).await?;
        Ok(Self { home: home.clone(), draft, memory, layer })
    }

    /// Takes what can only be taken while the VM is paused, which it is.
    ///
    /// # Errors
    ///
    /// [`MakeError`] if the VM has ended, or the disk does not take it.
    pub async fn take(self, machine: &dyn Machine) -> Result<Self, MakeError> {
        let Self { home, mut draft, memory, layer } = self;
        let state = draft.state().map(ToOwned::to_owned);
        // Another process writes the devices' state meanwhile: none of it is in the guest's memory.
        let devices = async {
            match &state {
                Some(state) => telemetry::step("capture_devices", machine.save(state)).await,
                None => Ok(()),
            }
        };
        let taking = on_disk(&home, move |_| {
            draft.take(memory.as_ref(), layer.as_deref())?;
            Ok((draft, memory, layer))
        });
        let (saved, taken) = tokio::join!(devices, telemetry::step("capture_pages", taking));
        saved?;
        let (draft, memory, layer) = taken?;
        Ok(Self { home, draft, memory, layer })
    }

    /// Publishes it; the VM may go on meanwhile.
    ///
    /// # Errors
    ///
    /// [`MakeError`] if the disk does not take it; then there is none.
    pub async fn publish(
        self,
        parts: Arc<Parts>,
        circumstances: Circumstances,
    ) -> Result<Manifest, MakeError> {
        let draft = self.draft;
        let work = move |home: &Home| {
            if !circumstances.is_ephemeral {
                parts.pin(&Origin::read(home)?)?;
            }
            draft.publish(home, circumstances, &parts.verified)
        };
        telemetry::step("capture_publish", on_disk(&self.home, work)).await
    }
}
