//! From a request to a process.
use std::{
    collections::HashMap,
    ffi::CString,
    fs::File,
    io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
};

use oc_proto::v1::RunRequest;
use tokio::net::unix::pipe;
use tonic::Status;

use super::spawn::{Program, SpawnError, c_string};
use crate::{
    children::{self, Process},
    refusal::Refusal,
    users::{self, User},
};

const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
const SHELL: &str = "/bin/sh";

/// A process and its ends of the pipes.
#[derive(Debug)]
pub struct Launched {
    /// The process.
    pub process: Process,
    /// `None` where there is nothing to write.
    pub stdin: Option<pipe::Sender>,
    /// What it writes to standard output.
    pub stdout: pipe::Receiver,
    /// What it writes to standard error.
    pub stderr: pipe::Receiver,
}

/// Starts the command of `request`, with `envs` below its own environment. Blocks until it runs.
///
/// # Errors
///
/// Why it could not be started.
pub fn launch(request: &RunRequest, envs: HashMap<String, String>) -> Result<Launched, Status> {
    let user = user(&request.user)?;
    let directory = directory(&request.cwd, &user)?;
    let failed = |error: io::Error| refused(request, &error);
    let invalid = |error: io::Error| Refusal::InvalidArgument.status(format!("{}: {error}", request.cmd));
    let (name, args) = command(request);
    let args = c_strings(args.iter().map(|arg| arg.as_bytes())).map_err(invalid)?;
    let envs = environment(request, envs, &user);
    let path = envs.get("PATH").cloned().unwrap_or_default();
    let envs = c_strings(envs.iter().map(|(name, value)| format!("{name}={value}"))).map_err(invalid)?;
    let (stdin, ours) = if request.stdin.is_empty() {
        (File::open("/dev/null").map_err(failed)?.into(), None)
    } else {
        let (writer, reader) = pipe::pipe().map_err(failed)?;
        (reader.into_blocking_fd().map_err(failed)?, Some(writer))
    };
    let output = || -> io::Result<(OwnedFd, pipe::Receiver)> {
        let (writer, reader) = pipe::pipe()?;
        Ok((writer.into_blocking_fd()?, reader))
    };
    let ((stdout, out), (stderr, err)) = (output().map_err(failed)?, output().map_err(failed)?);
    let streams = [stdin, stdout, stderr];
    let program = Program {
        name,
        args: &args,
        envs: &envs,
        path: &path,
        directory: &directory,
        user: &user,
        streams: &streams,
    };
    let process = children::start(|| program.spawn()).map_err(|error| match error {
        SpawnError::Program(error) => refused(request, &error),
        SpawnError::Directory(error) => bad_directory(&directory, &error),
    })?;
    Ok(Launched { process, stdin: ours, stdout: out, stderr: err })
}

/// What is run, and its arguments, its own name first.
fn command(request: &RunRequest) -> (&str, Vec<&str>) {
    if request.args.is_empty() {
        (SHELL, vec!["sh", "-c", &request.cmd])
    } else {
        let args = std::iter::once(&request.cmd).chain(&request.args);
        (&request.cmd, args.map(String::as_str).collect())
    }
}

/// What a login gives, below what the sandbox has, below what the request has.
fn environment(request: &RunRequest, envs: HashMap<String, String>, user: &User) -> HashMap<String, String> {
    let login = [
        ("PATH", PATH),
        ("LANG", "C.UTF-8"),
        ("USER", &user.name),
        ("LOGNAME", &user.name),
        ("SHELL", &user.shell),
        ("HOME", &user.home),
    ];
    let mut all: HashMap<String, String> =
        login.map(|(name, value)| (name.to_owned(), value.to_owned())).into();
    all.extend(envs);
    all.extend(request.envs.clone());
    all
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
fn refused(request: &RunRequest, error: &io::Error) -> Status {
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
    refusal.status(format!("{}: {error}", request.cmd))
}
