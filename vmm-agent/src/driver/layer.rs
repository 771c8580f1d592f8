//! Writable layers: sparse ext4 images, one per VM, copied from a snapshot's.

use std::{
    fs::{File, OpenOptions},
    io,
    os::unix::fs::OpenOptionsExt as _,
    path::Path,
    process::{Command, Stdio},
};

use rustix::{
    fs::{SeekFrom, fstatfs, ioctl_ficlone, seek},
    io::Errno,
};

/// Size of a new layer, MiB: what a sandbox has at least.
pub const LAYER_MB: u64 = 20_480;

// include/uapi/linux/magic.h
const XFS_SUPER_MAGIC: u64 = 0x5846_5342;
const BTRFS_SUPER_MAGIC: u64 = 0x9123_683e;

/// The journal's size, MiB: ext4 would choose 128 for a disk of this size, and each sandbox soon fills its own.
const JOURNAL_MB: u32 = 32;

/// Makes an empty layer. It is sparse: a few hundred KiB on disk.
///
/// # Errors
///
/// If `mke2fs` is not there or fails.
pub fn format(file: &Path) -> io::Result<()> {
    let output = Command::new("mke2fs")
        .args(["-q", "-F", "-t", "ext4", "-m", "0"])
        // Unwritten tables stay holes of the file; the kernel fills them in when they are first used.
        .args(["-E", "lazy_itable_init=1,lazy_journal_init=1,nodiscard,root_owner=0:0"])
        .args(["-J", &format!("size={JOURNAL_MB}")])
        .arg(file)
        .arg(format!("{LAYER_MB}M"))
        .stdin(Stdio::null())
        .output()?;
    if output.status.success() {
        return Ok(());
    }
    let message = String::from_utf8_lossy(&output.stderr);
    Err(io::Error::other(format!("mke2fs: {}", message.trim())))
}

/// Copies `from` to the new file `to`, sharing its blocks where the filesystem can, else copying what is no hole.
/// Returns the copy.
///
/// # Errors
///
/// If `to` exists, or either cannot be read or written.
pub fn copy(from: &Path, to: &Path) -> io::Result<File> {
    Ok(copy_or_share(from, to)?.0)
}

/// As [`copy`]; also whether it shares its blocks with the original.
///
/// # Errors
///
/// As there.
pub fn copy_or_share(from: &Path, to: &Path) -> io::Result<(File, bool)> {
    let source = File::open(from)?;
    let target = OpenOptions::new().create_new(true).read(true).write(true).mode(0o600).open(to)?;
    match ioctl_ficlone(&target, &source) {
        Ok(()) => return Ok((target, true)),
        Err(Errno::OPNOTSUPP | Errno::NOTTY | Errno::XDEV | Errno::INVAL) => {}
        Err(error) => return Err(error.into()),
    }
    copy_data(&source, &target)?;
    Ok((target, false))
}

/// Has `layer` written back where a copy that shares its blocks would wait for that, so that less is left of it when the
/// copy is made.
///
/// # Errors
///
/// If the disk does not take it.
pub fn write_back(layer: &Path) -> io::Result<()> {
    let file = File::open(layer)?;
    // Elsewhere what was not written back is copied as well as what was.
    match fstatfs(&file)?.f_type.cast_unsigned() {
        XFS_SUPER_MAGIC | BTRFS_SUPER_MAGIC => file.sync_data(),
        _ => Ok(()),
    }
}

fn copy_data(mut source: &File, target: &File) -> io::Result<()> {
    let length = source.metadata()?.len();
    target.set_len(length)?;
    let mut at = 0;
    while at < length {
        let start = match seek(source, SeekFrom::Data(at)) {
            Ok(start) => start,
            // Nothing but a hole up to the end.
            Err(Errno::NXIO) => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        let end = seek(source, SeekFrom::Hole(start))?;
        seek(source, SeekFrom::Start(start))?;
        seek(target, SeekFrom::Start(start))?;
        // By copy_file_range(2): the standard library does that between files.
        let copied = io::copy(&mut io::Read::take(&mut source, end - start), &mut &*target)?;
        if copied != end - start {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        at = end;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{FileExt as _, MetadataExt as _};

    use super::*;

    #[test]
    fn a_copy_has_the_same_bytes_and_the_same_holes() {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("a"), dir.path().join("b"));
        let file = File::create(&from).unwrap();
        file.set_len(64 << 20).unwrap();
        for (at, bytes) in [(0, "first"), (5 << 20, "middle"), ((64 << 20) - 4, "last")] {
            file.write_all_at(bytes.as_bytes(), at).unwrap();
        }
        copy(&from, &to).unwrap();
        assert!(std::fs::read(&from).unwrap() == std::fs::read(&to).unwrap());
        assert!(to.metadata().unwrap().blocks() < 4096, "{} blocks", to.metadata().unwrap().blocks());
        assert_eq!(copy(&from, &to).unwrap_err().kind(), io::ErrorKind::AlreadyExists);
    }

    #[test]
    fn a_new_layer_is_sparse() {
        let dir = tempfile::tempdir().unwrap();
        let layer = dir.path().join("layer");
        format(&layer).unwrap();
        let metadata = layer.metadata().unwrap();
        assert_eq!(metadata.len(), LAYER_MB << 20);
        assert!(metadata.blocks() * 512 < 16 << 20, "{} blocks", metadata.blocks());
        assert!(format(&dir.path().join("none/layer")).is_err());
    }
}
