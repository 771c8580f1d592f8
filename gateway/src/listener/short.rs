//! Messages that are short enough to be put together: `send` of one piece does less around the socket than `writev` of several does.

use std::{
    io::{self, IoSlice},
    pin::Pin,
    task::{Context, Poll},
};

use tokio::io::AsyncWrite;

/// What is worth being put together: heads, and most answers of an API with theirs.
const SHORT: usize = 1 << 10;

/// Writes these pieces, as one if they are few bytes.
pub fn poll_write<W: AsyncWrite>(
    writer: Pin<&mut W>,
    context: &mut Context<'_>,
    pieces: &[IoSlice<'_>],
) -> Poll<io::Result<usize>> {
    match joined(pieces, &mut [0; SHORT]) {
        Some(whole) => writer.poll_write(context, whole),
        None => writer.poll_write_vectored(context, pieces),
    }
}

/// These bytes in one piece, if they are few.
fn joined<'a>(pieces: &'a [IoSlice<'_>], room: &'a mut [u8; SHORT]) -> Option<&'a [u8]> {
    if let [piece] = pieces {
        return Some(piece);
    }
    let mut length = 0;
    for piece in pieces {
        room.get_mut(length..length + piece.len())?.copy_from_slice(piece);
        length += piece.len();
    }
    Some(&room[..length])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_short_becomes_one_piece() {
        let whole = |lengths: &[usize]| {
            let pieces: Vec<Vec<u8>> = (1..).zip(lengths).map(|(byte, length)| vec![byte; *length]).collect();
            let slices: Vec<_> = pieces.iter().map(|piece| IoSlice::new(piece)).collect();
            let joined = joined(&slices, &mut [0; SHORT]).map(<[u8]>::to_vec);
            assert!(joined.is_none() || joined == Some(pieces.concat()));
            joined.is_some()
        };
        assert!(whole(&[]) && whole(&[5, 0, 7]) && whole(&[1000, 24]) && whole(&[SHORT]));
        assert!(!whole(&[1000, 25]) && !whole(&[SHORT, 0, 1]));
        // One piece is not copied.
        assert!(whole(&[100_000]));
    }
}
