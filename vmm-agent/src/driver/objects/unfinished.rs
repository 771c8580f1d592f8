//! What a host that died amid a put has left in a store that is a directory: the crate writes each object under a name of its
//! own, `NAME#NUMBER`, renames it, and never lists those ([`object_store::local`]).

use std::{
    io,
    path::Path,
    time::{Duration, SystemTime},
};

use fs_err as fs;

use crate::driver::durable;

/// What no object's name has in it.
const MARK: u8 = b'#';

/// Removes those below `directory` that nobody can be writing any more. Returns how many there were.
///
/// # Errors
///
/// If something cannot be listed, or resists.
pub fn sweep(directory: &Path, now: SystemTime, grace: Duration) -> io::Result<usize> {
    let mut removed = 0;
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            removed += sweep(&entry.path(), now, grace)?;
        } else if entry.file_name().as_encoded_bytes().contains(&MARK) {
            let written = match entry.metadata() {
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                metadata => metadata?.modified()?,
            };
            if now.duration_since(written).unwrap_or_default() > grace {
                durable::remove(&entry.path())?;
                removed += 1;
            }
        }
    }
    Ok(removed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_old_halves_go() {
        let dir = tempfile::tempdir().unwrap();
        let group = dir.path().join("chunks/ab");
        fs::create_dir_all(&group).unwrap();
        for name in ["cd", "cd#1", "ef#12"] {
            fs::write(group.join(name), "").unwrap();
        }
        let (now, grace) = (SystemTime::now(), Duration::from_secs(100));
        assert_eq!(sweep(dir.path(), now, grace).unwrap(), 0);
        assert_eq!(sweep(dir.path(), now + Duration::from_secs(200), grace).unwrap(), 2);
        assert!(group.join("cd").is_file());
    }
}
