//! The floor: what QEMU takes with none of our code around it, for the same job. A guest of the template's kernel and
//! root filesystem in which a Python process echoes what arrives on a virtio-serial port; booted, snapshot, and
//! restored as clones that copy memory on write and have each a disk of their own (copied before the clock starts).
//!
//! - [`machine`]: one QEMU command line, its monitor, and a socket.
//! - [`fork`]: a second guest of one that goes on.
#![expect(
    clippy::disallowed_methods,
    reason = "it has a thread of its own, with no runtime between it and QEMU"
)]

pub mod fork;
mod machine;

use std::{
    fs,
    io::{Read as _, Write as _},
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use oc_integration::{mesh::succeeded, prepared, processes};
use serde_json::json;

use self::{
    fork::Fork,
    machine::{Beginning, Machine, echo},
};
use crate::table::{median, ms_since};

const CLONES: usize = 8;
const BULK_MIB: usize = 32;
const BOOTS: usize = 3;
const ATTEMPTS: usize = 3;
/// The machine leaves the initramfs at the end of memory, over the firmware's tables, unless its last page is empty but
/// for this (vmm-agent/src/driver/initramfs.rs).
const PAGE: u64 = 4096;
const IN_LAST_PAGE: u64 = 4;

/// The guest's one process: says that it is there, and echoes; asked for `BULK`, it sends as fast as it can, and for
/// `DIRTY`, it fills the same memory with something new each time.
const ECHO: &str = r#"
import os, time
port = os.open("/dev/" + [name for name in os.listdir("/dev") if name.startswith("vport")][0], os.O_RDWR)
kept = bytearray(64 << 20)
os.write(1, b"READY\n")
while True:
    data = os.read(port, 1 << 16)
    if not data:
        time.sleep(0.005)  # no host is connected
    elif data == b"BULK":
        left = 32 << 20
        while left > 0:
            left -= os.write(port, bytes(min(left, 1 << 15)))
    elif data == b"DIRTY":
        for piece in range(len(kept) >> 20):
            kept[piece << 20:piece + 1 << 20] = os.urandom(1 << 20)
        os.write(port, b"DONE")
    else:
        os.write(port, data)
"#;

/// Figures of the VMM alone.
#[derive(Clone, Debug)]
pub struct Floor {
    /// QEMU's version.
    pub version: String,
    /// From the start of the process to a Python process in the guest.
    pub cold_boot_ms: f64,
    /// From the start of a clone's process to the first byte that its guest echoes.
    pub first_answer_ms: f64,
    /// Bytes from a process in the guest to the host.
    pub guest_to_host_mib_s: f64,
    /// Proportional memory of an idle clone.
    pub clone_pss_mib: f64,
    /// Forks of a clone.
    pub fork: Fork,
}

/// Measures.
pub fn measure() -> anyhow::Result<Floor> {
    let work = tempfile::tempdir()?;
    let here = work.path();
    let version = succeeded({
        let mut command = Command::new("qemu-system-x86_64");
        command.arg("--version");
        command
    })?;
    let version = version.lines().next().unwrap_or_default().replace(" emulator version", "");
    let image = Path::new(prepared::IMAGES).join("base");
    initramfs(here, &image)?;

    let (disk, golden_disk) = (image.join("rootfs.img"), here.join("golden.img"));
    let (memory, state) = (here.join("memory"), here.join("state"));
    let (mut boots, mut failures) = (Vec::new(), 0);
    let mut golden = loop {
        let beginning = Beginning::Boot { memory: &memory };
        let machine = Machine { here, image: &image, disk: &disk, name: "golden", beginning };
        match machine.start().and_then(|vm| vm.booted().map(|took| (vm, took))) {
            Ok((vm, took)) => {
                boots.push(took);
                if boots.len() == BOOTS {
                    break vm;
                }
            }
            Err(error) => {
                failures += 1;
                ensure!(failures < ATTEMPTS, "{error:#}, {failures} times");
            }
        }
    };
    let mut link = golden.connect("port")?;
    echo(&mut link, b"warm")?;
    let begun = Instant::now();
    link.write_all(b"BULK")?;
    let mut buffer = vec![0; 1 << 20];
    let mut left = BULK_MIB << 20;
    while left > 0 {
        left -= link.read(&mut buffer)?.min(left);
    }
    #[allow(clippy::cast_precision_loss, reason = "a small number")]
    let guest_to_host_mib_s = BULK_MIB as f64 / begun.elapsed().as_secs_f64();
    drop(link);
    std::thread::sleep(Duration::from_millis(300));
    golden.call("stop", json!({}))?;
    golden.call("migrate", json!({ "uri": format!("file:{}", state.display()) }))?;
    golden.migrated()?;
    drop(golden);

    let (mut clones, mut answers) = (Vec::new(), Vec::new());
    for number in 0..CLONES {
        let name = format!("clone{number}");
        let beginning = Beginning::Restore { memory: &memory, state: &state };
        let vm = Machine { here, image: &image, disk: &golden_disk, name: &name, beginning }.start()?;
        let mut link = vm.connect("port")?;
        echo(&mut link, b"hello")?;
        answers.push(ms_since(vm.begun));
        clones.push((vm, link));
    }
    std::thread::sleep(Duration::from_secs(1));
    let pss: Vec<f64> = clones
        .iter()
        .filter_map(|(vm, _)| {
            let pid = i32::try_from(vm.process.id()).ok()?;
            processes::memory_kib(pid, "smaps_rollup", "Pss").map(crate::memory::mib)
        })
        .collect();
    drop(clones);
    Ok(Floor {
        version,
        cold_boot_ms: median(&boots),
        first_answer_ms: median(&answers),
        guest_to_host_mib_s,
        clone_pss_mib: median(&pss),
        fork: fork::measure(here, &image, &golden_disk, &memory, &state).context("forks")?,
    })
}

/// A static shell that loads the template's modules, mounts its root, and becomes Python in it.
fn initramfs(here: &Path, image: &Path) -> anyhow::Result<()> {
    let root = here.join("initramfs");
    for directory in ["bin", "modules", "dev", "proc", "sys", "mnt"] {
        fs::create_dir_all(root.join(directory))?;
    }
    fs::copy("/bin/busybox", root.join("bin/busybox"))
        .context("busybox-static is needed: run `make setup-test`")?;
    let mut init = String::from(
        "#!/bin/busybox sh\nb=/bin/busybox\n$b mount -t proc proc /proc\n$b mount -t devtmpfs dev /dev\n",
    );
    for module in fs::read_to_string(image.join("modules/order"))?.lines() {
        let file = format!("{module}.ko");
        fs::copy(image.join("modules").join(&file), root.join("modules").join(&file))?;
        init.push_str(&format!("$b insmod /modules/{file}\n"));
    }
    init.push_str("while ! [ -b /dev/vda ]; do $b usleep 1000; done\n$b mount -t ext4 /dev/vda /mnt\n");
    init.push_str("$b mount --move /dev /mnt/dev; $b mount --move /proc /mnt/proc\n");
    init.push_str("exec $b chroot /mnt /usr/bin/python3 -c \"$($b cat /echo.py)\"\n");
    fs::write(root.join("echo.py"), ECHO)?;
    fs::write(root.join("init"), init)?;
    let mut pack = Command::new("sh");
    pack.current_dir(&root)
        .args(["-c", "chmod +x init && find . | cpio --quiet -o -H newc | gzip -1 > ../initramfs.gz"]);
    succeeded(pack)?;
    let archive = fs::File::options().write(true).open(here.join("initramfs.gz"))?;
    let size = archive.metadata()?.len();
    Ok(archive.set_len((size - IN_LAST_PAGE).next_multiple_of(PAGE) + IN_LAST_PAGE)?)
}
