//! What the host can still take: memory, disk and number of sandboxes, asked before anything is started.

use std::{fs, io, path::Path};

use nix::sys::statvfs::statvfs;

/// What is left alone on the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Sandboxes at most.
    pub max_sandboxes: usize,
    /// Memory that must stay available, MiB.
    pub memory_reserve_mb: u64,
    /// Disk space that must stay free, MiB.
    pub disk_reserve_mb: u64,
}

/// What the host has right now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Room {
    /// Memory that could be had without swapping, MiB.
    pub memory_mb: u64,
    /// Free disk space where the VMs' homes lie, MiB.
    pub disk_mb: u64,
}

/// Why nothing more is started.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Full {
    /// Too many sandboxes.
    #[error("this host takes {max} sandboxes at most")]
    Sandboxes {
        /// The limit.
        max: usize,
    },
    /// Too little memory.
    #[error("{available_mb} MiB of memory are available and {reserve_mb} MiB must stay so")]
    Memory {
        /// What there is.
        available_mb: u64,
        /// What must stay.
        reserve_mb: u64,
    },
    /// Too little disk.
    #[error("{free_mb} MiB of disk are free and {reserve_mb} MiB must stay so")]
    Disk {
        /// What there is.
        free_mb: u64,
        /// What must stay.
        reserve_mb: u64,
    },
}

impl Limits {
    /// Whether one sandbox more may start beside `sandboxes` others.
    ///
    /// # Errors
    ///
    /// [`Full`] names what is short.
    pub fn admit(&self, sandboxes: usize, room: Room) -> Result<(), Full> {
        self.admit_beside(sandboxes)?;
        if room.memory_mb < self.memory_reserve_mb {
            return Err(Full::Memory { available_mb: room.memory_mb, reserve_mb: self.memory_reserve_mb });
        }
        self.admit_to_disk(room)
    }

    /// Whether one sandbox more may be there beside `sandboxes` others, as far as their number goes.
    ///
    /// # Errors
    ///
    /// [`Full::Sandboxes`].
    pub fn admit_beside(&self, sandboxes: usize) -> Result<(), Full> {
        if sandboxes >= self.max_sandboxes {
            return Err(Full::Sandboxes { max: self.max_sandboxes });
        }
        Ok(())
    }

    /// Whether one sandbox more may be stored.
    ///
    /// # Errors
    ///
    /// [`Full::Disk`].
    pub fn admit_to_disk(&self, room: Room) -> Result<(), Full> {
        if room.disk_mb < self.disk_reserve_mb {
            return Err(Full::Disk { free_mb: room.disk_mb, reserve_mb: self.disk_reserve_mb });
        }
        Ok(())
    }
}

/// Measures the host.
///
/// # Errors
///
/// If the kernel does not say.
pub fn measure(data_dir: &Path) -> io::Result<Room> {
    Ok(Room { memory_mb: memory("MemAvailable:")?, disk_mb: disk_free_mb(data_dir)? })
}

/// The host's memory, MiB.
///
/// # Errors
///
/// If the kernel does not say.
pub fn memory_total_mb() -> io::Result<u64> {
    memory("MemTotal:")
}

/// Memory that could be had without swapping, MiB.
///
/// # Errors
///
/// If the kernel does not say.
pub fn memory_available_mb() -> io::Result<u64> {
    memory("MemAvailable:")
}

fn memory(field: &str) -> io::Result<u64> {
    let text = fs::read_to_string("/proc/meminfo")?;
    parse_meminfo(&text, field)
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, format!("/proc/meminfo has no {field}")))
}

/// A field of `/proc/meminfo`, whose unit is KiB, in MiB.
fn parse_meminfo(text: &str, field: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(field))?;
    let kib: u64 = line.split_whitespace().next()?.parse().ok()?;
    Some(kib / 1024)
}

fn disk_free_mb(path: &Path) -> io::Result<u64> {
    let stat = statvfs(path)?;
    Ok(stat.blocks_available().saturating_mul(stat.fragment_size()) >> 20)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits { max_sandboxes: 2, memory_reserve_mb: 500, disk_reserve_mb: 1000 };

    #[test]
    fn names_what_is_short() {
        let room = Room { memory_mb: 500, disk_mb: 1000 };
        assert_eq!(LIMITS.admit(1, room), Ok(()));
        assert_eq!(LIMITS.admit(2, room), Err(Full::Sandboxes { max: 2 }));
        assert!(matches!(LIMITS.admit(0, Room { memory_mb: 499, ..room }), Err(Full::Memory { .. })));
        assert!(matches!(LIMITS.admit(0, Room { disk_mb: 999, ..room }), Err(Full::Disk { .. })));
    }

    #[test]
    fn reads_the_kernels_table() {
        let text = "MemTotal:       2048 kB\nMemAvailable:      1024 kB\n";
        assert_eq!(parse_meminfo(text, "MemAvailable:"), Some(1));
        assert_eq!(parse_meminfo(text, "MemFree:"), None);
    }

    #[test]
    fn measures_this_host() {
        let room = measure(Path::new("/")).unwrap();
        assert!(room.memory_mb > 0 && memory_total_mb().unwrap() >= room.memory_mb);
    }
}
