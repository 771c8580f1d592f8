//! The framing that the published clients speak, as functions of bytes.
//!
//! Of an exec session or an agent every message is binary and its first byte says what it is; of a terminal every
//! message is the terminal's bytes. docs/websocket.md describes it to users.

use bytes::Bytes;
use oc_proto::v1::ExecStream;
use tokio_tungstenite::tungstenite::Message;

use super::{cut::Cut, path::Kind};

/// From the client: bytes for standard input.
const STDIN: u8 = 0;
/// To the client: standard output.
const STDOUT: u8 = 1;
/// To the client: standard error.
const STDERR: u8 = 2;
/// To the client: the exit code, a 32-bit integer, its most significant byte first.
const EXIT: u8 = 3;
/// To the client: all that was written before it came has been sent.
const REPLAYED: u8 = 4;

/// A message that has no meaning here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Garbage {
    /// Text where bytes are due.
    #[error("text is not taken here, send binary messages")]
    Text,
    /// The first byte is not that of input.
    #[error("a message that begins with 0x{0:02x} is not known, input begins with 0x00")]
    Prefix(u8),
}

/// The input that a client's message carries, which may be empty.
///
/// # Errors
/// It carries none.
pub fn input(kind: Kind, message: Message) -> Result<Bytes, Garbage> {
    match (kind, message) {
        (Kind::Terminal, message) => Ok(message.into_data()),
        (Kind::Exec, Message::Binary(mut frame)) => match frame.first() {
            None => Ok(frame),
            Some(&STDIN) => Ok(frame.split_off(1)),
            Some(&prefix) => Err(Garbage::Prefix(prefix)),
        },
        (Kind::Exec, _) => Err(Garbage::Text),
    }
}

/// Output.
#[must_use]
pub fn output(kind: Kind, stream: ExecStream, data: Bytes) -> Cut {
    match (kind, stream) {
        (Kind::Terminal, _) => Cut::plain(data),
        (Kind::Exec, ExecStream::Stderr) => Cut::prefixed(STDERR, data),
        (Kind::Exec, _) => Cut::prefixed(STDOUT, data),
    }
}

/// The end of the replay; terminals have no message for it.
#[must_use]
pub fn replayed(kind: Kind) -> Option<Cut> {
    (kind == Kind::Exec).then(|| Cut::plain(Bytes::from_static(&[REPLAYED])))
}

/// The end of the session; that of a terminal is told by the close alone.
#[must_use]
pub fn exit(kind: Kind, exit_code: i32) -> Option<Cut> {
    (kind == Kind::Exec).then(|| Cut::prefixed(EXIT, Bytes::copy_from_slice(&exit_code.to_be_bytes())))
}

/// A sign of life: an empty message. Terminals have none, for them pings have to do.
#[must_use]
pub fn keepalive(kind: Kind) -> Option<Cut> {
    (kind == Kind::Exec).then(Cut::empty)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn bytes(cut: Cut) -> Vec<Vec<u8>> {
        cut.map(|message| message.into_data().to_vec()).collect()
    }

    #[test]
    fn messages_are_those_of_the_published_clients() {
        let data = Bytes::from_static(b"hi");
        assert_eq!(bytes(output(Kind::Exec, ExecStream::Stdout, data.clone())), [b"\x01hi"]);
        assert_eq!(bytes(output(Kind::Exec, ExecStream::Stderr, data.clone())), [b"\x02hi"]);
        assert_eq!(bytes(output(Kind::Terminal, ExecStream::Stdout, data)), [b"hi"]);
        assert_eq!(bytes(exit(Kind::Exec, -1).unwrap()), [b"\x03\xff\xff\xff\xff"]);
        assert_eq!(bytes(exit(Kind::Exec, 256).unwrap()), [b"\x03\0\0\x01\0"]);
        assert_eq!(bytes(replayed(Kind::Exec).unwrap()), [b"\x04"]);
        assert_eq!(bytes(keepalive(Kind::Exec).unwrap()), [b""]);
        for terminal in [exit(Kind::Terminal, 0), replayed(Kind::Terminal), keepalive(Kind::Terminal)] {
            assert!(terminal.is_none());
        }
    }

    #[test]
    fn input_is_told_by_its_first_byte_and_a_terminal_takes_text_too() {
        let binary = |bytes: &'static [u8]| Message::Binary(Bytes::from_static(bytes));
        assert_eq!(input(Kind::Exec, binary(b"\0ls\n")).unwrap(), "ls\n");
        assert_eq!(input(Kind::Exec, binary(b"\0")).unwrap(), "");
        assert_eq!(input(Kind::Exec, binary(b"")).unwrap(), "");
        assert_eq!(input(Kind::Exec, binary(b"\x01ls")), Err(Garbage::Prefix(1)));
        assert_eq!(input(Kind::Exec, Message::text("\0ls")), Err(Garbage::Text));
        assert_eq!(input(Kind::Terminal, Message::text("é")).unwrap(), "é");
        assert_eq!(input(Kind::Terminal, binary(b"\x03\xff")).unwrap(), &b"\x03\xff"[..]);
    }

    proptest! {
        #[test]
        fn output_comes_whole_in_messages_that_every_client_takes(
            data in proptest::collection::vec(any::<u8>(), 0..200_000),
            exec: bool,
        ) {
            let kind = if exec { Kind::Exec } else { Kind::Terminal };
            let mut whole = Vec::new();
            for message in bytes(output(kind, ExecStream::Stderr, data.clone().into())) {
                prop_assert!((1..=64 << 10).contains(&message.len()));
                prop_assert!(!exec || message[0] == STDERR);
                whole.extend_from_slice(&message[usize::from(exec)..]);
            }
            prop_assert!(whole == data);
        }
    }
}
