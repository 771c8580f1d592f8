//! Tells by a connection's first bytes what is spoken, without taking them: HTTP/2 or HTTP/1.1, or either of them where it should be TLS.

use std::{io, time::Duration};

use tokio::net::TcpStream;

/// What every HTTP/2 connection begins with (RFC 9113, 3.4). No request of HTTP/1.1 does.
pub const PREFACE: [u8; 24] = *b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// As many first bytes as tell a method's name.
const METHOD: usize = 8;

/// Between two looks at a beginning of which a part is there.
const LONGEST_PAUSE: Duration = Duration::from_millis(250);

/// How a peer speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// HTTP/1.1.
    Http1,
    /// HTTP/2, without TLS and without an upgrade.
    Http2,
    /// HTTP/1.1 or what begins like it, without TLS on a port that speaks it.
    WithoutTls,
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

/// Whether a peer that should begin with TLS begins with a request. Waits for no more than its first bytes, as TLS would.
///
/// # Errors
/// The connection broke.
pub async fn lacks_tls(stream: &TcpStream) -> io::Result<bool> {
    let mut first = [0; METHOD];
    let length = stream.peek(&mut first).await?;
    Ok(begins_request(&first[..length]))
}

/// Whether these bytes are a method's name, or begin with one. TLS begins with a byte that is no letter (RFC 8446, 5.1).
fn begins_request(first: &[u8]) -> bool {
    let name = first.split(|byte| *byte == b' ').next().unwrap_or_default();
    !name.is_empty() && name.iter().all(u8::is_ascii_uppercase)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_begins_with_the_name_of_a_method() {
        for first in ["GET / HT", "G", "OPTIONS ", "PROPFIND", "PRI * HT", "A b"] {
            assert!(begins_request(first.as_bytes()), "{first}");
        }
        let client_hello = "\x16\x03\x01\x02\0\x01\0\x01";
        for first in ["", client_hello, &client_hello[..1], "SSH-2.0-", "get / HT", " GET / H", "\r\nGET /"] {
            assert!(!begins_request(first.as_bytes()), "{first:?}");
        }
    }
}
