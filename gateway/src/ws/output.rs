//! How far a client has come in a session's output: no byte is sent twice, wherever the host begins again, and what is
//! missing is counted.

use bytes::{Buf as _, Bytes};

/// Beyond this, what a client has taken is acknowledged at once. Small sessions' rings are larger.
const ACKNOWLEDGED_AT_ONCE: u64 = 64 << 10;

/// A client's place in the output.
#[derive(Debug)]
pub struct Output {
    /// The next byte that it is to be sent.
    next: u64,
    /// All before this one are acknowledged.
    acknowledged: u64,
    /// Bytes that it was never sent.
    pub missed: u64,
}

impl Output {
    /// Begins with this byte.
    #[must_use]
    pub fn starting_at(next: u64) -> Self {
        Self { next, acknowledged: next, missed: 0 }
    }

    /// The next byte to be sent.
    #[must_use]
    pub fn next(&self) -> u64 {
        self.next
    }

    /// The part of these bytes that the client does not have yet.
    pub fn take(&mut self, offset: u64, mut data: Bytes) -> Bytes {
        let known = usize::try_from(self.next.saturating_sub(offset)).unwrap_or(usize::MAX).min(data.len());
        data.advance(known);
        if !data.is_empty() {
            self.skip_to(offset + known as u64);
            self.next += data.len() as u64;
        }
        data
    }

    /// What lies before this byte will not come.
    pub fn skip_to(&mut self, offset: u64) {
        let gap = offset.saturating_sub(self.next);
        self.missed += gap;
        self.next += gap;
    }

    /// The client has taken all that it was sent: whether that is to be acknowledged at once, soon, or not at all.
    #[must_use]
    pub fn due(&self) -> Due {
        match self.next - self.acknowledged {
            0 => Due::Never,
            bytes if bytes < ACKNOWLEDGED_AT_ONCE => Due::Soon,
            _ => Due::Now,
        }
    }

    /// What to acknowledge.
    pub fn acknowledge(&mut self) -> u64 {
        self.acknowledged = self.next;
        self.acknowledged
    }

    /// Another connection, another count: it begins where this one stands.
    pub fn restart(&mut self) {
        self.acknowledged = self.next;
    }
}

/// When something is to be acknowledged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Due {
    /// There is nothing new.
    Never,
    /// Together with what comes next, if it comes soon.
    Soon,
    /// Without waiting.
    Now,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn gaps_are_counted_and_repetitions_are_cut() {
        let mut output = Output::starting_at(10);
        assert_eq!(output.take(10, Bytes::from_static(b"abc")), "abc");
        assert_eq!(output.take(11, Bytes::from_static(b"bcde")), "de");
        assert_eq!(output.take(3, Bytes::from_static(b"x")), "");
        assert_eq!((output.next(), output.missed), (15, 0));
        assert_eq!(output.take(20, Bytes::from_static(b"z")), "z");
        output.skip_to(30);
        output.skip_to(5);
        assert_eq!((output.next(), output.missed), (30, 14));
    }

    #[test]
    fn much_is_acknowledged_at_once_and_little_soon() {
        let mut output = Output::starting_at(10);
        assert_eq!(output.due(), Due::Never);
        output.take(10, Bytes::from_static(b"a"));
        assert_eq!(output.due(), Due::Soon);
        output.take(11, vec![0; 64 << 10].into());
        assert_eq!(output.due(), Due::Now);
        assert_eq!(output.acknowledge(), 11 + (64 << 10));
        assert_eq!(output.due(), Due::Never);
    }

    proptest! {
        #[test]
        fn every_byte_comes_once_however_often_the_host_begins_again(
            written in proptest::collection::vec(any::<u8>(), 1..300),
            begins in proptest::collection::vec((0_usize..300, 1_usize..40), 1..20),
        ) {
            let (mut output, mut got) = (Output::starting_at(0), Vec::new());
            for (back, size) in begins {
                // Anywhere at or before the byte that is due, to anywhere after.
                let from = got.len().saturating_sub(back);
                let to = (got.len() + size).min(written.len());
                got.extend_from_slice(&output.take(from as u64, Bytes::copy_from_slice(&written[from..to])));
            }
            prop_assert_eq!(output.next(), got.len() as u64);
            prop_assert_eq!(output.missed, 0);
            prop_assert!(got == written[..got.len()]);
        }
    }
}
