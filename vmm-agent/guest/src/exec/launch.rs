//! From a request to a process.
use std::{
    collections::HashMap,
    ffi::CString,
    fs::File,
    io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    sync::Arc,
};

use nix::{
    fcntl::{FcntlArg, fcntl},
    unistd::{Gid, Uid, fchown},
};
use tokio::net::unix::pipe;
use tonic::Status;

use super::{
    spawn::{Program, SpawnError, Streams, c_string},
    terminal::{Size, Terminal},
};
use crate::{
    children::{self, Process},
    refusal::Refusal,
    users::{self, User},
};

const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
const SHELL: &str = "/bin/sh";
/// What terminals of today understand (terminfo has it on every Debian).
const TERM: &str = "xterm-256color";
/// Name and arguments of a command, bytes.
const MAX_ARGS: usize = 128 << 10;
/// Environment of a request, bytes.
const MAX_ENVS: usize = 128 << 10;
/// What a pipe for output holds, bytes.
const PIPE: i32 = 256 << 10;

/// What is to be run.
#[derive(Clone, Debug)]
pub struct Invocation {
    /// How.
    pub program: What,
    /// The request's environment.
    pub envs: HashMap<String, String>,
    /// Where it starts; the user's home where empty.
    pub cwd: String,
    /// Who runs it; the default user where empty.
    pub user: String,
}

/// How it is run.
#[derive(Clone, Debug)]
pub enum What {
    /// A script for the shell.
    Script(String),
    /// A program and its arguments, without its own name.
    Program(String, Vec<String>),
    /// The user's own shell, as login(1) starts it.
    LoginShell,
}

/// What the process reads from and writes to.
#[derive(Clone, Copy, Debug)]
pub enum Wanted {
    /// Pipes, and one for standard input only if there is something to read.
    Pipes {
        /// Whether there is.
        stdin: bool,
    },
    /// A terminal of this size.
    Terminal(Size),
}

/// Our ends of that.
#[derive(Debug)]
pub enum Channels {
    /// Pipes.
    Pipes {
        /// `None` where there is nothing to write.
        stdin: Option<pipe::Sender>,
        /// What it writes to standard output.
        stdout: pipe::Receiver,
        /// What it writes to standard error.
        stderr: pipe::Receiver,
    },
    /// The terminal.
    Terminal(Arc<Terminal>),
}

impl Channels {
    /// The terminal.
    pub fn terminal(&self) -> Option<Arc<Terminal>> {
        match self {
            Self::Terminal(terminal) => Some(Arc::clone(terminal)),
            Self::Pipes { .. } => None,
        }
    }
}

impl What {
    /// A command as `Run` takes it: without arguments it is a script.
    pub fn of_command(cmd: String, args: Vec<String>) -> Self {
        if args.is_empty() { Self::Script(cmd) } else { Self::Program(cmd, args) }
    }
}

impl Invocation {
    /// Refuses what is too large or makes no sense.
    ///
    /// # Errors
    ///
    /// `INVALID_ARGUMENT`.
    pub fn check(&self) -> Result<(), Status> {
        let invalid = |text: String| Err(Refusal::InvalidArgument.status(text));
        let (name, args): (&str, &[String]) = match &self.program {
            What::Script(script) => (script, &[]),
            What::Program(name, args) => (name, args),
            What::LoginShell => (SHELL, &[]),
        };
        if name.is_empty() {
            return invalid("cmd is empty".into());
        }
        let bytes = name.len() + args.iter().map(|arg| arg.len() + 1).sum::<usize>();
        if bytes > MAX_ARGS {
            return invalid(format!("cmd and args are {bytes} bytes; at most {MAX_ARGS} are taken"));
        }
        let envs: usize = self.envs.iter().map(|(key, value)| key.len() + value.len() + 2).sum();
        if envs > MAX_ENVS {
            return invalid(format!("envs are {envs} bytes; at most {MAX_ENVS} are taken"));
        }
        if self.envs.keys().any(|key| key.is_empty() || key.contains('=')) {
            return invalid("a name in envs is empty or has a '='".into());
        }
        Ok(())
    }

    /// Starts it, with `envs` below its own environment. Blocks until it runs.
    ///
    /// # Errors
    ///
    /// Why it could not be started.
    pub fn launch(
        &self,
        envs: HashMap<String, String>,
        wanted: Wanted,
    ) -> Result<(Process, Channels), Status> {
        let user = user(&self.user)?;
        let directory = directory(&self.cwd, &user)?;
        let (name, args) = self.command(&user);
        let failed = |error: io::Error| refused(name, &error);
        let invalid = |error: io::Error| Refusal::InvalidArgument.status(format!("{name}: {error}"));
        let args = c_strings(args.iter().map(|arg| arg.as_bytes())).map_err(invalid)?;
        let envs = self.environment(envs, &user, wanted);
        let path = envs.get("PATH").cloned().unwrap_or_default();
        let envs = c_strings(envs.iter().map(|(name, value)| format!("{name}={value}"))).map_err(invalid)?;
        let start = |streams: Streams<'_>| {
            let program = Program {
                name,
                args: &args,
                envs: &envs,
                path: &path,
                directory: &directory,
                user: &user,
                streams,
            };
            children::start(|| program.spawn()).map_err(|error| match error {
                SpawnError::Program(error) => refused(name, &error),
                SpawnError::Directory(error) => bad_directory(&directory, &error),
            })
        };
        match wanted {
            Wanted::Pipes { stdin } => {
                let (theirs, channels) = pipes(stdin, &user).map_err(failed)?;
                Ok((start(Streams::Three(&theirs))?, channels))
            }
            Wanted::Terminal(size) => {
                let terminal = Terminal::open(size, &user).map_err(failed)?;
                Ok((start(Streams::Terminal(terminal.path()))?, Channels::Terminal(Arc::new(terminal))))
            }
        }
    }

    /// What is run, and its arguments, its own name first.
    fn command<'a>(&'a self, user: &'a User) -> (&'a str, Vec<String>) {
        match &self.program {
            What::Script(script) => (SHELL, vec!["sh".into(), "-c".into(), script.clone()]),
            What::Program(name, args) => (name, std::iter::once(name).chain(args).cloned().collect()),
            What::LoginShell => {
                let shell = if user.shell.is_empty() { SHELL } else { &user.shell };
                let name = Path::new(shell).file_name().unwrap_or_default().to_string_lossy();
                (shell, vec![format!("-{name}")])
            }
        }
    }

    /// What a login gives, below what the sandbox has, below what the request has.
    fn environment(
        &self,
        envs: HashMap<String, String>,
        user: &User,
        wanted: Wanted,
    ) -> HashMap<String, String> {
        let login = [
            ("PATH", PATH),
            ("LANG", "C.UTF-8"),
            ("USER", &user.name),
            ("LOGNAME", &user.name),
            ("SHELL", &user.shell),
            ("HOME", &user.home),
        ];
        let terminal = matches!(wanted, Wanted::Terminal(_)).then_some(("TERM", TERM));
        let pairs = login.into_iter().chain(terminal);
        let mut all: HashMap<String, String> =
            pairs.map(|(name, value)| (name.to_owned(), value.to_owned())).collect();
        all.extend(envs);
        all.extend(self.envs.clone());
        all
    }
}

/// Their ends, and ours.
fn pipes(stdin: bool, user: &User) -> io::Result<([OwnedFd; 3], Channels)> {
    // Programs open /dev/stdout and its like anew, which is for the owner alone.
    let theirs = |end: OwnedFd| -> io::Result<OwnedFd> {
        fchown(&end, Some(Uid::from_raw(user.uid)), Some(Gid::from_raw(user.gid)))?;
        Ok(end)
    };
    let (stdin, ours) = if stdin {
        let (writer, reader) = pipe::pipe()?;
        (theirs(reader.into_blocking_fd()?)?, Some(writer))
    } else {
        (File::open("/dev/null")?.into(), None)
    };
    let output = || -> io::Result<(OwnedFd, pipe::Receiver)> {
        let (writer, reader) = pipe::pipe()?;
        // The larger, the fewer turns between the two sides of it; one that may not be so large is good, too.
        let _ = fcntl(&reader, FcntlArg::F_SETPIPE_SZ(PIPE));
        Ok((theirs(writer.into_blocking_fd()?)?, reader))
    };
    let ((stdout, out), (stderr, err)) = (output()?, output()?);
    Ok(([stdin, stdout, stderr], Channels::Pipes { stdin: ours, stdout: out, stderr: err }))
}

fn c_strings<T: AsRef<[u8]>>(texts: impl Iterator<Item = T>) -> io::Result<Vec<CString>> {
    texts.map(|text| c_string(text.as_ref())).collect()
}

fn user(name: &str) -> Result<User, Status> {
    let name = if name.is_empty() { users::DEFAULT } else { name };
    match users::find(name) {
        Ok(Some(user)) => Ok(user),
        Ok(None) => Err(Refusal::UnknownUser.status(format!("the sandbox has no user {name:?}"))),
        Err(error) => Err(Refusal::Internal.status(format!("/etc/passwd: {error}"))),
    }
}

/// Where the command starts.
fn directory(cwd: &str, user: &User) -> Result<PathBuf, Status> {
    if cwd.contains('\0') {
        return Err(Refusal::InvalidPath.status("cwd has a NUL"));
    }
    let directory = Path::new(&user.home).join(cwd);
    match directory.metadata() {
        Ok(found) if found.is_dir() => Ok(directory),
        // A user without a home starts at the root, as with login(1).
        _ if cwd.is_empty() => Ok(Path::new("/").into()),
        Ok(_) => Err(Refusal::InvalidPath.status(format!("cwd {} is no directory", directory.display()))),
        Err(error) => Err(bad_directory(&directory, &error)),
    }
}

fn bad_directory(directory: &Path, error: &io::Error) -> Status {
    Refusal::InvalidPath.status(format!("cwd {}: {error}", directory.display()))
}

/// Why nothing was started.
fn refused(name: &str, error: &io::Error) -> Status {
    let refusal = match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory | io::ErrorKind::InvalidFilename => {
            Refusal::CommandNotFound
        }
        io::ErrorKind::PermissionDenied | io::ErrorKind::IsADirectory | io::ErrorKind::ExecutableFileBusy => {
            Refusal::CommandNotExecutable
        }
        io::ErrorKind::InvalidInput | io::ErrorKind::ArgumentListTooLong => Refusal::InvalidArgument,
        io::ErrorKind::WouldBlock | io::ErrorKind::OutOfMemory => Refusal::Overloaded,
        _ => match error.raw_os_error() {
            Some(libc::ENOEXEC) => Refusal::CommandNotExecutable,
            Some(libc::ELOOP) => Refusal::CommandNotFound,
            Some(libc::EMFILE | libc::ENFILE) => Refusal::Overloaded,
            _ => Refusal::Internal,
        },
    };
    refusal.status(format!("{name}: {error}"))
}
