//! What a session has written, as far as it is kept: a ring of bytes over standard output and standard error together.
//!
//! No I/O here: pieces are put in at the end, and dropped at the beginning. Bytes are never copied again; a reader takes
//! them by reference.

use std::collections::VecDeque;

use oc_proto::v1::ExecStream;
use prost::bytes::Bytes;

/// What a piece takes beside its bytes. Counted, so that a program that writes single bytes takes no more memory than one
/// that writes pages.
const OVERHEAD: usize = 64;

/// A piece of output.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Offset of its first byte.
    pub offset: u64,
    /// Where it was written to.
    pub stream: ExecStream,
    /// The bytes; never empty.
    pub bytes: Bytes,
}

impl Piece {
    fn end(&self) -> u64 {
        self.offset + self.bytes.len() as u64
    }
}

/// The ring.
#[derive(Debug)]
pub struct Ring {
    pieces: VecDeque<Piece>,
    /// Offset of the first byte that is kept; `end` if none is.
    begin: u64,
    /// Offset of the next byte.
    end: u64,
    /// What it may take, bytes.
    capacity: usize,
    /// What it takes.
    taken: usize,
}

impl Ring {
    /// An empty one that takes at most `capacity` bytes, its overhead included.
    pub fn new(capacity: usize) -> Self {
        Self { pieces: VecDeque::new(), begin: 0, end: 0, capacity, taken: 0 }
    }

    /// Offset of the first byte that is kept.
    pub fn begin(&self) -> u64 {
        self.begin
    }

    /// Offset of the next byte: how many were written.
    pub fn end(&self) -> u64 {
        self.end
    }

    /// What it takes, bytes.
    pub fn taken(&self) -> usize {
        self.taken
    }

    /// Whether one more piece of so many bytes would be too much to keep all.
    pub fn is_full_with(&self, more: usize) -> bool {
        self.taken + more + OVERHEAD > self.capacity
    }

    /// Lets it take so much from now on.
    pub fn set_capacity(&mut self, capacity: usize) {
        self.capacity = capacity;
        self.shrink();
    }

    /// Whether one more piece of so many bytes can be put in without dropping what a reader at `offset` has not had yet.
    pub fn has_room_for(&self, offset: u64, more: usize) -> bool {
        let mut excess = (self.taken + more + OVERHEAD).saturating_sub(self.capacity);
        for oldest in &self.pieces {
            if excess == 0 {
                return true;
            }
            if oldest.end() > offset {
                return false;
            }
            excess = excess.saturating_sub(oldest.bytes.len() + OVERHEAD);
        }
        // All was read.
        true
    }

    /// Puts bytes in at the end.
    pub fn push(&mut self, stream: ExecStream, bytes: Bytes) {
        if bytes.is_empty() {
            return;
        }
        self.taken += bytes.len() + OVERHEAD;
        let piece = Piece { offset: self.end, stream, bytes };
        self.end = piece.end();
        self.pieces.push_back(piece);
        self.shrink();
    }

    /// Drops the oldest pieces that are too much. The newest one stays, whole.
    fn shrink(&mut self) {
        while self.taken > self.capacity && self.pieces.len() > 1 {
            let Some(oldest) = self.pieces.pop_front() else { break };
            self.taken -= oldest.bytes.len() + OVERHEAD;
            self.begin = oldest.end();
        }
    }

    /// The bytes at `offset`, at most `limit` and of one stream; `None` at the end. They begin later than asked for where the
    /// ring has dropped what was there.
    pub fn read(&self, offset: u64, limit: usize) -> Option<Piece> {
        let offset = offset.max(self.begin);
        let index = self.pieces.partition_point(|piece| piece.end() <= offset);
        let piece = self.pieces.get(index)?;
        // Within the piece, so it fits.
        let skip = usize::try_from(offset - piece.offset).unwrap_or(usize::MAX);
        let end = piece.bytes.len().min(skip.saturating_add(limit));
        Some(Piece { offset, stream: piece.stream, bytes: piece.bytes.slice(skip..end) })
    }

    /// All that is kept of one stream.
    pub fn of_stream(&self, stream: ExecStream) -> Bytes {
        let mut pieces = self.pieces.iter().filter(|piece| piece.stream == stream);
        match (pieces.next(), pieces.next()) {
            (None, _) => Bytes::new(),
            (Some(only), None) => only.bytes.clone(),
            _ => {
                let of_it = || self.pieces.iter().filter(|piece| piece.stream == stream);
                let mut all = Vec::with_capacity(of_it().map(|piece| piece.bytes.len()).sum());
                of_it().for_each(|piece| all.extend_from_slice(&piece.bytes));
                all.into()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn stream(is_error: bool) -> ExecStream {
        if is_error { ExecStream::Stderr } else { ExecStream::Stdout }
    }

    /// Reads on from `offset`, so many bytes at a time: what came, by stream, and how many were dropped.
    fn read_all(ring: &Ring, mut offset: u64, limit: usize) -> (Vec<(ExecStream, u8)>, u64) {
        let (mut read, mut dropped) = (Vec::new(), 0);
        while let Some(piece) = ring.read(offset, limit) {
            assert!(!piece.bytes.is_empty() && piece.bytes.len() <= limit);
            dropped += piece.offset - offset;
            offset = piece.end();
            read.extend(piece.bytes.iter().map(|&byte| (piece.stream, byte)));
        }
        assert_eq!(offset.max(ring.end()), offset);
        (read, dropped)
    }

    proptest! {
        #[test]
        fn a_reader_gets_every_byte_once_or_is_told_how_many_are_dropped(
            writes in proptest::collection::vec((any::<bool>(), proptest::collection::vec(any::<u8>(), 0..50)), 0..40),
            capacity in 1usize..2000,
            from in 0u64..800,
            limit in 1usize..70,
        ) {
            let mut ring = Ring::new(capacity);
            let mut all = Vec::new();
            for (is_error, bytes) in writes {
                all.extend(bytes.iter().map(|&byte| (stream(is_error), byte)));
                let largest = bytes.len() + OVERHEAD;
                ring.push(stream(is_error), bytes.into());
                prop_assert!(ring.taken() <= capacity.max(largest.max(50 + OVERHEAD)));
            }
            prop_assert_eq!(ring.end(), all.len() as u64);
            let (read, dropped) = read_all(&ring, from, limit);
            let begin = usize::try_from(from.max(ring.begin())).unwrap().min(all.len());
            prop_assert_eq!(&read, &all[begin..]);
            prop_assert!(read.is_empty() || dropped == ring.begin().saturating_sub(from));
            let kept = usize::try_from(ring.begin()).unwrap();
            for one in [ExecStream::Stdout, ExecStream::Stderr] {
                let expected: Vec<u8> =
                    all[kept..].iter().filter(|(stream, _)| *stream == one).map(|(_, byte)| *byte).collect();
                prop_assert_eq!(ring.of_stream(one), expected);
            }
        }

        #[test]
        fn nothing_unread_is_dropped_while_there_is_room_for_its_reader(
            steps in proptest::collection::vec((1usize..40, 0u64..60), 1..60),
            capacity in 1usize..600,
        ) {
            let mut ring = Ring::new(capacity);
            let mut reader = 0;
            for (write, read) in steps {
                if ring.has_room_for(reader, write) {
                    ring.push(ExecStream::Stdout, vec![0; write].into());
                    prop_assert!(ring.begin() <= reader);
                }
                reader = (reader + read).min(ring.end());
            }
            // Whoever has read all is never in the way.
            prop_assert!(ring.has_room_for(ring.end(), 1 << 20));
        }
    }

    #[test]
    fn a_reader_that_keeps_up_loses_nothing() {
        let mut ring = Ring::new(1000);
        let mut reader = 0;
        for _ in 0..10_000 {
            while ring.has_room_for(reader, 100) {
                ring.push(ExecStream::Stdout, vec![7; 100].into());
                assert!(ring.begin() <= reader, "dropped what was not read");
            }
            let piece = ring.read(reader, 64).unwrap();
            assert_eq!(piece.offset, reader);
            reader = piece.end();
        }
    }
}
