//! Errors as callers see them.
//!
//! An error with a reason was written for callers, by us, and goes to them as it is. One without comes from a
//! transport or a library: its text may name sockets and addresses of the inside, so it is logged and replaced.

use oc_mesh::error::{Reason, reason_of, status};
use tonic::{Code, Status};

/// The stable reason of an error.
#[must_use]
pub fn reason(status: &Status) -> String {
    reason_of(status).unwrap_or_else(|| by_code(status.code()).as_str().to_owned())
}

/// The error as callers may see it.
#[must_use]
pub fn presentable(error: Status) -> Status {
    if reason_of(&error).is_some() {
        return error;
    }
    let reason = by_code(error.code());
    tracing::warn!(code = ?error.code(), error = error.message(), "a call failed without a reason");
    let text = match reason {
        Reason::HostUnavailable => "the part that answers this call cannot be reached",
        Reason::DeadlineExceeded => "the call took too long",
        Reason::InvalidArgument => "the request cannot be read",
        Reason::MessageTooLarge => "a message is too large",
        Reason::RouteNotFound => "the part that answers this call does not know it",
        _ => "internal error",
    };
    status(reason, text)
}

/// The nearest reason for an error that has none.
fn by_code(code: Code) -> Reason {
    match code {
        // Cancelled by whoever answers, that is: he stops, or lost what he asked himself.
        Code::Unavailable | Code::Cancelled => Reason::HostUnavailable,
        Code::DeadlineExceeded => Reason::DeadlineExceeded,
        Code::InvalidArgument => Reason::InvalidArgument,
        Code::OutOfRange | Code::ResourceExhausted => Reason::MessageTooLarge,
        Code::Unimplemented => Reason::RouteNotFound,
        _ => Reason::Internal,
    }
}
