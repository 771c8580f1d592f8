//! Why a call was refused: one table from a stable reason to a gRPC code and an HTTP status. docs/errors.md says the
//! same to users; a test holds the two together.

use http::StatusCode;
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt as _};

/// `domain` of every `google.rpc.ErrorInfo` of ours.
pub const DOMAIN: &str = "oc";

macro_rules! reasons {
    ($($(#[doc = $doc:literal])+ $variant:ident = $name:literal, $code:ident, $http:literal;)+) => {
        /// A stable reason. Clients may rely on the name; the text beside it is for people.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum Reason {
            $($(#[doc = $doc])+ $variant,)+
        }

        impl Reason {
            /// Every reason, in the order of the table.
            pub const ALL: &'static [Self] = &[$(Self::$variant),+];

            /// As it stands in `ErrorInfo.reason` and in REST's `code`.
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $name),+ }
            }

            /// The gRPC code that goes with it.
            pub fn code(self) -> Code {
                match self { $(Self::$variant => Code::$code),+ }
            }

            /// The HTTP status that goes with it.
            pub fn http_status(self) -> StatusCode {
                let status: u16 = match self { $(Self::$variant => $http),+ };
                StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR)
            }

            /// What it means, a sentence.
            pub fn meaning(self) -> &'static str {
                match self { $(Self::$variant => concat!($($doc),+).trim_ascii()),+ }
            }
        }

        impl std::str::FromStr for Reason {
            type Err = ();

            fn from_str(text: &str) -> Result<Self, ()> {
                match text { $($name => Ok(Self::$variant),)+ _ => Err(()) }
            }
        }
    };
}

reasons! {
    /// The request is malformed; the text names the field.
    InvalidArgument = "INVALID_ARGUMENT", InvalidArgument, 400;
    /// No sandbox comes in that size.
    InvalidSize = "INVALID_SIZE", InvalidArgument, 400;
    /// The path has a NUL or a `..` component, is too long, or names no directory to work in.
    InvalidPath = "INVALID_PATH", InvalidArgument, 400;
    /// The sandbox has no such user.
    UnknownUser = "UNKNOWN_USER", InvalidArgument, 400;
    /// There is no such template.
    TemplateNotFound = "TEMPLATE_NOT_FOUND", NotFound, 404;
    /// There is no such sandbox, or it is not the caller's.
    SandboxNotFound = "SANDBOX_NOT_FOUND", NotFound, 404;
    /// The sandbox was deleted.
    SandboxDeleted = "SANDBOX_DELETED", NotFound, 410;
    /// The sandbox's microVM is lost; nothing but deleting is left to do with it.
    SandboxFailed = "SANDBOX_FAILED", NotFound, 410;
    /// The sandbox is not running yet; try again.
    SandboxNotReady = "SANDBOX_NOT_READY", Unavailable, 503;
    /// The sandbox is hibernated; it wakes for the next call.
    SandboxHibernated = "SANDBOX_HIBERNATED", Unavailable, 503;
    /// The sandbox was hibernated amid the call; what had begun may not be done.
    Interrupted = "INTERRUPTED", Aborted, 409;
    /// The sandbox is waking; try again.
    SandboxWaking = "SANDBOX_WAKING", Unavailable, 503;
    /// The sandbox could not be hibernated and runs on.
    HibernationFailed = "HIBERNATION_FAILED", Internal, 500;
    /// There is no such checkpoint, or it is not the caller's.
    CheckpointNotFound = "CHECKPOINT_NOT_FOUND", NotFound, 404;
    /// The sandbox has a checkpoint of that name.
    CheckpointExists = "CHECKPOINT_EXISTS", AlreadyExists, 409;
    /// The sandbox has as many checkpoints of that kind as it may have.
    TooManyCheckpoints = "TOO_MANY_CHECKPOINTS", ResourceExhausted, 400;
    /// The checkpoint is not on disk yet, or failed.
    CheckpointNotReady = "CHECKPOINT_NOT_READY", FailedPrecondition, 400;
    /// The checkpoint holds a disk alone: nothing goes on from it, it only boots.
    CheckpointHasNoMemory = "CHECKPOINT_HAS_NO_MEMORY", FailedPrecondition, 400;
    /// The checkpoint is damaged, or of another VMM, processor, kernel or base image than its host has.
    CheckpointDamaged = "CHECKPOINT_DAMAGED", DataLoss, 500;
    /// The checkpoint could not be taken; the sandbox runs on.
    CheckpointFailed = "CHECKPOINT_FAILED", Internal, 500;
    /// The host has no such snapshot.
    SnapshotNotFound = "SNAPSHOT_NOT_FOUND", NotFound, 404;
    /// The command was not found.
    CommandNotFound = "COMMAND_NOT_FOUND", NotFound, 400;
    /// The command may not be executed.
    CommandNotExecutable = "COMMAND_NOT_EXECUTABLE", PermissionDenied, 400;
    /// There is no such session, or it ended more than five minutes ago.
    SessionNotFound = "SESSION_NOT_FOUND", NotFound, 404;
    /// The session has ended.
    SessionEnded = "SESSION_ENDED", FailedPrecondition, 409;
    /// As many sessions run in the sandbox as may.
    TooManySessions = "TOO_MANY_SESSIONS", ResourceExhausted, 429;
    /// The session has no terminal.
    NoTerminal = "NO_TERMINAL", FailedPrecondition, 400;
    /// Another connection attached under the same name and goes on with this one's place.
    AttachedElsewhere = "ATTACHED_ELSEWHERE", Aborted, 409;
    /// The sandbox's template has no agent.
    AgentNotInstalled = "AGENT_NOT_INSTALLED", FailedPrecondition, 400;
    /// Nobody listens on that port in the sandbox.
    PortNotListening = "PORT_NOT_LISTENING", FailedPrecondition, 502;
    /// The connection to the port broke.
    PortReset = "PORT_RESET", Aborted, 502;
    /// There is no such preview, or the host name leads to none.
    PreviewNotFound = "PREVIEW_NOT_FOUND", NotFound, 404;
    /// The host name is another preview's.
    DomainTaken = "DOMAIN_TAKEN", AlreadyExists, 409;
    /// The sandbox has as many previews as it may have.
    TooManyPreviews = "TOO_MANY_PREVIEWS", ResourceExhausted, 429;
    /// The sandbox has no room for more watches.
    TooManyWatches = "TOO_MANY_WATCHES", ResourceExhausted, 429;
    /// There is no such file or directory.
    FileNotFound = "FILE_NOT_FOUND", NotFound, 404;
    /// Something else stands at that path.
    FileExists = "FILE_EXISTS", AlreadyExists, 409;
    /// The path does not name a regular file.
    NotAFile = "NOT_A_FILE", FailedPrecondition, 400;
    /// The path does not name a directory.
    NotADirectory = "NOT_A_DIRECTORY", FailedPrecondition, 400;
    /// The sandbox's disk is full.
    GuestDiskFull = "GUEST_DISK_FULL", ResourceExhausted, 507;
    /// The directory has more entries than are listed.
    DirectoryTooLarge = "DIRECTORY_TOO_LARGE", ResourceExhausted, 413;
    /// The request is larger than is read.
    MessageTooLarge = "MESSAGE_TOO_LARGE", ResourceExhausted, 413;
    /// The request's head has more fields, or more bytes, than are read.
    HeadTooLarge = "HEAD_TOO_LARGE", ResourceExhausted, 431;
    /// The request's target is longer than is read.
    TargetTooLong = "TARGET_TOO_LONG", InvalidArgument, 414;
    /// The rest of the request did not come in time.
    RequestTimeout = "REQUEST_TIMEOUT", DeadlineExceeded, 408;
    /// No host has disk space left, or the sandbox's own has none for what it writes; try again later.
    HostDiskFull = "HOST_DISK_FULL", ResourceExhausted, 503;
    /// No host has room left; try again later.
    NoCapacity = "NO_CAPACITY", Unavailable, 503;
    /// The tenant's quota is used up.
    QuotaExceeded = "QUOTA_EXCEEDED", ResourceExhausted, 429;
    /// The request carries no credentials.
    Unauthenticated = "UNAUTHENTICATED", Unauthenticated, 401;
    /// The API key or token is not valid, or a token is not enough for the call.
    InvalidCredentials = "INVALID_CREDENTIALS", PermissionDenied, 403;
    /// The token has expired; get a fresh one.
    TokenExpired = "TOKEN_EXPIRED", Unauthenticated, 401;
    /// The URL is not good any more.
    UrlExpired = "URL_EXPIRED", PermissionDenied, 403;
    /// The token is for another sandbox.
    WrongSandbox = "WRONG_SANDBOX", PermissionDenied, 403;
    /// The call needs an administrator's key.
    NotAdmin = "NOT_ADMIN", PermissionDenied, 403;
    /// Pages of that origin may not use the gateway.
    OriginNotAllowed = "ORIGIN_NOT_ALLOWED", PermissionDenied, 403;
    /// The host holds a newer epoch of the sandbox.
    StaleEpoch = "STALE_EPOCH", FailedPrecondition, 409;
    /// The sandbox was used meanwhile.
    SandboxActive = "SANDBOX_ACTIVE", FailedPrecondition, 409;
    /// The sandbox's host cannot be reached; try again.
    HostUnavailable = "HOST_UNAVAILABLE", Unavailable, 503;
    /// Too much at once; try again later.
    Overloaded = "OVERLOADED", ResourceExhausted, 503;
    /// It took longer than allowed.
    DeadlineExceeded = "DEADLINE_EXCEEDED", DeadlineExceeded, 504;
    /// The changes after that revision are no longer kept; watch anew, from what is there now.
    WatchCompacted = "WATCH_COMPACTED", OutOfRange, 410;
    /// There is no such key.
    KeyNotFound = "KEY_NOT_FOUND", NotFound, 404;
    /// There is no such route.
    RouteNotFound = "ROUTE_NOT_FOUND", NotFound, 404;
    /// The route does not take that method.
    MethodNotAllowed = "METHOD_NOT_ALLOWED", Unimplemented, 405;
    /// The microVM did not start.
    StartFailed = "START_FAILED", Internal, 500;
    /// Something broke on our side.
    Internal = "INTERNAL", Internal, 500;
}

/// An error with its reason as `google.rpc.ErrorInfo`.
pub fn status(reason: Reason, message: impl Into<String>) -> Status {
    let mut details = ErrorDetails::new();
    details.set_error_info(reason.as_str(), DOMAIN, std::collections::HashMap::new());
    Status::with_error_details(reason.code(), message, details)
}

/// The reason that an error carries, whoever made it.
pub fn reason_of(status: &Status) -> Option<String> {
    let info = status.get_details_error_info()?;
    (info.domain == DOMAIN).then_some(info.reason)
}

/// The HTTP status of an error: by its reason if that is one of ours, else by its gRPC code.
pub fn http_status(status: &Status) -> StatusCode {
    if let Some(reason) = reason_of(status).and_then(|reason| reason.parse::<Reason>().ok()) {
        return reason.http_status();
    }
    match status.code() {
        Code::Ok => StatusCode::OK,
        Code::InvalidArgument | Code::FailedPrecondition | Code::OutOfRange => StatusCode::BAD_REQUEST,
        Code::Unauthenticated => StatusCode::UNAUTHORIZED,
        Code::PermissionDenied => StatusCode::FORBIDDEN,
        Code::NotFound => StatusCode::NOT_FOUND,
        Code::AlreadyExists | Code::Aborted => StatusCode::CONFLICT,
        Code::ResourceExhausted => StatusCode::TOO_MANY_REQUESTS,
        // Nginx's "client closed request": nobody is left to read it.
        Code::Cancelled => StatusCode::from_u16(499).unwrap_or(StatusCode::BAD_REQUEST),
        Code::Unimplemented => StatusCode::NOT_IMPLEMENTED,
        Code::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
        Code::DeadlineExceeded => StatusCode::GATEWAY_TIMEOUT,
        Code::Unknown | Code::Internal | Code::DataLoss => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reason_survives_the_wire() {
        for reason in Reason::ALL {
            let error = status(*reason, "text");
            let sent = error.into_http::<tonic::body::Body>();
            let received = Status::from_header_map(sent.headers()).unwrap();
            assert_eq!(received.code(), reason.code());
            assert_eq!(reason_of(&received).as_deref(), Some(reason.as_str()));
            assert_eq!(http_status(&received), reason.http_status());
            assert_eq!(reason.as_str().parse(), Ok(*reason));
        }
    }

    #[test]
    fn an_unknown_reason_falls_back_to_the_code() {
        let mut details = ErrorDetails::new();
        details.set_error_info("OTHER", DOMAIN, std::collections::HashMap::new());
        let error = Status::with_error_details(Code::NotFound, "text", details);
        assert_eq!(http_status(&error), StatusCode::NOT_FOUND);
    }

    #[test]
    fn the_documentation_lists_exactly_these_reasons() {
        let page = include_str!("../../docs/errors.md");
        let listed: Vec<&str> = page.lines().filter(|line| line.starts_with("| `")).collect();
        let expected: Vec<String> = Reason::ALL
            .iter()
            .map(|reason| {
                let (name, code, http) = (reason.as_str(), reason.code(), reason.http_status().as_u16());
                format!("| `{name}` | {code:?} | {http} | {} |", reason.meaning())
            })
            .collect();
        assert_eq!(listed, expected);
    }
}
