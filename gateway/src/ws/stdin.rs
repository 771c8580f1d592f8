//! Input on its way to a session, kept until the session says that it has come: whatever dies on the way, it is sent
//! again from the byte that did not come.

use bytes::{Buf as _, Bytes, BytesMut};

/// Most that is on the way at once: beyond it, signals and acknowledgements would wait behind input (oc/v1/exec.proto,
/// `ExecStdin.data`).
pub const MAX_ON_THE_WAY: usize = 256 << 10;

/// Most that is sent in one message.
const MAX_PIECE: usize = 64 << 10;

/// The input of one attachment.
#[derive(Debug, Default)]
pub struct Stdin {
    /// How much of it has come.
    accepted: u64,
    /// What follows.
    held: BytesMut,
    /// How much of that has been sent.
    sent: usize,
}

impl Stdin {
    /// Whether more may be taken from the client.
    #[must_use]
    pub fn has_room(&self) -> bool {
        self.held.len() < MAX_ON_THE_WAY
    }

    /// Takes input from the client. Copied: many small pieces would each keep the buffer that they came in.
    pub fn push(&mut self, bytes: &[u8]) {
        self.held.extend_from_slice(bytes);
    }

    /// Whether there is something that may be sent.
    #[must_use]
    pub fn has_unsent(&self) -> bool {
        self.sent < self.held.len().min(MAX_ON_THE_WAY)
    }

    /// The next piece to send, and how much was sent before it.
    pub fn send(&mut self) -> Option<(u64, Bytes)> {
        let end = self.held.len().min(MAX_ON_THE_WAY).min(self.sent + MAX_PIECE);
        let piece = self.held.get(self.sent..end).filter(|piece| !piece.is_empty())?;
        let next = (self.accepted + self.sent as u64, Bytes::copy_from_slice(piece));
        self.sent = end;
        Some(next)
    }

    /// So much has come, of all that was ever sent. What was never sent cannot have come.
    pub fn accept(&mut self, offset: u64) {
        let come = usize::try_from(offset.saturating_sub(self.accepted)).unwrap_or(usize::MAX).min(self.sent);
        self.held.advance(come);
        self.accepted += come as u64;
        self.sent -= come;
        if self.held.is_empty() {
            // What is empty holds on to its memory, too.
            self.held = BytesMut::new();
        }
    }

    /// Attached again, where so much had come: the rest is sent once more.
    pub fn restart(&mut self, offset: u64) {
        self.accept(offset);
        self.sent = 0;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn only_so_much_is_on_the_way_at_once() {
        let mut stdin = Stdin::default();
        stdin.push(&[7; MAX_ON_THE_WAY - 1]);
        assert!(stdin.has_room());
        stdin.push(&[7; 1 << 20]);
        assert!(!stdin.has_room());
        let mut sent = 0;
        while let Some((offset, piece)) = stdin.send() {
            assert_eq!(offset, sent);
            sent += piece.len() as u64;
        }
        assert_eq!(sent, MAX_ON_THE_WAY as u64);
        assert!(!stdin.has_unsent());
        stdin.accept(10);
        assert_eq!(stdin.send().unwrap(), (sent, Bytes::from_static(&[7; 10])));
        stdin.accept(u64::MAX);
        assert_eq!(stdin.accepted, sent + 10, "what was never sent cannot have come");
    }

    /// What happens to an attachment's input.
    #[derive(Debug, Clone)]
    enum Step {
        Push(Vec<u8>),
        Send,
        Accept(u64),
        /// The connection breaks; so much of what was sent came.
        Break(u64),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            proptest::collection::vec(any::<u8>(), 0..50).prop_map(Step::Push),
            Just(Step::Send),
            (0_u64..100).prop_map(Step::Accept),
            (0_u64..100).prop_map(Step::Break),
        ]
    }

    proptest! {
        #[test]
        fn every_byte_comes_once_and_in_order(steps in proptest::collection::vec(step(), 0..60)) {
            let (mut stdin, mut written, mut come) = (Stdin::default(), Vec::new(), Vec::new());
            let mut on_the_way: Vec<(u64, Bytes)> = Vec::new();
            // What a session does: it takes what it has not taken yet.
            let take = |come: &mut Vec<u8>, (offset, piece): (u64, Bytes)| {
                let known = (come.len() as u64).checked_sub(offset).expect("a gap") as usize;
                come.extend_from_slice(piece.get(known..).unwrap_or_default());
            };
            for step in steps {
                match step {
                    Step::Push(bytes) => {
                        written.extend_from_slice(&bytes);
                        stdin.push(&bytes);
                    }
                    Step::Send => on_the_way.extend(stdin.send()),
                    Step::Accept(some) => {
                        let arrived = on_the_way.len().min(some as usize);
                        on_the_way.drain(..arrived).for_each(|piece| take(&mut come, piece));
                        stdin.accept(come.len() as u64);
                    }
                    Step::Break(some) => {
                        let arrived = on_the_way.len().min(some as usize);
                        on_the_way.drain(..arrived).for_each(|piece| take(&mut come, piece));
                        on_the_way.clear();
                        stdin.restart(come.len() as u64);
                    }
                }
            }
            while let Some(piece) = stdin.send() {
                on_the_way.push(piece);
            }
            on_the_way.into_iter().for_each(|piece| take(&mut come, piece));
            prop_assert!(come == written);
        }
    }
}
