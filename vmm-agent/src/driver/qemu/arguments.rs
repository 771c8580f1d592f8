//! QEMU's command line.

use std::{
    os::{fd::AsRawFd as _, unix::net::UnixListener},
    path::Path,
};

use crate::driver::{
    command_line,
    vmm::{Launch, Memory, Start},
};

/// The node of the writable layer's device.
pub const LAYER_NODE: &str = "layer";
/// What the writable layer's device is called.
const LAYER_DEVICE: &str = "layer";
/// Where that is found among QEMU's objects.
pub const LAYER_PATH: &str = "/machine/peripheral/layer";
/// What the device of the serial ports is called.
const PORTS_DEVICE: &str = "ports";
/// Where that is found among QEMU's objects.
pub const PORTS_PATH: &str = "/machine/peripheral/ports";
/// The queue of what the guest says on its port, which is port 1: each has two, and two more are for control
/// (`virtio_serial_device_realize` in QEMU's hw/char/virtio-serial-bus.c).
pub const SAID_QUEUE: u32 = 5;
/// What the guest looks for among its serial ports.
const PORT_NAME: &str = "oc.guest";
/// Room for translated code, MiB. QEMU's default is an eighth of the host's memory, for each VM.
const TRANSLATED_MB: u64 = 128;
/// QEMU's own heap and stacks: 25 MiB at rest (measured), and room for its block layer under load.
const HEAP_MB: u64 = 128;

/// What runs the guests' instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accelerator {
    /// Hardware virtualisation.
    Kvm,
    /// Software emulation.
    Tcg,
}

impl Accelerator {
    /// What QEMU calls it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        }
    }

    /// The accelerator's option.
    pub fn option(self) -> String {
        match self {
            Self::Kvm => "kvm".to_owned(),
            Self::Tcg => format!("tcg,thread=multi,tb-size={TRANSLATED_MB}"),
        }
    }

    /// The CPU model. Emulated `rep movsb` moves byte by byte, so guests are told that it is slow
    /// (docs/decisions/0003).
    pub fn cpu(self) -> &'static str {
        match self {
            Self::Kvm => "host",
            Self::Tcg => "max,-erms,-fsrm",
        }
    }

    /// What QEMU takes beside the guest's memory at most.
    pub fn overhead_bytes(self) -> u64 {
        let translated = match self {
            Self::Kvm => 0,
            Self::Tcg => TRANSLATED_MB,
        };
        (HEAP_MB + translated) << 20
    }
}

/// What a command line is made of.
#[derive(Debug)]
pub struct Machine<'a> {
    pub launch: &'a Launch<'a>,
    pub accelerator: Accelerator,
    pub tsc_khz: u64,
    pub control: &'a UnixListener,
    pub guest: &'a UnixListener,
    /// Where a stub for debuggers listens, if there is to be one.
    pub debug: Option<&'a UnixListener>,
}

impl Machine<'_> {
    /// The arguments after the program's name. Files are named by absolute path, sockets by the number of an
    /// inherited descriptor.
    pub fn arguments(&self) -> Vec<String> {
        let (launch, accelerator) = (self.launch, self.accelerator);
        let (cpus, memory_mb) = (launch.kind.cpu_count, launch.kind.memory_mb);
        let mut arguments: Vec<String> = Vec::with_capacity(64);
        let mut add = |option: &str, value: String| {
            arguments.push(option.to_owned());
            arguments.push(value);
        };
        // Without the legacy timer and interrupt controller: a kernel with hardware-reduced ACPI never initialises the
        // controller, so that a tick of the timer arrives as vector 0, a divide error, whenever it comes early enough.
        add("-machine", "microvm,acpi=on,pic=off,pit=off,memory-backend=ram".into());
        add("-accel", accelerator.option());
        add("-cpu", accelerator.cpu().into());
        add("-smp", cpus.to_string());
        add("-m", format!("{memory_mb}M"));
        add("-object", memory(&launch.memory, memory_mb));
        // What is restored has them in its memory. It must not have them elsewhere: a reset, which is part of a graft, would
        // write the kernel over the guest's.
        if launch.start == Start::Boot {
            add("-kernel", path(launch.kernel));
            add("-initrd", path(launch.initramfs));
            add("-append", self.kernel_command_line());
        }
        // In this order the guest finds vda and vdb. The transport is QEMU's choice: the first one gets no interrupts.
        add("-blockdev", block("base", launch.rootfs, true));
        add("-device", "virtio-blk-device,drive=base".into());
        add("-blockdev", block(LAYER_NODE, &launch.home.layer(), false));
        add("-device", format!("virtio-blk-device,drive={LAYER_NODE},id={LAYER_DEVICE}"));
        add("-device", format!("virtio-serial-device,max_ports=2,id={PORTS_DEVICE}"));
        add("-chardev", socket("guest", self.guest));
        add("-device", format!("virtserialport,chardev=guest,name={PORT_NAME}"));
        if let Some(network) = &launch.network {
            add("-netdev", format!("tap,id=network,fd={}", network.fd.as_raw_fd()));
            let mac = network.mac.map(|byte| format!("{byte:02x}")).join(":");
            // Nobody has to be told that a guest is at another place: its neighbours are pinned.
            add("-device", format!("virtio-net-device,netdev=network,mac={mac},guest_announce=off"));
        }
        add("-chardev", socket("control", self.control));
        add("-mon", "chardev=control,mode=control".into());
        if let Some(debug) = self.debug {
            add("-chardev", socket("debug", debug));
            add("-gdb", "chardev:debug".into());
        }
        add("-chardev", "stdio,id=console,signal=off".into());
        add("-serial", "chardev:console".into());
        add("-display", "none".into());
        add("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny".into());
        for flag in ["-no-user-config", "-nodefaults", "-no-reboot"] {
            arguments.push(flag.to_owned());
        }
        if launch.start == Start::Paused {
            arguments.extend(["-incoming".to_owned(), "defer".to_owned()]);
            // A state of the devices alone says nothing of the machine that it is of.
            arguments.extend(["-global".to_owned(), "migration.send-configuration=off".to_owned()]);
        }
        arguments
    }

    fn kernel_command_line(&self) -> String {
        // A guest that panics reboots at once, which ends QEMU.
        let mut line = String::from("console=ttyS0 quiet panic=-1 reboot=t");
        line.push_str(&command_line::of_guest(self.launch.network.is_some()));
        if self.accelerator == Accelerator::Tcg {
            // The counter is the host's. Nothing is there to check it against, and on a busy host a check would fail.
            line.push_str(&format!(" tsc_early_khz={} tsc=reliable", self.tsc_khz));
        }
        line
    }
}

fn memory(memory: &Memory, size_mb: u32) -> String {
    match memory {
        Memory::Anonymous => format!("memory-backend-ram,id=ram,size={size_mb}M"),
        Memory::Written(file) => {
            format!("memory-backend-file,id=ram,size={size_mb}M,share=on,mem-path={}", path(file))
        }
        // The file is the snapshot's, and not writable for the VM.
        Memory::CopyOf(file) => format!(
            "memory-backend-file,id=ram,size={size_mb}M,share=off,readonly=on,rom=off,mem-path={}",
            path(file)
        ),
    }
}

fn block(node: &str, file: &Path, is_read_only: bool) -> String {
    let access = if is_read_only { "read-only=on" } else { "discard=unmap" };
    format!("driver=raw,node-name={node},{access},file.driver=file,file.filename={}", path(file))
}

fn socket(id: &str, listener: &UnixListener) -> String {
    format!("socket,id={id},fd={},server=on,wait=off", listener.as_raw_fd())
}

/// QEMU's options separate by commas; a doubled one stands for itself.
fn path(path: &Path) -> String {
    path.to_string_lossy().replace(',', ",,")
}
