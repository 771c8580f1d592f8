//! One program in a new process, as another user, without a copy of this one.
//!
//! `fork` would copy page tables, and every page that is written afterwards: most of the cost of a short command in an
//! emulated guest. `posix_spawn` shares the memory until `exec`, but changes no user. So the *thread* takes on the
//! user's credentials for the time of the call: in Linux they belong to a thread, and only the C library's wrappers make
//! all threads follow (credentials(7), nptl(7)). What is spawned inherits them, and its `exec` drops the saved user
//! ID by which the thread finds back.
#![allow(unsafe_code)]

use std::{
    ffi::{CStr, CString, OsStr},
    io,
    mem::MaybeUninit,
    os::{
        fd::{AsRawFd as _, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    path::Path,
    ptr,
};

use nix::unistd::{AccessFlags, Uid, eaccess};

use crate::users::User;

const SHELL: &CStr = c"/bin/sh";
/// `POSIX_SPAWN_SETSID` (spawn.h of the GNU C library).
const SETSID: libc::c_int = 0x80;

/// A program to run.
#[derive(Debug)]
pub struct Program<'a> {
    /// Its name: looked up in the `PATH` of `envs` unless it has a slash.
    pub name: &'a str,
    /// Its arguments, its own name first.
    pub args: &'a [CString],
    /// Its environment, `NAME=value`.
    pub envs: &'a [CString],
    /// Where names are looked up, separated by colons.
    pub path: &'a str,
    /// Where it starts.
    pub directory: &'a Path,
    /// Who it runs as; only root can give it another user.
    pub user: &'a User,
    /// Standard input, output and error.
    pub streams: Streams<'a>,
}

/// What a program's standard input, output and error are.
#[derive(Clone, Copy, Debug)]
pub enum Streams<'a> {
    /// These.
    Three(&'a [OwnedFd; 3]),
    /// The terminal at this path, which is the program's controlling terminal.
    Terminal(&'a Path),
}

/// Why a program does not run.
#[derive(Debug)]
pub enum SpawnError {
    /// The user may not work in that directory.
    Directory(io::Error),
    /// The program itself; `NotFound` if there is none.
    Program(io::Error),
}

impl From<io::Error> for SpawnError {
    fn from(error: io::Error) -> Self {
        Self::Program(error)
    }
}

impl Program<'_> {
    /// Starts it, as the leader of a session and a process group. Returns its process ID.
    ///
    /// # Errors
    ///
    /// What the system said.
    pub fn spawn(&self) -> Result<libc::pid_t, SpawnError> {
        let actions = FileActions::new(self.directory, self.streams)?;
        let attributes = Attributes::new()?;
        let _user = Uid::effective().is_root().then(|| Disguise::put_on(self.user)).transpose()?;
        // As the user: what root sees there says nothing.
        eaccess(self.directory, AccessFlags::X_OK).map_err(|error| SpawnError::Directory(error.into()))?;
        self.find_and_start(&actions, &attributes).map_err(SpawnError::Program)
    }

    fn find_and_start(&self, actions: &FileActions, attributes: &Attributes) -> io::Result<libc::pid_t> {
        if self.name.contains('/') {
            return self.try_at(&c_string(self.name.as_bytes())?, actions, attributes);
        }
        let mut denied = None;
        for directory in self.path.split(':').filter(|directory| !directory.is_empty()) {
            let candidate = c_string(Path::new(directory).join(self.name).as_os_str().as_bytes())?;
            match self.try_at(&candidate, actions, attributes) {
                Err(error) if error.kind() == io::ErrorKind::PermissionDenied => denied = Some(error),
                Err(error)
                    if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {}
                done => return done,
            }
        }
        Err(denied.unwrap_or_else(|| io::ErrorKind::NotFound.into()))
    }

    fn try_at(&self, file: &CStr, actions: &FileActions, attributes: &Attributes) -> io::Result<libc::pid_t> {
        // Looking is much cheaper than a process that finds nothing.
        self.directory.join(OsStr::from_bytes(file.to_bytes())).metadata()?;
        match spawn(file, self.args, self.envs, actions, attributes) {
            // A script without `#!` is the shell's, as with execvp(3).
            Err(error) if error.raw_os_error() == Some(libc::ENOEXEC) => {
                let mut args = vec![SHELL.to_owned(), file.to_owned()];
                args.extend(self.args.iter().skip(1).cloned());
                spawn(SHELL, &args, self.envs, actions, attributes)
            }
            done => done,
        }
    }
}

/// A C string.
///
/// # Errors
///
/// If there is a NUL inside.
pub fn c_string(bytes: &[u8]) -> io::Result<CString> {
    CString::new(bytes).map_err(|_| io::Error::new(io::ErrorKind::InvalidInput, "it has a NUL"))
}

fn spawn(
    file: &CStr,
    args: &[CString],
    envs: &[CString],
    actions: &FileActions,
    attributes: &Attributes,
) -> io::Result<libc::pid_t> {
    let pointers = |strings: &[CString]| -> Vec<*mut libc::c_char> {
        strings.iter().map(|string| string.as_ptr().cast_mut()).chain([ptr::null_mut()]).collect()
    };
    let (args, envs) = (pointers(args), pointers(envs));
    let mut id = 0;
    // SAFETY: both lists end with a null pointer and outlive the call, which does not write through them, as do the
    // actions and attributes, which are initialised.
    let code = unsafe {
        libc::posix_spawn(
            &raw mut id,
            file.as_ptr(),
            actions.0.as_ptr(),
            attributes.0.as_ptr(),
            args.as_ptr(),
            envs.as_ptr(),
        )
    };
    checked(code)?;
    Ok(id)
}

/// `posix_spawn` and its kin return an error number.
fn checked(code: libc::c_int) -> io::Result<()> {
    if code == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(code)) }
}

/// What happens to descriptors and directory in the new process.
struct FileActions(MaybeUninit<libc::posix_spawn_file_actions_t>);

impl FileActions {
    fn new(directory: &Path, streams: Streams<'_>) -> io::Result<Self> {
        let mut actions = MaybeUninit::uninit();
        // SAFETY: it initialises what it is given.
        checked(unsafe { libc::posix_spawn_file_actions_init(actions.as_mut_ptr()) })?;
        let mut actions = Self(actions);
        let directory = c_string(directory.as_os_str().as_bytes())?;
        // SAFETY: initialised above; the path is copied.
        checked(unsafe {
            libc::posix_spawn_file_actions_addchdir_np(actions.0.as_mut_ptr(), directory.as_ptr())
        })?;
        match streams {
            Streams::Three(streams) => {
                for (number, stream) in (0..).zip(streams) {
                    actions.duplicate(stream.as_raw_fd(), number)?;
                }
            }
            // The first terminal that the leader of a new session opens becomes its own (tty_ioctl(4)).
            Streams::Terminal(path) => {
                let path = c_string(path.as_os_str().as_bytes())?;
                // SAFETY: initialised above; the path is copied.
                checked(unsafe {
                    libc::posix_spawn_file_actions_addopen(
                        actions.0.as_mut_ptr(),
                        0,
                        path.as_ptr(),
                        libc::O_RDWR,
                        0,
                    )
                })?;
                actions.duplicate(0, 1)?;
                actions.duplicate(0, 2)?;
            }
        }
        Ok(actions)
    }

    fn duplicate(&mut self, from: libc::c_int, to: libc::c_int) -> io::Result<()> {
        // SAFETY: initialised in `new`. Every other descriptor of ours closes at exec.
        checked(unsafe { libc::posix_spawn_file_actions_adddup2(self.0.as_mut_ptr(), from, to) })
    }
}

impl Drop for FileActions {
    fn drop(&mut self) {
        // SAFETY: initialised in `new`, and not used again.
        unsafe { libc::posix_spawn_file_actions_destroy(self.0.as_mut_ptr()) };
    }
}

/// A session of its own, and signals as a program expects them: none blocked, and a broken pipe ends it.
struct Attributes(MaybeUninit<libc::posix_spawnattr_t>);

impl Attributes {
    fn new() -> io::Result<Self> {
        let mut attributes = MaybeUninit::uninit();
        // SAFETY: it initialises what it is given.
        checked(unsafe { libc::posix_spawnattr_init(attributes.as_mut_ptr()) })?;
        let mut attributes = Self(attributes);
        let mut none = MaybeUninit::uninit();
        let mut ignored = MaybeUninit::uninit();
        let flags = SETSID | libc::POSIX_SPAWN_SETSIGMASK | libc::POSIX_SPAWN_SETSIGDEF;
        // SAFETY: the sets are initialised before they are read, and copied; the attributes were initialised above.
        unsafe {
            libc::sigemptyset(none.as_mut_ptr());
            libc::sigemptyset(ignored.as_mut_ptr());
            libc::sigaddset(ignored.as_mut_ptr(), libc::SIGPIPE);
            checked(libc::posix_spawnattr_setsigmask(attributes.0.as_mut_ptr(), none.as_ptr()))?;
            checked(libc::posix_spawnattr_setsigdefault(attributes.0.as_mut_ptr(), ignored.as_ptr()))?;
            // The flags fit: each is a bit below 0x100 (spawn.h).
            checked(libc::posix_spawnattr_setflags(attributes.0.as_mut_ptr(), flags as libc::c_short))?;
        }
        Ok(attributes)
    }
}

impl Drop for Attributes {
    fn drop(&mut self) {
        // SAFETY: initialised in `new`, and not used again.
        unsafe { libc::posix_spawnattr_destroy(self.0.as_mut_ptr()) };
    }
}

/// This thread as another user, until it is dropped.
struct Disguise;

impl Disguise {
    fn put_on(user: &User) -> io::Result<Self> {
        // Dropped on any error, so that the thread finds back from half-way too.
        let disguise = Self;
        set_groups(&user.groups)?;
        set_ids(libc::SYS_setresgid, user.gid, user.gid, 0)?;
        set_ids(libc::SYS_setresuid, user.uid, user.uid, 0)?;
        Ok(disguise)
    }
}

impl Drop for Disguise {
    fn drop(&mut self) {
        let back = set_ids(libc::SYS_setresuid, 0, 0, 0)
            .and_then(|()| set_ids(libc::SYS_setresgid, 0, 0, 0))
            .and_then(|()| set_groups(&[]));
        if back.is_err() {
            // The kernel always lets a thread return to its saved user. One that cannot must not serve on.
            std::process::abort();
        }
    }
}

fn set_groups(groups: &[libc::gid_t]) -> io::Result<()> {
    // SAFETY: the kernel reads as many numbers as are there.
    system(unsafe { libc::syscall(libc::SYS_setgroups, groups.len(), groups.as_ptr()) })
}

/// Sets the real, effective and saved ID of this thread only.
fn set_ids(call: libc::c_long, real: u32, effective: u32, saved: u32) -> io::Result<()> {
    // SAFETY: it takes three numbers.
    system(unsafe { libc::syscall(call, real, effective, saved) })
}

fn system(result: libc::c_long) -> io::Result<()> {
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use std::{fs, io::Read as _, os::unix::fs::PermissionsExt as _};

    use super::*;

    /// Nobody, or who we are if we are not root.
    fn user() -> User {
        let root = Uid::effective().is_root();
        let uid = if root { 65534 } else { Uid::effective().as_raw() };
        User {
            name: "somebody".into(),
            uid,
            gid: uid,
            groups: vec![uid],
            home: "/".into(),
            shell: "/bin/sh".into(),
        }
    }

    /// Its exit code and output.
    fn run(directory: &Path, name: &str, args: &[&str]) -> Result<(i32, String), SpawnError> {
        let strings = |texts: &[&str]| -> Vec<CString> {
            texts.iter().map(|text| c_string(text.as_bytes()).unwrap()).collect()
        };
        let (mut reader, writer) = io::pipe().unwrap();
        let null = || OwnedFd::from(fs::File::options().read(true).write(true).open("/dev/null").unwrap());
        let streams = [null(), writer.into(), null()];
        let program = Program {
            name,
            args: &strings(&[&[name], args].concat()),
            envs: &strings(&["PATH=/usr/bin:/bin", "A=b"]),
            path: "/nowhere::/usr/bin:/bin",
            directory,
            user: &user(),
            streams: Streams::Three(&streams),
        };
        crate::children::reap_in_tests();
        let mut process = crate::children::start(|| program.spawn())?;
        drop(streams);
        let mut output = String::new();
        reader.read_to_string(&mut output).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        Ok((runtime.block_on(process.exit()), output))
    }

    /// A directory that anybody may enter, with a script that names no interpreter.
    fn place() -> tempfile::TempDir {
        let place = tempfile::tempdir().unwrap();
        fs::set_permissions(place.path(), fs::Permissions::from_mode(0o755)).unwrap();
        fs::write(place.path().join("script"), "echo $0 $1 $A; exit 7\n").unwrap();
        fs::set_permissions(place.path().join("script"), fs::Permissions::from_mode(0o755)).unwrap();
        place
    }

    #[test]
    fn a_program_has_its_user_its_directory_and_nothing_else_of_ours() {
        let place = place();
        let (_, uid) = run(place.path(), "id", &["-u"]).unwrap();
        assert_eq!(uid.trim(), user().uid.to_string());
        // Whoever asks is as before.
        assert_eq!(Uid::effective(), nix::unistd::geteuid());
        let (_, directory) = run(place.path(), "pwd", &[]).unwrap();
        assert_eq!(Path::new(directory.trim()), place.path().canonicalize().unwrap());
        let (_, environment) = run(place.path(), "env", &[]).unwrap();
        assert_eq!(environment, "PATH=/usr/bin:/bin\nA=b\n");
        let (_, saved) = run(place.path(), "grep", &["^Uid", "/proc/self/status"]).unwrap();
        assert!(saved.split_whitespace().skip(1).all(|uid| uid == user().uid.to_string()), "{saved}");
    }

    #[test]
    fn a_relative_name_starts_at_the_directory_and_a_plain_script_is_the_shells() {
        let place = place();
        let ran = loop {
            match run(place.path(), "./script", &["x"]) {
                // Another test's child has it open for writing until it is what it is to be.
                Err(SpawnError::Program(error)) if error.kind() == io::ErrorKind::ExecutableFileBusy => {}
                ran => break ran.unwrap(),
            }
        };
        assert_eq!(ran, (7, "./script x b\n".into()));
    }

    #[test]
    fn what_cannot_be_run_says_why() {
        let place = place();
        let kind = |result: Result<(i32, String), SpawnError>| match result {
            Err(SpawnError::Program(error)) => error.kind(),
            other => panic!("{other:?}"),
        };
        assert_eq!(kind(run(place.path(), "no-such-program", &[])), io::ErrorKind::NotFound);
        assert_eq!(kind(run(place.path(), "./none", &[])), io::ErrorKind::NotFound);
        assert_eq!(kind(run(place.path(), "/etc/passwd", &[])), io::ErrorKind::PermissionDenied);
        let closed = tempfile::tempdir().unwrap();
        fs::set_permissions(closed.path(), fs::Permissions::from_mode(0o700)).unwrap();
        if Uid::effective().is_root() {
            let refused = run(closed.path(), "true", &[]);
            assert!(matches!(refused, Err(SpawnError::Directory(_))), "{refused:?}");
        }
    }
}
