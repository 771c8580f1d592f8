//! Messages for a client, cut to a size that every client takes and that costs little memory here: one frame is held at
//! a time, however much is to be sent.

use bytes::{BufMut as _, Bytes, BytesMut};
use tokio_tungstenite::tungstenite::{
    Message,
    protocol::frame::{
        Frame,
        coding::{Data, OpCode},
    },
};

/// Bytes of data in one frame. A buffer of this size is kept for each connection that ever sent as much, so it is not the
/// largest that clients take.
const PIECE: usize = 8 << 10;

/// What is left to be sent, frame by frame.
#[derive(Debug)]
pub struct Cut {
    rest: Bytes,
    style: Style,
    /// Whether a message without bytes is still to be sent.
    empty: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Style {
    /// Each piece is a message.
    Plain,
    /// Each piece is a message that begins with this byte.
    Prefixed(u8),
    /// All pieces are one message; this is the first of them, or not.
    Whole { first: bool },
}

impl Cut {
    /// Bytes that may be cut anywhere.
    #[must_use]
    pub fn plain(data: Bytes) -> Self {
        Self { rest: data, style: Style::Plain, empty: false }
    }

    /// Bytes that may be cut anywhere, each piece with this byte in front.
    #[must_use]
    pub fn prefixed(prefix: u8, data: Bytes) -> Self {
        Self { rest: data, style: Style::Prefixed(prefix), empty: false }
    }

    /// One message, which may be empty, in as many frames as it needs.
    #[must_use]
    pub fn whole(message: Bytes) -> Self {
        Self { empty: message.is_empty(), rest: message, style: Style::Whole { first: true } }
    }

    /// One message without bytes.
    #[must_use]
    pub fn empty() -> Self {
        Self { rest: Bytes::new(), style: Style::Plain, empty: true }
    }

    fn piece(&mut self) -> Bytes {
        let piece = self.rest.split_to(self.rest.len().min(PIECE));
        if self.rest.is_empty() {
            // What is empty holds on to its memory, too.
            self.rest = Bytes::new();
        }
        piece
    }
}

impl Iterator for Cut {
    type Item = Message;

    fn next(&mut self) -> Option<Message> {
        if self.rest.is_empty() && !std::mem::take(&mut self.empty) {
            return None;
        }
        let piece = self.piece();
        Some(match self.style {
            Style::Plain => Message::Binary(piece),
            Style::Prefixed(prefix) => {
                let mut prefixed = BytesMut::with_capacity(1 + piece.len());
                prefixed.put_u8(prefix);
                prefixed.extend_from_slice(&piece);
                Message::Binary(prefixed.freeze())
            }
            Style::Whole { first } => {
                self.style = Style::Whole { first: false };
                let code = if first { Data::Binary } else { Data::Continue };
                Message::Frame(Frame::message(piece, OpCode::Data(code), self.rest.is_empty()))
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_whole_message_has_one_beginning_and_one_end() {
        for (size, expected) in [(0, 1), (1, 1), (PIECE, 1), (PIECE + 1, 2), (5 * PIECE, 5)] {
            let frames: Vec<Frame> = Cut::whole(vec![7; size].into())
                .map(|message| match message {
                    Message::Frame(frame) => frame,
                    other => panic!("{other:?}"),
                })
                .collect();
            assert_eq!(frames.len(), expected, "{size}");
            for (index, frame) in frames.iter().enumerate() {
                let code = if index == 0 { Data::Binary } else { Data::Continue };
                assert_eq!(frame.header().opcode, OpCode::Data(code));
                assert_eq!(frame.header().is_final, index + 1 == frames.len());
            }
            assert_eq!(frames.iter().map(|frame| frame.payload().len()).sum::<usize>(), size);
        }
    }

    #[test]
    fn nothing_is_sent_for_no_bytes_unless_it_is_meant() {
        assert_eq!(Cut::plain(Bytes::new()).count(), 0);
        assert_eq!(Cut::prefixed(1, Bytes::new()).count(), 0);
        assert_eq!(Cut::empty().collect::<Vec<_>>(), [Message::Binary(Bytes::new())]);
    }
}
