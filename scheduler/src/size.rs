//! The sizes that sandboxes come in. Tiers instead of free choice: each (template, size) has a golden snapshot and a
//! pool of its own on every host.

use oc_proto::mesh::VmSize;
use thiserror::Error;

/// The tiers: memory in MiB, and the virtual CPUs that go with it.
const TIERS: [(i32, i32); 7] = [(256, 1), (512, 1), (1024, 1), (2048, 1), (4096, 1), (8192, 2), (16384, 4)];
/// The tier of who asks for none, MiB; also what one CPU alone means.
const DEFAULT_MEMORY_MB: i32 = 1024;
/// The smallest disk, MiB; also the one of who asks for none.
const MIN_DISK_MB: i32 = 20_480;
/// The largest disk, MiB.
const MAX_DISK_MB: i32 = 262_144;

/// No sandbox comes in that size.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum SizeError {
    /// The memory is none of a tier.
    #[error("memoryMB {0} is no tier: take 256, 512, 1024, 2048, 4096, 8192 or 16384")]
    Memory(i32),
    /// The number of CPUs is none of a tier.
    #[error("cpuCount {0} is no tier: take 1, 2 or 4")]
    Cpus(i32),
    /// Each is of a tier, but not of the same.
    #[error("memoryMB {memory_mb} comes with cpuCount {cpus}, not {asked}: give one of the two")]
    Mismatch {
        /// The memory asked for, MiB.
        memory_mb: i32,
        /// The CPUs of its tier.
        cpus: i32,
        /// The CPUs asked for.
        asked: i32,
    },
    /// The disk is too small or too large.
    #[error("diskMB {0} is out of range: take {MIN_DISK_MB} to {MAX_DISK_MB}")]
    Disk(i32),
}

/// The size that a request means, where 0 stands for what it does not say.
///
/// # Errors
///
/// [`SizeError`] if it means none.
pub fn infer(cpu_count: i32, memory_mb: i32, disk_mb: i32) -> Result<VmSize, SizeError> {
    let (memory_mb, cpu_count) = match (memory_mb, cpu_count) {
        (0, 0 | 1) => (DEFAULT_MEMORY_MB, 1),
        (0, asked) => *TIERS.iter().find(|(_, cpus)| *cpus == asked).ok_or(SizeError::Cpus(asked))?,
        (memory_mb, asked) => {
            let (_, cpus) =
                *TIERS.iter().find(|(memory, _)| *memory == memory_mb).ok_or(SizeError::Memory(memory_mb))?;
            if asked != 0 && asked != cpus {
                return Err(SizeError::Mismatch { memory_mb, cpus, asked });
            }
            (memory_mb, cpus)
        }
    };
    let disk_mb = match disk_mb {
        0 => MIN_DISK_MB,
        MIN_DISK_MB..=MAX_DISK_MB => disk_mb,
        _ => return Err(SizeError::Disk(disk_mb)),
    };
    Ok(VmSize { cpu_count, memory_mb, disk_mb })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn size(cpu_count: i32, memory_mb: i32) -> Result<(i32, i32), SizeError> {
        infer(cpu_count, memory_mb, 0).map(|size| (size.cpu_count, size.memory_mb))
    }

    #[test]
    fn one_of_the_two_implies_the_other() {
        assert_eq!(size(0, 0), Ok((1, 1024)));
        assert_eq!(size(1, 0), Ok((1, 1024)));
        assert_eq!(size(2, 0), Ok((2, 8192)));
        assert_eq!(size(4, 0), Ok((4, 16384)));
        assert_eq!(size(0, 256), Ok((1, 256)));
        assert_eq!(size(0, 4096), Ok((1, 4096)));
        assert_eq!(size(0, 16384), Ok((4, 16384)));
        assert_eq!(size(2, 8192), Ok((2, 8192)));
    }

    #[test]
    fn what_is_no_tier_is_refused() {
        assert_eq!(size(3, 0), Err(SizeError::Cpus(3)));
        assert_eq!(size(-1, 0), Err(SizeError::Cpus(-1)));
        assert_eq!(size(0, 1000), Err(SizeError::Memory(1000)));
        assert_eq!(size(1, i32::MIN), Err(SizeError::Memory(i32::MIN)));
        assert_eq!(size(4, 1024), Err(SizeError::Mismatch { memory_mb: 1024, cpus: 1, asked: 4 }));
    }

    #[test]
    fn disks_have_bounds() {
        assert_eq!(infer(0, 0, 0).unwrap().disk_mb, 20_480);
        assert_eq!(infer(0, 0, 262_144).unwrap().disk_mb, 262_144);
        for disk_mb in [-1, 1, 20_479, 262_145, i32::MAX] {
            assert_eq!(infer(0, 0, disk_mb), Err(SizeError::Disk(disk_mb)));
        }
    }

    proptest! {
        #[test]
        fn whatever_is_asked_only_tiers_are_given(cpus: i32, memory: i32, disk: i32) {
            if let Ok(size) = infer(cpus, memory, disk) {
                prop_assert!(TIERS.contains(&(size.memory_mb, size.cpu_count)));
                prop_assert!((MIN_DISK_MB..=MAX_DISK_MB).contains(&size.disk_mb));
                prop_assert_eq!(infer(size.cpu_count, size.memory_mb, size.disk_mb), Ok(size));
            }
        }
    }
}
