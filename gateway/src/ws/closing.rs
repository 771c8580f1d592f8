//! Why a WebSocket is closed: a code, and a reason that begins with a stable name where there is one.
//! docs/websocket.md says the same to users; a test holds the two together.

use std::borrow::Cow;

use http::StatusCode;
use oc_mesh::error::{Reason, http_status};
use tokio_tungstenite::tungstenite::{
    Error,
    error::{CapacityError, ProtocolError},
    protocol::{CloseFrame, frame::Utf8Bytes},
};
use tonic::Status;

use super::published::Garbage;
use crate::failure;

/// A close frame's reason has at most this many bytes (RFC 6455, 5.5).
const MAX_REASON: usize = 123;

/// The session ended, or the client left.
pub const NORMAL: u16 = 1000;
/// The gateway goes down: attach again.
pub const GOING_AWAY: u16 = 1001;
/// What came breaks the WebSocket protocol.
pub const PROTOCOL: u16 = 1002;
/// Text where bytes are due.
pub const UNSUPPORTED: u16 = 1003;
/// Never sent: a client closed without a code.
pub const NO_CODE: u16 = 1005;
/// Never sent: a connection ended without a close.
pub const ABNORMAL: u16 = 1006;
/// What came has no meaning.
pub const INVALID: u16 = 1007;
/// A credential does not suffice.
pub const POLICY: u16 = 1008;
/// A message is too large.
pub const TOO_BIG: u16 = 1009;
/// Something broke on our side.
pub const INTERNAL: u16 = 1011;
/// The host cannot be reached for the moment: attach again.
pub const RESTART: u16 = 1012;
/// Too much at once: attach again later.
pub const TRY_AGAIN: u16 = 1013;
/// An error that has no code of its own: this and its HTTP status.
const PRIVATE: u16 = 4000;

/// What is said to a client in the end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Close {
    /// One of those above, or `PRIVATE` and an HTTP status.
    pub code: u16,
    reason: Cow<'static, str>,
}

impl Close {
    fn new(code: u16, reason: impl Into<Cow<'static, str>>) -> Self {
        Self { code, reason: reason.into() }
    }

    /// The session has ended.
    #[must_use]
    pub fn ended() -> Self {
        Self::new(NORMAL, "")
    }

    /// The gateway goes down.
    #[must_use]
    pub fn draining() -> Self {
        Self::new(GOING_AWAY, "the gateway is stopping, attach again")
    }

    /// The host ended the stream with an error, or refused it. `error` is one that callers may see.
    #[must_use]
    pub fn failed(error: &Status) -> Self {
        let reason = failure::reason(error);
        Self::new(code_of(error), format!("{reason}: {}", error.message()))
    }

    /// A message of the published framing that has no meaning.
    #[must_use]
    pub fn garbage(garbage: Garbage) -> Self {
        let code = match garbage {
            Garbage::Text => UNSUPPORTED,
            Garbage::Prefix(_) => INVALID,
        };
        Self::new(code, garbage.to_string())
    }

    /// A message that is not what the subprotocol says.
    #[must_use]
    pub fn invalid(problem: &'static str) -> Self {
        Self::new(INVALID, problem)
    }

    /// What nobody may do for long.
    #[must_use]
    pub fn policy(problem: &'static str) -> Self {
        Self::new(POLICY, problem)
    }

    /// Why a connection cannot be read any further; `None` if nobody is there to be told.
    #[must_use]
    pub fn unreadable(error: &Error) -> Option<Self> {
        match error {
            Error::Capacity(CapacityError::MessageTooLong { max_size, .. }) => {
                Some(Self::new(TOO_BIG, format!("a message has at most {max_size} bytes")))
            }
            Error::Utf8(_) => Some(Self::new(INVALID, "text must be UTF-8")),
            Error::Protocol(ProtocolError::ResetWithoutClosingHandshake) => None,
            Error::Protocol(error) => Some(Self::new(PROTOCOL, error.to_string())),
            _ => None,
        }
    }

    /// As it is sent.
    #[must_use]
    pub fn frame(&self) -> CloseFrame {
        CloseFrame { code: self.code.into(), reason: Utf8Bytes::from(shortened(&self.reason)) }
    }
}

/// The code of an error: a standard one where there is one that says it.
fn code_of(error: &Status) -> u16 {
    let again =
        [Reason::HostUnavailable, Reason::SandboxNotReady, Reason::SandboxWaking, Reason::SandboxHibernated];
    let reason = failure::reason(error).parse::<Reason>().ok();
    if reason.is_some_and(|reason| again.contains(&reason)) {
        return RESTART;
    }
    match reason.map_or_else(|| http_status(error), Reason::http_status) {
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => POLICY,
        StatusCode::PAYLOAD_TOO_LARGE => TOO_BIG,
        StatusCode::SERVICE_UNAVAILABLE | StatusCode::TOO_MANY_REQUESTS => TRY_AGAIN,
        status if status.is_server_error() => INTERNAL,
        status => PRIVATE + status.as_u16(),
    }
}

fn shortened(reason: &str) -> &str {
    let end = (0..=MAX_REASON.min(reason.len())).rev().find(|&end| reason.is_char_boundary(end));
    end.and_then(|end| reason.get(..end)).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use oc_mesh::error::status;
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn errors_have_the_codes_that_the_documentation_lists() {
        let page = include_str!("../../../docs/websocket.md");
        for (reason, code) in [
            (Reason::SessionNotFound, 4404),
            (Reason::SandboxDeleted, 4410),
            (Reason::SandboxFailed, 4410),
            (Reason::Interrupted, 4409),
            (Reason::AttachedElsewhere, 4409),
            (Reason::InvalidArgument, 4400),
            (Reason::TokenExpired, POLICY),
            (Reason::WrongSandbox, POLICY),
            (Reason::MessageTooLarge, TOO_BIG),
            (Reason::HostUnavailable, RESTART),
            (Reason::SandboxHibernated, RESTART),
            (Reason::Overloaded, TRY_AGAIN),
            (Reason::TooManySessions, TRY_AGAIN),
            (Reason::Internal, INTERNAL),
            (Reason::DeadlineExceeded, INTERNAL),
        ] {
            let close = Close::failed(&status(reason, "why"));
            assert_eq!(close.code, code, "{reason:?}");
            assert_eq!(close.frame().reason.as_str(), format!("{}: why", reason.as_str()));
            assert!(page.contains(&format!("| {code} |")), "{code} is not documented");
        }
        for code in [NORMAL, GOING_AWAY, PROTOCOL, UNSUPPORTED, INVALID] {
            assert!(page.contains(&format!("| {code} |")), "{code} is not documented");
        }
    }

    #[test]
    fn every_reason_has_a_code_that_may_be_sent() {
        for reason in Reason::ALL {
            let frame = Close::failed(&status(*reason, "")).frame();
            assert!(frame.code.is_allowed(), "{reason:?}: {}", frame.code);
        }
        assert_eq!(Close::failed(&Status::unavailable("socket")).code, RESTART, "without a reason, too");
    }

    proptest! {
        #[test]
        fn reasons_fit_and_stay_text(text in "\\PC{0,300}") {
            let frame = Close::failed(&status(Reason::Internal, text)).frame();
            prop_assert!(frame.reason.len() <= MAX_REASON);
            prop_assert!(frame.reason.starts_with("INTERNAL: "));
        }
    }
}
