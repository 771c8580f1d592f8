//! The byte link between a host and its guest.
//!
//! A virtio-serial port is a pipe without connections: a host that closes it and opens it again may go unnoticed by the
//! guest, and either side may then find bytes, or the rest of a frame, that belong to a peer that is gone. HTTP/2 on top
//! needs connections. So every connect of the host begins a *session*, and bytes of one never reach another:
//!
//! ```text
//!   host                                            guest
//!    │  HELLO nonce ────────────────────────────────► │ ends the session before, if there is one
//!    │ ◄─────────────────────────────── ANSWER nonce  │
//!    │  (skips everything up to this very ANSWER)     │
//!    │  DATA ◄──────────────────────────────► DATA    │ until the host hangs up, or says HELLO again
//! ```
//!
//! - `HELLO` and `ANSWER` are 16 fixed bytes and a nonce of 16 random ones. The host looks for the answer anywhere
//!   in what arrives: stale output cannot contain a nonce that was made after it.
//! - `DATA` is a header of 8 bytes (kind, session, length) and at most [`MAX_PAYLOAD`] bytes. All user bytes travel
//!   inside, so nothing that a user sends can look like a `HELLO`.
//! - A host that died in the middle of a frame leaves the guest waiting for the rest, which would swallow the next
//!   `HELLO`. A host that gets no answer therefore sends [`MAX_PAYLOAD`] zeros, which complete any frame, and another
//!   `HELLO`, with a nonce of its own: an answer to the one before is stale from then on. A guest that meets what is neither `DATA` nor `HELLO` skips to the next `HELLO`.
//!
//! The guest is not trusted: the host buffers at most one frame of it, and gives up on the first malformed one.

mod codec;
mod guest;
mod host;
mod link;

pub use codec::{MAX_PAYLOAD, Nonce};
pub use guest::{GuestPort, GuestSession};
pub use host::{HandshakeError, HostLink};

#[cfg(test)]
mod tests;
