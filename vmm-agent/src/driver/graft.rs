//! Grafts: a snapshot's state put into a clone of the pool, which runs warm, instead of into a new VMM.
//!
//! An emulated VM translates all code that it runs for the first time, and a new VMM begins with none: that is most of
//! what a restore takes. A clone that waits in the pool has run its guest's first process and a command, and has
//! translated them. Its memory differs from the snapshot's in little, if both are of the same image: in what each has changed of it.
//! So what differs is written into the clone's memory, its disk and devices are exchanged, and it goes on as the
//! snapshot's VM, with the translations that it has.
//!
//! Whatever goes wrong, the clone is ended, and a new VMM is started as if it had never been.

use std::{
    collections::BTreeMap,
    fs::File,
    io,
    os::unix::fs::{FileExt as _, MetadataExt as _},
};

use super::{
    pages::{GuestMemory, PAGE, Run},
    snapshot::{Manifest, Place},
    vmm::Patch,
};

/// Pages beside the image up to which a graft is tried, bytes. Writing what differs takes 30 ms for each MiB, translating anew a
/// fifth of a second (measured); of a VM that was grafted itself, about half of the pages differ from another clone's.
const MOST: u64 = 10 << 20;
/// Equal bytes that are written all the same, where they lie between others: a packet of its own would take longer.
const GAP: usize = 64;

/// Why what is at `place` cannot be put into a clone of the image whose file is `golden`. `None` if it can.
///
/// # Errors
///
/// If they cannot be looked at.
pub fn why_not(place: &Place, manifest: &Manifest, golden: &std::path::Path) -> io::Result<Option<String>> {
    if !manifest.has_memory() {
        return Ok(Some("it has no memory".into()));
    }
    if manifest.origin.cpu_count != 1 {
        return Ok(Some(format!("it has {} CPUs", manifest.origin.cpu_count)));
    }
    if manifest.pages_bytes() > MOST {
        return Ok(Some(format!("{} KiB of its memory are changed", manifest.pages_bytes() >> 10)));
    }
    // While little is changed a snapshot's image is the golden one, by another name.
    let (ours, theirs) = (place.memory().metadata()?, golden.metadata()?);
    let is_same = (ours.dev(), ours.ino()) == (theirs.dev(), theirs.ino());
    Ok((!is_same).then(|| "its image is another".into()))
}

/// What a clone's memory is to become.
#[derive(Debug)]
pub struct Memory {
    /// The pages that are not the image's.
    pages: BTreeMap<u32, Box<[u8]>>,
    /// The image.
    image: File,
}

impl Memory {
    /// That of the snapshot at `place`.
    ///
    /// # Errors
    ///
    /// [`io::ErrorKind::InvalidData`] if it is damaged.
    pub fn of(place: &Place, manifest: &Manifest, memory_bytes: u64) -> io::Result<Self> {
        let (runs, bytes) = place.read_pages(manifest, memory_bytes)?;
        Ok(Self { pages: by_page(&runs, &bytes), image: File::open(place.memory())? })
    }

    /// What has to be written into the `memory` of a clone that is paused.
    ///
    /// # Errors
    ///
    /// If the clone has ended.
    pub fn patches(&self, memory: &GuestMemory) -> io::Result<Vec<Patch>> {
        let mut patches = Vec::new();
        self.compare(memory, |page, old, new| {
            for (start, end) in differences(old, new) {
                let address = memory.guest_address(u64::from(page) * PAGE) + start as u64;
                patches.push(Patch { address, bytes: new[start..end].to_vec() });
            }
            Ok(())
        })?;
        Ok(patches)
    }

    /// Sees that the `memory` of a clone is that, to the last byte.
    ///
    /// # Errors
    ///
    /// If it is not.
    pub fn verify(&self, memory: &GuestMemory) -> io::Result<()> {
        self.compare(memory, |page, _, _| {
            Err(io::Error::other(format!("page {page} of the memory is not what was written to it")))
        })
    }

    /// Tells the pages of `memory` that are not what they are to be: as they are, and as they are to be.
    fn compare(
        &self,
        memory: &GuestMemory,
        mut differs: impl FnMut(u32, &[u8], &[u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        let runs = memory.own()?;
        let mut bytes = vec![0; runs.iter().map(|run| run.bytes()).sum::<u64>() as usize];
        memory.read_into(&runs, &mut bytes)?;
        let own = by_page(&runs, &bytes);
        let mut of_image = [0; PAGE as usize];
        for page in self.pages.keys().chain(own.keys().filter(|page| !self.pages.contains_key(*page))) {
            let (old, new) = (own.get(page), self.pages.get(page));
            if old.is_none() || new.is_none() {
                self.image.read_exact_at(&mut of_image, u64::from(*page) * PAGE)?;
            }
            let (old, new) = (old.map_or(&of_image[..], |page| page), new.map_or(&of_image[..], |page| page));
            if old != new {
                differs(*page, old, new)?;
            }
        }
        Ok(())
    }
}

/// The pages of `runs`, whose bytes follow each other.
fn by_page(runs: &[Run], bytes: &[u8]) -> BTreeMap<u32, Box<[u8]>> {
    let numbers = runs.iter().flat_map(|run| run.0..run.0 + run.1);
    numbers.zip(bytes.chunks_exact(PAGE as usize)).map(|(page, bytes)| (page, bytes.into())).collect()
}

/// Where two pages differ: start and end of each stretch.
fn differences(old: &[u8], new: &[u8]) -> Vec<(usize, usize)> {
    let mut stretches: Vec<(usize, usize)> = Vec::new();
    let different = old.iter().zip(new).enumerate().filter(|(_, (old, new))| old != new).map(|(at, _)| at);
    for at in different {
        match stretches.last_mut() {
            Some((_, end)) if at - *end <= GAP => *end = at + 1,
            _ => stretches.push((at, at + 1)),
        }
    }
    stretches
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn what_differs_and_nothing_far_from_it_is_written(
            old in prop::collection::vec(0_u8..3, 600),
            changes in prop::collection::vec((0_usize..600, 0_u8..3), 0..12),
        ) {
            let mut new = old.clone();
            for (at, byte) in changes {
                new[at] = byte;
            }
            let mut patched = old.clone();
            let stretches = differences(&old, &new);
            for &(start, end) in &stretches {
                prop_assert!(old[start] != new[start] && old[end - 1] != new[end - 1]);
                patched[start..end].copy_from_slice(&new[start..end]);
            }
            prop_assert_eq!(patched, new);
            prop_assert!(stretches.windows(2).all(|two| two[1].0 - two[0].1 > GAP));
        }
    }

    #[test]
    fn pages_are_told_apart() {
        let bytes: Vec<u8> = (1..=3).flat_map(|number| vec![number; PAGE as usize]).collect();
        let pages = by_page(&[Run(4, 2), Run(9, 1)], &bytes);
        assert_eq!(pages.keys().copied().collect::<Vec<_>>(), [4, 5, 9]);
        assert!(pages[&9].iter().all(|&byte| byte == 3));
    }
}
