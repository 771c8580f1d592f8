//! A guest as it is under Firecracker, booted by QEMU with no more than Firecracker has: the same kernel, initramfs and command
//! line, disks, entropy, balloon and vsock on virtio-mmio, which ACPI tells of, a serial port and a keyboard controller.
//!
//! Its vsock is that of rust-vmm, which speaks to its host as Firecracker's does (`CONNECT` and a port): so the host's end of our
//! link, that protocol, the kernel's driver and the guest's first process are all the real ones.

use std::{
    fs,
    os::unix::fs::DirBuilderExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::Arc,
    time::Duration,
};

use oc_integration::{firecracker::settings, mesh::PATIENCE, prepared};
use oc_proto::v1::{RunRequest, exec_service_client::ExecServiceClient};
use oc_vmm_agent::driver::{
    firecracker::{Firecracker, boot_arguments},
    guest_link::GuestLink,
    home::Home,
    initramfs, layer,
    qemu::tsc,
    template::{self, Template},
    vmm::Vmm,
};
use tempfile::TempDir;
use tokio::time::{Instant, sleep, timeout};

/// A guest, and what serves it.
struct Lookalike {
    vmm: Arc<dyn Vmm>,
    home: Home,
    guest: Child,
    vsock: Child,
    console: PathBuf,
    _dir: TempDir,
}

impl Lookalike {
    async fn boot() -> Self {
        let dir = TempDir::new_in("/var/tmp").unwrap();
        let home = Home::of(dir.path(), "vm-lookalike");
        home.create().unwrap();
        let vmm: Arc<dyn Vmm> = Arc::new(Firecracker::find(settings(), false).await.unwrap());
        let template =
            template::find(Path::new(prepared::IMAGES)).unwrap().into_iter().next().expect("a template");
        let init = prepared::binaries().unwrap().join("oc-init");
        let initramfs = initramfs::ensure(dir.path(), &template, &init).unwrap();
        layer::format(&home.layer()).unwrap();
        // Where a jailed VMM has it, and the VMM's user's.
        let jail = home.dir().join("jail/firecracker/vm-lookalike/root");
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&jail).unwrap();
        let (backend, socket) = (dir.path().join("vhost.sock"), jail.join("guest.sock"));
        let vsock = Command::new(prepared::tool("vhost-device-vsock/bin/vhost-device-vsock").unwrap())
            .arg("--guest-cid=3")
            .arg(format!("--socket={}", backend.display()))
            .arg(format!("--uds-path={}", socket.display()))
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        appears(&backend).await;
        let console = dir.path().join("console");
        let guest = qemu(&template, &initramfs.path, &home, &backend, tsc::measure_khz().await)
            .stdin(Stdio::null())
            .stdout(fs::File::create(&console).unwrap())
            .spawn()
            .unwrap();
        appears(&socket).await;
        std::os::unix::fs::chown(&socket, Some(home.uid()), Some(home.uid())).unwrap();
        Self { vmm, home, guest, vsock, console, _dir: dir }
    }

    /// A link of its own to the guest, once that is up.
    async fn link(&self) -> GuestLink {
        let link = GuestLink::new(self.vmm.clone(), self.home.clone());
        let begun = Instant::now();
        while let Err(error) = link.connect().await {
            let console = fs::read_to_string(&self.console).unwrap_or_default();
            assert!(begun.elapsed() < PATIENCE, "{error}; the console says:\n{console}");
            sleep(Duration::from_millis(50)).await;
        }
        link
    }
}

impl Drop for Lookalike {
    fn drop(&mut self) {
        for child in [&mut self.guest, &mut self.vsock] {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

async fn appears(path: &Path) {
    let begun = Instant::now();
    while !path.exists() {
        assert!(begun.elapsed() < PATIENCE, "{} does not appear", path.display());
        sleep(Duration::from_millis(10)).await;
    }
}

fn qemu(template: &Template, initramfs: &Path, home: &Home, backend: &Path, tsc_khz: u64) -> Command {
    let disk = |id: &str, file: &Path, access: &str| {
        format!("driver=raw,node-name={id},{access}file.driver=file,file.filename={}", file.display())
    };
    let mut qemu = Command::new("qemu-system-x86_64");
    qemu.args([
        "-machine",
        "microvm,acpi=on,pic=off,pit=off,memory-backend=ram",
        "-accel",
        "tcg,thread=multi",
    ])
    .args(["-cpu", "max,-erms,-fsrm", "-smp", "1", "-m", "512M"])
    // What serves the vsock sees the guest's memory.
    .args(["-object", "memory-backend-memfd,id=ram,size=512M,share=on"])
    .args(["-global", "virtio-mmio.force-legacy=false"])
    .arg("-kernel")
    .arg(template.kernel())
    .arg("-initrd")
    .arg(initramfs)
    .args(["-append", &format!("{} tsc_early_khz={tsc_khz} tsc=reliable", boot_arguments(false))])
    .args([
        "-blockdev",
        &disk("base", &template.rootfs(), "read-only=on,"),
        "-device",
        "virtio-blk-device,drive=base",
    ])
    .args(["-blockdev", &disk("layer", &home.layer(), ""), "-device", "virtio-blk-device,drive=layer"])
    .args(["-device", "virtio-rng-device", "-device", "virtio-balloon-device", "-device", "i8042"])
    .arg("-chardev")
    .arg(format!("socket,id=vsock,path={}", backend.display()))
    .args(["-device", "vhost-user-vsock-device,chardev=vsock"])
    .args(["-serial", "stdio", "-display", "none", "-no-user-config", "-nodefaults", "-no-reboot"]);
    qemu
}

/// What a command in the guest says.
async fn run(link: &GuestLink, command: &str) -> String {
    let request = RunRequest { cmd: command.to_owned(), ..Default::default() };
    let answer = timeout(PATIENCE, ExecServiceClient::new(link.clone()).run(request)).await;
    let answer = answer.expect("an answer in time").unwrap().into_inner();
    String::from_utf8_lossy(&answer.stdout).into_owned()
}

#[tokio::test]
async fn a_guest_with_firecrackers_devices_is_reached_by_its_vsock() {
    let mut lookalike = Lookalike::boot().await;
    let link = lookalike.link().await;
    let answer = run(
        &link,
        "cat /sys/class/misc/hw_random/rng_available; ls /sys/bus/virtio/drivers/*/ | grep -c virtio",
    )
    .await;
    assert!(answer.contains("virtio_rng.0"), "{answer:?}");
    // Two disks, entropy, balloon, vsock; more where a device is listed with its driver's module.
    let drivers =
        run(&link, "for d in /sys/bus/virtio/devices/*; do basename $(readlink $d/driver); done | sort")
            .await;
    let drivers: Vec<_> = drivers.split_whitespace().collect();
    assert_eq!(
        drivers,
        ["virtio_balloon", "virtio_blk", "virtio_blk", "virtio_rng", "vmw_vsock_virtio_transport"]
    );
    // Much, whole.
    let many = run(&link, "head -c 3000000 /dev/zero | tr '\\0' x").await;
    assert!(many.len() == 3_000_000 && many.bytes().all(|byte| byte == b'x'));
    // An agent that comes again, while what the one before had still hangs there.
    let again = lookalike.link().await;
    assert_eq!(run(&again, "echo again").await, "again\n");
    assert_eq!(run(&link, "echo still").await, "still\n");
    link.hang_up().await;
    assert_eq!(run(&link, "echo anew").await, "anew\n");

    // Nobody in the guest speaks for its host.
    let inside = r#"
import socket
for cid in (1, 2, 3):
    s = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
    s.settimeout(5)
    try:
        s.connect((cid, 1024))
        s.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        print(cid, "answered", s.recv(64))
    except OSError as error:
        print(cid, "refused")
"#;
    let answer = run(&again, &format!("python3 - <<'PY'{inside}PY")).await;
    let said: Vec<_> = answer.lines().collect();
    assert_eq!(said.len(), 3, "{answer:?}");
    assert!(said.iter().all(|line| line.ends_with("refused") || line.ends_with("answered b''")), "{said:?}");

    // A reset ends it, as it ends Firecracker.
    let reset = RunRequest {
        cmd: "echo b > /proc/sysrq-trigger".to_owned(),
        user: "root".to_owned(),
        ..Default::default()
    };
    let mut exec = ExecServiceClient::new(again);
    let ended = async {
        // It is not answered: that is the point.
        let _ = timeout(Duration::from_secs(5), exec.run(reset)).await;
        while lookalike.guest.try_wait().unwrap().is_none() {
            sleep(Duration::from_millis(50)).await;
        }
    };
    timeout(PATIENCE, ended).await.expect("a guest that resets ends its VMM");
}
