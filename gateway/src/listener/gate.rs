//! A connection of HTTP/1.1 as hyper gets it: the same bytes, but no head that [`head`] refuses.
//!
//! It follows each request from its head to the end of its body, where the next head begins. In place of what is refused hyper is
//! given a stand-in, a request without anything that ends the connection, whose answer says what was refused, and why: so it
//! comes in its turn, with a request ID and a line in the log like every other. Nothing behind it is read as a request any more.
//!
//! Bytes are read where hyper wants them, and copied only where a head comes in parts or what follows must wait.

use std::{
    future::Future as _,
    io::{self, IoSlice},
    mem::MaybeUninit,
    pin::Pin,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use futures_util::task::AtomicWaker;
use http::{Response, StatusCode};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::{Sleep, sleep},
};

use super::{
    head::{self, Body, MAX_BYTES, Problem, Refused},
    short,
};

/// Most that is thrown away.
const MAX_DISCARDED: usize = 64 << 20;
/// What is read of it at a time.
const DISCARD: usize = 4 << 10;

/// What the gate and whoever answers its requests tell each other.
#[derive(Debug, Default)]
pub struct Ledger {
    /// Requests that have begun to be answered.
    begun: AtomicU64,
    /// What was refused, and how many requests came before it.
    refused: OnceLock<(u64, Refused)>,
    /// How many requests there were with the one whose answer says what comes after it, once that is known. Doubled, and one more
    /// if that is no HTTP any more.
    decided: AtomicU64,
    /// Waits for that.
    waits: AtomicWaker,
}

impl Ledger {
    /// The number of the next request, from 1 on.
    pub fn begin(&self) -> u64 {
        self.begun.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// What this request stands for, if it is a stand-in.
    #[must_use]
    pub fn refused(&self, number: u64) -> Option<&Refused> {
        self.refused.get().filter(|(before, _)| before + 1 == number).map(|(_, refused)| refused)
    }

    /// Says how a request was answered, before hyper learns it.
    pub fn answered<B>(&self, number: u64, response: &Response<B>) {
        let switches = response.status() == StatusCode::SWITCHING_PROTOCOLS;
        self.decided.store(number * 2 + u64::from(switches), Ordering::Release);
        self.waits.wake();
    }

    /// Whether this request's answer has switched to another protocol, once it has one.
    fn has_switched(&self, number: u64) -> Option<bool> {
        let decided = self.decided.load(Ordering::Acquire);
        (decided / 2 == number).then_some(decided % 2 == 1)
    }
}

/// Where the next byte belongs.
#[derive(Debug)]
enum At {
    /// To a head, of which so much is known not to end it.
    Head(usize),
    /// To a body, and whether something else than HTTP may follow.
    Body(Body, bool),
    /// That is known once the last request is answered.
    Undecided,
    /// To something that is no HTTP.
    Raw,
    /// To nothing: a stand-in was the last request.
    Refused,
    /// To nothing: where a body ends cannot be told.
    Broken,
}

/// A connection. See the module.
#[derive(Debug)]
pub struct Gate<I> {
    io: I,
    at: At,
    /// Requests that were let through.
    requests: u64,
    /// Bytes that have come and were not handed on.
    held: Vec<u8>,
    /// How many of them may be.
    cleared: usize,
    /// How long a head may take from its first byte to its last.
    head_within: Duration,
    /// How long, once a refusal was answered, what its sender still sends is thrown away: closed with unread bytes the
    /// connection would be reset, and the answer lost.
    linger: Duration,
    late: Option<Pin<Box<Sleep>>>,
    /// Why whatever comes is refused, if it is.
    refuses: Option<Problem>,
    end: End,
    ledger: Arc<Ledger>,
}

/// How far a refused connection has come towards its end.
#[derive(Debug)]
enum End {
    Open,
    /// Our side has ended.
    Lingers {
        until: Pin<Box<Sleep>>,
        discarded: usize,
    },
}

impl<I> Gate<I> {
    /// A connection that has just begun: how long its requests' heads may take, and what comes behind one that is refused.
    pub fn new(io: I, head_within: Duration, linger: Duration) -> Self {
        Self {
            io,
            at: At::Head(0),
            requests: 0,
            held: Vec::new(),
            cleared: 0,
            head_within,
            linger,
            late: None,
            refuses: None,
            end: End::Open,
            ledger: Arc::default(),
        }
    }

    /// Refuses whatever comes.
    #[must_use]
    pub fn refusing(self, problem: Problem) -> Self {
        Self { refuses: Some(problem), ..self }
    }

    /// What is told to whoever answers.
    #[must_use]
    pub fn ledger(&self) -> Arc<Ledger> {
        Arc::clone(&self.ledger)
    }

    /// How many of these bytes, the next that have come, may be handed on.
    ///
    /// # Errors
    /// The first of them begin what is no request.
    fn follow(&mut self, bytes: &[u8]) -> Result<usize, Box<Refused>> {
        let mut taken = 0;
        while let rest @ [_, ..] = &bytes[taken..] {
            match &mut self.at {
                At::Head(known) => {
                    if *known > 0 && rest.len() < MAX_BYTES && !head::may_end(rest, *known) {
                        *known = rest.len();
                        break;
                    }
                    let read = head::read(rest);
                    if let (Ok(Some(_)), Some(problem)) = (&read, self.refuses) {
                        return Err(Refused::beginning(problem, rest));
                    }
                    match read {
                        Ok(Some(head)) => {
                            taken += head.length;
                            self.requests += 1;
                            self.late = None;
                            self.at = At::Body(head.body, head.may_switch);
                            self.end_body();
                        }
                        Ok(None) => {
                            *known = rest.len();
                            break;
                        }
                        // What comes before it is handed on first.
                        Err(_) if taken > 0 => break,
                        Err(refused) => return Err(refused),
                    }
                }
                At::Body(body, _) => {
                    match body {
                        Body::Length(left) => {
                            let there = rest.len();
                            let length = usize::try_from(*left).map_or(there, |left| left.min(there));
                            *left -= length as u64;
                            taken += length;
                        }
                        Body::Chunked(chunks) => match chunks.follow(rest) {
                            Ok(length) => taken += length,
                            // hyper finds it, too, and whoever reads the body learns it.
                            Err(_) => {
                                self.at = At::Broken;
                                return Ok(bytes.len());
                            }
                        },
                    }
                    self.end_body();
                }
                At::Undecided => match self.ledger.has_switched(self.requests) {
                    Some(true) => self.at = At::Raw,
                    Some(false) => self.at = At::Head(0),
                    None => break,
                },
                At::Raw | At::Refused | At::Broken => return Ok(bytes.len()),
            }
        }
        Ok(taken)
    }

    /// Goes on behind a body that has ended.
    fn end_body(&mut self) {
        let At::Body(body, may_switch) = &self.at else { return };
        let has_ended = match body {
            Body::Length(left) => *left == 0,
            Body::Chunked(chunks) => chunks.has_ended(),
        };
        if has_ended {
            self.at = if *may_switch { At::Undecided } else { At::Head(0) };
        }
    }

    /// Clears what is held, as far as that may be.
    fn clear(&mut self) {
        let held = std::mem::take(&mut self.held);
        let followed = self.follow(&held);
        self.held = held;
        match followed {
            Ok(length) => self.cleared = length,
            Err(refused) => self.refuse(*refused),
        }
    }

    /// Puts a stand-in in the place of all that is held.
    fn refuse(&mut self, mut refused: Refused) {
        refused.problem = self.refuses.unwrap_or(refused.problem);
        // An answer to HEAD has no body.
        let method = if refused.request.method() == http::Method::HEAD { "HEAD" } else { "GET" };
        self.held = format!("{method} / HTTP/1.1\r\nconnection: close\r\n\r\n").into_bytes();
        self.cleared = self.held.len();
        self.at = At::Refused;
        self.late = None;
        // There is one at most: nothing is followed any more.
        let _ = self.ledger.refused.set((self.requests, refused));
    }

    /// Whether a head has begun and not come to its end. Empty lines are none.
    fn is_amid_head(&self) -> bool {
        matches!(self.at, At::Head(_)) && !self.held.iter().all(|byte| matches!(byte, b'\r' | b'\n'))
    }
}

impl<I: AsyncRead + Unpin> Gate<I> {
    /// Waits for the rest of a head, and no longer than that may take.
    fn wait_for_head(&mut self, context: &mut Context<'_>) -> Poll<()> {
        let within = self.head_within;
        let late = self.late.get_or_insert_with(|| Box::pin(sleep(within)));
        late.as_mut().poll(context)
    }
}

impl<I: AsyncRead + Unpin> AsyncRead for Gate<I> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        loop {
            if this.cleared == 0 && !this.held.is_empty() {
                this.clear();
            }
            if this.cleared > 0 {
                let length = this.cleared.min(buffer.remaining());
                buffer.put_slice(&this.held[..length]);
                this.cleared -= length;
                if length == this.held.len() {
                    // Its memory is not kept for a connection that may be idle for long.
                    this.held = Vec::new();
                } else {
                    this.held.drain(..length);
                }
                return Poll::Ready(Ok(()));
            }
            match this.at {
                // To hyper an end would be that of whoever waits for the answer.
                At::Refused => return Poll::Pending,
                At::Broken => return Poll::Ready(Ok(())),
                At::Undecided if !this.held.is_empty() => {
                    this.ledger.waits.register(context.waker());
                    if this.ledger.has_switched(this.requests).is_none() {
                        return Poll::Pending;
                    }
                    continue;
                }
                _ => {}
            }
            let before = buffer.filled().len();
            match Pin::new(&mut this.io).poll_read(context, buffer) {
                Poll::Ready(Ok(())) => {}
                Poll::Pending if this.is_amid_head() => {
                    ready!(this.wait_for_head(context));
                    this.refuse(*Refused::beginning(Problem::Late, &this.held));
                    continue;
                }
                other => return other,
            }
            let come = &buffer.filled()[before..];
            if come.is_empty() {
                if !this.is_amid_head() {
                    return Poll::Ready(Ok(()));
                }
                this.refuse(*Refused::beginning(Problem::Cut, &this.held));
            } else if this.held.is_empty() {
                // What is refused is judged again from where it is held.
                let length = this.follow(come).unwrap_or(0);
                this.held.extend_from_slice(&come[length..]);
                buffer.set_filled(before + length);
                if length > 0 {
                    return Poll::Ready(Ok(()));
                }
            } else {
                this.held.extend_from_slice(come);
                buffer.set_filled(before);
            }
        }
    }
}

impl<I: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Gate<I> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        data: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(context, data)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        data: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        short::poll_write(Pin::new(&mut self.io), context, data)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        loop {
            match &mut this.end {
                End::Open => {
                    ready!(Pin::new(&mut this.io).poll_shutdown(context))?;
                    if !matches!(this.at, At::Refused | At::Broken) {
                        return Poll::Ready(Ok(()));
                    }
                    this.end = End::Lingers { until: Box::pin(sleep(this.linger)), discarded: 0 };
                }
                End::Lingers { until, discarded } => {
                    let mut room = [MaybeUninit::uninit(); DISCARD];
                    let mut rest = ReadBuf::uninit(&mut room);
                    match Pin::new(&mut this.io).poll_read(context, &mut rest) {
                        Poll::Ready(Ok(())) if !rest.filled().is_empty() && *discarded < MAX_DISCARDED => {
                            *discarded += rest.filled().len();
                        }
                        Poll::Ready(_) => return Poll::Ready(Ok(())),
                        Poll::Pending => return until.as_mut().poll(context).map(Ok),
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, duplex};

    use super::{super::LINGER, *};

    const WITHIN: Duration = Duration::from_secs(30);
    const STAND_IN: &str = "GET / HTTP/1.1\r\nconnection: close\r\n\r\n";

    fn gate() -> (DuplexStream, Gate<DuplexStream>) {
        let (client, server) = duplex(1 << 20);
        (client, Gate::new(server, WITHIN, LINGER))
    }

    /// All that comes through within a moment.
    async fn through(gate: &mut Gate<DuplexStream>, room: usize) -> String {
        let (mut all, mut part) = (Vec::new(), vec![0; room]);
        while let Ok(Ok(length @ 1..)) =
            tokio::time::timeout(Duration::from_millis(5), gate.read(&mut part)).await
        {
            all.extend_from_slice(&part[..length]);
        }
        String::from_utf8(all).unwrap()
    }

    #[tokio::test(start_paused = true)]
    async fn requests_pass_as_they_are_up_to_one_that_is_refused() {
        let good = "GET /a HTTP/1.0\r\n\r\nPOST /b HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nGET\n\n\
                    PUT /c HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nX\r\n\r\n0\r\n\r\n\
                    HEAD /d HTTP/1.1\r\nHost: x\r\n\r\n";
        let bad = "POST /e HTTP/1.1\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\nHost: x\r\n\r\n\
                   0\r\n\r\nGET /f HTTP/1.1\r\nHost: x\r\n\r\n";
        for (cut, room) in [(1, 7), (3, 1000), (1000, 1), (1000, 1000), (40, 40)] {
            let (mut client, mut gate) = gate();
            let mut come = String::new();
            for part in [good, bad].concat().as_bytes().chunks(cut) {
                client.write_all(part).await.unwrap();
                come += &through(&mut gate, room).await;
            }
            assert_eq!(come, [good, STAND_IN].concat(), "{cut} {room}");
            let ledger = gate.ledger();
            assert!((1..=4).all(|number| ledger.refused(number).is_none()));
            let refused = ledger.refused(5).unwrap();
            assert_eq!((refused.problem, refused.request.uri().path()), (Problem::TwoFramings, "/e"));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_follows_an_upgrade_waits_for_its_answer() {
        let asks = "GET /ws HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\n\r\n";
        let another = "GET / HTTP/1.1\r\nHost: x\r\n\r\n";
        for (status, frames, come) in [
            (StatusCode::SWITCHING_PROTOCOLS, "\x01 no HTTP", "\x01 no HTTP"),
            (StatusCode::FORBIDDEN, another, another),
            (StatusCode::FORBIDDEN, "\x01 no HTTP", STAND_IN),
        ] {
            let (mut client, mut gate) = gate();
            client.write_all([asks, frames].concat().as_bytes()).await.unwrap();
            assert_eq!(through(&mut gate, 100).await, asks);
            let ledger = gate.ledger();
            let response = Response::builder().status(status).body(()).unwrap();
            let (rest, ()) = tokio::join!(through(&mut gate, 100), async {
                tokio::task::yield_now().await;
                ledger.answered(ledger.begin(), &response);
            });
            assert_eq!(rest, come, "{status}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_head_that_does_not_come_is_refused() {
        let start = "PUT /x HTTP/1.1\r\nHost: a\r\nHo";
        for (ends, problem) in [(false, Problem::Late), (true, Problem::Cut)] {
            let (mut client, mut gate) = gate();
            client.write_all(start.as_bytes()).await.unwrap();
            assert_eq!(through(&mut gate, 100).await, "");
            if ends {
                client.shutdown().await.unwrap();
            }
            let mut come = vec![0; STAND_IN.len()];
            gate.read_exact(&mut come).await.unwrap();
            let ledger = gate.ledger();
            let refused = ledger.refused(1).unwrap();
            assert_eq!((refused.problem, refused.request.method().as_str()), (problem, "PUT"));
            assert_eq!(refused.request.headers()["host"], "a");
        }
        // Between two requests nothing is waited for.
        let (mut client, mut gate) = gate();
        client.write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
        through(&mut gate, 100).await;
        assert!(tokio::time::timeout(WITHIN * 3, gate.read_u8()).await.is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn a_gate_that_refuses_everything_waits_for_a_head_and_lets_none_pass() {
        for (head, rest, path) in [
            ("GET /x HTTP/1.1\r\nHost: x\r", "\n\r\n", "/x"),
            ("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "", "*"),
            ("POST /x HTTP/1.1\r\n", "", "/x"),
        ] {
            let (mut client, gate) = gate();
            let mut gate = gate.refusing(Problem::WithoutTls);
            client.write_all(head.as_bytes()).await.unwrap();
            if !rest.is_empty() {
                assert_eq!(through(&mut gate, 100).await, "");
            }
            client.write_all(rest.as_bytes()).await.unwrap();
            let mut come = vec![0; STAND_IN.len()];
            gate.read_exact(&mut come).await.unwrap();
            assert_eq!(come, STAND_IN.as_bytes());
            let ledger = gate.ledger();
            let refused = ledger.refused(1).unwrap();
            assert_eq!((refused.problem, refused.request.uri().path()), (Problem::WithoutTls, path));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_still_sent_to_a_refused_connection_is_thrown_away() {
        let (mut client, mut gate) = gate();
        client.write_all(&b"\x01".repeat(1 << 19)).await.unwrap();
        assert_eq!(through(&mut gate, 100).await, STAND_IN);
        let (shut, ()) = tokio::join!(gate.shutdown(), async {
            client.write_all(&b"x".repeat(1 << 20)).await.unwrap();
            assert_eq!(client.read(&mut [0; 1]).await.unwrap(), 0);
        });
        shut.unwrap();
    }

    proptest! {
        #[test]
        fn what_passes_does_not_depend_on_how_it_is_cut(
            bytes in "(GET / HTTP/1.0\r\n\r\n|POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\n|\
                      POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n|\
                      1\r\nx\r\n0\r\n\r\n|[a\r\n]){0,12}",
            cut in 1_usize..30,
        ) {
            let passes = |cut: usize| {
                let mut gate = Gate::new((), WITHIN, LINGER);
                let (mut passed, mut held) = (0, Vec::new());
                for part in bytes.as_bytes().chunks(cut) {
                    held.extend_from_slice(part);
                    while let Ok(length @ 1..) = gate.follow(&held) {
                        passed += length;
                        held.drain(..length);
                    }
                }
                (passed, gate.requests)
            };
            prop_assert_eq!(passes(cut), passes(1000));
        }
    }
}
