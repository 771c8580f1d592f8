//! Who is attached to a session, what its ring keeps for whom, and how much of whose input has come.
//!
//! No I/O here, and time is told. An attachment that has a name lives through several connections:
//!
//! ```text
//!            attach                     broken, to be held                 time, or detach
//!   (none) ─────────▶ live connection ─────────────────────▶ held ─────────────────────▶ gone
//!                        ▲    │ ▲          attach              │                           │
//!                        └────┘ └──────────────────────────────┴───────────────────────────┘
//!                     attach (elsewhere)
//! ```
//!
//! One that is live or held is waited for: the ring drops nothing that it needs. One that is gone is remembered for its input
//! alone, so that none of it is taken twice.

use std::time::Duration;

use tokio::time::Instant;

use super::ring::Ring;

/// Connections to one session at once.
const MAX_LIVE: usize = 256;
/// Attachments that are remembered.
const MAX_KNOWN: usize = 512;
/// Who takes nothing for this long while others wait is waited for no longer.
const STALLED: Duration = Duration::from_secs(10);

/// Names an attachment of one session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Key(u64);

/// How a client attaches.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Terms {
    /// What it calls its attachment; nothing where empty.
    pub name: String,
    /// Whether it says itself what it has dealt with.
    pub acknowledges: bool,
    /// For how long it is waited for after its connection broke.
    pub hold: Duration,
}

/// A connection of an attachment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Connection {
    /// The attachment.
    pub key: Key,
    number: u64,
}

/// Why nobody attaches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TooMany;

/// Input that does not follow what has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gap {
    /// What has come, bytes.
    pub come: u64,
}

/// All attachments of a session.
#[derive(Debug)]
pub struct Attachments {
    known: Vec<Attachment>,
    next: u64,
    /// Since when nobody is connected; `None` while somebody is.
    alone_since: Option<Instant>,
}

#[derive(Debug)]
struct Attachment {
    key: Key,
    terms: Terms,
    state: State,
    /// Whatever was written before this is of no use to it.
    needs: u64,
    /// Since when it is in the way of others.
    in_the_way_since: Option<Instant>,
    /// Input that has come, bytes.
    stdin: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Live { number: u64 },
    Held { until: Instant },
    Gone,
}

impl Attachments {
    /// None yet.
    pub fn new(now: Instant) -> Self {
        Self { known: Vec::new(), next: 0, alone_since: Some(now) }
    }

    /// How many connections there are.
    pub fn live(&self) -> usize {
        self.known.iter().filter(|one| matches!(one.state, State::Live { .. })).count()
    }

    /// Since when nobody is connected; `None` while somebody is.
    pub fn alone_since(&self) -> Option<Instant> {
        self.alone_since
    }

    /// Begins a connection that has everything before `offset`. One of the same name before it is over.
    ///
    /// # Errors
    ///
    /// [`TooMany`].
    pub fn attach(&mut self, terms: Terms, offset: u64) -> Result<Connection, TooMany> {
        let number = self.next;
        self.next += 1;
        let named = |one: &&mut Attachment| !terms.name.is_empty() && one.terms.name == terms.name;
        let is_live = |one: &Attachment| matches!(one.state, State::Live { .. });
        let live = self.live();
        if let Some(known) = self.known.iter_mut().find(named) {
            if live >= MAX_LIVE && !is_live(known) {
                return Err(TooMany);
            }
            (known.terms, known.state, known.needs) = (terms, State::Live { number }, offset);
            known.in_the_way_since = None;
            self.alone_since = None;
            return Ok(Connection { key: known.key, number });
        }
        if live >= MAX_LIVE {
            return Err(TooMany);
        }
        if self.known.len() >= MAX_KNOWN {
            let oldest_gone = self.known.iter().position(|one| one.state == State::Gone);
            self.known.remove(oldest_gone.ok_or(TooMany)?);
        }
        let key = Key(number);
        self.known.push(Attachment {
            key,
            terms,
            state: State::Live { number },
            needs: offset,
            in_the_way_since: None,
            stdin: 0,
        });
        self.alone_since = None;
        Ok(Connection { key, number })
    }

    fn live_at(&mut self, connection: Connection) -> Option<&mut Attachment> {
        self.known
            .iter_mut()
            .find(|one| one.key == connection.key && one.state == State::Live { number: connection.number })
    }

    /// Whether a connection is still the newest of its attachment.
    pub fn is_current(&mut self, connection: Connection) -> bool {
        self.live_at(connection).is_some()
    }

    /// Notes that everything before `offset` was handed over to a connection.
    pub fn sent(&mut self, connection: Connection, offset: u64) {
        if let Some(one) = self.live_at(connection).filter(|one| !one.terms.acknowledges) {
            one.advance(offset);
        }
    }

    /// Notes that a client has dealt with everything before `offset`.
    pub fn acknowledged(&mut self, connection: Connection, offset: u64) {
        if let Some(one) = self.live_at(connection).filter(|one| one.terms.acknowledges) {
            one.advance(offset);
        }
    }

    /// Ends a connection. With `is_broken` its attachment is held as long as its client has asked for.
    pub fn detach(&mut self, connection: Connection, is_broken: bool, now: Instant) {
        let Some(one) = self.live_at(connection) else { return };
        let is_held = is_broken && !one.terms.name.is_empty() && !one.terms.hold.is_zero();
        one.state = if is_held { State::Held { until: now + one.terms.hold } } else { State::Gone };
        one.in_the_way_since = None;
        self.known.retain(|one| !one.terms.name.is_empty() || one.state != State::Gone);
        if self.live() == 0 {
            self.alone_since = Some(now);
        }
    }

    /// Until when somebody has to be waited for before a piece of so many bytes can be put into the ring, if nobody takes
    /// anything before that: `None` if it can be now.
    pub fn wait(&mut self, ring: &Ring, more: usize, now: Instant) -> Option<Wait> {
        for one in &mut self.known {
            if matches!(one.state, State::Held { until } if until <= now) {
                one.state = State::Gone;
            }
            let is_in_the_way = one.state != State::Gone && !ring.has_room_for(one.needs, more);
            one.in_the_way_since = is_in_the_way.then(|| one.in_the_way_since.unwrap_or(now));
        }
        // Whoever waits for more, as all that was written has been sent or dealt with.
        let others_wait = self
            .known
            .iter()
            .any(|one| matches!(one.state, State::Live { .. }) && one.in_the_way_since.is_none());
        let waits = self.known.iter().filter_map(|one| {
            let since = one.in_the_way_since?;
            match one.state {
                State::Held { until } => Some(Wait::Until(until)),
                State::Live { .. } if others_wait => Some(Wait::Until(since + STALLED)),
                State::Live { .. } => Some(Wait::ForIt),
                State::Gone => None,
            }
        });
        waits.filter(|wait| !matches!(wait, Wait::Until(until) if *until <= now)).min()
    }

    /// How much of an attachment's input has come, bytes.
    pub fn stdin(&self, key: Key) -> u64 {
        self.known.iter().find(|one| one.key == key).map_or(0, |one| one.stdin)
    }

    /// How many of `length` bytes of input that were sent after `offset` others have come already.
    ///
    /// # Errors
    ///
    /// [`Gap`] if some before them have not.
    pub fn known_input(&self, key: Key, offset: u64, length: usize) -> Result<usize, Gap> {
        let Some(one) = self.known.iter().find(|one| one.key == key && !one.terms.name.is_empty()) else {
            return Ok(0);
        };
        match one.stdin.checked_sub(offset) {
            None => Err(Gap { come: one.stdin }),
            Some(known) => Ok(usize::try_from(known).unwrap_or(usize::MAX).min(length)),
        }
    }

    /// Notes that so much more input has come.
    pub fn input(&mut self, key: Key, length: usize) {
        if let Some(one) = self.known.iter_mut().find(|one| one.key == key) {
            one.stdin += length as u64;
        }
    }
}

/// How long to wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Wait {
    /// Until then at most.
    Until(Instant),
    /// Until somebody takes something.
    ForIt,
}

impl Attachment {
    fn advance(&mut self, offset: u64) {
        if offset > self.needs {
            self.needs = offset;
            self.in_the_way_since = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use oc_proto::v1::ExecStream;

    use super::*;

    const HOLD: Duration = Duration::from_secs(15);

    fn named(name: &str) -> Terms {
        Terms { name: name.into(), acknowledges: true, hold: HOLD }
    }

    fn full() -> Ring {
        let mut ring = Ring::new(300);
        ring.push(ExecStream::Stdout, vec![0; 100].into());
        ring.push(ExecStream::Stdout, vec![0; 50].into());
        ring
    }

    #[test]
    fn nobody_is_waited_for_where_nobody_is() {
        let now = Instant::now();
        let mut all = Attachments::new(now);
        assert_eq!(all.wait(&full(), 100, now), None);
        assert_eq!(all.alone_since(), Some(now));
    }

    #[test]
    fn a_reader_is_waited_for_until_it_has_taken_what_would_be_dropped() {
        let now = Instant::now();
        let mut all = Attachments::new(now);
        let reader = all.attach(Terms::default(), 0).unwrap();
        assert_eq!(all.wait(&full(), 100, now), Some(Wait::ForIt));
        all.acknowledged(reader, 100);
        assert_eq!(all.wait(&full(), 100, now), Some(Wait::ForIt), "it does not acknowledge");
        all.sent(reader, 100);
        assert_eq!(all.wait(&full(), 100, now), None);
        assert_eq!(all.alone_since(), None);
    }

    #[test]
    fn what_is_on_the_way_is_kept_for_one_that_acknowledges() {
        let now = Instant::now();
        let mut all = Attachments::new(now);
        let reader = all.attach(named("a"), 0).unwrap();
        all.sent(reader, 150);
        assert_eq!(all.wait(&full(), 100, now), Some(Wait::ForIt));
        all.detach(reader, true, now);
        assert_eq!(all.wait(&full(), 100, now), Some(Wait::Until(now + HOLD)));
        assert_eq!(all.live(), 0);
        let again = all.attach(named("a"), 0).unwrap();
        assert_eq!(again.key, reader.key);
        assert_eq!(all.wait(&full(), 100, now + HOLD), Some(Wait::ForIt));
        all.acknowledged(reader, 150);
        assert_eq!(all.wait(&full(), 100, now), Some(Wait::ForIt), "an old connection says nothing any more");
        all.detach(reader, false, now);
        assert!(all.is_current(again));
        all.detach(again, false, now);
        assert_eq!(all.wait(&full(), 100, now), None);
    }

    #[test]
    fn nobody_is_held_for_longer_than_asked() {
        let now = Instant::now();
        let mut all = Attachments::new(now);
        let reader = all.attach(named("a"), 0).unwrap();
        all.detach(reader, true, now);
        assert_eq!(all.wait(&full(), 100, now + HOLD), None);
        let nameless = all.attach(Terms { name: String::new(), ..named("") }, 0).unwrap();
        all.detach(nameless, true, now);
        assert_eq!(all.wait(&full(), 100, now), None);
    }

    #[test]
    fn one_that_stands_still_holds_up_others_for_a_while_only() {
        let now = Instant::now();
        let mut all = Attachments::new(now);
        let _dead = all.attach(Terms::default(), 0).unwrap();
        let quick = all.attach(Terms::default(), 150).unwrap();
        // However long ago it took something: it was not in the way then.
        let later = now + Duration::from_secs(3600);
        assert_eq!(all.wait(&full(), 100, later), Some(Wait::Until(later + STALLED)));
        assert_eq!(all.wait(&full(), 100, later + STALLED), None);
        all.detach(quick, false, later);
        assert_eq!(all.wait(&full(), 100, later + STALLED), Some(Wait::ForIt), "nobody else waits");
    }

    #[test]
    fn input_comes_once_over_all_connections() {
        let now = Instant::now();
        let mut all = Attachments::new(now);
        let first = all.attach(named("a"), 0).unwrap();
        assert_eq!(all.known_input(first.key, 0, 10), Ok(0));
        all.input(first.key, 10);
        all.detach(first, true, now);
        let second = all.attach(named("a"), 0).unwrap();
        assert_eq!(all.stdin(second.key), 10);
        assert_eq!(all.known_input(second.key, 4, 10), Ok(6));
        assert_eq!(all.known_input(second.key, 0, 10), Ok(10));
        assert_eq!(all.known_input(second.key, 11, 1), Err(Gap { come: 10 }));
        let nameless = all.attach(Terms::default(), 0).unwrap();
        assert_eq!(all.known_input(nameless.key, 99, 5), Ok(0));
    }

    #[test]
    fn there_is_an_end_to_attachments() {
        let now = Instant::now();
        let mut all = Attachments::new(now);
        let mut live: Vec<_> = (0..MAX_LIVE).map(|n| all.attach(named(&n.to_string()), 0).unwrap()).collect();
        assert_eq!(all.attach(Terms::default(), 0), Err(TooMany));
        assert!(all.attach(named("7"), 0).is_ok(), "it takes its own place");
        for n in 0..2 * MAX_KNOWN {
            let last = live.pop().unwrap();
            all.detach(last, false, now);
            live.push(all.attach(named(&format!("again {n}")), 0).unwrap());
        }
        assert!(all.known.len() <= MAX_KNOWN);
        assert_eq!(all.live(), MAX_LIVE);
    }
}
