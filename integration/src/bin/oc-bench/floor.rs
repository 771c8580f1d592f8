//! The floor: what QEMU takes with none of our code around it, for the same job. A guest of the template's kernel and
//! root filesystem in which a Python process echoes what arrives on a virtio-serial port; booted, snapshot, and
//! restored as clones that copy memory on write and have each a disk of their own (copied before the clock starts).
//! One QEMU command line, its monitor, and a socket.
#![expect(
    clippy::disallowed_methods,
    reason = "it has a thread of its own, with no runtime between it and QEMU"
)]

use std::{
    fs,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};
use oc_integration::{mesh::succeeded, prepared, processes};
use serde_json::{Value, json};

use crate::table::{median, ms_since};

const MEMORY_MIB: u64 = 512;
const CLONES: usize = 8;
const BULK_MIB: usize = 32;
const BOOTS: usize = 3;
/// A boot that hangs is ended and tried again.
const BOOTS_WITHIN: Duration = Duration::from_secs(20);
const ATTEMPTS: usize = 3;
/// The machine leaves the initramfs at the end of memory, over the firmware's tables, unless its last page is empty but
/// for this (vmm-agent/src/driver/initramfs.rs).
const PAGE: u64 = 4096;
const IN_LAST_PAGE: u64 = 4;

/// The guest's one process: says that it is there, and echoes; asked for `BULK`, it sends as fast as it can.
const ECHO: &str = r#"
import os, time
port = os.open("/dev/" + [name for name in os.listdir("/dev") if name.startswith("vport")][0], os.O_RDWR)
os.write(1, b"READY\n")
while True:
    data = os.read(port, 1 << 16)
    if not data:
        time.sleep(0.005)  # no host is connected
    elif data == b"BULK":
        left = 32 << 20
        while left > 0:
            left -= os.write(port, bytes(min(left, 1 << 15)))
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
    let (mut boots, mut failures) = (Vec::new(), 0);
    let mut golden = loop {
        let machine =
            Machine { here, image: &image, disk: &disk, name: "golden", shared: true, restored: false };
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
    golden.call("migrate", json!({ "uri": format!("file:{}", here.join("state").display()) }))?;
    golden.migrated()?;
    drop(golden);

    let (mut clones, mut answers) = (Vec::new(), Vec::new());
    for number in 0..CLONES {
        let name = format!("clone{number}");
        let machine =
            Machine { here, image: &image, disk: &golden_disk, name: &name, shared: false, restored: true };
        let mut vm = machine.start()?;
        vm.call("migrate-incoming", json!({ "uri": format!("file:{}", here.join("state").display()) }))?;
        vm.migrated()?;
        vm.call("cont", json!({}))?;
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
    Ok(Floor {
        version,
        cold_boot_ms: median(&boots),
        first_answer_ms: median(&answers),
        guest_to_host_mib_s,
        clone_pss_mib: median(&pss),
    })
}

fn echo(link: &mut UnixStream, text: &[u8]) -> anyhow::Result<()> {
    link.write_all(text)?;
    let mut back = vec![0; text.len()];
    link.read_exact(&mut back)?;
    ensure!(back == text, "the guest echoes something else");
    Ok(())
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

struct Machine<'a> {
    here: &'a Path,
    image: &'a Path,
    /// What it gets a writable copy of.
    disk: &'a Path,
    name: &'a str,
    /// Whether memory is written through to the file, or copied on write.
    shared: bool,
    restored: bool,
}

struct Vm {
    process: Child,
    begun: Instant,
    monitor: BufReader<UnixStream>,
    prefix: PathBuf,
}

impl Machine<'_> {
    fn start(&self) -> anyhow::Result<Vm> {
        let prefix = self.here.join(self.name);
        let file = |suffix: &str| prefix.with_extension(suffix).display().to_string();
        for suffix in ["monitor", "port", "log"] {
            let _ = fs::remove_file(file(suffix));
        }
        succeeded({
            let mut copy = Command::new("cp");
            copy.args(["--reflink=auto", "--sparse=always"]).arg(self.disk).arg(file("img"));
            copy
        })?;
        // Or QEMU would wait for the copy to reach the device, within what is timed.
        fs::File::open(file("img"))?.sync_all()?;
        let begun = Instant::now();
        let share = if self.shared { "on" } else { "off" };
        let memory = self.here.join("memory").display().to_string();
        let mut command = Command::new("qemu-system-x86_64");
        command
            .args([
                "-M",
                "microvm,acpi=on,pic=off,pit=off,memory-backend=ram",
                "-accel",
                "tcg,thread=multi",
                "-cpu",
                "max",
            ])
            .args(["-m", &format!("{MEMORY_MIB}M"), "-smp", "1"])
            .args([
                "-object",
                &format!("memory-backend-file,id=ram,size={MEMORY_MIB}M,share={share},mem-path={memory}"),
            ])
            .arg("-kernel")
            .arg(self.image.join("vmlinux"))
            .arg("-initrd")
            .arg(self.here.join("initramfs.gz"))
            .args(["-append", &format!("console=ttyS0 quiet panic=-1 tsc_early_khz={}", tsc_khz()?)])
            .arg("-drive")
            .arg(format!("id=root,if=none,format=raw,file={}", file("img")))
            .args(["-device", "virtio-blk-device,drive=root", "-device", "virtio-serial-device"])
            .args(["-chardev", &format!("socket,id=port,path={},server=on,wait=off", file("port"))])
            .args(["-device", "virtserialport,chardev=port,name=floor"])
            .args(["-qmp", &format!("unix:{},server=on,wait=off", file("monitor"))])
            .args(["-serial", &format!("file:{}", file("log"))])
            .args(["-display", "none", "-nodefaults", "-no-user-config", "-no-reboot"])
            .stdin(Stdio::null());
        if self.restored {
            command.args(["-incoming", "defer"]);
        }
        let process = command.spawn().context("qemu-system-x86_64")?;
        let monitor = match connect(&prefix, "monitor") {
            Ok(stream) => BufReader::new(stream),
            Err(error) => {
                let mut process = process;
                let _ = process.kill();
                let _ = process.wait();
                return Err(error);
            }
        };
        let mut vm = Vm { process, begun, monitor, prefix };
        vm.receive()?;
        vm.call("qmp_capabilities", json!({}))?;
        let shared = json!({ "capabilities": [{ "capability": "x-ignore-shared", "state": true }] });
        vm.call("migrate-set-capabilities", shared)?;
        Ok(vm)
    }
}

impl Vm {
    /// Milliseconds from the start to the guest's process.
    fn booted(&self) -> anyhow::Result<f64> {
        let log = self.prefix.with_extension("log");
        while !fs::read_to_string(&log).unwrap_or_default().contains("READY") {
            ensure!(self.begun.elapsed() < BOOTS_WITHIN, "a boot took longer than {BOOTS_WITHIN:?}");
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(ms_since(self.begun))
    }

    fn connect(&self, suffix: &str) -> anyhow::Result<UnixStream> {
        connect(&self.prefix, suffix)
    }

    fn call(&mut self, command: &str, arguments: Value) -> anyhow::Result<Value> {
        let line = json!({ "execute": command, "arguments": arguments }).to_string();
        self.monitor.get_mut().write_all(format!("{line}\n").as_bytes())?;
        loop {
            let answer = self.receive()?;
            if let Some(error) = answer.get("error") {
                bail!("{command}: {error}");
            }
            if let Some(value) = answer.get("return") {
                return Ok(value.clone());
            }
        }
    }

    fn receive(&mut self) -> anyhow::Result<Value> {
        let mut line = String::new();
        ensure!(self.monitor.read_line(&mut line)? > 0, "QEMU ended");
        Ok(serde_json::from_str(&line)?)
    }

    fn migrated(&mut self) -> anyhow::Result<()> {
        loop {
            match self.call("query-migrate", json!({}))?["status"].as_str() {
                Some("completed") => return Ok(()),
                Some("failed") => bail!("the migration failed"),
                _ => std::thread::sleep(Duration::from_micros(300)),
            }
        }
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn connect(prefix: &Path, suffix: &str) -> anyhow::Result<UnixStream> {
    let (path, begun) = (prefix.with_extension(suffix), Instant::now());
    loop {
        match UnixStream::connect(&path) {
            Ok(stream) => {
                stream.set_read_timeout(Some(BOOTS_WITHIN))?;
                return Ok(stream);
            }
            Err(error) if begun.elapsed() > BOOTS_WITHIN => {
                return Err(error).context(path.display().to_string());
            }
            Err(_) => std::thread::sleep(Duration::from_millis(1)),
        }
    }
}

/// The host's rate, by its kernel: without it a guest calibrates, which fails on a busy host.
fn tsc_khz() -> anyhow::Result<u64> {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo")?;
    let mhz = cpuinfo.lines().find_map(|line| line.strip_prefix("cpu MHz\t\t: ")).context("no cpu MHz")?;
    let (whole, part) = mhz.split_once('.').unwrap_or((mhz, "000"));
    Ok(format!("{whole}{part:0<3.3}").parse()?)
}
