//! When sandboxes were last used, as their hosts told at the last look. Only in memory: a scheduler that starts asks
//! the hosts again.

use std::{collections::HashMap, sync::Arc, time::SystemTime};

use oc_proto::mesh::{SandboxRecord, Vm};
use parking_lot::Mutex;

use crate::lifecycle;

/// What is known about the use of sandboxes. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct Activity(Arc<Mutex<HashMap<String, SystemTime>>>);

impl Activity {
    /// Notes what a host told.
    pub fn note(&self, vms: &[Vm]) {
        let mut known = self.0.lock();
        for vm in vms {
            known.insert(vm.sandbox_id.clone(), lifecycle::time(vm.active_at));
        }
    }

    /// Forgets the sandboxes that are none any more.
    pub fn retain(&self, is_sandbox: impl Fn(&str) -> bool) {
        self.0.lock().retain(|sandbox_id, _| is_sandbox(sandbox_id));
    }

    /// When the sandbox was last used: what its record or its host says, whichever is later.
    pub fn of(&self, record: &SandboxRecord) -> SystemTime {
        let told = self.0.lock().get(&record.sandbox_id).copied();
        lifecycle::active_at(record).max(told.unwrap_or(SystemTime::UNIX_EPOCH))
    }
}
