//! The filesystems that sandboxes and jails lie on.

use std::{
    fs::File,
    io::{self, Write as _},
    os::unix::fs::{MetadataExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
};

use fs_err as fs;
use nix::sys::statvfs::{FsFlags, statvfs};
use oc_proto::v1::HostCheck;
use rustix::{
    fs::{Mode, OFlags, ioctl_ficlone, open, statfs},
    io::Errno,
};

use super::{
    finding::{BOTH, FIRECRACKER, Finding, check},
    host::Host,
    subject::Subject,
};

/// What a busy sandbox or two may write, MiB.
const AMPLE_MB: u64 = 10 * 1024;
/// A sandbox has some ten files.
const AMPLE_FILES: u64 = 10_000;
/// Filesystems by their numbers (include/uapi/linux/magic.h, and their own sources), and what speaks against them.
const FILESYSTEMS: [(u64, &str, Option<&str>); 9] = [
    (0x5846_5342, "xfs", None),
    (0x9123_683e, "btrfs", None),
    (0xef53, "ext4", None),
    (0xf2f5_2010, "f2fs", None),
    (0x2fc1_2fc1, "zfs", None),
    (0x0102_1994, "tmpfs", Some("which is memory, and gone when the machine is")),
    (0x794c_7630, "overlayfs", Some("of a container, which is slow and may be gone with it")),
    (0x6969, "nfs", Some("where a lost connection halts every sandbox")),
    (0x6573_5546, "fuse", Some("where each write goes through another process")),
];

/// All of them.
pub fn all(host: &Host, subject: &Subject) -> Vec<HostCheck> {
    let directory = nearest(&host.path(&subject.data_dir));
    vec![
        filesystem(statfs(&directory).map(|stat| stat.f_type.cast_unsigned()).map_err(io::Error::from)),
        reflinks(share_a_block(&directory)),
        space(Room::of(&directory), subject.disk_reserve_mb),
        files(Room::of(&directory)),
        reachable(host, [&subject.data_dir, &subject.image_dir]),
        jail_mount(&host.path(&subject.data_dir)),
        jail_owner(host, subject),
    ]
}

/// The directory itself, or the one that it is going to be made in.
fn nearest(path: &Path) -> PathBuf {
    path.ancestors().find(|path| path.is_dir()).unwrap_or_else(|| Path::new("/")).to_owned()
}

/// Which filesystem the data directory is on.
pub fn filesystem(magic: io::Result<u64>) -> HostCheck {
    let finding = magic
        .map_err(|error| Finding::unknown(format!("the filesystem does not say: {error}")))
        .map(|magic| match FILESYSTEMS.into_iter().find(|(number, ..)| *number == magic) {
            Some((_, name, None)) => Finding::ok(name),
            Some((_, name, Some(against))) => Finding::warning(
                format!("{name}, {against}"),
                "put the data directory on XFS on a disk of this machine",
            ),
            None => Finding::ok(format!("filesystem {magic:#x}, which nobody here has tried")),
        });
    check("data-filesystem", "Filesystem of the data directory", BOTH, finding)
}

/// Whether copies share their blocks there.
pub fn reflinks(shared: io::Result<bool>) -> HostCheck {
    let finding = shared
        .map_err(|error| Finding::unknown(format!("cannot try it in the data directory: {error}")))
        .map(|is_shared| {
            if is_shared {
                return Finding::ok("copies share their blocks");
            }
            Finding::warning(
                "copies of disks and memory are written out, each as large as what it is of",
                "put the data directory on XFS (mkfs.xfs -m reflink=1), or start the agent with --data-image-mb",
            )
        });
    check("data-reflinks", "Copies that share blocks (reflinks)", BOTH, finding)
}

/// Tries it with two files that have no name, and are gone however this ends.
fn share_a_block(directory: &Path) -> io::Result<bool> {
    let nameless =
        || open(directory, OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC, Mode::RUSR | Mode::WUSR);
    let (mut from, to) = (File::from(nameless()?), nameless()?);
    from.write_all(&[1; 4096])?;
    match ioctl_ficlone(&to, &from) {
        Ok(()) => Ok(true),
        Err(Errno::OPNOTSUPP | Errno::NOTTY | Errno::INVAL) => Ok(false),
        Err(errno) => Err(errno.into()),
    }
}

/// What a filesystem has left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Room {
    /// Free space, MiB.
    pub free_mb: u64,
    /// Files that can be made; absent where nothing but space bounds them.
    pub files: Option<u64>,
}

impl Room {
    fn of(directory: &Path) -> io::Result<Self> {
        let stat = statvfs(directory)?;
        Ok(Self {
            free_mb: stat.blocks_available().saturating_mul(stat.fragment_size()) >> 20,
            files: (stat.files() > 0).then(|| stat.files_available()),
        })
    }
}

fn unmeasured(error: io::Error) -> Finding {
    Finding::unknown(format!("cannot measure the data directory's filesystem: {error}"))
}

/// Whether there is room for sandboxes; `reserve_mb` must stay free.
pub fn space(room: io::Result<Room>, reserve_mb: u64) -> HostCheck {
    let finding = room.map_err(unmeasured).map(|Room { free_mb, .. }| {
        let found = format!("{free_mb} MiB are free, of which {reserve_mb} must stay so");
        let remedy = "make room, or put the data directory on a larger disk";
        if free_mb < reserve_mb {
            Finding::problem(found, remedy)
        } else if free_mb - reserve_mb < AMPLE_MB {
            Finding::warning(found, remedy)
        } else {
            Finding::ok(found)
        }
    });
    check("data-space", "Space for sandboxes", BOTH, finding)
}

/// Whether there is room for their files.
pub fn files(room: io::Result<Room>) -> HostCheck {
    let finding = room.map_err(unmeasured).map(|room| match room.files {
        None => Finding::ok("as many files as there is space for"),
        Some(files) if files < AMPLE_FILES => Finding::warning(
            format!("{files} files more"),
            "remove what is not needed, or make the filesystem with more inodes",
        ),
        Some(files) => Finding::ok(format!("{files} files more")),
    });
    check("data-files", "Files for sandboxes (inodes)", BOTH, finding)
}

/// Whether VMs, which are users of their own, find the way to their disks.
pub fn reachable<'a>(host: &Host, directories: impl IntoIterator<Item = &'a PathBuf>) -> HostCheck {
    let finding = (|| {
        let mut closed = Vec::new();
        for directory in directories {
            for ancestor in directory.ancestors() {
                match fs::metadata(host.path(ancestor)) {
                    Ok(stat) if stat.permissions().mode() & 0o001 == 0 => closed.push(ancestor.to_owned()),
                    Err(error) if error.kind() != io::ErrorKind::NotFound => {
                        return Err(Finding::unknown(error));
                    }
                    // What is not there is made by the agent, open enough.
                    _ => {}
                }
            }
        }
        Ok(match closed.first() {
            None => Finding::ok("open to VMs' users"),
            Some(closed) => Finding::problem(
                format!("{} is closed to VMs, which run as users of their own", closed.display()),
                format!("chmod o+x {}, or choose another --data-dir or --image-dir", closed.display()),
            ),
        })
    })();
    check("data-reachable", "Way to the data and the templates", BOTH, finding)
}

/// Whether jails can be where they are to be: a program is run in each, and devices are made.
pub fn jail_mount(data_dir: &Path) -> HostCheck {
    let directory = nearest(data_dir);
    let finding = statvfs(&directory)
        .map_err(|errno| Finding::unknown(format!("cannot look at {}: {errno}", directory.display())))
        .map(|stat| judge_mount(data_dir, stat.flags()));
    check("jail-mount", "Filesystem of the jails", FIRECRACKER, finding)
}

fn judge_mount(data_dir: &Path, flags: FsFlags) -> Finding {
    let names = [(FsFlags::ST_NODEV, "nodev"), (FsFlags::ST_NOEXEC, "noexec"), (FsFlags::ST_RDONLY, "ro")];
    let names: Vec<_> =
        names.into_iter().filter(|(flag, _)| flags.contains(*flag)).map(|(_, name)| name).collect();
    if names.is_empty() {
        return Finding::ok("programs may run there, and devices be made");
    }
    Finding::problem(
        format!(
            "{} is on a filesystem that is mounted {}: jails have a program and devices",
            data_dir.display(),
            names.join(", ")
        ),
        "choose another --data-dir, or mount it without",
    )
}

/// Whether nobody but root can put something in the place of what the jailer trusts.
pub fn jail_owner(host: &Host, subject: &Subject) -> HostCheck {
    let finding = (|| {
        let programs =
            [&subject.firecracker, &subject.jailer].into_iter().filter_map(|named| host.program(named));
        let mut open = Vec::new();
        for path in programs.chain([host.path(&subject.data_dir)]) {
            for ancestor in path.ancestors().filter(|ancestor| ancestor.starts_with(host.path("/"))) {
                match fs::metadata(ancestor) {
                    Ok(stat) if is_open(stat.uid(), stat.mode()) => open.push(ancestor.to_owned()),
                    Err(error) if error.kind() != io::ErrorKind::NotFound => {
                        return Err(Finding::unknown(error));
                    }
                    _ => {}
                }
            }
        }
        open.sort_unstable();
        open.dedup();
        Ok(match open.first() {
            None => Finding::ok("root's alone"),
            Some(first) => Finding::warning(
                format!("others than root may write to {}, which the jailer trusts", first.display()),
                format!("chown root:root {0} && chmod go-w {0}", first.display()),
            ),
        })
    })();
    check("jail-owner", "Owner of jails and programs", FIRECRACKER, finding)
}

/// Whether somebody beside root may change it. In a directory with the sticky bit nobody removes what is another's.
fn is_open(uid: u32, mode: u32) -> bool {
    const STICKY: u32 = 0o1000;
    uid != 0 || (mode & 0o022 != 0 && mode & STICKY == 0)
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;
    use oc_proto::v1::HostCheckStatus::{Ok as Fine, Problem, Unknown, Warning};

    use super::{super::host::made_up::Machine, *};

    fn broken<T>() -> io::Result<T> {
        Err(io::ErrorKind::PermissionDenied.into())
    }

    #[test]
    fn filesystems_are_named() {
        for (magic, name, status) in [
            (0x5846_5342, "xfs", Fine),
            (0xef53, "ext4", Fine),
            (0x0102_1994, "tmpfs", Warning),
            (0x1234, "0x1234", Fine),
        ] {
            let told = filesystem(Ok(magic));
            assert!(told.status() == status && told.found.contains(name), "{told:?}");
        }
        assert_eq!(filesystem(broken()).status(), Unknown);
    }

    #[test]
    fn copies_that_are_written_out_are_warned_of() {
        assert_eq!(
            [Ok(true), Ok(false), broken()].map(|shared| reflinks(shared).status()),
            [Fine, Warning, Unknown]
        );
        let directory = tempfile::tempdir().unwrap();
        share_a_block(directory.path()).unwrap();
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0, "nothing is left");
        assert_eq!(nearest(&directory.path().join("not/yet")), directory.path());
    }

    #[test]
    fn room_is_measured() {
        let room = |free_mb, files| Ok(Room { free_mb, files });
        let spaces = [room(100, None), room(3000, None), room(20_000, None), broken()];
        assert_eq!(spaces.map(|room| space(room, 2048).status()), [Problem, Warning, Fine, Unknown]);
        let inodes = [room(0, None), room(0, Some(10)), room(0, Some(1 << 20)), broken()];
        assert_eq!(inodes.map(|room| files(room).status()), [Fine, Warning, Fine, Unknown]);
        assert!(Room::of(Path::new("/")).is_ok());
    }

    #[test]
    fn a_closed_directory_on_the_way_is_a_problem() {
        let machine = Machine::with([("home/me/data/x", ""), ("images/x", "")]);
        let at = |name: &str, mode| {
            fs::set_permissions(machine.root().join(name), std::fs::Permissions::from_mode(mode)).unwrap();
        };
        let told = || reachable(&machine.host(), [&"/home/me/data".into(), &"/images/later".into()]);
        for name in ["", "home", "home/me", "home/me/data", "images"] {
            at(name, 0o711);
        }
        assert_eq!(told().status(), Fine, "{:?}", told());
        at("home/me", 0o700);
        assert_eq!(told().status(), Problem);
        assert!(told().found.starts_with("/home/me is closed"), "{}", told().found);
    }

    #[test]
    fn a_jail_has_devices_and_a_program() {
        let status = |flags| check("x", "X", BOTH, Ok(judge_mount(Path::new("/srv"), flags))).status();
        assert_eq!(status(FsFlags::ST_NOSUID), Fine);
        assert_eq!(status(FsFlags::ST_NODEV | FsFlags::ST_NOSUID), Problem);
        assert_ne!(jail_mount(Path::new("/not/yet")).status(), Unknown);
    }

    #[test]
    fn what_the_jailer_trusts_is_roots() {
        assert!(!is_open(0, 0o100_755) && !is_open(0, 0o041_777));
        assert!(is_open(0, 0o040_775) && is_open(7, 0o040_700));
        let machine = Machine::with([("srv/data/x", "")]);
        machine.program("firecracker", "");
        for (name, mode) in [("", 0o755), ("srv", 0o755), ("srv/data", 0o777), ("bin", 0o755)] {
            fs::set_permissions(machine.root().join(name), std::fs::Permissions::from_mode(mode)).unwrap();
        }
        let subject = Subject::try_parse_from(["doctor", "--data-dir", "/srv/data"]).unwrap();
        let told = jail_owner(&machine.host(), &subject);
        assert!(told.status() == Warning && told.remedy.contains("srv/data"), "{told:?}");
        fs::set_permissions(machine.root().join("srv/data"), std::fs::Permissions::from_mode(0o755)).unwrap();
        assert_eq!(jail_owner(&machine.host(), &subject).status(), Fine);
    }
}
