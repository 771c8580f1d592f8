use oc_proto::v1::{ExecAttached, ExecDropped, ExecStdinAccepted};
use proptest::prelude::*;

use super::*;

fn ledger(offset: u64) -> Ledger {
    Ledger::new("sb-1".into(), "s1".into(), "a1".into(), offset)
}

fn event(event: Event) -> AttachExecResponse {
    AttachExecResponse { event: Some(event) }
}

fn attached(offset: u64, stdin_offset: u64) -> AttachExecResponse {
    event(Event::Attached(ExecAttached { offset, stdin_offset, ..ExecAttached::default() }))
}

fn output(offset: u64, data: &'static [u8]) -> AttachExecResponse {
    event(Event::Output(ExecOutput { offset, stream: ExecStream::Stdout.into(), data: data.into() }))
}

/// All that a connection has to say now.
fn said(ledger: &mut Ledger, connection: u64) -> Vec<Say> {
    let mut said = Vec::new();
    while let Next::Send(request) = ledger.next(connection) {
        said.push(request.input.unwrap());
    }
    said
}

#[test]
fn a_connection_names_the_session_and_waits_for_the_answer() {
    let mut ledger = ledger(7);
    let connection = ledger.connect();
    ledger.add_input(b"in");
    let first = said(&mut ledger, connection);
    let [Say::Start(start)] = first.as_slice() else { panic!("{first:?}") };
    assert_eq!((start.offset, start.acknowledges, start.attachment_id.as_str()), (7, true, "a1"));
    assert_eq!(ledger.receive(attached(7, 0)), Received::default());
    let stdin = Say::Stdin(ExecStdin { offset: 0, data: b"in"[..].into() });
    assert_eq!(said(&mut ledger, connection), [stdin]);
}

#[test]
fn signals_overtake_input_and_the_end_comes_last() {
    let mut ledger = ledger(0);
    let connection = ledger.connect();
    said(&mut ledger, connection);
    ledger.receive(attached(0, 0));
    ledger.add_input(b"in");
    ledger.end_input();
    ledger.resize(TerminalSize { cols: 80, rows: 24 });
    ledger.signal(2);
    let order: Vec<_> = said(&mut ledger, connection);
    assert!(
        matches!(order[..], [Say::Signal(_), Say::Resize(_), Say::Stdin(_), Say::StdinEnd(_)]),
        "{order:?}"
    );
}

#[test]
fn output_that_came_before_is_left_out_and_gaps_are_told() {
    let mut ledger = ledger(0);
    ledger.connect();
    ledger.receive(attached(0, 0));
    assert_eq!(ledger.receive(output(0, b"abc")).output.unwrap().1, b"abc"[..]);
    assert_eq!(ledger.receive(output(1, b"bcde")).output.unwrap().1, b"de"[..]);
    assert_eq!(ledger.receive(output(0, b"abc")).output, None);
    let dropped = event(Event::Dropped(ExecDropped { offset: 5, bytes: 10 }));
    assert_eq!(ledger.receive(dropped).missing, 10);
    assert_eq!(ledger.receive(output(16, b"x")).missing, 1);
    assert_eq!(ledger.receive(attached(20, 0)).missing, 3);
    assert_eq!(ledger.offset(), 20);
}

#[test]
fn only_what_was_dealt_with_is_acknowledged() {
    let mut ledger = ledger(0);
    let connection = ledger.connect();
    said(&mut ledger, connection);
    ledger.receive(attached(0, 0));
    ledger.receive(output(0, b"abc"));
    assert_eq!(said(&mut ledger, connection), []);
    ledger.dealt_with();
    assert_eq!(said(&mut ledger, connection), [Say::Acknowledge(ExecAcknowledgement { offset: 3 })]);
    assert_eq!(said(&mut ledger, connection), []);
}

#[test]
fn who_goes_says_so_after_what_was_typed() {
    let mut ledger = ledger(0);
    let connection = ledger.connect();
    said(&mut ledger, connection);
    ledger.receive(attached(0, 0));
    ledger.add_input(b"in");
    ledger.end_input();
    ledger.go();
    let order = said(&mut ledger, connection);
    assert!(matches!(order[..], [Say::Stdin(_), Say::Detach(_)]), "{order:?}");
    assert_eq!(ledger.next(connection), Next::End);
}

#[test]
fn who_goes_before_the_answer_waits_for_nothing() {
    let mut ledger = ledger(0);
    let connection = ledger.connect();
    ledger.add_input(b"in");
    ledger.go();
    let order = said(&mut ledger, connection);
    assert!(matches!(order[..], [Say::Start(_), Say::Detach(_)]), "{order:?}");
}

#[test]
fn an_older_connection_gets_nothing_more() {
    let mut ledger = ledger(0);
    let old = ledger.connect();
    let new = ledger.connect();
    assert_eq!(ledger.next(old), Next::End);
    assert!(matches!(ledger.next(new), Next::Send(_)));
}

#[test]
fn a_session_that_forgot_our_input_is_noticed() {
    let mut ledger = ledger(0);
    ledger.connect();
    ledger.receive(attached(0, 0));
    ledger.add_input(b"abc");
    ledger.receive(event(Event::StdinAccepted(ExecStdinAccepted { offset: 3 })));
    ledger.connect();
    assert!(!ledger.receive(attached(0, 3)).is_input_lost);
    ledger.connect();
    assert!(ledger.receive(attached(0, 0)).is_input_lost);
}

/// A session as the contract describes it, and the messages on the way to and from it.
#[derive(Default)]
struct Session {
    written: Vec<u8>,
    taken: Vec<u8>,
    ended: bool,
    sizes: Vec<u32>,
    acknowledged: u64,
    /// Whether the connection has begun, and what it was sent.
    is_attached: bool,
    sent: u64,
    down: VecDeque<AttachExecResponse>,
    up: VecDeque<AttachExecRequest>,
}

impl Session {
    /// Takes one message that has come.
    fn take(&mut self) {
        match self.up.pop_front().and_then(|request| request.input) {
            Some(Say::Start(start)) => {
                assert!(start.offset >= self.acknowledged, "asks for what it acknowledged");
                (self.is_attached, self.sent) = (true, start.offset);
                // Nobody asks for what came before.
                self.acknowledged = start.offset;
                self.down.push_back(attached(start.offset, self.taken.len() as u64));
            }
            Some(Say::Stdin(stdin)) => {
                let have = self.taken.len() as u64;
                assert!(stdin.offset <= have, "a gap");
                let known = usize::try_from(have - stdin.offset).unwrap().min(stdin.data.len());
                self.taken.extend(&stdin.data[known..]);
                let offset = self.taken.len() as u64;
                self.down.push_back(event(Event::StdinAccepted(ExecStdinAccepted { offset })));
            }
            Some(Say::StdinEnd(_)) => self.ended = true,
            Some(Say::Resize(size)) => self.sizes.push(size.cols),
            Some(Say::Acknowledge(acknowledged)) => {
                assert!(acknowledged.offset >= self.acknowledged);
                self.acknowledged = acknowledged.offset;
            }
            _ => {}
        }
    }

    /// What was on the way, either way, is gone.
    fn breaks(&mut self) {
        self.up.clear();
        self.down.clear();
        self.is_attached = false;
    }

    /// Sends output, as much as fits in a message of `most` bytes.
    fn send(&mut self, most: usize) {
        if !self.is_attached {
            return;
        }
        let from = usize::try_from(self.sent).unwrap();
        let data = self.written[from..self.written.len().min(from + most)].to_vec();
        if !data.is_empty() {
            self.sent += data.len() as u64;
            let stream = ExecStream::Stdout.into();
            self.down.push_back(event(Event::Output(ExecOutput {
                offset: from as u64,
                stream,
                data: data.into(),
            })));
        }
    }
}

#[derive(Debug, Clone)]
enum Happens {
    Writes(Vec<u8>),
    Types(Vec<u8>),
    Resizes(u32),
    Says,
    Takes,
    Sends(usize),
    Hears,
    Breaks,
}

fn happens() -> impl Strategy<Value = Happens> {
    prop_oneof![
        1 => prop::collection::vec(any::<u8>(), 1..20).prop_map(Happens::Writes),
        1 => prop::collection::vec(any::<u8>(), 1..20).prop_map(Happens::Types),
        1 => (1..200_u32).prop_map(Happens::Resizes),
        4 => Just(Happens::Says),
        4 => Just(Happens::Takes),
        4 => (1..30_usize).prop_map(Happens::Sends),
        4 => Just(Happens::Hears),
        1 => Just(Happens::Breaks),
    ]
}

proptest! {
    #[test]
    fn whatever_breaks_nothing_is_lost_and_nothing_comes_twice(story in prop::collection::vec(happens(), 0..200)) {
        let mut ledger = ledger(0);
        let mut session = Session::default();
        let mut connection = ledger.connect();
        let (mut typed, mut seen, mut size) = (Vec::<u8>::new(), Vec::<u8>::new(), None);
        let mut hear = |ledger: &mut Ledger, session: &mut Session| {
            let Some(message) = session.down.pop_front() else { return };
            let received = ledger.receive(message);
            assert_eq!((received.missing, received.is_input_lost), (0, false));
            if let Some((_, data)) = received.output {
                seen.extend(data);
                ledger.dealt_with();
            }
        };
        for happens in story {
            match happens {
                Happens::Writes(bytes) => session.written.extend(bytes),
                Happens::Types(bytes) => {
                    typed.extend(&bytes);
                    ledger.add_input(&bytes);
                }
                Happens::Resizes(cols) => {
                    size = Some(cols);
                    ledger.resize(TerminalSize { cols, rows: 1 });
                }
                Happens::Says => {
                    if let Next::Send(request) = ledger.next(connection) {
                        session.up.push_back(request);
                    }
                }
                Happens::Takes => session.take(),
                Happens::Sends(most) => session.send(most),
                Happens::Hears => hear(&mut ledger, &mut session),
                Happens::Breaks => {
                    session.breaks();
                    connection = ledger.connect();
                }
            }
        }
        ledger.end_input();
        // Once more, and then it stays.
        session.breaks();
        connection = ledger.connect();
        loop {
            let mut moved = false;
            while let Next::Send(request) = ledger.next(connection) {
                session.up.push_back(request);
                moved = true;
            }
            while !session.up.is_empty() {
                session.take();
            }
            session.send(64);
            while !session.down.is_empty() {
                hear(&mut ledger, &mut session);
                moved = true;
            }
            if !moved {
                break;
            }
        }
        prop_assert_eq!(&seen, &session.written);
        prop_assert_eq!(&session.taken, &typed);
        prop_assert!(session.ended);
        prop_assert_eq!(session.sizes.last().copied(), size);
        prop_assert_eq!(session.acknowledged, session.written.len() as u64);
    }

    #[test]
    fn input_on_the_way_is_bounded_and_comes_in_messages_that_the_contract_allows(sizes in prop::collection::vec(1..200_000_usize, 1..10)) {
        let mut ledger = ledger(0);
        let connection = ledger.connect();
        said(&mut ledger, connection);
        ledger.receive(attached(0, 0));
        for size in sizes {
            ledger.add_input(&vec![7; size.min(ledger.room())]);
        }
        let mut offset = 0;
        for say in said(&mut ledger, connection) {
            let Say::Stdin(stdin) = say else { panic!() };
            prop_assert_eq!(stdin.offset, offset);
            prop_assert!(stdin.data.len() <= 1 << 20);
            offset += stdin.data.len() as u64;
        }
        prop_assert!(offset <= INPUT_BYTES as u64);
    }
}
