//! An archive on its way in.

use std::{
    borrow::Cow,
    cell::{Cell, RefCell},
    ffi::OsStr,
    fs::{self, File},
    io::{self, Read, Write as _},
    os::unix::ffi::OsStrExt as _,
    path::Path,
    rc::Rc,
    time::{Duration, UNIX_EPOCH},
};

use oc_proto::v1::WriteArchiveResponse;
use prost::bytes::{Buf as _, Bytes};
use tar::{Archive, Entry, EntryType};
use tokio::sync::mpsc;
use tonic::Status;

use super::target::{Target, names};
use crate::{
    files::{Owner, tree},
    refusal::{Refusal, io_status},
};

/// What may come between the content of two entries, bytes: headers, and names that have no room in them.
const MAX_HEADERS: u64 = 1 << 20;
/// What is copied at once, bytes.
const COPY: usize = 128 << 10;
/// Keys of files with holes as GNU tar writes them in pax archives. Taken for others, they would come out wrong.
const SPARSE: &[u8] = b"GNU.sparse.";

/// Unpacks what comes from `parts` into `directory`.
///
/// # Errors
///
/// That the stream broke, or what is wrong with an entry; then those before it stay.
pub fn unpack(
    directory: &Path,
    parts: mpsc::Receiver<Result<Bytes, Status>>,
    owner: Owner,
) -> Result<WriteArchiveResponse, Status> {
    if fs::metadata(directory).is_ok_and(|found| !found.is_dir()) {
        return Err(Refusal::NotADirectory.status(format!("{} is no directory", directory.display())));
    }
    tree::make(directory, 0, owner)?;
    let mut target = Target::open(directory, owner)?;
    let state = Rc::<State>::default();
    let source = Source { parts, part: Bytes::new(), state: Rc::clone(&state) };
    let mut archive = Archive::new(source);
    let mut unpacking =
        Unpacking { state: Rc::clone(&state), buffer: vec![0; COPY], done: WriteArchiveResponse::default() };
    let unpacked = unpacking.all(&mut archive, &mut target);
    // What the stream said comes before what became of it.
    if let Some(broken) = state.broken.take() {
        return Err(broken);
    }
    unpacked?;
    // Archives are filled up, and a client is not cut short.
    state.allowance.set(u64::MAX);
    let drained = io::copy(&mut archive.into_inner(), &mut io::sink());
    match state.broken.take() {
        Some(broken) => Err(broken),
        None => drained.map(|_| unpacking.done).map_err(|error| malformed(&error)),
    }
}

fn malformed(error: &io::Error) -> Status {
    Refusal::InvalidArgument.status(format!("the archive: {error}"))
}

/// What the source and its reader share.
#[derive(Debug, Default)]
struct State {
    /// Bytes that may still be read.
    allowance: Cell<u64>,
    /// How the stream broke.
    broken: RefCell<Option<Status>>,
}

/// The stream, as something to read.
#[derive(Debug)]
struct Source {
    parts: mpsc::Receiver<Result<Bytes, Status>>,
    part: Bytes,
    state: Rc<State>,
}

impl Read for Source {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while !self.part.has_remaining() {
            match self.parts.blocking_recv() {
                Some(Ok(part)) => self.part = part,
                Some(Err(broken)) => {
                    *self.state.broken.borrow_mut() = Some(broken);
                    return Err(io::ErrorKind::ConnectionAborted.into());
                }
                None => return Ok(0),
            }
        }
        let count = buffer.len().min(self.part.len());
        let Some(left) = self.state.allowance.get().checked_sub(count as u64) else {
            return Err(io::Error::other("the headers of an entry are too large"));
        };
        self.state.allowance.set(left);
        self.part.copy_to_slice(&mut buffer[..count]);
        Ok(count)
    }
}

struct Unpacking {
    state: Rc<State>,
    buffer: Vec<u8>,
    done: WriteArchiveResponse,
}

impl Unpacking {
    fn all(&mut self, archive: &mut Archive<Source>, target: &mut Target) -> Result<(), Status> {
        let mut entries = archive.entries().map_err(|error| malformed(&error))?;
        loop {
            // Nothing that has to be kept whole is without a bound.
            self.state.allowance.set(MAX_HEADERS);
            let Some(entry) = entries.next() else { return Ok(()) };
            let mut entry = entry.map_err(|error| malformed(&error))?;
            self.state.allowance.set(u64::MAX);
            self.one(&mut entry, target)?;
            // The next header is read from here, with nothing to skip but what fills up a block.
            self.skip(&mut entry)?;
        }
    }

    fn one(&mut self, entry: &mut Entry<'_, Source>, target: &mut Target) -> Result<(), Status> {
        let bytes = entry.path_bytes().into_owned();
        let path = Path::new(OsStr::from_bytes(&bytes));
        let kind = match entry.header().entry_type() {
            // As it was before there was a type for them.
            EntryType::Regular if bytes.ends_with(b"/") => EntryType::Directory,
            EntryType::Continuous | EntryType::GNUSparse => EntryType::Regular,
            kind => kind,
        };
        let is_wanted =
            matches!(kind, EntryType::Regular | EntryType::Directory | EntryType::Symlink | EntryType::Link);
        if !is_wanted {
            return Ok(());
        }
        let mode = entry.header().mode().map_err(|error| malformed(&error))?;
        let names = names(path)?;
        if names.is_empty() && kind == EntryType::Directory {
            // It is there.
            return Ok(());
        }
        match kind {
            EntryType::Directory => {
                target.place(&names, path, true)?.make_directory(mode)?;
            }
            EntryType::Symlink => {
                let link = link_of(entry, path)?;
                target.place(&names, path, true)?.make_link(Path::new(OsStr::from_bytes(&link)))?;
            }
            EntryType::Link => {
                let link = link_of(entry, path)?;
                let link = Path::new(OsStr::from_bytes(&link));
                let from = target.place(&self::names(link)?, link, false)?.to_link()?;
                target.place(&names, path, true)?.make_hard_link(&from)?;
            }
            _ => {
                let place = target.place(&names, path, true)?;
                let written = self.content(entry, path, |fill| place.make_file(mode, fill))?;
                self.done.bytes += i64::try_from(written).unwrap_or(i64::MAX);
            }
        }
        self.done.entries += 1;
        Ok(())
    }

    /// Has `make` make a file of the entry's content; how much it is.
    fn content(
        &mut self,
        entry: &mut Entry<'_, Source>,
        path: &Path,
        make: impl FnOnce(&mut dyn FnMut(&mut File) -> Result<(), Status>) -> Result<(), Status>,
    ) -> Result<u64, Status> {
        if is_sparse(entry)? {
            let text = format!("entry {}: files with holes are not taken", path.display());
            return Err(Refusal::InvalidArgument.status(text));
        }
        let size = entry.size();
        let modified = entry.header().mtime().map_err(|error| malformed(&error))?;
        let buffer = &mut self.buffer;
        let mut written = 0;
        make(&mut |file| {
            loop {
                let read = entry.read(buffer).map_err(|error| malformed(&error))?;
                if read == 0 {
                    break;
                }
                file.write_all(&buffer[..read]).map_err(|error| io_status(path, &error))?;
                written += read as u64;
            }
            if written != size {
                return Err(malformed(&io::ErrorKind::UnexpectedEof.into()));
            }
            // A time that cannot be is not worth an error.
            if let Some(time) = UNIX_EPOCH.checked_add(Duration::from_secs(modified)) {
                let _ = file.set_modified(time);
            }
            Ok(())
        })?;
        Ok(written)
    }

    /// Reads what is left of an entry that is not wanted.
    fn skip(&mut self, entry: &mut Entry<'_, Source>) -> Result<(), Status> {
        while entry.read(&mut self.buffer).map_err(|error| malformed(&error))? > 0 {}
        Ok(())
    }
}

fn link_of<'a>(entry: &'a Entry<'_, Source>, path: &Path) -> Result<Cow<'a, [u8]>, Status> {
    entry.link_name_bytes().filter(|link| !link.is_empty()).ok_or_else(|| {
        Refusal::InvalidArgument.status(format!("entry {}: it is a link to nowhere", path.display()))
    })
}

fn is_sparse(entry: &mut Entry<'_, Source>) -> Result<bool, Status> {
    let Some(records) = entry.pax_extensions().map_err(|error| malformed(&error))? else {
        return Ok(false);
    };
    Ok(records.flatten().any(|record| record.key_bytes().starts_with(SPARSE)))
}
