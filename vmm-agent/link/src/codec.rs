//! Frames, without I/O.

use bytes::{Buf as _, BytesMut};

/// Largest payload of one frame, bytes. With its header it fits in what Linux takes in one `write` to a port (32 KiB).
pub const MAX_PAYLOAD: usize = HEADER_AND_PAYLOAD - HEADER;

pub(crate) const HEADER: usize = 8;
pub(crate) const HEADER_AND_PAYLOAD: usize = 32 << 10;
pub(crate) const HELLO: usize = 32;

/// First byte of a `DATA` frame. Neither zero (padding) nor the first byte of [`MAGIC`].
const DATA: u8 = 0xd1;
/// Second byte of a `DATA` frame, so that garbage is seldom taken for one.
const CHECK: u8 = 0x5a;
/// How a `HELLO` begins: 16 bytes chosen at random.
const MAGIC: [u8; 16] =
    [0x8f, 0x1c, 0xe2, 0x47, 0x9b, 0x60, 0xd5, 0x3a, 0x71, 0xfe, 0x08, 0xac, 0x36, 0xc9, 0x54, 0xeb];
/// How the guest's answer begins. It differs, or a guest that takes a `HELLO` for the rest of a payload, and has a
/// program that echoes its input, would seem to answer.
const ANSWER: [u8; 16] =
    [0xb6, 0x3d, 0x0f, 0xd8, 0x52, 0xe9, 0x17, 0x84, 0xca, 0x2b, 0x96, 0x70, 0xf3, 0x45, 0x1e, 0xad];

/// Names a session: random, made by the host for each connect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Nonce(pub [u8; 16]);

impl Nonce {
    /// The nonce of the next try of the same connect: each try is a session of its own, so that what the guest
    /// says in answer to an earlier one is seen to be stale.
    pub(crate) fn next_try(mut self) -> Self {
        self.0[0] = self.0[0].wrapping_add(1);
        self
    }

    /// What `DATA` frames carry of it.
    pub(crate) fn session(self) -> u16 {
        u16::from_le_bytes([self.0[0], self.0[1]])
    }

    /// The host's `HELLO` of this session.
    pub(crate) fn hello(self) -> [u8; HELLO] {
        self.after(MAGIC)
    }

    /// The guest's answer to it.
    pub(crate) fn answer(self) -> [u8; HELLO] {
        self.after(ANSWER)
    }

    fn after(self, magic: [u8; 16]) -> [u8; HELLO] {
        let mut bytes = [0; HELLO];
        bytes[..16].copy_from_slice(&magic);
        bytes[16..].copy_from_slice(&self.0);
        bytes
    }
}

/// The header of a `DATA` frame with `length` bytes, [`MAX_PAYLOAD`] at most.
pub(crate) fn header(session: u16, length: usize) -> [u8; HEADER] {
    debug_assert!(length <= MAX_PAYLOAD);
    let [low, high] = session.to_le_bytes();
    // At most 32 KiB: the upper bytes are zero.
    let [a, b, c, d, ..] = length.to_le_bytes();
    [DATA, CHECK, low, high, a, b, c, d]
}

/// What stands next in a stream of frames.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Item {
    /// The host begins a session.
    Hello(Nonce),
    /// A frame of this session with so many bytes, which follow.
    Data { session: u16, length: usize },
}

/// What [`next`] found.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Next {
    /// This; it was taken from the buffer.
    Item(Item),
    /// The beginning of something: more bytes are needed.
    Incomplete,
    /// Neither `DATA` nor `HELLO`. Nothing was taken.
    Malformed,
}

/// Takes the next frame's header, or a `HELLO`, from the buffer.
pub(crate) fn next(buffer: &mut BytesMut) -> Next {
    match buffer.first() {
        None => Next::Incomplete,
        Some(&DATA) => {
            let Some(header) = buffer.get(..HEADER) else { return Next::Incomplete };
            let session = u16::from_le_bytes([header[2], header[3]]);
            let length = u32::from_le_bytes([header[4], header[5], header[6], header[7]]) as usize;
            if header[1] != CHECK || length > MAX_PAYLOAD {
                return Next::Malformed;
            }
            buffer.advance(HEADER);
            Next::Item(Item::Data { session, length })
        }
        Some(_) => {
            let known = buffer.len().min(MAGIC.len());
            if buffer[..known] != MAGIC[..known] {
                return Next::Malformed;
            }
            let Some(hello) = buffer.get(..HELLO) else { return Next::Incomplete };
            let mut nonce = [0; 16];
            nonce.copy_from_slice(&hello[16..]);
            buffer.advance(HELLO);
            Next::Item(Item::Hello(Nonce(nonce)))
        }
    }
}

/// Drops everything before the next `HELLO`, or before what may be the beginning of one.
pub(crate) fn skip_to_hello(buffer: &mut BytesMut) {
    skip_to(buffer, &MAGIC);
}

/// Drops everything before this answer, and then the answer itself; whether it was there.
pub(crate) fn take_answer(buffer: &mut BytesMut, answer: &[u8; HELLO]) -> bool {
    skip_to(buffer, answer);
    let is_whole = buffer.len() >= HELLO;
    if is_whole {
        buffer.advance(HELLO);
    }
    is_whole
}

fn skip_to(buffer: &mut BytesMut, pattern: &[u8]) {
    let starts = |at: usize| {
        let rest = &buffer[at..];
        let known = rest.len().min(pattern.len());
        rest[..known] == pattern[..known]
    };
    let at = (0..buffer.len()).find(|at| buffer[*at] == pattern[0] && starts(*at)).unwrap_or(buffer.len());
    buffer.advance(at);
}
