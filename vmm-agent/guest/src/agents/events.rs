//! An agent's events, out of what its session has written.
//!
//! No I/O here. Standard output and standard error share one count of bytes, so that an event's line may have bytes of the
//! log amid it; where an event ends is an offset from which everything after it comes again.

use std::{borrow::Cow, mem};

use serde::Deserialize;

/// Longest line that is an event, bytes, so that its message is less than the 4 MiB that gRPC's clients take where nobody
/// tells them otherwise.
pub const MAX_LINE: usize = (4 << 20) - (4 << 10);
/// Longest type, bytes.
const MAX_TYPE: usize = 64;

/// What there was.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Found {
    /// An event.
    Event {
        /// Its type.
        kind: String,
        /// All of it, without the line's end.
        json: String,
        /// Offset of the byte behind its line.
        next_offset: u64,
    },
    /// So many bytes that are no event: the ring dropped them, they are too long a line, or none of the wrapper's.
    Dropped(u64),
}

/// Finds events in standard output, piece by piece.
#[derive(Debug, Default)]
pub struct Lines {
    /// The line under way, as long as it is not too long.
    partial: Vec<u8>,
    /// How many bytes it has.
    length: u64,
}

impl Lines {
    /// Takes the bytes of standard output at `offset`, and tells `found` what is complete.
    pub fn push(&mut self, mut offset: u64, bytes: &[u8], mut found: impl FnMut(Found)) {
        for part in bytes.split_inclusive(|&byte| byte == b'\n') {
            offset += part.len() as u64;
            self.length += part.len() as u64;
            if self.length <= MAX_LINE as u64 {
                self.partial.extend_from_slice(part);
            } else {
                self.partial = Vec::new();
            }
            if part.ends_with(b"\n") {
                found(self.take(offset));
            }
        }
    }

    /// Notes that so many bytes will never come. What follows them may begin amid a line; that is no JSON then.
    pub fn gap(&mut self, bytes: u64) -> Found {
        self.partial.clear();
        Found::Dropped(mem::take(&mut self.length) + bytes)
    }

    /// Notes that nothing follows.
    pub fn end(&mut self) -> Option<Found> {
        (self.length > 0).then(|| self.gap(0))
    }

    fn take(&mut self, next_offset: u64) -> Found {
        let (line, length) = (mem::take(&mut self.partial), mem::take(&mut self.length));
        event(line, next_offset).unwrap_or(Found::Dropped(length))
    }
}

/// The event that a line is, if it is one.
fn event(mut line: Vec<u8>, next_offset: u64) -> Option<Found> {
    #[derive(Deserialize)]
    struct Head<'a> {
        #[serde(rename = "type", borrow)]
        kind: Cow<'a, str>,
    }
    line.pop_if(|last| *last == b'\n');
    // What begins otherwise is no object.
    let json = String::from_utf8(line).ok().filter(|json| json.starts_with('{'))?;
    // All of it is read, so all of it is JSON.
    let Head { kind } = serde_json::from_str(&json).ok()?;
    let kind = (kind.len() <= MAX_TYPE).then(|| kind.into_owned())?;
    Some(Found::Event { kind, json, next_offset })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn all(lines: &mut Lines, offset: u64, bytes: &[u8]) -> Vec<Found> {
        let mut found = Vec::new();
        lines.push(offset, bytes, |one| found.push(one));
        found
    }

    #[test]
    fn an_event_is_a_line_that_says_its_type() {
        let mut lines = Lines::default();
        let found = all(&mut lines, 7, b"{\"a\":[{}],\"type\":\"\\u0072eady\"}\n{\"type\":\"x\"");
        let json = r#"{"a":[{}],"type":"\u0072eady"}"#.to_owned();
        let next_offset = 7 + 1 + json.len() as u64;
        assert_eq!(found, [Found::Event { kind: "ready".into(), json, next_offset }]);
        assert_eq!(lines.end(), Some(Found::Dropped(11)));
        assert_eq!(lines.end(), None);
        for bad in [
            &b"\n"[..],
            b"text\n",
            b"{}\n",
            b"[\"type\"]\n",
            b"{\"type\":1}\n",
            b"{\"type\":\"x\"} \x00\n",
            b"{\"type\":\"x\",\"y\":\"\xff\"}\n",
            b"{\"type\":\"x\"}{}\n",
        ] {
            assert_eq!(all(&mut lines, 0, bad), [Found::Dropped(bad.len() as u64)], "{bad:?}");
        }
        let long_type = format!("{{\"type\":\"{}\"}}\n", "x".repeat(MAX_TYPE + 1));
        assert_eq!(all(&mut lines, 0, long_type.as_bytes()), [Found::Dropped(long_type.len() as u64)]);
    }

    #[test]
    fn a_line_that_is_too_long_is_left_out_and_not_kept() {
        let mut lines = Lines::default();
        let (begin, end) = ("{\"type\":\"x\",\"y\":\"", "\"}\n");
        let fits = format!("{begin}{}{end}", "y".repeat(MAX_LINE - begin.len() - end.len()));
        assert!(matches!(all(&mut lines, 0, fits.as_bytes())[..], [Found::Event { .. }]));
        let piece = vec![b'y'; 1 << 20];
        for _ in 0..40 {
            assert_eq!(all(&mut lines, 0, &piece), []);
            assert!(lines.partial.capacity() <= 2 * MAX_LINE);
        }
        assert!(lines.partial.is_empty());
        let found = all(&mut lines, 0, b"\n{\"type\":\"next\"}\n");
        assert_eq!(found[0], Found::Dropped((40 << 20) + 1));
        assert!(matches!(&found[1], Found::Event { kind, .. } if kind == "next"));
    }

    /// What an agent writes: an event, something else on standard output, or its log.
    #[derive(Clone, Debug)]
    enum Written {
        Event(u32),
        Other(String),
        Log(usize),
    }

    fn written() -> impl Strategy<Value = Vec<Written>> {
        let one = prop_oneof![
            4 => any::<u32>().prop_map(Written::Event),
            1 => "[a-z{}\"\\\\]{0,12}".prop_map(Written::Other),
            2 => (1usize..20).prop_map(Written::Log),
        ];
        prop::collection::vec(one, 0..20)
    }

    fn json(number: u32) -> String {
        format!("{{\"type\":\"n\",\"inner\":{{\"type\":\"m\",\"n\":{number}}},\"s\":\"}}{{\"}}")
    }

    /// Pieces as a session has them: standard output is cut at `cuts`, and what is written to the log lies where it may.
    fn pieces(written: &[Written], cuts: &[usize]) -> Vec<(u64, bool, Vec<u8>)> {
        let (mut pieces, mut offset) = (Vec::new(), 0u64);
        let mut cuts = cuts.iter().cycle();
        let mut carry = Vec::new();
        let mut push = |is_output: bool, bytes: Vec<u8>| {
            let length = bytes.len() as u64;
            if length > 0 {
                pieces.push((offset, is_output, bytes));
            }
            offset += length;
        };
        for one in written {
            match one {
                Written::Event(number) => carry.extend_from_slice(format!("{}\n", json(*number)).as_bytes()),
                Written::Other(text) => carry.extend_from_slice(format!("{text}\n").as_bytes()),
                Written::Log(length) => {
                    // Half of the line under way is written before it.
                    let cut = cuts.next().copied().unwrap_or(0) % (carry.len() + 1);
                    let rest = carry.split_off(cut);
                    push(true, mem::replace(&mut carry, rest));
                    push(false, vec![b'{'; *length]);
                }
            }
        }
        while !carry.is_empty() {
            let cut = 1 + cuts.next().copied().unwrap_or(0) % carry.len();
            let rest = carry.split_off(cut);
            push(true, mem::replace(&mut carry, rest));
        }
        pieces
    }

    /// What is found from `from` on, as a reader does it.
    fn found(pieces: &[(u64, bool, Vec<u8>)], from: u64) -> Vec<Found> {
        let (mut lines, mut found) = (Lines::default(), Vec::new());
        for (offset, is_output, bytes) in pieces {
            let skip = usize::try_from(from.saturating_sub(*offset)).unwrap().min(bytes.len());
            if *is_output {
                lines.push(offset + skip as u64, &bytes[skip..], |one| found.push(one));
            }
        }
        found.extend(lines.end());
        found
    }

    fn events(found: &[Found]) -> Vec<(String, u64)> {
        let of = |one: &Found| match one {
            Found::Event { json, next_offset, .. } => Some((json.clone(), *next_offset)),
            Found::Dropped(_) => None,
        };
        found.iter().filter_map(of).collect()
    }

    proptest! {
        #[test]
        fn every_event_is_found_however_it_comes_and_wherever_one_goes_on(
            written in written(),
            cuts in prop::collection::vec(0usize..100, 1..10),
        ) {
            let pieces = pieces(&written, &cuts);
            let all = events(&found(&pieces, 0));
            let numbers = written.iter().filter_map(|one| match one {
                Written::Event(number) => Some(json(*number)),
                _ => None,
            });
            prop_assert_eq!(all.iter().map(|(json, _)| json.clone()).collect::<Vec<_>>(), numbers.collect::<Vec<_>>());
            for (index, (_, next_offset)) in all.iter().enumerate() {
                prop_assert_eq!(&events(&found(&pieces, *next_offset)), &all[index + 1..]);
            }
        }

        #[test]
        fn every_byte_is_an_events_or_told(
            written in written(),
            cuts in prop::collection::vec(0usize..100, 1..10),
        ) {
            let pieces = pieces(&written, &cuts);
            let output: u64 = pieces.iter().filter(|piece| piece.1).map(|piece| piece.2.len() as u64).sum();
            let told: u64 = found(&pieces, 0)
                .iter()
                .map(|one| match one {
                    Found::Event { json, .. } => json.len() as u64 + 1,
                    Found::Dropped(bytes) => *bytes,
                })
                .sum();
            prop_assert_eq!(told, output);
        }

        #[test]
        fn nothing_that_begins_amid_a_line_is_an_event(number in any::<u32>(), cut in 1usize..100) {
            let line = format!("{}\n", json(number));
            let cut = cut % line.len();
            prop_assume!(cut > 0);
            let mut lines = Lines::default();
            let mut found = vec![lines.gap(cut as u64)];
            lines.push(cut as u64, &line.as_bytes()[cut..], |one| found.push(one));
            prop_assert!(events(&found).is_empty(), "{:?}", found);
        }
    }
}
