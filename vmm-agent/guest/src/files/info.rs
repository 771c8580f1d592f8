//! What a path names.

use std::{
    fs::{self, Metadata},
    os::unix::fs::MetadataExt as _,
    path::Path,
};

use oc_proto::v1::{FileInfo, FileType};
use prost_types::Timestamp;
use tonic::Status;

use crate::refusal::io_status;

/// Bits of a mode that `chmod` sets.
const PERMISSIONS: u32 = 0o7777;

/// Describes what stands at `path`, without following a link.
///
/// # Errors
///
/// What the file system said.
pub fn of(path: &Path) -> Result<FileInfo, Status> {
    let metadata = fs::symlink_metadata(path).map_err(|error| io_status(path, &error))?;
    Ok(describe(path, &metadata))
}

/// Describes `path`, of which `metadata` is.
pub fn describe(path: &Path, metadata: &Metadata) -> FileInfo {
    let kind = metadata.file_type();
    let file_type = if kind.is_file() {
        FileType::File
    } else if kind.is_dir() {
        FileType::Directory
    } else if kind.is_symlink() {
        FileType::Symlink
    } else {
        FileType::Unspecified
    };
    let link = kind.is_symlink().then(|| fs::read_link(path).ok()).flatten();
    let name = path.file_name().unwrap_or(path.as_os_str());
    FileInfo {
        name: name.to_string_lossy().into_owned(),
        path: path.to_string_lossy().into_owned(),
        r#type: file_type.into(),
        is_dir: kind.is_dir(),
        size: i64::try_from(metadata.len()).unwrap_or(i64::MAX),
        mode: metadata.mode() & PERMISSIONS,
        uid: metadata.uid(),
        gid: metadata.gid(),
        modified_at: Some(Timestamp {
            seconds: metadata.mtime(),
            // Below a thousand million.
            nanos: i32::try_from(metadata.mtime_nsec()).unwrap_or_default(),
        }),
        link_target: link.map(|target| target.to_string_lossy().into_owned()).unwrap_or_default(),
    }
}
