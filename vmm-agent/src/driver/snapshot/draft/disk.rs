//! The disk of a snapshot in the making.

use std::{io, os::unix::fs::MetadataExt as _};

use fs_err::File;
use tracing::{debug, warn};

use crate::driver::{
    digests::{Digests, Verified},
    home::Home,
    previous,
    snapshot::{LayerPart, digests_of},
};

/// A copy of a disk, that nobody writes to.
#[derive(Debug)]
pub struct LayerDraft {
    /// The copy.
    pub copy: File,
    /// Whether it shares its blocks with the original.
    pub is_shared: bool,
}

impl LayerDraft {
    /// Finishes it; if it `is_kept` it is on disk then, with its digests.
    ///
    /// # Errors
    ///
    /// If the disk does not take it.
    pub fn finish(self, home: &Home, is_kept: bool, verified: &Verified) -> io::Result<LayerPart> {
        let file = self.copy.file();
        let mut digest = None;
        if is_kept {
            self.copy.sync_all()?;
            let digests = self.digests(home)?;
            digests.write(&digests_of(self.copy.path()))?;
            verified.note(file)?;
            digest = Some(digests.root());
            // Where blocks are not shared it would take a disk's room, and be of no use.
            if self.is_shared
                && let Err(error) = previous::keep_disk(home, self.copy.path())
            {
                warn!(%error, "the next capture reads all of the disk");
            }
        }
        // st_blocks is in units of 512 bytes (stat(2)).
        Ok(LayerPart { digest, allocated_bytes: self.copy.metadata()?.blocks() * 512 })
    }

    fn digests(&self, home: &Home) -> io::Result<Digests> {
        if self.is_shared
            && let Some((before, digests)) = previous::disk(home)
        {
            match digests.taken_over(before.file(), self.copy.file()) {
                Ok(digests) => return Ok(digests),
                Err(error) => debug!(%error, "cannot tell what has changed of a disk"),
            }
        }
        Digests::of(self.copy.file())
    }
}
