//! Attached to a session in a sandbox: its output comes to us, our input goes to it, and neither is lost or doubled when
//! something on the way dies: we attach again, from the first byte that did not come.
//!
//! [`ledger`] decides what to say and where to go on; here are the connections. Whoever has a part in it (what reads our
//! standard input, what heeds signals) changes the ledger, and the connection that is there sends what it says next: so
//! nothing queues up, and nothing is told to a connection that is gone.

pub mod ledger;

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use backon::{BackoffBuilder as _, ExponentialBackoff, ExponentialBuilder};
use futures_util::{Stream, stream};
use oc_proto::v1::{AttachExecRequest, ExecExit, TerminalSize};
use tokio::{
    sync::watch,
    time::{Instant, timeout},
};
use tonic::{Request, Status};

use crate::{
    attachment::ledger::{Ledger, Next},
    connection::Connection,
    console::Console,
    failure::Failure,
};

/// For an attachment to come about; a hibernated sandbox wakes meanwhile.
const OPENING: Duration = Duration::from_secs(30);
/// A session that is silent for so long, though it gives signs of life far more often, is out of reach.
const SILENCE: Duration = Duration::from_secs(15);
/// For how long it is tried to attach again.
const PATIENCE: Duration = Duration::from_secs(60);
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// How an attachment ended.
#[derive(Debug)]
pub enum End {
    /// The session has ended.
    Exited(ExecExit),
    /// We went, and the session goes on.
    Detached,
}

/// How a connection ended.
enum Broken {
    /// For good.
    Over(End),
    /// Before its time.
    Off(Failure),
}

/// An attachment to a session.
#[derive(Debug)]
pub struct Attachment {
    connection: Connection,
    shared: Arc<Shared>,
}

/// What an attachment shares with its connections.
#[derive(Debug)]
struct Shared {
    ledger: Mutex<Ledger>,
    /// Marked whenever the ledger has changed.
    changed: watch::Sender<()>,
}

impl Shared {
    /// The ledger. Nothing that holds it can panic halfway through a change of it.
    fn ledger(&self) -> MutexGuard<'_, Ledger> {
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Attachment {
    /// To a session whose output is wanted from `offset` on. Nothing happens until it is [followed](Self::follow).
    pub fn new(
        connection: &Connection,
        sandbox_id: &str,
        session_id: &str,
        offset: u64,
    ) -> Result<Self, Failure> {
        let mut random = [0; 16];
        getrandom::fill(&mut random)
            .map_err(|error| Failure::local("cannot make up a name", std::io::Error::other(error)))?;
        let name = hex::encode(random);
        let ledger = Ledger::new(sandbox_id.to_owned(), session_id.to_owned(), name, offset);
        let shared = Shared { ledger: Mutex::new(ledger), changed: watch::Sender::new(()) };
        Ok(Self { connection: connection.clone(), shared: Arc::new(shared) })
    }

    /// Brings the session's output to `console` until it ends, or we have gone.
    pub async fn follow(&self, console: &mut Console) -> Result<End, Failure> {
        let mut outage = None;
        loop {
            let heard = self.shared.ledger().heard();
            let failure = match self.connect(console).await? {
                Broken::Over(end) => return Ok(end),
                Broken::Off(failure) => failure,
            };
            if self.shared.ledger().heard() > heard {
                outage = None;
            }
            let outage = outage.get_or_insert_with(|| {
                console.note(format_args!("oc: {failure}; attaching again"));
                Outage::begin()
            });
            match outage.pause() {
                Some(pause) => tokio::time::sleep(pause).await,
                None => return Err(failure),
            }
        }
    }

    /// One connection. An error ends it all.
    async fn connect(&self, console: &mut Console) -> Result<Broken, Failure> {
        let mut client = self.connection.exec();
        let opened = timeout(OPENING, client.attach_exec(Request::new(self.requests()))).await;
        let mut events = match opened {
            Ok(Ok(answer)) => answer.into_inner(),
            Ok(Err(status)) => return self.broken(status),
            Err(_) => return Ok(Broken::Off(silent())),
        };
        loop {
            let event = match timeout(SILENCE, events.message()).await {
                Ok(Ok(Some(event))) => event,
                Ok(Err(status)) => return self.broken(status),
                Ok(Ok(None)) if self.goes() => return Ok(Broken::Over(End::Detached)),
                Ok(Ok(None)) => {
                    return Ok(Broken::Off(Failure::Stalled("the session's stream ended early".to_owned())));
                }
                Err(_) => return Ok(Broken::Off(silent())),
            };
            let received = self.change(|ledger| ledger.receive(event));
            if received.is_input_lost {
                let message =
                    "the session was out of reach for too long: it is not known what it has of our input";
                return Err(Failure::Stalled(message.to_owned()));
            }
            if received.missing > 0 {
                console.note(format_args!("oc: {} bytes of output are missing here", received.missing));
            }
            if let Some((stream, data)) = received.output {
                console.write(stream, &data).await?;
                self.change(Ledger::dealt_with);
            }
            if let Some(exit) = received.exit {
                return Ok(Broken::Over(End::Exited(exit)));
            }
        }
    }

    /// What a new connection says, as it comes up.
    fn requests(&self) -> impl Stream<Item = AttachExecRequest> + Send + 'static {
        let connection = self.change(Ledger::connect);
        let shared = Arc::clone(&self.shared);
        let changes = shared.changed.subscribe();
        stream::unfold((shared, changes), move |(shared, mut changes)| async move {
            loop {
                // Before the ledger is asked: what changes it afterwards is noticed.
                changes.mark_unchanged();
                let next = shared.ledger().next(connection);
                match next {
                    Next::Send(request) => return Some((request, (shared, changes))),
                    Next::End => return None,
                    // Cannot fail: the sender is in `shared`.
                    Next::Wait => changes.changed().await.ok()?,
                }
            }
        })
    }

    fn broken(&self, status: Status) -> Result<Broken, Failure> {
        let failure = Failure::from(status);
        if self.goes() {
            return Ok(Broken::Over(End::Detached));
        }
        if failure.is_passing() { Ok(Broken::Off(failure)) } else { Err(failure) }
    }

    /// The next byte of output.
    pub fn offset(&self) -> u64 {
        self.shared.ledger().offset()
    }

    /// Waits until input may be added, and says how many bytes.
    pub async fn room(&self) -> usize {
        let mut changes = self.shared.changed.subscribe();
        loop {
            changes.mark_unchanged();
            let room = self.shared.ledger().room();
            if room > 0 || changes.changed().await.is_err() {
                return room;
            }
        }
    }

    /// Sends input.
    pub fn send(&self, bytes: &[u8]) {
        self.change(|ledger| ledger.add_input(bytes));
    }

    /// Says that no more input follows.
    pub fn end_input(&self) {
        self.change(Ledger::end_input);
    }

    /// Sends a signal.
    pub fn signal(&self, signal: i32) {
        self.change(|ledger| ledger.signal(signal));
    }

    /// Tells the size of our window.
    pub fn resize(&self, size: TerminalSize) {
        self.change(|ledger| ledger.resize(size));
    }

    /// Goes for good, and leaves the session running.
    pub fn detach(&self) {
        self.change(Ledger::go);
    }

    fn goes(&self) -> bool {
        self.shared.ledger().goes()
    }

    fn change<T>(&self, change: impl FnOnce(&mut Ledger) -> T) -> T {
        let result = change(&mut self.shared.ledger());
        self.shared.changed.send_replace(());
        result
    }
}

/// A time in which the session cannot be reached.
#[derive(Debug)]
pub struct Outage {
    ends: Instant,
    pauses: ExponentialBackoff,
}

impl Outage {
    /// It has just begun.
    pub fn begin() -> Self {
        let pauses = ExponentialBuilder::default()
            .with_min_delay(FIRST_PAUSE)
            .with_max_delay(LONGEST_PAUSE)
            .without_max_times()
            .with_jitter()
            .build();
        Self { ends: Instant::now() + PATIENCE, pauses }
    }

    /// How long to wait until the next attempt; nothing if it has lasted for too long.
    pub fn pause(&mut self) -> Option<Duration> {
        self.pauses.next().filter(|pause| Instant::now() + *pause < self.ends)
    }
}

fn silent() -> Failure {
    Failure::Stalled("the session is silent".to_owned())
}
