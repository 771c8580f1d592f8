//! How many may watch at once: each stream holds a watch of the store.

use std::{collections::HashMap, sync::Arc};

use parking_lot::Mutex;

/// Streams of this process.
const MAX: usize = 128;
/// Streams of one tenant.
const MAX_PER_TENANT: usize = 32;

/// The streams that are open. Clones share them.
#[derive(Clone, Debug, Default)]
pub struct Slots(Arc<Mutex<HashMap<String, usize>>>);

/// A place for one stream, until it is dropped.
#[derive(Debug)]
pub struct Slot {
    tenant: String,
    slots: Slots,
}

impl Slots {
    /// A place for a stream of this tenant; `None` if it has enough, or all together have.
    pub fn take(&self, tenant: &str) -> Option<Slot> {
        let mut open = self.0.lock();
        let own = open.get(tenant).copied().unwrap_or(0);
        if own >= MAX_PER_TENANT || open.values().sum::<usize>() >= MAX {
            return None;
        }
        open.insert(tenant.into(), own + 1);
        Some(Slot { tenant: tenant.into(), slots: self.clone() })
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let mut open = self.slots.0.lock();
        if let Some(own) = open.get_mut(&self.tenant) {
            *own -= 1;
            if *own == 0 {
                open.remove(&self.tenant);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_tenant_cannot_take_all_and_all_cannot_take_more_than_there_are() {
        let slots = Slots::default();
        let mut held: Vec<Slot> = (0..MAX_PER_TENANT).map(|_| slots.take("a").unwrap()).collect();
        assert!(slots.take("a").is_none());
        for tenant in ["b", "c", "d"] {
            held.extend((0..MAX_PER_TENANT).map(|_| slots.take(tenant).unwrap()));
        }
        assert!(slots.take("e").is_none());
        held.pop();
        let other = slots.take("e").unwrap();
        assert!(slots.take("d").is_none());
        drop((held, other));
        assert!(slots.0.lock().is_empty());
    }
}
