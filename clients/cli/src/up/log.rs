//! Log files of the services: bounded, one generation kept.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read as _, Seek as _, SeekFrom},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    time::Duration,
};

/// What grows beyond is moved away.
const LOG_BYTES: u64 = 32 << 20;
/// How often a running service's log is looked at.
pub const CHECK_INTERVAL: Duration = Duration::from_secs(30);

/// Opens a log for appending.
pub fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new().append(true).create(true).mode(0o600).open(path)
}

/// Moves a log away that has grown too long. Its writer goes on in the same, now empty, file: it appends, so no
/// hole is left. What it writes between copy and cut is lost.
pub fn bound(path: &Path) -> io::Result<()> {
    bound_to(path, LOG_BYTES)
}

fn bound_to(path: &Path, limit: u64) -> io::Result<()> {
    if fs::metadata(path)?.len() <= limit {
        return Ok(());
    }
    fs::copy(path, PathBuf::from(format!("{}.1", path.display())))?;
    OpenOptions::new().write(true).open(path)?.set_len(0)
}

/// The last lines of a log, for an error message.
pub fn tail(path: &Path, lines: usize) -> String {
    const BYTES: u64 = 8 << 10;
    let read = || {
        let mut file = File::open(path)?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(BYTES)))?;
        let mut bytes = Vec::new();
        file.take(BYTES).read_to_end(&mut bytes)?;
        Ok::<_, io::Error>(String::from_utf8_lossy(&bytes).into_owned())
    };
    let text = read().unwrap_or_default();
    let all: Vec<_> = text.lines().filter(|line| !line.trim().is_empty()).collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    #[test]
    fn a_long_log_is_moved_away_under_its_writer() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.log");
        let mut log = open(&path).unwrap();
        log.write_all(b"one\ntwo\n").unwrap();
        bound_to(&path, 8).unwrap();
        assert_eq!(tail(&path, 1), "two");
        bound_to(&path, 7).unwrap();
        log.write_all(b"three\n").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"three\n");
        assert_eq!(fs::read(directory.path().join("a.log.1")).unwrap(), b"one\ntwo\n");
        assert_eq!(tail(&directory.path().join("none"), 3), "");
    }
}
