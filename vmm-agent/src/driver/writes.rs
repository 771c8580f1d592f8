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
    use std::{
        io::{BufRead as _, BufReader, Write as _},
        process::{Child, Command, Stdio},
    };

    use super::*;
    use crate::driver::process::Process;

    #[tokio::test]
    async fn what_is_written_after_a_look_is_found_by_the_next_one() {
        // Another process, as a VMM is, with a userfaultfd that it made itself and a private mapping of a file.
        let image = tempfile::NamedTempFile::new().unwrap();
        image.as_file().write_all(&vec![7; 64 * 4096]).unwrap();
        let mut other = Other::start(image.path());
        let memory = other.memory();
        other.write(&[3, 5, 6]);
        assert!(memory.look(Wanted::Own).is_err(), "nobody remembers yet");
        memory.remember_writes().unwrap();
        memory.remember_writes().unwrap();
        assert_eq!(memory.look(Wanted::Written).unwrap(), [Run(3, 1), Run(5, 2)]);
        assert_eq!(memory.look(Wanted::Own).unwrap(), memory.own().unwrap());
        assert_eq!(memory.take_account(Wanted::Own).unwrap(), [Run(3, 1), Run(5, 2)]);
        assert_eq!(memory.look(Wanted::Written).unwrap(), []);
        // One that was written before, one that was not, and one that the kernel writes for it.
        other.write(&[5, 40]);
        other.read_into(6);
        assert_eq!(memory.look(Wanted::Written).unwrap(), [Run(5, 2), Run(40, 1)]);
        assert_eq!(memory.take_account(Wanted::Written).unwrap(), [Run(5, 2), Run(40, 1)]);
        assert_eq!(memory.take_account(Wanted::Written).unwrap(), []);
        assert_eq!(memory.look(Wanted::Own).unwrap(), [Run(3, 1), Run(5, 2), Run(40, 1)]);
        other.child.kill().unwrap();
        other.child.wait().unwrap();
        assert!(memory.look(Wanted::Own).is_err());
    }

    /// Python: with the address of a mapping on its first line, it does what it is told.
    const OTHER: &str = "
import ctypes, mmap, os, sys
libc = ctypes.CDLL(None)
libc.syscall(323, 1 | os.O_CLOEXEC | os.O_NONBLOCK)  # userfaultfd(2)
file = os.open(sys.argv[1], os.O_RDONLY)
memory = mmap.mmap(file, 64 * 4096, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
print(ctypes.addressof(ctypes.c_char.from_buffer(memory)), flush=True)
zeros = open('/dev/zero', 'rb', buffering=0)
for line in sys.stdin:
    what, page = line.split()
    at = int(page) * 4096
    if what == 'write': memory[at] = 9
    else: zeros.readinto(memoryview(memory)[at:at + 4096])
    print('done', flush=True)
";

    struct Other {
        child: Child,
        output: BufReader<std::process::ChildStdout>,
        address: u64,
    }

    impl Other {
        fn start(image: &std::path::Path) -> Self {
            let mut child = Command::new("python3")
                .args(["-c", OTHER])
                .arg(image)
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()
                .unwrap();
            let mut output = BufReader::new(child.stdout.take().unwrap());
            let mut line = String::new();
            output.read_line(&mut line).unwrap();
            Self { child, output, address: line.trim().parse().unwrap() }
        }

        fn memory(&self) -> GuestMemory {
            let process = Process::open(i32::try_from(self.child.id()).unwrap()).unwrap();
            GuestMemory { process, address: self.address, bytes: 64 * 4096 }
        }

        fn write(&mut self, pages: &[u32]) {
            for page in pages {
                self.tell(&format!("write {page}"));
            }
        }

        fn read_into(&mut self, page: u32) {
            self.tell(&format!("read {page}"));
        }

        fn tell(&mut self, what: &str) {
            let mut input = self.child.stdin.as_ref().unwrap();
            writeln!(input, "{what}").unwrap();
            let mut line = String::new();
            self.output.read_line(&mut line).unwrap();
            assert_eq!(line, "done\n");
        }
    }
}
