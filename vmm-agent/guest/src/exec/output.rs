//! The end of what a command wrote.

use prost::bytes::{Buf as _, Bytes, BytesMut};
use tokio::{io::AsyncReadExt as _, net::unix::pipe};

use super::budget::Room;

/// What is kept, bytes.
pub const KEPT: usize = 4 << 20;
/// A pipe holds 64 KiB at a time (pipe(7)).
const READ: usize = 64 << 10;
/// What every tail may hold, bytes, however many there are.
const GRANTED: usize = 2 * READ;

/// Keeps the last [`KEPT`] bytes, or fewer while all commands together write too much, and counts all.
#[derive(Debug)]
pub struct Tail {
    bytes: BytesMut,
    total: u64,
    /// What it may hold.
    room: Room,
    is_cut: bool,
}

impl Tail {
    /// Nothing yet.
    pub fn new() -> Self {
        Self { bytes: BytesMut::new(), total: 0, room: Room::new(GRANTED), is_cut: false }
    }

    /// Reads until every writer has closed the pipe.
    pub async fn read_all(&mut self, mut pipe: pipe::Receiver) {
        loop {
            // Up to twice what is kept.
            if self.bytes.len() + READ > self.room.get() && !self.room.grow(2 * KEPT) {
                // The older half goes at once, so that each byte is moved once at most.
                self.cut(KEPT.min(self.room.get() / 2));
            }
            self.bytes.reserve(READ);
            match pipe.read_buf(&mut self.bytes).await {
                Ok(0) | Err(_) => return,
                Ok(read) => self.total += read as u64,
            }
        }
    }

    fn cut(&mut self, keep: usize) {
        if self.bytes.len() > keep {
            let kept = self.bytes.split_off(self.bytes.len() - keep);
            self.bytes = BytesMut::with_capacity(self.room.get());
            self.bytes.extend_from_slice(&kept);
            self.is_cut = true;
        }
    }

    /// Adds a line that the command did not write.
    pub fn add_line(&mut self, line: &str) {
        if self.bytes.last().is_some_and(|last| *last != b'\n') {
            self.bytes.extend_from_slice(b"\n");
        }
        self.bytes.extend_from_slice(line.as_bytes());
        self.bytes.extend_from_slice(b"\n");
    }

    /// All bytes that the command wrote.
    pub fn total(&self) -> u64 {
        self.total
    }

    /// Whether something is left out.
    pub fn is_truncated(&self) -> bool {
        self.is_cut || self.bytes.len() > KEPT
    }

    /// The last bytes.
    pub fn into_bytes(mut self) -> Bytes {
        let excess = self.bytes.len().saturating_sub(KEPT);
        self.bytes.advance(excess);
        std::mem::take(&mut self.bytes).freeze()
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    #[tokio::test]
    async fn the_end_is_kept_and_all_is_counted() {
        let (writer, reader) = pipe::pipe().unwrap();
        let mut writer: std::fs::File = writer.into_blocking_fd().unwrap().into();
        let wrote = std::thread::spawn(move || {
            for number in 0..2_000_000_u32 {
                writer.write_all(&number.to_le_bytes()).unwrap();
            }
        });
        let mut tail = Tail::new();
        tail.read_all(reader).await;
        wrote.join().unwrap();
        assert_eq!(tail.total(), 8_000_000);
        assert!(tail.is_truncated());
        let bytes = tail.into_bytes();
        assert_eq!(bytes.len(), KEPT);
        let first = 2_000_000 - u32::try_from(KEPT / 4).unwrap();
        assert!(bytes.chunks(4).zip(first..).all(|(chunk, number)| chunk == number.to_le_bytes()));
        assert_eq!(Room::spent(), 0);
    }

    #[test]
    fn what_is_short_is_whole() {
        let mut tail = Tail::new();
        tail.bytes.extend_from_slice(b"no line end");
        tail.add_line("a line");
        assert!(!tail.is_truncated());
        assert_eq!(tail.into_bytes(), "no line end\na line\n");
    }
}
