//! What went wrong: for people a line `error: …` and a line `code: …`, for programs (`--json`) one JSON object,
//! both on standard error; for scripts the exit code.
//!
//! | exit code | meaning |
//! | --- | --- |
//! | 1 | something on this machine |
//! | 2 | the command line is wrong |
//! | 3 | the mesh refused the request: asking again changes nothing |
//! | 4 | conflict with the state of something |
//! | 5 | the mesh failed or cannot be reached: asking again may help |
//!
//! `oc exec` and `oc shell` end with the command's own code, 124 after its timeout, and, as shells do, 126 or 127 for a
//! program that cannot be run or found; `oc agent` with 1 where the agent could not do what it was told.

use std::{fmt, io, io::Write as _};

use tonic::{Code, Status};
use tonic_types::StatusExt as _;

/// Exit code for a wrong command line.
pub const USAGE: u8 = 2;
const LOCAL: u8 = 1;
const REFUSED: u8 = 3;
const CONFLICT: u8 = 4;
const FAILED: u8 = 5;
/// 128 + SIGPIPE: what a program gets that dies of writing to a closed pipe.
const PIPE_CLOSED: u8 = 141;

/// Why a command did not do what it should.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// The command line is wrong.
    #[error("{0}")]
    Usage(String),
    /// Something on this machine failed.
    #[error("{what}: {source}")]
    Local {
        /// The attempt and its object.
        what: String,
        /// What the system said.
        source: io::Error,
    },
    /// Something on this machine is not as it must be.
    #[error("{0}")]
    Unfit(String),
    /// Nothing says which key to use.
    #[error("no API key: start a mesh with `oc up`, set OC_API_KEY, or run `oc config set api-key KEY`")]
    NoKey,
    /// Something stands in the way.
    #[error("{0}")]
    Conflict(String),
    /// No gateway answers.
    #[error("cannot reach {url}: {reason}")]
    Unreachable {
        /// Where it should be.
        url: String,
        /// What the connection attempt said.
        reason: String,
    },
    /// The mesh answered with an error.
    #[error("{}", message_of(.0))]
    Rpc(Box<Status>),
    /// A transfer stood still for too long.
    #[error("{0}")]
    Stalled(String),
    /// The sandbox hibernated under what goes on when it wakes.
    #[error("{0}")]
    Interrupted(String),
    /// A mesh that was being started did not become ready.
    #[error("{0}")]
    NotReady(String),
    /// What the supervisor in the background reported.
    #[error("{message}")]
    Reported {
        /// The error's text.
        message: String,
        /// The error's code.
        code: String,
        /// The exit code it stands for.
        exit: u8,
    },
    /// Whoever read standard output has gone.
    #[error("standard output is closed")]
    OutputClosed,
}

impl Failure {
    /// Something on this machine failed: `what` names the attempt and its object.
    pub fn local(what: impl Into<String>, source: impl Into<io::Error>) -> Self {
        Self::Local { what: what.into(), source: source.into() }
    }

    /// Stable name of the error: the mesh's own reason where it gave one.
    pub fn code(&self) -> String {
        match self {
            Self::Usage(_) => "USAGE".to_owned(),
            Self::Local { .. } | Self::OutputClosed => "LOCAL_IO".to_owned(),
            Self::Unfit(_) => "LOCAL_SETUP".to_owned(),
            Self::NoKey => "UNAUTHENTICATED".to_owned(),
            Self::Conflict(_) => "CONFLICT".to_owned(),
            Self::Unreachable { .. } => "UNREACHABLE".to_owned(),
            Self::Stalled(_) => "DEADLINE_EXCEEDED".to_owned(),
            Self::Interrupted(_) => "INTERRUPTED".to_owned(),
            Self::NotReady(_) => "NOT_READY".to_owned(),
            Self::Reported { code, .. } => code.clone(),
            Self::Rpc(status) => reason_of(status).unwrap_or_else(|| name_of(code_of(status)).to_owned()),
        }
    }

    /// Exit code, see the table of this module.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Usage(_) => USAGE,
            Self::Local { .. } | Self::Unfit(_) | Self::NotReady(_) => LOCAL,
            Self::NoKey => REFUSED,
            Self::Conflict(_) | Self::Interrupted(_) => CONFLICT,
            Self::Unreachable { .. } | Self::Stalled(_) => FAILED,
            Self::Reported { exit, .. } => *exit,
            Self::OutputClosed => PIPE_CLOSED,
            Self::Rpc(status) => exit_code_of(status),
        }
    }

    /// Writes the error to standard error.
    pub fn report(&self, json: bool) {
        if matches!(self, Self::OutputClosed) {
            return;
        }
        let text = if json {
            serde_json::json!({ "error": self.to_string(), "code": self.code() }).to_string()
        } else {
            format!("error: {}\ncode: {}", crate::output::Printable(&self.to_string()), self.code())
        };
        // Nobody is left to tell if standard error is closed too.
        let _ = writeln!(io::stderr(), "{text}");
    }

    /// Whether it is the mesh that says so, not the transport.
    pub fn is_from_mesh(&self) -> bool {
        matches!(self, Self::Rpc(status) if reason_of(status).is_some())
    }

    /// Whether it passes: a stream that ended so is to be resumed.
    pub fn is_passing(&self) -> bool {
        let Self::Rpc(status) = self else { return matches!(self, Self::Stalled(_)) };
        // The transport's own errors have no reason, and codes of no meaning.
        let is_transport =
            matches!(status.code(), Code::Unknown | Code::Internal | Code::Cancelled) && !self.is_from_mesh();
        status.code() == Code::Unavailable || is_transport || self.has_reason("OVERLOADED")
    }

    /// Whether the mesh gave this reason.
    pub fn has_reason(&self, reason: &str) -> bool {
        matches!(self, Self::Rpc(status) if reason_of(status).as_deref() == Some(reason))
    }
}

impl From<Status> for Failure {
    fn from(status: Status) -> Self {
        Self::Rpc(Box::new(status))
    }
}

/// `ErrorInfo.reason` of our own domain.
fn reason_of(status: &Status) -> Option<String> {
    status.get_details_error_info().map(|info| info.reason).filter(|reason| !reason.is_empty())
}

/// The status code; tonic reports the end of a local deadline as `Cancelled`.
fn code_of(status: &Status) -> Code {
    match status.code() {
        Code::Cancelled if status.message() == "Timeout expired" => Code::DeadlineExceeded,
        code => code,
    }
}

fn message_of(status: &Status) -> impl fmt::Display {
    match (code_of(status), status.message()) {
        (Code::DeadlineExceeded, "Timeout expired") => "no answer in time".to_owned(),
        (code, "") => name_of(code).to_lowercase().replace('_', " "),
        (_, message) => message.to_owned(),
    }
}

fn exit_code_of(status: &Status) -> u8 {
    // Codes that gRPC has only one of, though HTTP and our exit codes tell two apart.
    match reason_of(status).as_deref() {
        Some("STALE_EPOCH" | "SANDBOX_ACTIVE" | "FILE_EXISTS") => return CONFLICT,
        Some("HOST_DISK_FULL" | "OVERLOADED" | "GUEST_DISK_FULL") => return FAILED,
        Some("METHOD_NOT_ALLOWED") => return REFUSED,
        _ => {}
    }
    match code_of(status) {
        Code::AlreadyExists | Code::Aborted => CONFLICT,
        Code::InvalidArgument
        | Code::NotFound
        | Code::PermissionDenied
        | Code::Unauthenticated
        | Code::FailedPrecondition
        | Code::OutOfRange
        | Code::ResourceExhausted
        | Code::Cancelled => REFUSED,
        Code::Unknown
        | Code::DeadlineExceeded
        | Code::Unimplemented
        | Code::Internal
        | Code::Unavailable
        | Code::DataLoss
        | Code::Ok => FAILED,
    }
}

/// The code's name as the gRPC specification spells it.
fn name_of(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "CANCELLED",
        Code::Unknown => "UNKNOWN",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::NotFound => "NOT_FOUND",
        Code::AlreadyExists => "ALREADY_EXISTS",
        Code::PermissionDenied => "PERMISSION_DENIED",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::FailedPrecondition => "FAILED_PRECONDITION",
        Code::Aborted => "ABORTED",
        Code::OutOfRange => "OUT_OF_RANGE",
        Code::Unimplemented => "UNIMPLEMENTED",
        Code::Internal => "INTERNAL",
        Code::Unavailable => "UNAVAILABLE",
        Code::DataLoss => "DATA_LOSS",
        Code::Unauthenticated => "UNAUTHENTICATED",
    }
}

#[cfg(test)]
mod tests {
    use tonic_types::ErrorDetails;

    use super::*;

    fn refused(code: Code, reason: &str) -> Failure {
        let details = ErrorDetails::with_error_info(reason, "oc", []);
        Status::with_error_details(code, "said so", details).into()
    }

    #[test]
    fn the_meshs_reason_is_the_code() {
        let failure = refused(Code::NotFound, "SANDBOX_NOT_FOUND");
        assert_eq!(failure.code(), "SANDBOX_NOT_FOUND");
        assert_eq!(failure.to_string(), "said so");
        assert_eq!(failure.exit_code(), REFUSED);
        assert!(failure.has_reason("SANDBOX_NOT_FOUND"));
    }

    #[test]
    fn exit_codes_tell_refusals_conflicts_and_failures_apart() {
        for (code, reason, exit) in [
            (Code::ResourceExhausted, "QUOTA_EXCEEDED", REFUSED),
            (Code::ResourceExhausted, "HOST_DISK_FULL", FAILED),
            (Code::ResourceExhausted, "OVERLOADED", FAILED),
            (Code::FailedPrecondition, "NOT_A_FILE", REFUSED),
            (Code::FailedPrecondition, "SANDBOX_ACTIVE", CONFLICT),
            (Code::AlreadyExists, "FILE_EXISTS", CONFLICT),
            (Code::Unavailable, "NO_CAPACITY", FAILED),
            (Code::Unauthenticated, "TOKEN_EXPIRED", REFUSED),
            (Code::Internal, "INTERNAL", FAILED),
            (Code::Unimplemented, "METHOD_NOT_ALLOWED", REFUSED),
        ] {
            assert_eq!(refused(code, reason).exit_code(), exit, "{reason}");
        }
    }

    #[test]
    fn a_status_without_details_is_named_by_its_code() {
        let failure = Failure::from(Status::new(Code::Unavailable, ""));
        assert_eq!(failure.code(), "UNAVAILABLE");
        assert_eq!(failure.to_string(), "unavailable");
    }

    #[test]
    fn the_end_of_our_own_deadline_is_not_a_cancellation() {
        let failure = Failure::from(Status::cancelled("Timeout expired"));
        assert_eq!(failure.code(), "DEADLINE_EXCEEDED");
        assert_eq!(failure.exit_code(), FAILED);
        assert_eq!(failure.to_string(), "no answer in time");
    }
}
