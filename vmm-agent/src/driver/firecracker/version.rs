//! Which versions of Firecracker there are drivers for.

use std::{fmt, path::Path, process::Stdio, str::FromStr, time::Duration};

use tokio::{process::Command, time::timeout};

/// The oldest that is supported: with network overrides, and ACPI tables that a kernel finds its devices in.
pub const OLDEST: Version = Version(1, 12, 1);
/// The first that is not: 1.16.0 and 1.16.1 let every connection of the host to a guest hang that was paused and went on
/// (firecracker-microvm/firecracker, issue 6074), and 1.16.0 silences the guest's after a restore (5958). What comes after is not
/// tried yet.
pub const FIRST_NOT: Version = Version(1, 16, 0);
/// Before it, changed memory of a guest with more than one region is written to wrong places: of one that is larger than
/// 3 GiB. A port of the vsock may be given twice after a restore as well (CHANGELOG.md, 1.15.0).
pub const GOOD: Version = Version(1, 15, 0);
/// The first that calls it `track_dirty_pages` when a snapshot is loaded (CHANGELOG.md, 1.13.0).
const TRACKS_BY_ITS_NAME: Version = Version(1, 13, 0);
/// Memory below the gap for devices, MiB (`MMIO_MEM_START` in src/vmm/src/arch/x86_64/layout.rs).
const REGION_MB: u32 = 3072;
/// How long a program may take to print its version.
const PRINTS_WITHIN: Duration = Duration::from_secs(20);

/// A version of Firecracker, or its jailer: major, minor, patch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version(pub u32, pub u32, pub u32);

impl Version {
    /// Sees that it is one of those that are supported.
    ///
    /// # Errors
    ///
    /// What is, and what to do.
    pub fn check(self) -> Result<(), String> {
        if (OLDEST..FIRST_NOT).contains(&self) {
            return Ok(());
        }
        Err(format!(
            "Firecracker {self} is not supported: install {OLDEST} or newer, below {FIRST_NOT}; 1.15.1 is the best of them"
        ))
    }

    /// Whether what a guest of so much memory has changed is written to the right places.
    pub fn writes_changes_of(self, memory_mb: u32) -> bool {
        self >= GOOD || memory_mb <= REGION_MB
    }

    /// What it calls the field of `PUT /snapshot/load` that lets it remember which pages are written.
    pub fn tracking_field(self) -> &'static str {
        if self >= TRACKS_BY_ITS_NAME { "track_dirty_pages" } else { "enable_diff_snapshots" }
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.0, self.1, self.2)
    }
}

impl FromStr for Version {
    type Err = String;

    /// From the first line that a program prints: `Firecracker v1.12.1`.
    fn from_str(text: &str) -> Result<Self, String> {
        let parse = || {
            let version = text.lines().next()?.split_whitespace().find_map(|word| word.strip_prefix('v'))?;
            // A build of something in between has more to say after a hyphen, and is not that version.
            let numbers: Vec<u32> = version.split('.').map(str::parse).collect::<Result<_, _>>().ok()?;
            let [major, minor, patch] = numbers[..] else { return None };
            Some(Self(major, minor, patch))
        };
        parse().ok_or_else(|| format!("{text:?} is no version of a release"))
    }
}

/// What `program` prints when it is called with `option`.
///
/// # Errors
///
/// If it cannot be run, or says nothing in time; with the remedy.
pub async fn printed(program: &Path, option: &str) -> Result<String, String> {
    let name = program.display();
    let output = Command::new(program).arg(option).stdin(Stdio::null()).kill_on_drop(true).output();
    match timeout(PRINTS_WITHIN, output).await {
        Err(_) => Err(format!("{name} {option} prints nothing within {PRINTS_WITHIN:?}")),
        Ok(Err(error)) => Err(format!(
            "cannot run {name}: {error}; install Firecracker's release binaries, or name them by --firecracker and --jailer"
        )),
        Ok(Ok(output)) if !output.status.success() => {
            Err(format!("{name} {option}: {}", String::from_utf8_lossy(&output.stderr).trim()))
        }
        Ok(Ok(output)) => Ok(String::from_utf8_lossy(&output.stdout).into_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn version(text: &str) -> Version {
        format!("Firecracker v{text}\n\nmore").parse().unwrap()
    }

    #[test]
    fn a_range_is_supported() {
        for good in ["1.12.1", "1.12.2", "1.13.0", "1.14.4", "1.15.1"] {
            version(good).check().unwrap();
        }
        for bad in ["1.12.0", "1.10.1", "0.25.0", "1.16.0", "1.16.1", "1.17.0", "2.0.0"] {
            let refusal = version(bad).check().unwrap_err();
            assert!(refusal.contains(bad) && refusal.contains("1.15.1"), "{refusal}");
        }
        for none in ["", "Firecracker", "Firecracker v1.12", "Firecracker v1.12.1-dirty", "v1.x.2"] {
            assert!(none.parse::<Version>().is_err(), "{none}");
        }
        assert_eq!("Jailer v1.12.1".parse(), Ok(version("1.12.1")));
    }

    #[test]
    fn what_a_version_lacks_is_known() {
        assert!(version("1.12.1").writes_changes_of(3072) && !version("1.14.4").writes_changes_of(3073));
        assert!(version("1.15.0").writes_changes_of(16384));
        assert_eq!(version("1.12.1").tracking_field(), "enable_diff_snapshots");
        assert_eq!(version("1.13.0").tracking_field(), "track_dirty_pages");
    }

    #[tokio::test]
    async fn a_program_that_is_not_there_is_named_with_the_remedy() {
        let refusal = printed(Path::new("/nowhere/firecracker"), "--version").await.unwrap_err();
        assert!(refusal.contains("/nowhere/firecracker") && refusal.contains("--jailer"), "{refusal}");
        assert!(printed(Path::new("/bin/false"), "--version").await.is_err());
    }
}
