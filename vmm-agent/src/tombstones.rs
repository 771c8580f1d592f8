//! Which (sandbox, epoch) were deleted here, so that a create that was delayed on its way brings none back.
//!
//! One small file with a line per deletion, appended before the deletion becomes visible. A line torn by a crash
//! belongs to a deletion that nobody was told of, and is skipped. The oldest are forgotten beyond
//! [`Tombstones::CAPACITY`]: a request is never delayed that long.

use std::{
    collections::{HashMap, VecDeque},
    fs::{self, File, OpenOptions},
    io::{self, Write as _},
    path::{Path, PathBuf},
};

use crate::identity::{Epoch, SandboxId};

/// The file's name in a data directory.
pub const FILE: &str = "tombstones";

/// The deletions that this host remembers.
#[derive(Debug)]
pub struct Tombstones {
    path: PathBuf,
    file: File,
    /// Lines in the file, superseded ones included.
    lines: usize,
    latest: HashMap<SandboxId, Epoch>,
    order: VecDeque<SandboxId>,
}

impl Tombstones {
    /// Sandboxes that are remembered: about twenty minutes at the fastest that one host can make and delete them.
    pub const CAPACITY: usize = 8192;

    /// Reads the file, or begins one.
    ///
    /// # Errors
    ///
    /// What the file system said.
    pub fn open(path: PathBuf) -> io::Result<Self> {
        let text = match fs::read(&path) {
            Ok(bytes) => String::from_utf8_lossy(&bytes).into_owned(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
            Err(error) => return Err(error),
        };
        let mut latest = HashMap::new();
        let mut order = VecDeque::new();
        for (sandbox, epoch) in text.lines().filter_map(parse_line) {
            remember(&mut latest, &mut order, sandbox, epoch);
        }
        let file = rewrite(&path, &latest, &order)?;
        Ok(Self { path, file, lines: order.len(), latest, order })
    }

    /// The latest epoch of `sandbox` that was deleted here.
    pub fn get(&self, sandbox: &SandboxId) -> Option<Epoch> {
        self.latest.get(sandbox).copied()
    }

    /// Remembers that `sandbox` was deleted at `epoch`.
    ///
    /// # Errors
    ///
    /// What the file system said; it is remembered in memory all the same.
    pub fn add(&mut self, sandbox: &SandboxId, epoch: Epoch) -> io::Result<()> {
        if self.get(sandbox).is_some_and(|known| known >= epoch) {
            return Ok(());
        }
        remember(&mut self.latest, &mut self.order, sandbox.clone(), epoch);
        if self.lines >= 2 * Self::CAPACITY {
            self.file = rewrite(&self.path, &self.latest, &self.order)?;
            self.lines = self.order.len();
            return Ok(());
        }
        self.lines += 1;
        // One write, so that a crash leaves the line or none of it.
        self.file.write_all(format!("{sandbox} {epoch}\n").as_bytes())
    }
}

fn remember(
    latest: &mut HashMap<SandboxId, Epoch>,
    order: &mut VecDeque<SandboxId>,
    sandbox: SandboxId,
    epoch: Epoch,
) {
    if let Some(known) = latest.get_mut(&sandbox) {
        *known = epoch.max(*known);
        return;
    }
    order.push_back(sandbox.clone());
    latest.insert(sandbox, epoch);
    if order.len() > Tombstones::CAPACITY
        && let Some(oldest) = order.pop_front()
    {
        latest.remove(&oldest);
    }
}

fn parse_line(line: &str) -> Option<(SandboxId, Epoch)> {
    let (sandbox, epoch) = line.split_once(' ')?;
    Some((SandboxId::parse(sandbox).ok()?, Epoch(epoch.parse().ok()?)))
}

fn rewrite(path: &Path, latest: &HashMap<SandboxId, Epoch>, order: &VecDeque<SandboxId>) -> io::Result<File> {
    let mut text = String::new();
    for (sandbox, epoch) in order.iter().filter_map(|id| Some((id, latest.get(id)?))) {
        text.push_str(&format!("{sandbox} {epoch}\n"));
    }
    let new = path.with_extension("new");
    fs::write(&new, text)?;
    fs::rename(&new, path)?;
    OpenOptions::new().append(true).open(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(n: usize) -> SandboxId {
        SandboxId::parse(format!("sb-{n}")).unwrap()
    }

    #[test]
    fn deletions_outlive_the_agent() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tombstones");
        let mut tombstones = Tombstones::open(path.clone()).unwrap();
        tombstones.add(&id(1), Epoch(1)).unwrap();
        tombstones.add(&id(2), Epoch(5)).unwrap();
        tombstones.add(&id(1), Epoch(3)).unwrap();
        tombstones.add(&id(1), Epoch(2)).unwrap();
        drop(tombstones);
        let tombstones = Tombstones::open(path).unwrap();
        assert_eq!(tombstones.get(&id(1)), Some(Epoch(3)));
        assert_eq!(tombstones.get(&id(2)), Some(Epoch(5)));
        assert_eq!(tombstones.get(&id(3)), None);
    }

    #[test]
    fn a_torn_line_is_skipped() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tombstones");
        fs::write(&path, "sb-1 4\nsb-2").unwrap();
        let mut tombstones = Tombstones::open(path.clone()).unwrap();
        assert_eq!(tombstones.get(&id(2)), None);
        tombstones.add(&id(3), Epoch(1)).unwrap();
        assert_eq!(fs::read_to_string(path).unwrap(), "sb-1 4\nsb-3 1\n");
    }

    #[test]
    fn memory_and_file_stay_bounded() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tombstones");
        let mut tombstones = Tombstones::open(path.clone()).unwrap();
        for n in 0..3 * Tombstones::CAPACITY {
            tombstones.add(&id(n), Epoch(1)).unwrap();
        }
        assert_eq!(tombstones.latest.len(), Tombstones::CAPACITY);
        let lines = fs::read_to_string(path).unwrap().lines().count();
        assert!(lines <= 2 * Tombstones::CAPACITY, "{lines}");
        assert_eq!(tombstones.get(&id(0)), None);
    }
}
