//! Tells HTTP/2 from HTTP/1.1 by a connection's first bytes, without taking them.

use std::{io, time::Duration};

use tokio::net::TcpStream;

/// What every HTTP/2 connection begins with (RFC 9113, 3.4). No request of HTTP/1.1 does.
pub const PREFACE: [u8; 24] = *b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Between two looks at a beginning of which a part is there.
const LONGEST_PAUSE: Duration = Duration::from_millis(250);

/// How a peer speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// HTTP/1.1.
    Http1,
    /// HTTP/2, without TLS and without an upgrade.
    Http2,
}

/// Waits until the first bytes tell. The caller bounds the wait: hyper has no deadline of its own for the preface.
///
/// # Errors
/// The connection ended before it began.
pub async fn protocol(stream: &TcpStream) -> io::Result<Protocol> {
    let mut first = [0; PREFACE.len()];
    let mut pause = Duration::from_millis(1);
    loop {
        stream.readable().await?;
        let length = match stream.peek(&mut first).await? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            length => length,
        };
        if first[..length] != PREFACE[..length] {
            return Ok(Protocol::Http1);
        }
        if length == PREFACE.len() {
            return Ok(Protocol::Http2);
        }
        // A part of it: a peek does not take what is there, so there is no event to wait for.
        tokio::time::sleep(pause).await;
        pause = (2 * pause).min(LONGEST_PAUSE);
    }
}
