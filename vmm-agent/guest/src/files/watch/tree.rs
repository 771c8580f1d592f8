//! The directories that a call watches, and what inotify(7) says of them put into words.

use std::{
    collections::{HashMap, HashSet},
    fs, io,
    os::fd::{AsFd as _, AsRawFd as _, RawFd},
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    sys::inotify::{AddWatchFlags, InitFlags, Inotify, InotifyEvent, WatchDescriptor},
};
use oc_proto::v1::{FileEventType, WatchDirectoryResponse};
use tonic::{Code, Status};

use crate::{
    files::path::is_kernels,
    refusal::{Refusal, io_status},
};

/// Directories that one call watches.
const MAX_DIRECTORIES: usize = 8192;
/// What is looked at in new directories before the kernel's queue is empty once.
const MAX_FOUND: usize = 16_384;

/// What is told once the caller knows of `messages`.
#[derive(Debug, Default)]
pub struct Told {
    /// What has happened.
    pub messages: Vec<WatchDirectoryResponse>,
    /// The directory itself is gone.
    pub is_over: bool,
    /// More has happened than is known.
    pub is_lost: bool,
}

/// Something that was moved, and whose new name is awaited.
#[derive(Debug)]
struct Moved {
    cookie: u32,
    path: PathBuf,
    is_dir: bool,
}

/// An inotify instance and the directories that it watches.
#[derive(Debug)]
pub struct Tree {
    inotify: Inotify,
    root: PathBuf,
    top: WatchDescriptor,
    is_recursive: bool,
    directories: HashMap<WatchDescriptor, PathBuf>,
    moved: Option<Moved>,
    /// What was told because it was found in a new directory; the kernel may have it in its queue, too.
    found: HashSet<PathBuf>,
}

fn is(event: &InotifyEvent, mask: AddWatchFlags) -> bool {
    event.mask.intersects(mask)
}

/// Whether the other half of a renaming is among `events`.
fn is_among(events: &[InotifyEvent], cookie: u32) -> bool {
    events.iter().any(|event| event.cookie == cookie && is(event, AddWatchFlags::IN_MOVED_TO))
}

fn wanted() -> AddWatchFlags {
    AddWatchFlags::IN_CREATE
        | AddWatchFlags::IN_CLOSE_WRITE
        | AddWatchFlags::IN_ATTRIB
        | AddWatchFlags::IN_DELETE
        | AddWatchFlags::IN_MOVED_FROM
        | AddWatchFlags::IN_MOVED_TO
        | AddWatchFlags::IN_ONLYDIR
        // What is removed while it is open is not told of after that.
        | AddWatchFlags::from_bits_retain(libc::IN_EXCL_UNLINK)
}

fn message(what: FileEventType, path: &Path, is_dir: bool) -> WatchDirectoryResponse {
    WatchDirectoryResponse {
        r#type: what.into(),
        path: path.to_string_lossy().into_owned(),
        renamed_from: String::new(),
        is_dir,
    }
}

fn too_many() -> Status {
    Refusal::TooManyWatches.status(format!("more than {MAX_DIRECTORIES} directories cannot be watched"))
}

impl Tree {
    /// Watches `root`, and the directories in it if it is recursive.
    ///
    /// # Errors
    ///
    /// What the file system said; `NOT_A_DIRECTORY`, `TOO_MANY_WATCHES`.
    pub fn begin(root: PathBuf, is_recursive: bool) -> Result<Self, Status> {
        let failed = |error: Errno| match error {
            Errno::ENOSPC | Errno::EMFILE | Errno::ENFILE => {
                Refusal::TooManyWatches.status("the guest has no watches left")
            }
            error => io_status(&root, &error.into()),
        };
        let inotify = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC).map_err(failed)?;
        // A link is followed here, as everywhere where a directory is named.
        let own = AddWatchFlags::IN_DELETE_SELF | AddWatchFlags::IN_MOVE_SELF;
        let top = inotify.add_watch(&root, wanted() | own).map_err(failed)?;
        let mut tree = Self {
            inotify,
            top,
            is_recursive,
            directories: HashMap::from([(top, root.clone())]),
            moved: None,
            found: HashSet::new(),
            root,
        };
        if is_recursive {
            let root = tree.root.clone();
            tree.descend(root, None)?;
        }
        Ok(tree)
    }

    /// The same, with nothing known of what has happened; none where the directory is gone.
    ///
    /// # Errors
    ///
    /// As [`Tree::begin`].
    pub fn again(self) -> Result<Option<Self>, Status> {
        let Self { inotify, root, is_recursive, .. } = self;
        // Its watches are free for the next.
        drop(inotify);
        match Self::begin(root, is_recursive) {
            Err(status) if status.code() == Code::NotFound => Ok(None),
            begun => begun.map(Some),
        }
    }

    /// What becomes readable when something has happened.
    pub fn descriptor(&self) -> RawFd {
        self.inotify.as_fd().as_raw_fd()
    }

    /// What has happened since the last time.
    ///
    /// # Errors
    ///
    /// `WouldBlock` if nothing has.
    pub fn read(&self) -> io::Result<Vec<InotifyEvent>> {
        Ok(self.inotify.read_events()?)
    }

    /// Nothing is in the kernel's queue that happened before a new directory was looked at.
    pub fn caught_up(&mut self) {
        self.found = HashSet::new();
    }

    /// Whether something was moved whose new name may still be told.
    pub fn is_waiting(&self) -> bool {
        self.moved.is_some()
    }

    /// What was moved is not in the tree any more.
    pub fn settle(&mut self) -> Option<WatchDirectoryResponse> {
        let Moved { path, is_dir, .. } = self.moved.take()?;
        if is_dir {
            self.forget(&path);
        }
        Some(message(FileEventType::Removed, &path, is_dir))
    }

    /// Whether [`Tree::take`] looks into directories for these events.
    pub fn needs_disk(&self, events: &[InotifyEvent]) -> bool {
        let new = AddWatchFlags::IN_CREATE | AddWatchFlags::IN_MOVED_TO;
        self.is_recursive && events.iter().any(|event| is(event, new) && is(event, AddWatchFlags::IN_ISDIR))
    }

    /// Puts events into words.
    ///
    /// # Errors
    ///
    /// `TOO_MANY_WATCHES` if there are new directories and no watches for them.
    pub fn take(&mut self, events: Vec<InotifyEvent>) -> Result<Told, Status> {
        let mut told = Told::default();
        // What has waited since the last time, and is not among these, was moved out.
        if self.moved.as_ref().is_some_and(|moved| !is_among(&events, moved.cookie)) {
            told.messages.extend(self.settle());
        }
        let mut events = events.into_iter();
        while let Some(event) = events.next() {
            self.take_one(event, &mut told)?;
            // Its other half may only be still to come where nothing else has come after it.
            let left = events.as_slice();
            let is_out = |moved: &Moved| !left.is_empty() && !is_among(left, moved.cookie);
            if self.moved.as_ref().is_some_and(is_out) {
                told.messages.extend(self.settle());
            }
            if told.is_over || told.is_lost {
                break;
            }
        }
        Ok(told)
    }

    fn take_one(&mut self, event: InotifyEvent, told: &mut Told) -> Result<(), Status> {
        if is(&event, AddWatchFlags::IN_Q_OVERFLOW) {
            told.is_lost = true;
            return Ok(());
        }
        let gone = AddWatchFlags::IN_IGNORED | AddWatchFlags::IN_DELETE_SELF | AddWatchFlags::IN_MOVE_SELF;
        if event.wd == self.top && is(&event, gone) {
            told.messages.extend(self.settle());
            told.is_over = true;
            return Ok(());
        }
        if is(&event, AddWatchFlags::IN_IGNORED) {
            self.directories.remove(&event.wd);
            return Ok(());
        }
        // Those without a name are of a directory itself, of which its parent tells; or of one that is not watched any more.
        let (Some(name), Some(directory)) = (&event.name, self.directories.get(&event.wd)) else {
            return Ok(());
        };
        let path = directory.join(name);
        let is_dir = is(&event, AddWatchFlags::IN_ISDIR);
        if let Some(moved) = &self.moved {
            if is(&event, AddWatchFlags::IN_MOVED_TO) && moved.cookie == event.cookie {
                return self.renamed(path, told);
            }
            if is(&event, AddWatchFlags::IN_MOVED_FROM) || path.starts_with(&moved.path) {
                told.messages.extend(self.settle());
            }
        }
        if is(&event, AddWatchFlags::IN_MOVED_FROM) {
            self.found.remove(&path);
            self.moved = Some(Moved { cookie: event.cookie, path, is_dir });
        } else if is(&event, AddWatchFlags::IN_CREATE | AddWatchFlags::IN_MOVED_TO) {
            if !self.found.remove(&path) {
                told.messages.push(message(FileEventType::Created, &path, is_dir));
                if is_dir && self.is_recursive {
                    self.descend(path, Some(told))?;
                }
            }
        } else if is(&event, AddWatchFlags::IN_DELETE) {
            self.found.remove(&path);
            told.messages.push(message(FileEventType::Removed, &path, is_dir));
        } else {
            told.messages.push(message(FileEventType::Modified, &path, is_dir));
        }
        Ok(())
    }

    /// What was moved has its new name, `to`.
    fn renamed(&mut self, to: PathBuf, told: &mut Told) -> Result<(), Status> {
        let Some(Moved { path: from, is_dir, .. }) = self.moved.take() else { return Ok(()) };
        told.messages.push(if self.found.remove(&to) {
            // It was found under its new name already.
            message(FileEventType::Removed, &from, is_dir)
        } else {
            let renamed_from = from.to_string_lossy().into_owned();
            WatchDirectoryResponse { renamed_from, ..message(FileEventType::Renamed, &to, is_dir) }
        });
        if !is_dir || !self.is_recursive {
            return Ok(());
        }
        let mut was_watched = false;
        for path in self.directories.values_mut() {
            if *path == from {
                was_watched = true;
                path.clone_from(&to);
            } else if let Ok(rest) = path.strip_prefix(&from) {
                *path = to.join(rest);
            }
        }
        // It had this name before it was looked at under its first one.
        if was_watched { Ok(()) } else { self.descend(to, Some(told)) }
    }

    /// Stops watching `directory` and what is in it, wherever it is now.
    fn forget(&mut self, directory: &Path) {
        let inotify = &self.inotify;
        self.directories.retain(|watch, path| {
            let stays = !path.starts_with(directory);
            if !stays {
                // It may have been removed since.
                let _ = inotify.rm_watch(*watch);
            }
            stays
        });
    }

    /// Watches the directories in `top`, and `top` itself; each before it is looked at, so that nothing is missed.
    /// What is found is told of if the caller cannot know it yet.
    fn descend(&mut self, top: PathBuf, mut told: Option<&mut Told>) -> Result<(), Status> {
        let mut left = vec![top];
        while let Some(directory) = left.pop() {
            if !self.add(&directory)? {
                continue;
            }
            // It may be gone by now, or its entries; then that is told, too.
            let Ok(entries) = fs::read_dir(&directory) else { continue };
            for entry in entries.flatten() {
                let is_dir = entry.file_type().is_ok_and(|kind| kind.is_dir());
                let path = entry.path();
                if let Some(told) = told.as_deref_mut()
                    && self.found.insert(path.clone())
                {
                    if self.found.len() > MAX_FOUND {
                        told.is_lost = true;
                        return Ok(());
                    }
                    told.messages.push(message(FileEventType::Created, &path, is_dir));
                }
                if is_dir {
                    left.push(path);
                }
                if left.len() > MAX_DIRECTORIES {
                    return Err(too_many());
                }
            }
        }
        Ok(())
    }

    /// Watches `directory`; whether it is one.
    fn add(&mut self, directory: &Path) -> Result<bool, Status> {
        if *directory == *self.root {
            return Ok(true);
        }
        if is_kernels(directory) {
            return Ok(false);
        }
        match self.inotify.add_watch(directory, wanted() | AddWatchFlags::IN_DONT_FOLLOW) {
            Ok(watch) => {
                self.directories.insert(watch, directory.to_owned());
                if self.directories.len() > MAX_DIRECTORIES { Err(too_many()) } else { Ok(true) }
            }
            Err(Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP) => Ok(false),
            Err(Errno::ENOSPC) => Err(Refusal::TooManyWatches.status("the guest has no watches left")),
            Err(error) => Err(io_status(directory, &error.into())),
        }
    }
}
