//! Taking a snapshot of a VM: what can be done while it runs, what must be done while it is paused, and the rest.

use std::{path::PathBuf, sync::Arc};

use super::{
    home::Home,
    parts::Parts,
    running::on_disk,
    snapshot::{Draft, Manifest, Origin, Place, Source},
    stored::Writing,
    vmm::Machine,
};
use crate::{backend::Circumstances, fail, microvm::MakeError, telemetry};

/// A snapshot in the making.
#[derive(Debug)]
pub struct Capture {
    home: Home,
    draft: Draft,
    memory: Option<Source>,
    layer: Option<PathBuf>,
    /// Goes from thread to thread with the draft, and last.
    writing: Writing,
}

impl Capture {
    /// Begins to take the VM in `home` down at `place`: its `memory`, if given, and a copy of its disk, if wanted. It may
    /// run.
    ///
    /// # Errors
    ///
    /// [`MakeError`] if the disk does not take it.
    pub async fn begin(
        place: Place,
        home: &Home,
        memory: Option<Source>,
        with_layer: bool,
        writing: Writing,
    ) -> Result<Self, MakeError> {
        let layer = with_layer.then(|| home.layer());
        let (of, from) = (memory.clone(), layer.clone());
        let begun = on_disk(home, move |home| {
            Ok((Draft::begin(&place, home, of.as_ref(), from.as_deref())?, writing))
        });
        let (draft, writing) = telemetry::step("capture_begin", begun).await?;
        Ok(Self { home: home.clone(), draft, memory, layer, writing })
    }

    /// Takes what can only be taken while the VM is paused, which it is.
    ///
    /// # Errors
    ///
    /// [`MakeError`] if the VM has ended, or the disk does not take it.
    pub async fn take(self, machine: &dyn Machine) -> Result<Self, MakeError> {
        let Self { home, mut draft, memory, layer, writing } = self;
        let saving = draft.saving().map_err(|error| MakeError::Backend(error.to_string()))?;
        // Another process writes the devices' state meanwhile, and the memory if it writes that itself: none of it is in the
        // memory that is read here.
        let devices = async {
            if let Some(saving) = &saving {
                let saved = machine.save(&saving.state, saving.memory());
                telemetry::step("capture_devices", saved).await?;
            }
            Ok::<_, MakeError>(fail::pass(fail::SNAPSHOT_DEVICES, home.vm())?)
        };
        let taking = on_disk(&home, move |home| {
            draft.take(memory.as_ref(), layer.as_deref())?;
            fail::pass(fail::SNAPSHOT_PAGES, home.vm())?;
            Ok((draft, memory, layer, writing))
        });
        let (saved, taken) = tokio::join!(devices, telemetry::step("capture_pages", taking));
        saved?;
        let (draft, memory, layer, writing) = taken?;
        Ok(Self { home, draft, memory, layer, writing })
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
        let Self { draft, writing, .. } = self;
        let work = move |home: &Home| {
            let _writing = writing;
            if !circumstances.is_ephemeral {
                parts.pin(&Origin::read(home)?)?;
            }
            draft.publish(home, circumstances, &parts.verified)
        };
        telemetry::step("capture_publish", on_disk(&self.home, work)).await
    }
}
