//! The initramfs: the guest's PID 1 and the kernel modules that it needs to find its disks.

use std::{
    io,
    io::Write as _,
    path::{Path, PathBuf},
};

use cpio::newc;
use fs_err as fs;
use sha2::{Digest as _, Sha256};

use super::{durable, template::Template};

/// The archive's files: name inside, mode, content.
type Entry = (String, u32, Vec<u8>);

const DIRECTORY: u32 = 0o040_755;
const PROGRAM: u32 = 0o100_755;
const FILE: u32 = 0o100_644;
const CHARACTER_DEVICE: u32 = 0o020_600;
/// The kernel opens it as `/init`'s standard streams, before anything is mounted (Documentation/admin-guide/devices.txt).
const CONSOLE: (u32, u32) = (5, 1);
/// QEMU's microvm puts the initramfs at the very end of memory, rounded down to a page, over the ACPI tables that its
/// firmware has put there: about 1 KiB, and the kernel hangs without them. So the last page is used as little as can be:
/// an archive is a multiple of 4 bytes, and zeros may follow it.
const PAGE: usize = 4096;
const IN_LAST_PAGE: usize = 4;

/// An initramfs on disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Initramfs {
    /// Where it lies.
    pub path: PathBuf,
    /// Of its content.
    pub digest: String,
}

/// Makes the initramfs of `template` with `guest_binary` as `/init` in `cache`, unless it is there already.
///
/// # Errors
///
/// If a part cannot be read or the archive not written.
pub fn ensure(cache: &Path, template: &Template, guest_binary: &Path) -> io::Result<Initramfs> {
    let archive = pack(entries(template, guest_binary)?)?;
    let digest = hex::encode(&Sha256::digest(&archive)[..8]);
    let path = place(cache, &digest);
    if !path.try_exists()? {
        // No secrets are inside, and every VM's own user reads it.
        durable::write(&path, 0o644, |file| file.write_all(&archive))?;
    }
    Ok(Initramfs { path, digest })
}

/// Where the initramfs of that digest is in `cache`, if it is there.
pub fn place(cache: &Path, digest: &str) -> PathBuf {
    cache.join(format!("initramfs-{digest}.img"))
}

/// The initramfs of that digest in `cache`, if it is there.
pub fn find(cache: &Path, digest: &str) -> Option<Initramfs> {
    let path = place(cache, digest);
    path.is_file().then(|| Initramfs { path, digest: digest.to_owned() })
}

fn entries(template: &Template, guest_binary: &Path) -> io::Result<Vec<Entry>> {
    let order = fs::read_to_string(template.modules().join("order"))?;
    let mut entries = vec![
        ("init".to_owned(), PROGRAM, fs::read(guest_binary)?),
        ("dev".to_owned(), DIRECTORY, Vec::new()),
        ("dev/console".to_owned(), CHARACTER_DEVICE, Vec::new()),
        ("modules".to_owned(), DIRECTORY, Vec::new()),
    ];
    let mut files = String::new();
    for module in order.lines().filter(|line| !line.is_empty()) {
        let file = format!("{module}.ko");
        entries.push((format!("modules/{file}"), FILE, fs::read(template.modules().join(&file))?));
        files.push_str(&file);
        files.push('\n');
    }
    entries.push(("modules/order".to_owned(), FILE, files.into_bytes()));
    Ok(entries)
}

/// `cpio -H newc`: what the kernel unpacks (Documentation/driver-api/early-userspace/buffer-format.rst).
fn pack(entries: Vec<Entry>) -> io::Result<Vec<u8>> {
    let mut archive = Vec::new();
    for (number, (name, mode, content)) in (1..).zip(entries) {
        let size = u32::try_from(content.len()).map_err(|_| io::ErrorKind::FileTooLarge)?;
        let mut file = newc::Builder::new(&name).ino(number).mode(mode).nlink(1);
        if mode == CHARACTER_DEVICE {
            file = file.rdev_major(CONSOLE.0).rdev_minor(CONSOLE.1);
        }
        let mut writer = file.write(&mut archive, size);
        writer.write_all(&content)?;
        writer.finish()?;
    }
    newc::trailer(&mut archive)?;
    archive.resize((archive.len() - IN_LAST_PAGE).next_multiple_of(PAGE) + IN_LAST_PAGE, 0);
    Ok(archive)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_archive_leaves_the_end_of_memory_to_the_firmware() {
        for size in [0, 1, 3968, 4096, 70_000] {
            let archive = pack(vec![("init".to_owned(), PROGRAM, vec![1; size])]).unwrap();
            assert_eq!(archive.len() % PAGE, IN_LAST_PAGE);
        }
    }
}
