//! Base images that this host needs, whatever is built after them.
//!
//! A build of a template lies in a directory of its own, and older ones are removed when a newer one is built, except those
//! that are pinned: in their directory `pins` is a file for each host that has sandboxes or snapshots of them. It holds the
//! path of that host's directory, so that a pin whose host is gone counts for nothing (`vmm-agent/templates/build`).

use std::{io, path::PathBuf};

use fs_err as fs;
use sha2::{Digest as _, Sha256};

use super::{durable, parts::Places, template::Template};

/// The pins of one host.
#[derive(Clone, Debug)]
pub struct Pins {
    /// What they are called.
    name: String,
    /// What is in them: where the host keeps its snapshots.
    content: PathBuf,
}

impl Pins {
    /// Of the host with these directories.
    pub fn of(places: &Places) -> Self {
        let digest = Sha256::digest(places.snapshots.as_os_str().as_encoded_bytes());
        Self { name: hex::encode(&digest[..8]), content: places.snapshots.clone() }
    }

    /// Pins a build. Fine if it is.
    ///
    /// # Errors
    ///
    /// If it cannot be written down.
    pub fn add(&self, template: &Template) -> io::Result<()> {
        let pin = template.pins().join(&self.name);
        if pin.try_exists()? {
            return Ok(());
        }
        fs::create_dir_all(template.pins())?;
        let content = self.content.as_os_str().as_encoded_bytes();
        durable::write(&pin, 0o644, |file| io::Write::write_all(file, content))
    }

    /// Unpins all builds but those that are `needed`.
    ///
    /// # Errors
    ///
    /// If a pin cannot be written or resists.
    pub fn keep_only<'a>(
        &self,
        templates: impl Iterator<Item = &'a Template>,
        needed: impl Fn(&Template) -> bool,
    ) -> io::Result<()> {
        for template in templates {
            match needed(template) {
                true => self.add(template)?,
                false => durable::remove(&template.pins().join(&self.name))?,
            }
        }
        Ok(())
    }
}
