//! All sessions of the guest, by ID. One that has ended stays for a while, for whoever wants to know how.

use std::{
    ops::RangeInclusive,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use oc_proto::v1::ExecKind;
use tokio::{task::spawn_blocking, time::Instant};
use tonic::Status;

use super::{
    drive::{Limits, drive},
    launch::{Invocation, Wanted, What},
    session::{Facts, Session},
};
use crate::{identity::Identity, refusal::Refusal};

/// Sessions that run at once.
const MAX_RUNNING: usize = 64;
/// Sessions that have ended and are remembered.
const MAX_ENDED: usize = 256;
/// For how long they are.
const REMEMBERED: Duration = Duration::from_secs(300);
/// What a ring may take where nobody says otherwise, bytes.
const RING: usize = 1 << 20;
/// What it may take where somebody does, bytes.
const RINGS: RangeInclusive<usize> = 4 << 10..=16 << 20;
/// Bytes of randomness in an ID.
const ID_BYTES: usize = 8;

/// A session to start.
#[derive(Clone, Debug)]
pub struct Order {
    /// What it is.
    pub kind: ExecKind,
    /// What runs in it.
    pub invocation: Invocation,
    /// What it reads from and writes to.
    pub wanted: Wanted,
    /// When it is ended.
    pub limits: Limits,
    /// What its ring may take, bytes; the usual where 0.
    pub ring_bytes: usize,
}

/// All of them. Clones are the same.
#[derive(Clone, Debug)]
pub struct Sessions {
    identity: Identity,
    all: Arc<Mutex<Table>>,
}

/// The oldest first.
#[derive(Debug, Default)]
struct Table {
    sessions: Vec<Arc<Session>>,
    /// Of those that are being started.
    starting: usize,
}

impl Table {
    /// Forgets what is remembered for long enough, or is too much.
    fn forget(&mut self, now: Instant) {
        let ended = |session: &Arc<Session>| session.lock().ended();
        self.sessions.retain(|session| ended(session).is_none_or(|ended| now < ended.since + REMEMBERED));
        let mut excess =
            self.sessions.iter().filter(|session| ended(session).is_some()).count().saturating_sub(MAX_ENDED);
        self.sessions.retain(|session| {
            let goes = excess > 0 && ended(session).is_some();
            excess -= usize::from(goes);
            !goes
        });
    }

    fn running(&self) -> usize {
        self.sessions.iter().filter(|session| session.lock().ended().is_none()).count()
    }
}

/// A place for a session that is being started.
struct Place(Sessions);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.lock().starting -= 1;
    }
}

impl Sessions {
    /// None yet. Commands have the environment that `identity` has.
    pub fn new(identity: Identity) -> Self {
        Self { identity, all: Arc::default() }
    }

    /// Who the guest is.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn place(&self) -> Result<Place, Status> {
        let mut table = self.lock();
        table.forget(Instant::now());
        if table.running() + table.starting >= MAX_RUNNING {
            return Err(Refusal::TooManySessions.status(format!("{MAX_RUNNING} sessions run already")));
        }
        table.starting += 1;
        Ok(Place(self.clone()))
    }

    /// Starts one.
    ///
    /// # Errors
    ///
    /// `TOO_MANY_SESSIONS`, or why its process cannot be started.
    pub async fn start(&self, order: Order) -> Result<Arc<Session>, Status> {
        let Order { kind, invocation, wanted, limits, ring_bytes } = order;
        invocation.check()?;
        let place = self.place()?;
        let mut id = [0; ID_BYTES];
        getrandom::fill(&mut id).map_err(|error| Refusal::Internal.status(error.to_string()))?;
        let id: String = id.iter().map(|byte| format!("{byte:02x}")).collect();
        let (command, args) = match &invocation.program {
            What::Script(script) => (script.clone(), Vec::new()),
            What::Program(name, args) => (name.clone(), args.clone()),
            What::LoginShell => (String::new(), Vec::new()),
        };
        let envs = self.identity.envs();
        let (process, channels) = spawn_blocking(move || invocation.launch(envs, wanted))
            .await
            .map_err(|error| Refusal::Internal.status(error.to_string()))??;
        let ring_bytes = if ring_bytes == 0 { RING } else { ring_bytes.clamp(*RINGS.start(), *RINGS.end()) };
        let facts = Facts { id, kind, command, args, started_at: SystemTime::now(), ring_bytes };
        let size = match wanted {
            Wanted::Terminal(size) => Some(size),
            Wanted::Pipes { .. } => None,
        };
        let session = Session::new(facts, process.group(), channels.terminal().zip(size));
        self.lock().sessions.push(Arc::clone(&session));
        drop(place);
        // It ends by itself, as its process does.
        tokio::spawn(drive(Arc::clone(&session), process, channels, limits));
        Ok(session)
    }

    /// Those of a kind, or all; the oldest first.
    pub fn list(&self, kind: Option<ExecKind>) -> Vec<Arc<Session>> {
        let mut table = self.lock();
        table.forget(Instant::now());
        let is_wanted = |session: &&Arc<Session>| kind.is_none_or(|kind| session.facts().kind == kind);
        table.sessions.iter().filter(is_wanted).cloned().collect()
    }

    /// The one of that ID.
    ///
    /// # Errors
    ///
    /// `SESSION_NOT_FOUND`.
    pub fn find(&self, id: &str) -> Result<Arc<Session>, Status> {
        let mut table = self.lock();
        table.forget(Instant::now());
        let found = table.sessions.iter().find(|session| session.facts().id == id);
        found.cloned().ok_or_else(|| {
            let shown: String = id.chars().take(40).collect();
            Refusal::SessionNotFound.status(format!("there is no session {shown:?}"))
        })
    }

    /// Forgets one that nobody will ask for again.
    pub fn remove(&self, id: &str) {
        self.lock().sessions.retain(|session| session.facts().id != id);
    }
}
