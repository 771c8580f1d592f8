//! One QEMU, started and told what to do as plainly as possible.

use std::{
    fs,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};
use oc_integration::mesh::succeeded;
use serde_json::{Value, json};

use crate::table::ms_since;

/// Memory of each guest.
const MEMORY_MIB: u64 = 512;
/// A boot that hangs is ended and tried again.
const BOOTS_WITHIN: Duration = Duration::from_secs(20);

/// A QEMU to start.
pub struct Machine<'a> {
    /// Where its files are.
    pub here: &'a Path,
    /// The template's kernel and modules.
    pub image: &'a Path,
    /// What it gets a writable copy of.
    pub disk: &'a Path,
    /// What its own files are called by.
    pub name: &'a str,
    /// How its guest begins.
    pub beginning: Beginning<'a>,
}

/// How a guest begins.
#[derive(Clone, Copy)]
pub enum Beginning<'a> {
    /// It boots. What it writes to memory goes to the image.
    Boot { memory: &'a Path },
    /// It goes on where the state's guest was. What it writes to memory is its own.
    Restore { memory: &'a Path, state: &'a Path },
    /// As [`Beginning::Restore`], of a state that is one of devices alone.
    Fork { memory: &'a Path, state: &'a Path },
}

/// A QEMU that runs; killed when dropped.
pub struct Vm {
    /// Its process.
    pub process: Child,
    /// When it was started.
    pub begun: Instant,
    monitor: BufReader<UnixStream>,
    prefix: PathBuf,
}

impl Machine<'_> {
    /// Starts it, until its monitor answers; its guest does not run yet unless it boots.
    fn launch(&self) -> anyhow::Result<Vm> {
        let prefix = self.here.join(self.name);
        let file = |suffix: &str| prefix.with_extension(suffix).display().to_string();
        for suffix in ["monitor", "port", "log"] {
            let _ = fs::remove_file(file(suffix));
        }
        copy(self.disk, &prefix.with_extension("img"))?;
        let begun = Instant::now();
        let (memory, share) = match self.beginning {
            Beginning::Boot { memory } => (memory.display(), "on"),
            Beginning::Restore { memory, .. } | Beginning::Fork { memory, .. } => (memory.display(), "off"),
        };
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
        if !matches!(self.beginning, Beginning::Boot { .. }) {
            command.args(["-incoming", "defer"]);
        }
        if matches!(self.beginning, Beginning::Fork { .. }) {
            // The state of devices alone neither begins nor ends with a description of the machine.
            command.args(["-global", "migration.send-configuration=off", "-machine", "suppress-vmdesc=on"]);
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

    /// Starts it, until its guest runs.
    pub fn start(&self) -> anyhow::Result<Vm> {
        let mut vm = self.launch()?;
        if let Beginning::Restore { state, .. } | Beginning::Fork { state, .. } = self.beginning {
            vm.call("migrate-incoming", json!({ "uri": format!("file:{}", state.display()) }))?;
            vm.migrated()?;
            vm.call("cont", json!({}))?;
        }
        Ok(vm)
    }
}

impl Vm {
    /// Milliseconds from the start to the guest's process.
    pub fn booted(&self) -> anyhow::Result<f64> {
        let log = self.prefix.with_extension("log");
        while !fs::read_to_string(&log).unwrap_or_default().contains("READY") {
            ensure!(self.begun.elapsed() < BOOTS_WITHIN, "a boot took longer than {BOOTS_WITHIN:?}");
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(ms_since(self.begun))
    }

    /// Connects to one of its sockets: `port` or `monitor`.
    pub fn connect(&self, suffix: &str) -> anyhow::Result<UnixStream> {
        connect(&self.prefix, suffix)
    }

    /// Asks its monitor for something, and waits for the answer.
    pub fn call(&mut self, command: &str, arguments: Value) -> anyhow::Result<Value> {
        self.ask(command, arguments)?;
        self.answer().context(command.to_owned())
    }

    /// Asks its monitor for something.
    pub fn ask(&mut self, command: &str, arguments: Value) -> anyhow::Result<()> {
        let line = json!({ "execute": command, "arguments": arguments }).to_string();
        Ok(self.monitor.get_mut().write_all(format!("{line}\n").as_bytes())?)
    }

    /// The answer to what its monitor was asked for.
    pub fn answer(&mut self) -> anyhow::Result<Value> {
        loop {
            let answer = self.receive()?;
            if let Some(error) = answer.get("error") {
                bail!("{error}");
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

    /// Waits until its state is written or read.
    pub fn migrated(&mut self) -> anyhow::Result<()> {
        loop {
            match self.call("query-migrate", json!({}))?["status"].as_str() {
                Some("completed") => return Ok(()),
                Some("failed") => bail!("the migration failed"),
                _ => std::thread::sleep(Duration::from_micros(300)),
            }
        }
    }
}

/// Waits until a guest's process echoes `text`.
pub fn echo(link: &mut UnixStream, text: &[u8]) -> anyhow::Result<()> {
    link.write_all(text)?;
    let mut back = vec![0; text.len()];
    link.read_exact(&mut back)?;
    ensure!(back == text, "the guest echoes something else");
    Ok(())
}

/// Copies a file, holes and all, until it is on the device: QEMU, or what is timed, would wait for that.
pub fn copy(from: &Path, to: &Path) -> anyhow::Result<fs::File> {
    let mut copy = Command::new("cp");
    copy.args(["--reflink=auto", "--sparse=always"]).arg(from).arg(to);
    succeeded(copy)?;
    let file = fs::File::options().write(true).open(to)?;
    file.sync_all()?;
    Ok(file)
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
