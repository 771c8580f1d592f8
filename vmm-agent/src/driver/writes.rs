//! Which pages of a VM's memory were written since it was last looked at, by the kernel's account.
//!
//! From the first capture of a VM on, the kernel is asked to remember: each capture protects what it takes while the VM is
//! paused, and the next one finds what was written since. Pages that were never written need no protection, being the
//! image's. It begins as late as that because a mapping whose writes are remembered is read in page by page.

use std::{fs::OpenOptions, io};

use super::{
    pagemap_scan::{self, Wanted},
    pages::{GuestMemory, Run},
    userfaultfd,
};

impl GuestMemory {
    /// Has the kernel remember which pages are written. Fine if it does.
    ///
    /// # Errors
    ///
    /// If it cannot: then all pages that are the VM's own count as written.
    pub fn remember_writes(&self) -> io::Result<()> {
        userfaultfd::register(&self.process, self.address, self.bytes)
    }

    /// The pages that are `wanted`, which stay as they are.
    ///
    /// # Errors
    ///
    /// If the process has ended, or its writes are not remembered.
    pub fn look(&self, wanted: Wanted) -> io::Result<Vec<Run>> {
        self.scan(wanted, false)
    }

    /// The pages that are `wanted`: from now on they count as not written. The VM must be paused until they are read.
    ///
    /// # Errors
    ///
    /// As [`GuestMemory::look`]. Some may count as not written then although nobody was told of them.
    pub fn take_account(&self, wanted: Wanted) -> io::Result<Vec<Run>> {
        self.scan(wanted, true)
    }

    fn scan(&self, wanted: Wanted, protect: bool) -> io::Result<Vec<Run>> {
        let pagemap = self.process.open_file("pagemap", OpenOptions::new().read(true))?;
        pagemap_scan::scan(&pagemap, self.address, self.bytes, wanted, protect)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;
    use crate::driver::mapped::Mapped;

    #[tokio::test]
    async fn what_is_written_after_a_look_is_found_by_the_next_one() {
        let image = tempfile::NamedTempFile::new().unwrap();
        image.as_file().write_all(&vec![7; 64 * 4096]).unwrap();
        let mut other = Mapped::start(image.path());
        let memory = other.memory.clone();
        other.write(3, 1, 9);
        other.write(5, 2, 9);
        assert!(memory.look(Wanted::Own).is_err(), "nobody remembers yet");
        memory.remember_writes().unwrap();
        memory.remember_writes().unwrap();
        assert_eq!(memory.look(Wanted::Written).unwrap(), [Run(3, 1), Run(5, 2)]);
        assert_eq!(memory.look(Wanted::Own).unwrap(), memory.own().unwrap());
        assert_eq!(memory.take_account(Wanted::Own).unwrap(), [Run(3, 1), Run(5, 2)]);
        assert_eq!(memory.look(Wanted::Written).unwrap(), []);
        // One that was written before, one that was not, and one that the kernel writes for it.
        other.write(5, 1, 8);
        other.write(40, 1, 8);
        other.read_zeros_into(6);
        assert_eq!(memory.look(Wanted::Written).unwrap(), [Run(5, 2), Run(40, 1)]);
        assert_eq!(memory.take_account(Wanted::Written).unwrap(), [Run(5, 2), Run(40, 1)]);
        assert_eq!(memory.take_account(Wanted::Written).unwrap(), []);
        assert_eq!(memory.look(Wanted::Own).unwrap(), [Run(3, 1), Run(5, 2), Run(40, 1)]);
        drop(other);
        assert!(memory.look(Wanted::Own).is_err());
    }

    #[tokio::test]
    async fn more_runs_than_are_told_at_a_time_are_each_found_once() {
        const RUNS: u32 = 5000;
        let image = tempfile::NamedTempFile::new().unwrap();
        image.as_file().set_len(u64::from(RUNS) * 2 * 4096).unwrap();
        let mut other = Mapped::start(image.path());
        let memory = other.memory.clone();
        memory.remember_writes().unwrap();
        // With fewer than are told at a time, as many, and more; and again when some are protected already.
        for count in [RUNS, 4096, 600, RUNS] {
            let expected: Vec<Run> = (0..count).map(|number| Run(number * 2, 1)).collect();
            other.scatter(0, count, 1);
            assert_eq!(memory.look(Wanted::Written).unwrap(), expected);
            assert_eq!(memory.look(Wanted::Own).unwrap(), memory.own().unwrap());
            assert_eq!(memory.take_account(Wanted::Written).unwrap(), expected);
            assert_eq!(memory.look(Wanted::Written).unwrap(), []);
            assert_eq!(memory.take_account(Wanted::Own).unwrap(), memory.own().unwrap());
        }
        assert_eq!(memory.own().unwrap().len(), RUNS as usize);
    }
}
