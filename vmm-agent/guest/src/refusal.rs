//! Why a call is refused: the reasons of `docs/errors.md` that a guest gives.

use std::{collections::HashMap, io};

use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt as _};

/// Longest message, bytes.
const MAX_MESSAGE: usize = 512;
/// `domain` of every `google.rpc.ErrorInfo` of ours.
const DOMAIN: &str = "oc";

/// A stable reason; `oc-mesh` has the whole table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The request is malformed.
    InvalidArgument,
    /// The path cannot be used.
    InvalidPath,
    /// There is no such user.
    UnknownUser,
    /// There is no such command.
    CommandNotFound,
    /// It may not be executed.
    CommandNotExecutable,
    /// There is no such session.
    SessionNotFound,
    /// The session has ended.
    SessionEnded,
    /// As many sessions run as may.
    TooManySessions,
    /// The session has no terminal.
    NoTerminal,
    /// Another connection goes on with this one's place.
    AttachedElsewhere,
    /// The template has no agent.
    AgentNotInstalled,
    /// Nobody listens on that port.
    PortNotListening,
    /// The connection to the port broke.
    PortReset,
    /// No room for more watches.
    TooManyWatches,
    /// There is no such file or directory.
    FileNotFound,
    /// Something else stands there.
    FileExists,
    /// It is no regular file.
    NotAFile,
    /// It is no directory.
    NotADirectory,
    /// The writable layer is full.
    GuestDiskFull,
    /// Too many entries.
    DirectoryTooLarge,
    /// Too much at once.
    Overloaded,
    /// Something broke in the guest.
    Internal,
}

impl Refusal {
    /// The error as it goes out.
    pub fn status(self, message: impl Into<String>) -> Status {
        let (reason, code) = self.names();
        let details = ErrorDetails::with_error_info(reason, DOMAIN, HashMap::new());
        let mut message: String = message.into();
        // It travels in a header, twice, and the host takes no long ones.
        if message.len() > MAX_MESSAGE {
            let end = (0..=MAX_MESSAGE).rev().find(|&end| message.is_char_boundary(end)).unwrap_or(0);
            message.truncate(end);
            message.push('…');
        }
        Status::with_error_details(code, message, details)
    }

    /// The reason's name and the gRPC code that goes with it.
    pub fn names(self) -> (&'static str, Code) {
        match self {
            Self::InvalidArgument => ("INVALID_ARGUMENT", Code::InvalidArgument),
            Self::InvalidPath => ("INVALID_PATH", Code::InvalidArgument),
            Self::UnknownUser => ("UNKNOWN_USER", Code::InvalidArgument),
            Self::CommandNotFound => ("COMMAND_NOT_FOUND", Code::NotFound),
            Self::CommandNotExecutable => ("COMMAND_NOT_EXECUTABLE", Code::PermissionDenied),
            Self::SessionNotFound => ("SESSION_NOT_FOUND", Code::NotFound),
            Self::SessionEnded => ("SESSION_ENDED", Code::FailedPrecondition),
            Self::TooManySessions => ("TOO_MANY_SESSIONS", Code::ResourceExhausted),
            Self::NoTerminal => ("NO_TERMINAL", Code::FailedPrecondition),
            Self::AttachedElsewhere => ("ATTACHED_ELSEWHERE", Code::Aborted),
            Self::AgentNotInstalled => ("AGENT_NOT_INSTALLED", Code::FailedPrecondition),
            Self::PortNotListening => ("PORT_NOT_LISTENING", Code::FailedPrecondition),
            Self::PortReset => ("PORT_RESET", Code::Aborted),
            Self::TooManyWatches => ("TOO_MANY_WATCHES", Code::ResourceExhausted),
            Self::FileNotFound => ("FILE_NOT_FOUND", Code::NotFound),
            Self::FileExists => ("FILE_EXISTS", Code::AlreadyExists),
            Self::NotAFile => ("NOT_A_FILE", Code::FailedPrecondition),
            Self::NotADirectory => ("NOT_A_DIRECTORY", Code::FailedPrecondition),
            Self::GuestDiskFull => ("GUEST_DISK_FULL", Code::ResourceExhausted),
            Self::DirectoryTooLarge => ("DIRECTORY_TOO_LARGE", Code::ResourceExhausted),
            Self::Overloaded => ("OVERLOADED", Code::ResourceExhausted),
            Self::Internal => ("INTERNAL", Code::Internal),
        }
    }

    /// The reason for what a file system said.
    pub fn of(error: &io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::NotFound => Self::FileNotFound,
            io::ErrorKind::AlreadyExists | io::ErrorKind::DirectoryNotEmpty => Self::FileExists,
            io::ErrorKind::IsADirectory => Self::NotAFile,
            io::ErrorKind::NotADirectory => Self::NotADirectory,
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge => {
                Self::GuestDiskFull
            }
            // Root is refused by what the path leads to: /proc, a mount, an immutable file, a loop of links.
            io::ErrorKind::InvalidInput
            | io::ErrorKind::InvalidFilename
            | io::ErrorKind::PermissionDenied
            | io::ErrorKind::ReadOnlyFilesystem
            | io::ErrorKind::ResourceBusy
            | io::ErrorKind::CrossesDevices => Self::InvalidPath,
            _ if error.raw_os_error() == Some(libc::ELOOP) => Self::InvalidPath,
            _ => Self::Internal,
        }
    }
}

/// The error for what a file system said about `path`.
pub fn io_status(path: &std::path::Path, error: &io::Error) -> Status {
    Refusal::of(error).status(format!("{}: {error}", path.display()))
}
