//! Whether anybody is still there, on either side, as a function of what was seen when.
//!
//! A client that vanished sends no FIN, and a published client never sends anything by itself: so it is pinged after a
//! silence. Some hop between may end connections on which nothing comes for a while: so it is sent something after a
//! silence. And a host that says nothing, not even its signs of life, is gone as well.

use std::time::Duration;

use tokio::time::Instant;

/// How long a silence may be.
#[derive(Debug, Clone, Copy)]
pub struct Patience {
    /// After this long a client is pinged, and sent a sign of life.
    pub quiet: Duration,
    /// A client that neither sent nor answered anything for this long is gone. What is left of it after `quiet` counts from the
    /// first ping that it did not answer: after we stood still ourselves, as in a suspended machine, nobody has been asked yet.
    /// Not if it is not listened to: while its input is held back, or it takes nothing of what it is sent. If its
    /// connection is dead then, the kernel says so when it has waited long enough (see [`listener`](crate::listener)).
    pub gone: Duration,
    /// A host that said nothing for this long is gone. It says something every 30 s (oc/v1/exec.proto, `heartbeat_ms`).
    pub host: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self { quiet: Duration::from_secs(30), gone: Duration::from_secs(60), host: Duration::from_secs(90) }
    }
}

/// When something was last seen.
#[derive(Debug)]
pub struct Liveness {
    patience: Patience,
    received: Instant,
    /// The first ping since then.
    asked: Option<Instant>,
    /// The last ping.
    pinged: Instant,
    sent: Instant,
    host: Instant,
}

/// What is to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Nothing yet.
    Wait,
    /// Ask the client whether it is there.
    Ping,
    /// Send the client a sign of life.
    KeepAlive,
    /// The client is gone.
    ClientGone,
    /// The host is gone.
    HostGone,
}

impl Liveness {
    /// Everybody is there.
    #[must_use]
    pub fn new(patience: Patience, now: Instant) -> Self {
        Self { patience, received: now, asked: None, pinged: now, sent: now, host: now }
    }

    /// The client sent something.
    pub fn received(&mut self, now: Instant) {
        self.received = now;
        self.asked = None;
    }

    /// The client took something.
    pub fn sent(&mut self, now: Instant) {
        self.sent = now;
    }

    /// The host said something.
    pub fn heard(&mut self, now: Instant) {
        self.host = now;
    }

    /// When to ask again.
    #[must_use]
    pub fn due(&self) -> Instant {
        let Patience { quiet, host, .. } = self.patience;
        let ping = self.received.max(self.pinged) + quiet;
        let due = ping.min(self.sent + quiet).min(self.host + host);
        self.gone().map_or(due, |gone| due.min(gone))
    }

    /// When the client is gone, if it was asked and says nothing until then.
    fn gone(&self) -> Option<Instant> {
        let Patience { quiet, gone, .. } = self.patience;
        self.asked.map(|asked| asked + gone.saturating_sub(quiet))
    }

    /// What is to be done now; ask until it is [`Action::Wait`], or the end.
    pub fn act(&mut self, now: Instant) -> Action {
        let Patience { quiet, host, .. } = self.patience;
        if self.gone().is_some_and(|gone| now >= gone) {
            Action::ClientGone
        } else if now >= self.host + host {
            self.host = now;
            Action::HostGone
        } else if now >= self.received.max(self.pinged) + quiet {
            self.asked = self.asked.or(Some(now));
            self.pinged = now;
            Action::Ping
        } else if now >= self.sent + quiet {
            self.sent = now;
            Action::KeepAlive
        } else {
            Action::Wait
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is done in which of these seconds from the beginning, until the client is gone.
    fn acts(
        seconds: impl IntoIterator<Item = u64>,
        mut happens: impl FnMut(&mut Liveness, u64, Instant),
    ) -> Vec<(u64, Action)> {
        let begun = Instant::now();
        let mut alive = Liveness::new(Patience::default(), begun);
        let mut acts = Vec::new();
        for second in seconds {
            let now = begun + Duration::from_secs(second);
            happens(&mut alive, second, now);
            assert_eq!(alive.due() <= now, alive.act_is_due(now));
            loop {
                match alive.act(now) {
                    Action::Wait => break,
                    action => acts.push((second, action)),
                }
                if acts.last().is_some_and(|(_, action)| *action == Action::ClientGone) {
                    return acts;
                }
            }
        }
        acts
    }

    impl Liveness {
        fn act_is_due(&self, now: Instant) -> bool {
            let mut copy = Self { ..*self };
            copy.act(now) != Action::Wait
        }
    }

    #[test]
    fn a_client_that_answers_pings_stays_and_gets_signs_of_life() {
        let acts = acts(0..100, |alive, second, now| {
            alive.heard(now);
            if second % 35 == 0 {
                alive.received(now);
            }
        });
        let pings = acts.iter().filter(|(_, action)| *action == Action::Ping).count();
        let signs: Vec<_> = acts.iter().filter(|(_, action)| *action == Action::KeepAlive).collect();
        assert_eq!(pings, 2, "{acts:?}");
        assert_eq!(signs.iter().map(|(second, _)| *second).collect::<Vec<_>>(), [30, 60, 90]);
        assert!(!acts.iter().any(|(_, action)| matches!(action, Action::ClientGone | Action::HostGone)));
    }

    #[test]
    fn a_client_that_vanished_is_pinged_and_then_gone() {
        let acts = acts(0..1000, |alive, _, now| {
            alive.heard(now);
            alive.sent(now);
        });
        assert_eq!(acts, [(30, Action::Ping), (60, Action::ClientGone)]);
    }

    #[test]
    fn who_stood_still_asks_first_and_then_gives_the_client_its_time() {
        // An hour without a second of it.
        let stood_still = |answers: Option<u64>| {
            acts((0..10).chain(3600..4000), |alive, second, now| {
                alive.heard(now);
                alive.sent(now);
                if Some(second) == answers {
                    alive.received(now);
                }
            })
        };
        assert_eq!(stood_still(None), [(3600, Action::Ping), (3630, Action::ClientGone)]);
        // Who answers at the last moment begins anew.
        let answered = [(3600, Action::Ping), (3659, Action::Ping), (3689, Action::ClientGone)];
        assert_eq!(stood_still(Some(3629)), answered);
    }

    #[test]
    fn a_silent_host_is_gone() {
        let acts = acts(0..200, |alive, _, now| {
            alive.received(now);
            alive.sent(now);
        });
        assert_eq!(acts, [(90, Action::HostGone), (180, Action::HostGone)]);
    }
}
