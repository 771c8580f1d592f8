//! A VM's own memory: the pages that it changed of the image that it maps, or that it ever touched where it maps none.
//!
//! The image is mapped privately, so what is the VM's own is exactly what is anonymous in the mapping: the kernel tells by
//! `/proc/PID/pagemap`, and `/proc/PID/mem` reads and writes it. The VM must be paused meanwhile.

use std::{
    fs::{File, OpenOptions},
    io::{self, Read, Write},
    os::unix::fs::FileExt as _,
};

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::{process::Process, runs};

/// Bytes of a page of the host.
pub const PAGE: u64 = 4096;
/// Bytes of an entry of `/proc/PID/pagemap` (Documentation/admin-guide/mm/pagemap.rst).
const ENTRY: u64 = 8;
/// The page is in memory.
const PRESENT: u64 = 1 << 63;
/// The page is swapped out.
const SWAPPED: u64 = 1 << 62;
/// The page is a file's, or shared.
const OF_A_FILE: u64 = 1 << 61;
/// Bytes that are copied at a time.
const PIECE: u64 = 1 << 20;
/// Places in another process's memory that are read at a time: `IOV_MAX` (process_vm_readv(2)).
const MAX_RUNS: usize = 1024;

/// Pages that follow each other: the first one's number, and how many there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Run(pub u32, pub u32);

impl Run {
    /// Where the first one begins.
    pub fn offset(self) -> u64 {
        u64::from(self.0) * PAGE
    }

    /// What they take.
    pub fn bytes(self) -> u64 {
        u64::from(self.1) * PAGE
    }
}

/// A guest's memory in its VMM's process.
#[derive(Clone, Debug)]
pub struct GuestMemory {
    /// The process.
    pub process: Process,
    /// Where in the process it begins.
    pub address: u64,
    /// Its size.
    pub bytes: u64,
}

/// Which pages a file holds, one after the other, and the digest of all of it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pages {
    /// The pages, in order.
    pub runs: Vec<Run>,
    /// SHA-256 of the file, hex; `None` if it is for use at once.
    pub sha256: Option<String>,
}

impl Pages {
    /// What they take.
    pub fn bytes(&self) -> u64 {
        runs::bytes(&self.runs)
    }

    /// Writes them, which `file` holds, over the pages of `image`, an image of their memory.
    ///
    /// # Errors
    ///
    /// [`io::ErrorKind::InvalidData`] if the file is not what was saved: then the image is of no use.
    pub fn lay_over(&self, file: &mut File, image: &File) -> io::Result<()> {
        self.put(file, image.metadata()?.len(), |bytes, at| image.write_all_at(bytes, at))
    }

    /// Reads `file`, which holds them, and has each piece `written` where it belongs in a memory of `bytes`.
    fn put(
        &self,
        file: &mut File,
        bytes: u64,
        mut written: impl FnMut(&[u8], u64) -> io::Result<()>,
    ) -> io::Result<()> {
        let damaged = |what: &str| io::Error::new(io::ErrorKind::InvalidData, what.to_owned());
        if !self.fit(bytes) || file.metadata()?.len() != self.bytes() {
            return Err(damaged("the pages do not fit the memory"));
        }
        let mut digest = Sha256::new();
        let mut buffer = Vec::new();
        for (at, length) in self.runs.iter().flat_map(|run| pieces(*run)) {
            buffer.resize(length, 0);
            file.read_exact(&mut buffer)?;
            if self.sha256.is_some() {
                digest.update(&buffer);
            }
            written(&buffer, at)?;
        }
        match &self.sha256 {
            Some(expected) if *expected != hex::encode(digest.finalize()) => {
                Err(damaged("the pages are not those that were saved"))
            }
            _ => Ok(()),
        }
    }

    /// Whether they can be of a memory of `bytes`.
    pub(super) fn fit(&self, bytes: u64) -> bool {
        let mut end = 0;
        self.runs.iter().all(|run| {
            let follows = run.1 > 0 && run.offset() >= end;
            end = run.offset() + run.bytes();
            follows && end <= bytes
        })
    }
}

impl GuestMemory {
    /// The pages that are the VM's own.
    ///
    /// # Errors
    ///
    /// If the process has ended.
    pub fn own(&self) -> io::Result<Vec<Run>> {
        let pagemap = self.process.open_file("pagemap", OpenOptions::new().read(true))?;
        let pages = self.bytes / PAGE;
        let mut entries = vec![0; usize::try_from(pages * ENTRY).map_err(io::Error::other)?];
        pagemap.read_exact_at(&mut entries, self.address / PAGE * ENTRY)?;
        Ok(own(&entries))
    }

    /// Where the guest sees what is at `offset` of its memory: what does not fit below the devices lies above 4 GiB
    /// (`microvm_memory_init` in QEMU's hw/i386/microvm.c; Firecracker's layout has the same two addresses).
    pub fn guest_address(&self, offset: u64) -> u64 {
        const GAP: u64 = 3 << 30;
        const ABOVE: u64 = 4 << 30;
        if offset < GAP { offset } else { offset - GAP + ABOVE }
    }

    /// Writes the pages `runs` to `file`, one after the other.
    ///
    /// # Errors
    ///
    /// If the process has ended, or the file does not take them.
    pub fn save(&self, runs: &[Run], file: &File) -> io::Result<()> {
        let mut file = file;
        self.read(runs, |_, bytes| file.write_all(bytes))
    }

    /// Writes the pages `runs` over those of `image`, an image of such a memory.
    ///
    /// # Errors
    ///
    /// As [`GuestMemory::save`].
    pub fn save_over(&self, runs: &[Run], image: &File) -> io::Result<()> {
        self.read(runs, |batch, bytes| {
            let mut rest = bytes;
            for run in batch {
                let (part, after) = rest.split_at(run.bytes() as usize);
                image.write_all_at(part, run.offset())?;
                rest = after;
            }
            Ok(())
        })
    }

    /// Reads the pages `runs` into `buffer`, one after the other, which has room for them.
    ///
    /// # Errors
    ///
    /// If the process has ended.
    pub fn read_into(&self, runs: &[Run], buffer: &mut [u8]) -> io::Result<()> {
        let mut rest = buffer;
        for runs in runs.chunks(MAX_RUNS) {
            let bytes: u64 = runs.iter().map(|run| run.bytes()).sum();
            let (part, after) = rest.split_at_mut(bytes as usize);
            self.process.read_memory(self.places(runs), part)?;
            rest = after;
        }
        Ok(())
    }

    /// Where `runs` are in the process, and what they take.
    fn places(&self, runs: &[Run]) -> impl Iterator<Item = (u64, u64)> {
        runs.iter().map(|run| (self.address + run.offset(), run.bytes()))
    }

    /// Reads the pages `runs` in batches: the runs of a batch, and their bytes one after the other.
    fn read(&self, runs: &[Run], mut take: impl FnMut(&[Run], &[u8]) -> io::Result<()>) -> io::Result<()> {
        let mut buffer = vec![0; PIECE as usize];
        for batch in batches(runs) {
            let bytes: u64 = batch.iter().map(|run| run.bytes()).sum();
            // At most PIECE.
            let buffer = &mut buffer[..bytes as usize];
            self.process.read_memory(self.places(&batch), buffer)?;
            take(&batch, buffer)?;
        }
        Ok(())
    }

    /// Makes `pages`, which `file` holds, the VM's own.
    ///
    /// # Errors
    ///
    /// [`io::ErrorKind::InvalidData`] if the file is not what was saved: then the VM is only good for being killed.
    pub fn load(&self, file: &mut File, pages: &Pages) -> io::Result<()> {
        let memory = self.process.open_file("mem", OpenOptions::new().write(true))?;
        pages.put(file, self.bytes, |bytes, at| memory.write_all_at(bytes, self.address + at))
    }
}

/// Cuts runs into batches of at most [`PIECE`] bytes and [`MAX_RUNS`] runs.
fn batches(runs: &[Run]) -> impl Iterator<Item = Vec<Run>> {
    const PAGES: u32 = (PIECE / PAGE) as u32;
    let mut rest = runs.iter().copied();
    let mut cut: Option<Run> = None;
    std::iter::from_fn(move || {
        let (mut batch, mut room) = (Vec::new(), PAGES);
        while room > 0 && batch.len() < MAX_RUNS {
            let Some(run) = cut.take().or_else(|| rest.next()) else { break };
            let taken = run.1.min(room);
            batch.push(Run(run.0, taken));
            room -= taken;
            cut = (taken < run.1).then(|| Run(run.0 + taken, run.1 - taken));
        }
        (!batch.is_empty()).then_some(batch)
    })
}

/// The runs of own pages by their entries.
fn own(entries: &[u8]) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    for (number, entry) in (0_u32..).zip(entries.as_chunks::<{ ENTRY as usize }>().0) {
        let entry = u64::from_ne_bytes(*entry);
        if entry & (PRESENT | SWAPPED) == 0 || entry & OF_A_FILE != 0 {
            continue;
        }
        match runs.last_mut() {
            Some(last) if last.0 + last.1 == number => last.1 += 1,
            _ => runs.push(Run(number, 1)),
        }
    }
    runs
}

/// Offset and length of each piece of a run.
fn pieces(run: Run) -> impl Iterator<Item = (u64, usize)> {
    let (first, end) = (run.offset(), run.offset() + run.bytes());
    // Below PIECE.
    (first..end).step_by(PIECE as usize).map(move |at| (at, (end - at).min(PIECE) as usize))
}

/// The digest of a file, hex.
///
/// # Errors
///
/// If it cannot be read.
pub fn sha256_of(file: &mut File) -> io::Result<String> {
    let mut digest = Sha256::new();
    let mut buffer = vec![0; PIECE as usize];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(hex::encode(digest.finalize())),
            read => digest.update(buffer.get(..read).unwrap_or_default()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Seek as _, SeekFrom};

    use nix::sys::mman::{MapFlags, ProtFlags, mmap};

    use super::*;

    const PAGES: usize = 600;

    /// A private mapping of `image` in this process.
    fn map(image: &File) -> GuestMemory {
        let length = std::num::NonZeroUsize::new(PAGES * PAGE as usize).unwrap();
        // SAFETY: a mapping of its own, which stays until the process ends.
        #[allow(unsafe_code)]
        let address = unsafe {
            mmap(None, length, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, MapFlags::MAP_PRIVATE, image, 0)
        };
        let process = Process::open(i32::try_from(std::process::id()).unwrap()).unwrap();
        let address = address.unwrap().addr().get() as u64;
        GuestMemory { process, address, bytes: length.get() as u64 }
    }

    fn byte(memory: &GuestMemory, page: u64) -> u8 {
        let file = memory.process.open_file("mem", OpenOptions::new().read(true)).unwrap();
        let mut byte = [0];
        file.read_exact_at(&mut byte, memory.address + page * PAGE).unwrap();
        byte[0]
    }

    fn saved(memory: &GuestMemory, file: &mut File) -> Pages {
        let runs = memory.own().unwrap();
        memory.save(&runs, file).unwrap();
        file.seek(SeekFrom::Start(0)).unwrap();
        Pages { runs, sha256: Some(sha256_of(file).unwrap()) }
    }

    #[test]
    fn batches_are_bounded_and_leave_nothing_out() {
        let scattered: Vec<_> = (0..3000).map(|number| Run(number * 2, 1)).collect();
        for runs in [vec![Run(0, 1000), Run(2000, 3)], scattered, vec![]] {
            let batches: Vec<_> = batches(&runs).collect();
            assert!(batches.iter().all(|batch| batch.len() <= MAX_RUNS));
            assert!(batches.iter().all(|batch| batch.iter().map(|run| run.bytes()).sum::<u64>() <= PIECE));
            let pages =
                |runs: &[Run]| -> Vec<u32> { runs.iter().flat_map(|run| run.0..run.0 + run.1).collect() };
            assert_eq!(pages(&batches.concat()), pages(&runs));
        }
    }

    #[tokio::test]
    async fn what_was_changed_is_saved_and_comes_back_in_another_copy() {
        let mut image = tempfile::tempfile().unwrap();
        image.write_all(&vec![7; PAGES * PAGE as usize]).unwrap();
        let original = tempfile::tempfile().unwrap();
        (&original).write_all(&vec![7; PAGES * PAGE as usize]).unwrap();
        let (memory, other) = (map(&image), map(&original));
        let writer = memory.process.open_file("mem", OpenOptions::new().write(true)).unwrap();
        for (first, pages) in [(3, 1_usize), (10, 2), (100, 300), (599, 1)] {
            writer.write_all_at(&vec![9; pages * PAGE as usize], memory.address + first * PAGE).unwrap();
        }
        // Read, and still the image's.
        assert_eq!(byte(&memory, 50), 7);
        let mut file = tempfile::tempfile().unwrap();
        let pages = saved(&memory, &mut file);
        assert_eq!(pages.runs, [Run(3, 1), Run(10, 2), Run(100, 300), Run(599, 1)]);
        assert_eq!(file.metadata().unwrap().len(), pages.bytes());
        // Laid over the image, they make one that has it all.
        memory.save_over(&pages.runs, &image).unwrap();

        file.seek(SeekFrom::Start(0)).unwrap();
        other.load(&mut file, &pages).unwrap();
        for page in 0..PAGES as u64 {
            assert_eq!(byte(&other, page), byte(&memory, page), "page {page}");
        }
        assert_eq!(other.own().unwrap(), pages.runs);
        let merged = map(&image);
        assert!((0..PAGES as u64).all(|page| byte(&merged, page) == byte(&memory, page)));
        assert_eq!(merged.own().unwrap(), []);
    }

    #[tokio::test]
    async fn damaged_pages_are_told() {
        let image = tempfile::tempfile().unwrap();
        image.set_len(PAGES as u64 * PAGE).unwrap();
        let memory = map(&image);
        let writer = memory.process.open_file("mem", OpenOptions::new().write(true)).unwrap();
        writer.write_all_at(&[1; 2 * PAGE as usize], memory.address).unwrap();
        let mut file = tempfile::tempfile().unwrap();
        let pages = saved(&memory, &mut file);
        let refused = |file: &mut File, pages: &Pages| {
            file.seek(SeekFrom::Start(0)).unwrap();
            memory.load(file, pages).unwrap_err().kind()
        };
        for runs in
            [vec![Run(0, 1), Run(0, 1)], vec![Run(5, 1), Run(2, 1)], vec![Run(599, 2)], vec![Run(0, 3)]]
        {
            let other = Pages { runs, ..pages.clone() };
            assert_eq!(refused(&mut file, &other), io::ErrorKind::InvalidData, "{:?}", other.runs);
        }
        file.write_all_at(&[2], 5000).unwrap();
        assert_eq!(refused(&mut file, &pages), io::ErrorKind::InvalidData);
        file.set_len(PAGE).unwrap();
        assert_eq!(refused(&mut file, &pages), io::ErrorKind::InvalidData);
    }
}
