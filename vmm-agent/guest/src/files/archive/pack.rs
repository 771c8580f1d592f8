//! An archive on its way out.
//!
//! A file is as long in the archive as it was when it was opened: what is written to it later is left out, and what is
//! cut off meanwhile is zeros, as with other tars. What goes before it is reached is left out.

use std::{
    fs::{self, File, Metadata},
    io::{self, Read as _},
    os::unix::{
        ffi::OsStrExt as _,
        fs::{MetadataExt as _, OpenOptionsExt as _},
    },
    path::{Path, PathBuf},
};

use oc_proto::{google::api::HttpBody, v1::ReadArchiveResponse};
use prost::bytes::BytesMut;
use tar::{EntryType, Header};
use tokio::sync::mpsc;
use tonic::Status;

use crate::{
    files::path::is_kernels,
    refusal::{Refusal, io_status},
};

/// Bytes of one message.
const PART: usize = 512 << 10;
const CONTENT_TYPE: &str = "application/x-tar";
/// What a header is, and what everything is filled up to (POSIX pax, "ustar Interchange Format").
const BLOCK: usize = 512;
/// Directories that are known and still to be looked into.
const MAX_PENDING: usize = 100_000;
/// What a ustar header has room for: eleven and seven octal digits.
const MAX_SIZE: u64 = 0o777_7777_7777;
const MAX_ID: u64 = 0o777_7777;
const PERMISSIONS: u32 = 0o7777;

type Sender = mpsc::Sender<Result<ReadArchiveResponse, Status>>;

/// What is packed.
#[derive(Debug)]
pub enum Top {
    /// A directory, with all it holds.
    Directory(PathBuf),
    /// One file.
    File(PathBuf, File, Metadata),
}

/// Why packing ended early.
enum Stop {
    /// Nobody takes it any more.
    Gone,
    /// Something failed.
    Failed(Status),
}

impl From<Status> for Stop {
    fn from(status: Status) -> Self {
        Self::Failed(status)
    }
}

impl Top {
    /// Finds what is at `path`.
    ///
    /// # Errors
    ///
    /// What the file system said; `NOT_A_FILE` if it is neither a directory nor a regular file.
    pub fn open(path: &Path) -> Result<Self, Status> {
        let failed = |error| io_status(path, &error);
        // A pipe without a writer must not hold the thread.
        let file = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path).map_err(failed)?;
        let metadata = file.metadata().map_err(failed)?;
        if metadata.is_dir() {
            Ok(Self::Directory(path.to_owned()))
        } else if metadata.is_file() {
            Ok(Self::File(path.to_owned(), file, metadata))
        } else {
            Err(Refusal::NotAFile.status(format!("{} is neither a directory nor a file", path.display())))
        }
    }

    /// Sends the archive.
    pub fn send(self, sender: &Sender) {
        let mut parts = Parts { sender, part: BytesMut::zeroed(PART), filled: 0 };
        let packed = match self {
            Self::Directory(top) => directory(&top, &mut parts),
            Self::File(path, file, metadata) => {
                let name = Path::new(path.file_name().unwrap_or(path.as_os_str()));
                regular(name, file, &metadata, &path, &mut parts)
            }
        };
        // It ends with two blocks of zeros.
        let sent = packed.and_then(|()| parts.put(&[0; 2 * BLOCK])).and_then(|()| parts.flush());
        if let Err(Stop::Failed(error)) = sent {
            let _ = sender.blocking_send(Err(error));
        }
    }
}

/// Packs all that is in `top`, each directory before what it holds.
fn directory(top: &Path, parts: &mut Parts<'_>) -> Result<(), Stop> {
    let mut left = vec![PathBuf::new()];
    while let Some(directory) = left.pop() {
        let full = top.join(&directory);
        let entries = match fs::read_dir(&full) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound && directory != Path::new("") => continue,
            Err(error) => return Err(io_status(&full, &error).into()),
        };
        for entry in entries {
            let entry = entry.map_err(|error| io_status(&full, &error))?;
            let (name, path) = (directory.join(entry.file_name()), entry.path());
            if one(&name, &path, parts)? {
                left.push(name);
            }
            if left.len() > MAX_PENDING {
                let text = format!("{} has more than {MAX_PENDING} directories", top.display());
                return Err(Refusal::DirectoryTooLarge.status(text).into());
            }
        }
    }
    Ok(())
}

/// Packs what is at `path` as `name`; whether it is a directory, whose content is still to come.
fn one(name: &Path, path: &Path, parts: &mut Parts<'_>) -> Result<bool, Stop> {
    let failed = |error| Stop::Failed(io_status(path, &error));
    let metadata = match fs::symlink_metadata(path) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(failed(error)),
    };
    if metadata.is_dir() {
        let mut header = header(EntryType::Directory, &metadata);
        parts.header(&mut header, name, None)?;
        return Ok(!is_kernels(path));
    }
    if metadata.is_symlink() {
        match fs::read_link(path) {
            Ok(target) => parts.header(&mut header(EntryType::Symlink, &metadata), name, Some(&target))?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(failed(error)),
        }
    } else if metadata.is_file() {
        let flags = libc::O_NONBLOCK | libc::O_NOFOLLOW;
        match File::options().read(true).custom_flags(flags).open(path) {
            Ok(file) => {
                // Of the file that is open: another may have taken its place.
                let metadata = file.metadata().map_err(failed)?;
                if metadata.is_file() {
                    regular(name, file, &metadata, path, parts)?;
                }
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) if error.raw_os_error() == Some(libc::ELOOP) => {}
            Err(error) => return Err(failed(error)),
        }
    }
    Ok(false)
}

/// Packs a file as `name`.
fn regular(
    name: &Path,
    mut file: File,
    metadata: &Metadata,
    path: &Path,
    parts: &mut Parts<'_>,
) -> Result<(), Stop> {
    let mut header = header(EntryType::Regular, metadata);
    header.set_size(metadata.len());
    parts.header(&mut header, name, None)?;
    let mut left = metadata.len();
    while left > 0 {
        let room = parts.room()?;
        let wanted = usize::try_from(left).unwrap_or(room.len()).min(room.len());
        let read = match file.read(&mut room[..wanted]) {
            Ok(read) => read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(io_status(path, &error).into()),
        };
        if read == 0 {
            parts.zeros(left)?;
            break;
        }
        parts.filled += read;
        left -= read as u64;
    }
    parts.pad(metadata.len())
}

fn header(kind: EntryType, metadata: &Metadata) -> Header {
    let mut header = Header::new_ustar();
    header.set_entry_type(kind);
    header.set_mode(metadata.mode() & PERMISSIONS);
    header.set_uid(metadata.uid().into());
    header.set_gid(metadata.gid().into());
    header.set_mtime(u64::try_from(metadata.mtime()).unwrap_or_default());
    header.set_size(0);
    header
}

/// The messages: bytes are gathered to whole ones.
struct Parts<'a> {
    sender: &'a Sender,
    part: BytesMut,
    filled: usize,
}

impl Parts<'_> {
    /// A header, and before it what has no room there.
    fn header(&mut self, header: &mut Header, name: &Path, link: Option<&Path>) -> Result<(), Stop> {
        let mut records = Vec::new();
        if header.set_path(name).is_err() {
            record(&mut records, "path", name.as_os_str().as_bytes());
        }
        if let Some(link) = link
            && header.set_link_name_literal(link.as_os_str().as_bytes()).is_err()
        {
            record(&mut records, "linkpath", link.as_os_str().as_bytes());
        }
        let numbers = [
            ("size", header.entry_size(), MAX_SIZE),
            ("uid", header.uid(), MAX_ID),
            ("gid", header.gid(), MAX_ID),
        ];
        for (key, value, most) in numbers {
            if let Ok(value) = value
                && value > most
            {
                record(&mut records, key, value.to_string().as_bytes());
            }
        }
        if !records.is_empty() {
            let mut extended = Header::new_ustar();
            extended.set_entry_type(EntryType::XHeader);
            // Never shown by those who know what it is; it needs a name all the same.
            let _ = extended.set_path("PaxHeaders/entry");
            extended.set_mode(0o644);
            extended.set_size(records.len() as u64);
            extended.set_cksum();
            self.put(extended.as_bytes())?;
            self.put(&records)?;
            self.pad(records.len() as u64)?;
        }
        header.set_cksum();
        self.put(header.as_bytes())
    }

    /// The room that is left in the message, which is never empty.
    fn room(&mut self) -> Result<&mut [u8], Stop> {
        if self.filled == self.part.len() {
            self.flush()?;
        }
        Ok(&mut self.part[self.filled..])
    }

    fn put(&mut self, mut bytes: &[u8]) -> Result<(), Stop> {
        while !bytes.is_empty() {
            let room = self.room()?;
            let count = room.len().min(bytes.len());
            room[..count].copy_from_slice(&bytes[..count]);
            self.filled += count;
            bytes = &bytes[count..];
        }
        Ok(())
    }

    fn zeros(&mut self, mut count: u64) -> Result<(), Stop> {
        while count > 0 {
            let room = self.room()?;
            let some = usize::try_from(count).unwrap_or(room.len()).min(room.len());
            // A read that failed may have left something.
            room[..some].fill(0);
            self.filled += some;
            count -= some as u64;
        }
        Ok(())
    }

    /// Fills up the last block of `size` bytes.
    fn pad(&mut self, size: u64) -> Result<(), Stop> {
        self.zeros(size.next_multiple_of(BLOCK as u64) - size)
    }

    /// Sends what there is.
    fn flush(&mut self) -> Result<(), Stop> {
        let mut data = std::mem::replace(&mut self.part, BytesMut::zeroed(PART));
        data.truncate(std::mem::take(&mut self.filled));
        let body =
            HttpBody { content_type: CONTENT_TYPE.into(), data: data.freeze(), extensions: Vec::new() };
        self.sender.blocking_send(Ok(ReadArchiveResponse { body: Some(body) })).map_err(|_| Stop::Gone)
    }
}

/// Adds a record of an extended header: its length, which counts itself, the key and the value.
fn record(records: &mut Vec<u8>, key: &str, value: &[u8]) {
    let rest = " =\n".len() + key.len() + value.len();
    let mut length = rest + 1;
    while length != rest + length.to_string().len() {
        length = rest + length.to_string().len();
    }
    records.extend_from_slice(format!("{length} {key}=").as_bytes());
    records.extend_from_slice(value);
    records.push(b'\n');
}
