//! The keys that leave a session running: Ctrl-P and then Ctrl-Q, as with `docker attach`.

const CTRL_P: u8 = 0x10;
const CTRL_Q: u8 = 0x11;

/// Looks for the keys in what is typed. A Ctrl-P is held back until it is known what follows.
#[derive(Debug, Default)]
pub struct DetachKeys {
    is_held: bool,
}

/// What to do with what was typed.
#[derive(Debug, PartialEq, Eq)]
pub struct Typed {
    /// Passed on.
    pub bytes: Vec<u8>,
    /// Whether the keys came after that.
    pub detaches: bool,
}

impl DetachKeys {
    /// Takes what was typed.
    pub fn take(&mut self, typed: &[u8]) -> Typed {
        let mut bytes = Vec::with_capacity(typed.len() + 1);
        for &key in typed {
            match (std::mem::take(&mut self.is_held), key) {
                (true, CTRL_Q) => return Typed { bytes, detaches: true },
                (false, CTRL_P) => self.is_held = true,
                // Twice in a row stands for itself, and may begin the keys again.
                (true, CTRL_P) => {
                    bytes.push(CTRL_P);
                    self.is_held = true;
                }
                (true, key) => bytes.extend([CTRL_P, key]),
                (false, key) => bytes.push(key),
            }
        }
        Typed { bytes, detaches: false }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_keys_are_found_however_they_come() {
        let mut keys = DetachKeys::default();
        assert_eq!(keys.take(b"a\x10"), Typed { bytes: b"a".into(), detaches: false });
        assert_eq!(keys.take(b"\x11b"), Typed { bytes: b"".into(), detaches: true });
        assert!(DetachKeys::default().take(b"x\x10\x10\x11").detaches);
        assert_eq!(DetachKeys::default().take(b"\x11\x10x").bytes, b"\x11\x10x");
    }

    proptest! {
        #[test]
        fn what_holds_no_keys_passes_unchanged(parts in prop::collection::vec("[\x0f-\x11a]{0,4}", 0..8)) {
            let mut keys = DetachKeys::default();
            let mut passed = Vec::new();
            let typed = parts.concat().into_bytes();
            let at = typed.windows(2).position(|pair| pair == [CTRL_P, CTRL_Q]);
            let mut detaches = false;
            for part in parts {
                let taken = keys.take(part.as_bytes());
                passed.extend(taken.bytes);
                detaches |= taken.detaches;
                if detaches {
                    break;
                }
            }
            prop_assert_eq!(detaches, at.is_some());
            let expected = at.map_or(typed.as_slice(), |at| &typed[..at]);
            // The last one may still be held.
            let held = at.is_none() && expected.last() == Some(&CTRL_P);
            prop_assert_eq!(passed.as_slice(), &expected[..expected.len() - usize::from(held)]);
        }
    }
}
