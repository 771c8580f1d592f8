//! Bytes that come piece by piece and are held until all are there.
//!
//! Whoever sends them chooses how they are cut. Each piece on its own costs its entry here and keeps the buffer that
//! it was read into, so that a message cut into single bytes would take many times its length. Small pieces are
//! therefore copied together; large ones stay as they came.

use std::collections::VecDeque;

use bytes::{Bytes, BytesMut};

/// Pieces smaller than this are copied.
const SMALL: usize = 4 << 10;

/// Small pieces are copied together up to about this size.
const BLOCK: usize = 64 << 10;

/// What has come so far.
#[derive(Debug, Default)]
pub struct Pieces {
    whole: VecDeque<Bytes>,
    /// Small pieces behind those.
    tail: BytesMut,
    length: usize,
}

impl Pieces {
    /// Adds a piece.
    pub fn push(&mut self, piece: Bytes) {
        self.length += piece.len();
        if piece.len() < SMALL {
            self.tail.extend_from_slice(&piece);
            if self.tail.len() >= BLOCK {
                self.close_tail();
            }
        } else {
            self.close_tail();
            self.whole.push_back(piece);
        }
    }

    /// Bytes in all pieces.
    #[must_use]
    pub fn len(&self) -> usize {
        self.length
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// The first `length` bytes in one piece, or all there are if they are fewer. Not copied where they are in one
    /// already.
    pub fn first(&mut self, length: usize) -> Bytes {
        self.close_tail();
        match self.whole.front() {
            Some(first) if first.len() >= length => first.slice(..length),
            _ => {
                let mut copied = BytesMut::with_capacity(length.min(self.length));
                for piece in &self.whole {
                    let missing = length - copied.len();
                    copied.extend_from_slice(piece.get(..missing).unwrap_or(piece));
                }
                copied.freeze()
            }
        }
    }

    /// All in one piece; not copied where they came in one.
    #[must_use]
    pub fn into_whole(mut self) -> Bytes {
        self.close_tail();
        match self.whole.pop_front() {
            Some(only) if self.whole.is_empty() => only,
            first => {
                let mut whole = BytesMut::with_capacity(self.length);
                for piece in first.into_iter().chain(self.whole) {
                    whole.extend_from_slice(&piece);
                }
                whole.freeze()
            }
        }
    }

    /// One after the other.
    #[must_use]
    pub fn into_pieces(mut self) -> VecDeque<Bytes> {
        self.close_tail();
        self.whole
    }

    fn close_tail(&mut self) {
        if !self.tail.is_empty() {
            self.whole.push_back(std::mem::take(&mut self.tail).freeze());
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn small_pieces_are_held_in_few_blocks() {
        let mut pieces = Pieces::default();
        for _ in 0..1 << 20 {
            pieces.push(Bytes::from_static(b"x"));
            pieces.push(Bytes::new());
        }
        assert_eq!(pieces.len(), 1 << 20);
        let held = pieces.into_pieces();
        assert!(held.len() <= (1 << 20) / BLOCK, "{}", held.len());
    }

    #[test]
    fn large_pieces_are_not_copied() {
        let large = Bytes::from(vec![7; SMALL]);
        let mut pieces = Pieces::default();
        pieces.push(large.clone());
        assert_eq!(pieces.first(10).as_ptr(), large.as_ptr());
        pieces.push(Bytes::from_static(b"small"));
        pieces.push(large.clone());
        let held = pieces.into_pieces();
        assert_eq!(held.len(), 3);
        assert_eq!((held[0].as_ptr(), held[2].as_ptr()), (large.as_ptr(), large.as_ptr()));
        let mut only = Pieces::default();
        only.push(large.clone());
        assert_eq!(only.into_whole().as_ptr(), large.as_ptr());
    }

    proptest! {
        #[test]
        fn bytes_stay_in_order(
            sizes in proptest::collection::vec(prop_oneof![0_usize..20, SMALL - 1..SMALL + 2], 0..40),
            first in 0_usize..3 * SMALL,
            look_at in 0_usize..40,
        ) {
            let mut sent = Vec::new();
            let (mut pieces, mut others) = (Pieces::default(), Pieces::default());
            for (index, size) in sizes.into_iter().enumerate() {
                let piece: Vec<u8> = (0..size).map(|at| (at + index) as u8).collect();
                sent.extend_from_slice(&piece);
                pieces.push(piece.clone().into());
                others.push(piece.into());
                if index == look_at {
                    prop_assert_eq!(&pieces.first(first)[..], &sent[..first.min(sent.len())]);
                }
            }
            prop_assert_eq!(pieces.len(), sent.len());
            prop_assert_eq!(&pieces.first(first)[..], &sent[..first.min(sent.len())]);
            prop_assert!(pieces.into_whole() == sent);
            prop_assert!(Vec::from(others.into_pieces()).concat() == sent);
        }
    }
}
