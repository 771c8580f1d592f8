//! A live fork with QEMU alone. A clone maps its memory's image privately, so what it changed is what the kernel calls
//! anonymous in that mapping. Paused, the clone has its devices saved and those pages laid over a copy of the image; its
//! child is a restore of the two.

use std::{
    fs::{self, File},
    io::{Read as _, Write as _},
    os::unix::{fs::FileExt as _, net::UnixStream},
    path::{Path, PathBuf},
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use serde_json::json;

use super::machine::{Beginning, Machine, Vm, copy, echo};
use crate::table::{median, ms_since};

/// What the guest changes when it is told `DIRTY`.
pub const CHANGED_MIB: u64 = 64;
const CAPTURES: usize = 7;
const CHILDREN: usize = 7;
const REST: Duration = Duration::from_secs(1);

const PAGE: usize = 4096;
/// Bytes of an entry of `/proc/PID/pagemap`, and its bits: in memory, swapped out, a file's
/// (Documentation/admin-guide/mm/pagemap.rst).
const ENTRY: usize = 8;
const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
const OF_A_FILE: u64 = 1 << 61;
/// Bytes copied at a time.
const PIECE: usize = 1 << 20;

/// Figures of forks.
#[derive(Clone, Debug)]
pub struct Fork {
    /// How long a guest at rest stands still.
    pub pause_ms: f64,
    /// How long one stands still that has changed [`CHANGED_MIB`].
    pub pause_changed_ms: f64,
    /// From the start of a child's process to the first byte that its guest echoes.
    pub first_answer_ms: f64,
}

/// Measures forks of a clone of `memory`, `state` and `disk`.
pub fn measure(here: &Path, image: &Path, disk: &Path, memory: &Path, state: &Path) -> anyhow::Result<Fork> {
    let beginning = Beginning::Restore { memory, state };
    let mut parent = Machine { here, image, disk, name: "parent", beginning }.start()?;
    echo(&mut parent.connect("port")?, b"hello")?;
    let captured = Captured { memory: here.join("fork.memory"), state: here.join("fork.state") };
    let rests = captures(&mut parent, memory, &captured, 0, |_| Ok(()))?;

    let mut answers = Vec::new();
    for number in 0..CHILDREN {
        let beginning = Beginning::Fork { memory: &captured.memory, state: &captured.state };
        // The parent has written nothing to its disk since.
        let disk = here.join("parent.img");
        let name = format!("child{number}");
        let child = Machine { here, image, disk: &disk, name: &name, beginning }.start()?;
        echo(&mut child.connect("port")?, b"hello")?;
        answers.push(ms_since(child.begun));
    }

    let pauses = captures(&mut parent, memory, &captured, CHANGED_MIB, |link| {
        // Its memory is in use and may not be torn: the answer comes when it is done.
        link.write_all(b"DIRTY")?;
        let mut done = [0; 4];
        link.read_exact(&mut done)?;
        ensure!(&done == b"DONE", "the guest says something else");
        Ok(())
    })?;
    Ok(Fork {
        pause_ms: median(&rests),
        pause_changed_ms: median(&pauses),
        first_answer_ms: median(&answers),
    })
}

/// What a capture leaves.
struct Captured {
    memory: PathBuf,
    state: PathBuf,
}

/// Pauses of several captures, each after the guest did `work`, which changes so much at least.
fn captures(
    vm: &mut Vm,
    base: &Path,
    to: &Captured,
    least_mib: u64,
    work: impl Fn(&mut UnixStream) -> anyhow::Result<()>,
) -> anyhow::Result<Vec<f64>> {
    let mut pauses = Vec::new();
    for _ in 0..CAPTURES {
        let mut link = vm.connect("port")?;
        work(&mut link)?;
        // No link is open when a state is saved: nobody would have the other end of the child's.
        drop(link);
        let image = copy(base, &to.memory)?;
        sleep(REST);
        let begun = Instant::now();
        vm.call("stop", json!({}))?;
        // Not for Xen alone, whatever its name says.
        vm.ask("xen-save-devices-state", json!({ "filename": to.state, "live": false }))?;
        let changed = save_changed(vm.process.id(), base, &image)?;
        vm.answer().context("xen-save-devices-state")?;
        vm.call("cont", json!({}))?;
        pauses.push(ms_since(begun));
        ensure!(changed >= least_mib << 20, "{changed} bytes changed of at least {least_mib} MiB");
        echo(&mut vm.connect("port")?, b"goes on")?;
    }
    Ok(pauses)
}

/// Writes the pages that a process changed of the file `base` over those of `image`. Returns what they take, bytes.
fn save_changed(pid: u32, base: &Path, image: &File) -> anyhow::Result<u64> {
    let proc = PathBuf::from(format!("/proc/{pid}"));
    let (pagemap, memory) = (File::open(proc.join("pagemap"))?, File::open(proc.join("mem"))?);
    let mut buffer = vec![0; PIECE];
    let mut changed = 0;
    for Mapping { start, length, offset } in mappings(&proc, base)? {
        let mut entries = vec![0; length / PAGE * ENTRY];
        pagemap.read_exact_at(&mut entries, start / PAGE as u64 * ENTRY as u64)?;
        let own: Vec<bool> =
            entries.as_chunks().0.iter().map(|entry| is_own(u64::from_ne_bytes(*entry))).collect();
        let mut at = 0;
        for run in own.chunk_by(|one, next| one == next) {
            let end = at + run.len() * PAGE;
            while run[0] && at < end {
                let piece = &mut buffer[..PIECE.min(end - at)];
                memory.read_exact_at(piece, start + at as u64)?;
                image.write_all_at(piece, offset + at as u64)?;
                at += piece.len();
                changed += piece.len() as u64;
            }
            at = end;
        }
    }
    Ok(changed)
}

fn is_own(entry: u64) -> bool {
    entry & (PRESENT | SWAPPED) != 0 && entry & OF_A_FILE == 0
}

/// A part of a file in a process's memory.
struct Mapping {
    start: u64,
    length: usize,
    offset: u64,
}

/// Where a process maps a file (proc_pid_maps(5)).
fn mappings(proc: &Path, file: &Path) -> anyhow::Result<Vec<Mapping>> {
    let maps = fs::read_to_string(proc.join("maps"))?;
    let name = file.display().to_string();
    let mut found = Vec::new();
    for line in maps.lines().filter(|line| line.ends_with(&name)) {
        let mut words = line.split_whitespace();
        let (start, end) =
            words.next().and_then(|span| span.split_once('-')).context("a mapping without a span")?;
        let offset = words.nth(1).context("a mapping without an offset")?;
        let number = |text| u64::from_str_radix(text, 16);
        let start = number(start)?;
        let length = usize::try_from(number(end)? - start)?;
        found.push(Mapping { start, length, offset: number(offset)? });
    }
    ensure!(!found.is_empty(), "{name} is not mapped");
    Ok(found)
}
