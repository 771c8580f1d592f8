//! For tests: another process, as a VMM is one, with a userfaultfd that it made itself and a private mapping of a file.

use std::{
    fs::OpenOptions,
    io::{BufRead as _, BufReader, Write as _},
    os::unix::fs::FileExt as _,
    path::Path,
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
};

use super::{
    pages::{GuestMemory, PAGE},
    process::Process,
};

/// Says where its mapping is, and then does what it is told: `write FIRST COUNT BYTE`, `scatter FIRST COUNT BYTE`, which
/// writes to every other page from the first one on, or `read PAGE`, which has the kernel write there.
const PROGRAM: &str = "
import ctypes, mmap, os, sys
ctypes.CDLL(None).syscall(323, 1 | os.O_CLOEXEC | os.O_NONBLOCK)  # userfaultfd(2)
file = os.open(sys.argv[1], os.O_RDONLY)
memory = mmap.mmap(file, os.fstat(file).st_size, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
print(ctypes.addressof(ctypes.c_char.from_buffer(memory)), flush=True)
zeros = open('/dev/zero', 'rb', buffering=0)
for line in sys.stdin:
    what, *numbers = line.split()
    at = int(numbers[0]) * 4096
    if what == 'write':
        length = int(numbers[1]) * 4096
        memory[at:at + length] = bytes([int(numbers[2])]) * length
    elif what == 'scatter':
        for number in range(int(numbers[1])): memory[at + number * 8192] = int(numbers[2])
    else:
        zeros.readinto(memoryview(memory)[at:at + 4096])
    print('done', flush=True)
";

/// The process; it ends with this.
#[derive(Debug)]
pub struct Mapped {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
    /// What it maps.
    pub memory: GuestMemory,
}

impl Mapped {
    /// Starts it with a mapping of `image`.
    pub fn start(image: &Path) -> Self {
        let mut child = Command::new("python3")
            .args(["-c", PROGRAM])
            .arg(image)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (input, output) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        let mut output = BufReader::new(output);
        let mut line = String::new();
        output.read_line(&mut line).unwrap();
        let process = Process::open(i32::try_from(child.id()).unwrap()).unwrap();
        let bytes = image.metadata().unwrap().len();
        let memory = GuestMemory { process, address: line.trim().parse().unwrap(), bytes };
        Self { child, input, output, memory }
    }

    /// Has it write to pages.
    pub fn write(&mut self, first: u32, count: u32, byte: u8) {
        self.tell(&format!("write {first} {count} {byte}"));
    }

    /// Has it write to every other page.
    pub fn scatter(&mut self, first: u32, count: u32, byte: u8) {
        self.tell(&format!("scatter {first} {count} {byte}"));
    }

    /// Has the kernel write zeros to one of its pages.
    pub fn read_zeros_into(&mut self, page: u32) {
        self.tell(&format!("read {page}"));
    }

    /// All that is in its memory.
    pub fn content(&self) -> Vec<u8> {
        let memory = self.memory.process.open_file("mem", OpenOptions::new().read(true)).unwrap();
        let mut content = vec![0; usize::try_from(self.memory.bytes / PAGE * PAGE).unwrap()];
        memory.read_exact_at(&mut content, self.memory.address).unwrap();
        content
    }

    fn tell(&mut self, what: &str) {
        writeln!(self.input, "{what}").unwrap();
        let mut line = String::new();
        self.output.read_line(&mut line).unwrap();
        assert_eq!(line, "done\n");
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
