//! From the kernel's first process to the root that commands see.
//!
//! The base (`vda`) is mounted read-only and shared by all sandboxes of a template; the layer (`vdb`) takes every write.
//! Overlayfs shows both as one, which becomes the root.

use std::{
    fs::{self, DirBuilder, File},
    io,
    os::unix::fs::{DirBuilderExt as _, PermissionsExt as _},
    path::Path,
    time::{Duration, Instant},
};

use nix::{
    kmod::{ModuleInitFlags, finit_module},
    mount::{MsFlags, mount},
    sys::{
        resource::{Resource, setrlimit},
        sysinfo::sysinfo,
    },
    unistd::{chdir, chroot},
};

use crate::freeze::Layer;

/// Kernel modules in the order in which they are needed, one file name a line.
const MODULES: &str = "/modules";
/// How long a device may take to appear; under emulation on a busy host that is seconds.
const APPEARS_WITHIN: Duration = Duration::from_secs(30);
/// Where the machine's ID is.
pub const MACHINE_ID: &str = "/run/machine-id";
/// Where the boot's ID is, in the place of the kernel's, which all clones share.
pub const BOOT_ID: &str = "/run/boot-id";
/// What tells one boot of a kernel from the next (random(4)).
const KERNELS_BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";
/// Processes and threads that a user may have in a small guest.
const MIN_PROCESSES: u64 = 256;
const POLL: Duration = Duration::from_millis(1);

/// Boots, and returns the filesystem that takes the writes.
///
/// # Errors
///
/// What went wrong at which step.
pub fn boot() -> io::Result<Layer> {
    let safe = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    attach("proc", "/proc", "proc", safe, "")?;
    attach("sysfs", "/sys", "sysfs", safe, "")?;
    attach("devtmpfs", "/dev", "devtmpfs", MsFlags::MS_NOSUID, "mode=0755")?;
    load_modules()?;
    appears(Path::new("/dev/vda"))?;
    appears(Path::new("/dev/vdb"))?;
    attach("/dev/vda", "/base", "ext4", MsFlags::MS_RDONLY, "")?;
    // Without the thread that would fill unused tables of a large disk, in every clone, for hours.
    attach("/dev/vdb", "/layer", "ext4", MsFlags::MS_NOATIME, "noinit_itable")?;
    let layer = Layer::open(Path::new("/layer"))?;
    for part in ["/layer/upper", "/layer/work"] {
        DirBuilder::new().recursive(true).mode(0o755).create(part).map_err(|error| at(part, error))?;
    }
    let parts = "lowerdir=/base,upperdir=/layer/upper,workdir=/layer/work";
    attach("overlay", "/root", "overlay", MsFlags::MS_NOATIME, parts)?;
    for part in ["/proc", "/sys", "/dev"] {
        attach(part, &format!("/root{part}"), "", MsFlags::MS_MOVE, "")?;
    }
    enter("/root")?;
    attach(
        "devpts",
        "/dev/pts",
        "devpts",
        MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC,
        "mode=0620,ptmxmode=0666",
    )?;
    attach("tmpfs", "/dev/shm", "tmpfs", MsFlags::MS_NOSUID | MsFlags::MS_NODEV, "mode=1777")?;
    attach("tmpfs", "/run", "tmpfs", MsFlags::MS_NOSUID | MsFlags::MS_NODEV, "mode=0755")?;
    if Path::new("/sys/fs/cgroup").is_dir() {
        attach("cgroup2", "/sys/fs/cgroup", "cgroup2", safe, "")?;
    }
    for link in [
        ("/proc/self/fd", "/dev/fd"),
        ("/proc/self/fd/0", "/dev/stdin"),
        ("/proc/self/fd/1", "/dev/stdout"),
        ("/proc/self/fd/2", "/dev/stderr"),
    ] {
        let _ = std::os::unix::fs::symlink(link.0, link.1);
    }
    // Everybody may use them; devtmpfs makes some for root alone.
    for device in
        ["/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom", "/dev/tty", "/dev/ptmx"]
    {
        let _ = fs::set_permissions(device, fs::Permissions::from_mode(0o666));
    }
    DirBuilder::new().mode(0o755).create("/run/lock")?;
    fs::set_permissions("/run/lock", fs::Permissions::from_mode(0o1777))?;
    // A name that a machine keeps for good (machine-id(5)). In memory, where a clone renews it without a disk.
    fs::write(MACHINE_ID, "")?;
    fs::set_permissions(MACHINE_ID, fs::Permissions::from_mode(0o444))?;
    if Path::new("/etc/machine-id").is_file() {
        attach(MACHINE_ID, "/etc/machine-id", "", MsFlags::MS_BIND, "")?;
    }
    fs::copy(KERNELS_BOOT_ID, BOOT_ID)?;
    fs::set_permissions(BOOT_ID, fs::Permissions::from_mode(0o444))?;
    attach(BOOT_ID, KERNELS_BOOT_ID, "", MsFlags::MS_BIND, "")?;
    loopback_up()?;
    limit_processes()?;
    Ok(layer)
}

fn at(what: &str, error: impl Into<io::Error>) -> io::Error {
    let error: io::Error = error.into();
    io::Error::new(error.kind(), format!("{what}: {error}"))
}

fn attach(source: &str, target: &str, kind: &str, flags: MsFlags, options: &str) -> io::Result<()> {
    let some = |text| Some(text).filter(|text: &&str| !text.is_empty());
    if !Path::new(target).exists() {
        DirBuilder::new().recursive(true).mode(0o755).create(target).map_err(|error| at(target, error))?;
    }
    mount(Some(source), target, some(kind), flags, some(options))
        .map_err(|error| at(&format!("mount {target}"), error))
}

fn load_modules() -> io::Result<()> {
    for name in fs::read_to_string(format!("{MODULES}/order"))?.lines() {
        let file = File::open(format!("{MODULES}/{name}")).map_err(|error| at(name, error))?;
        match finit_module(&file, c"", ModuleInitFlags::empty()) {
            Ok(()) | Err(nix::Error::EEXIST) => {}
            Err(error) => return Err(at(name, error)),
        }
    }
    Ok(())
}

/// Waits for a device: its driver has just been loaded.
///
/// # Errors
///
/// If it does not appear in time.
#[expect(clippy::disallowed_methods, reason = "there is no runtime yet, and nothing else to do")]
pub fn appears(path: &Path) -> io::Result<()> {
    let begun = Instant::now();
    while !path.exists() {
        if begun.elapsed() > APPEARS_WITHIN {
            return Err(io::Error::new(
                io::ErrorKind::TimedOut,
                format!("{} does not appear", path.display()),
            ));
        }
        std::thread::sleep(POLL);
    }
    Ok(())
}

/// Makes `root` the root. The initramfs stays mounted below it, out of reach.
fn enter(root: &str) -> io::Result<()> {
    chdir(root)?;
    mount(Some("."), "/", None::<&str>, MsFlags::MS_MOVE, None::<&str>)
        .map_err(|error| at("move the root", error))?;
    chroot(".")?;
    Ok(chdir("/")?)
}

/// Bounds the processes and threads of each user but root, whom a fork bomb would else leave no memory to end it with:
/// one for each MiB of memory. The kernel's own bound is several times that.
fn limit_processes() -> io::Result<()> {
    let mib = sysinfo()?.ram_total() >> 20;
    let limit = mib.max(MIN_PROCESSES);
    Ok(setrlimit(Resource::RLIMIT_NPROC, limit, limit)?)
}

/// `lo` is there, and down, in a kernel that has just started.
fn loopback_up() -> io::Result<()> {
    network::set_up("lo").map_err(|error| at("lo", error))
}

mod network {
    #![allow(unsafe_code)]

    use std::{io, os::fd::AsRawFd as _};

    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

    nix::ioctl_write_ptr_bad!(set_flags, libc::SIOCSIFFLAGS, libc::ifreq);

    /// Takes the interface called `name` up (netdevice(7)).
    pub fn set_up(name: &str) -> io::Result<()> {
        let socket = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
        // SAFETY: zeros are a valid ifreq.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
            *to = from.cast_signed();
        }
        // The flags fit: IFF_UP is 1, IFF_RUNNING is 64.
        request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
        // SAFETY: the descriptor is open, and the request is valid.
        unsafe { set_flags(socket.as_raw_fd(), &raw const request) }?;
        Ok(())
    }
}
