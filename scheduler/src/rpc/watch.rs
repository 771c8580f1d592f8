//! `oc.v1.SandboxService.WatchSandbox`.
//!
//! Each stream reads a watch of the store of its own, and no further than its reader takes: nothing is kept for a slow
//! one. One that is so slow that the store has compacted what it has not read yet is told to begin anew.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use futures_util::{Stream, StreamExt as _, stream::BoxStream};
use oc_mesh::{
    caller::Caller,
    keys,
    store::{Revision, SharedStore, StoreError},
};
use oc_proto::v1::{SandboxEvent, SandboxEventType, WatchSandboxRequest, WatchSandboxResponse};
use tokio::time::{Instant, MissedTickBehavior, interval_at, sleep_until};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Status};

use super::{present::Presenter, sandbox_caller};
use crate::{
    lifecycle,
    refusal::Refusal,
    sandboxes::Sandboxes,
    watch::{
        Position, Scope, Told,
        horizon::{self, Horizon},
        slots::Slots,
    },
};

/// How often a stream says how far it is.
const PROGRESS: Duration = Duration::from_secs(15);
/// How long a stream lasts, as long as a sandbox's token: then its caller shows its credentials again.
const MAX_AGE: Duration = Duration::from_secs(15 * 60);

/// The stream.
pub type Events = BoxStream<'static, Result<WatchSandboxResponse, Status>>;

/// Serves watches.
#[derive(Clone, Debug)]
pub struct Watches {
    store: SharedStore,
    sandboxes: Sandboxes,
    presenter: Arc<Presenter>,
    slots: Slots,
    horizon: Arc<Horizon>,
    stop: CancellationToken,
}

/// What a stream waits for.
enum Next {
    Changes(Vec<oc_mesh::store::Event>),
    Progress,
    Old,
}

impl Watches {
    /// Watches of these sandboxes, that end when `stop` is cancelled.
    pub fn new(
        store: SharedStore,
        sandboxes: Sandboxes,
        presenter: Arc<Presenter>,
        stop: CancellationToken,
    ) -> Self {
        let horizon = Arc::new(Horizon::new(store.clone()));
        Self { store, sandboxes, presenter, slots: Slots::default(), horizon, stop }
    }

    /// Opens a stream.
    ///
    /// # Errors
    ///
    /// [`Refusal::WrongSandbox`], [`Refusal::SandboxNotFound`], [`Refusal::TooManyWatches`],
    /// [`Refusal::WatchCompacted`]; failures of the store.
    pub async fn open(&self, request: Request<WatchSandboxRequest>) -> Result<Events, Refusal> {
        let caller = sandbox_caller(&request, &request.get_ref().sandbox_id)?;
        let WatchSandboxRequest { sandbox_id, after_revision } = request.into_inner();
        let slot = self.slots.take(&caller.tenant).ok_or(Refusal::TooManyWatches)?;
        let scope = match sandbox_id.is_empty() {
            true => Scope::Tenant(caller.tenant.clone()),
            false => Scope::Sandbox { tenant: caller.tenant.clone(), sandbox_id },
        };
        let (position, present) = self.begin(&scope, Revision(after_revision)).await?;
        let events = self.clone().follow(caller, prefix(&scope), position, present);
        Ok(events
            .map(move |message| {
                let _held = &slot;
                message.map_err(Status::from)
            })
            .boxed())
    }

    /// Where a stream begins, and what it begins with.
    async fn begin(&self, scope: &Scope, after: Revision) -> Result<(Position, Vec<Told>), Refusal> {
        let found = match scope {
            Scope::Sandbox { tenant, sandbox_id } => Some(self.sandboxes.find(tenant, sandbox_id).await?),
            Scope::Tenant(_) => None,
        };
        if after == Revision::default() {
            let (listed, seen) = horizon::list(&self.store, &prefix(scope), |entry| entry).await?;
            return Ok(Position::at_present(scope.clone(), listed, seen)?);
        }
        // A revision that is still to come is of another store, or of this one before it was restored.
        if self.store.range(&prefix(scope), None, 1).await?.revision < after {
            return Err(Refusal::WatchCompacted);
        }
        let mut position = Position::after(scope.clone(), after);
        if let Some(found) = found
            && lifecycle::is_deleted(&found.record)
            && found.revision <= after
        {
            position.end();
        }
        Ok((position, Vec::new()))
    }

    fn follow(
        self,
        caller: Caller,
        prefix: String,
        mut position: Position,
        present: Vec<Told>,
    ) -> impl Stream<Item = Result<WatchSandboxResponse, Refusal>> + Send {
        async_stream::try_stream! {
            let begun = Instant::now();
            for told in present {
                yield self.message(told, &caller);
            }
            // From here on it can be resumed.
            yield progress(&position);
            if position.is_over() {
                return;
            }
            let mut changes = self.store.watch(&prefix, position.seen()).await.map_err(refusal)?;
            let mut ticks = interval_at(begun + PROGRESS, PROGRESS);
            ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
            loop {
                let next = tokio::select! {
                    biased;
                    () = self.stop.cancelled() => Err(Refusal::Stopping),
                    () = sleep_until(begun + MAX_AGE) => Ok(Next::Old),
                    group = changes.next() => match group {
                        Some(group) => group.map(Next::Changes).map_err(refusal),
                        None => Err(StoreError::Unavailable("the watch ended".into()).into()),
                    },
                    _ = ticks.tick() => Ok(Next::Progress),
                };
                match next? {
                    Next::Changes(group) => {
                        for told in position.advance(group)? {
                            ticks.reset();
                            yield self.message(told, &caller);
                        }
                    }
                    Next::Progress => {
                        position.reach(self.horizon.beyond(position.seen()).await);
                        yield progress(&position);
                    }
                    Next::Old => return,
                }
                if position.is_over() {
                    return;
                }
            }
        }
    }

    fn message(&self, told: Told, caller: &Caller) -> WatchSandboxResponse {
        let Told { kind, record, revision, complete } = told;
        let is_change = !matches!(kind, SandboxEventType::Current | SandboxEventType::Created);
        let event = SandboxEvent {
            revision: revision.0,
            seen_at: Some(self.now().into()),
            r#type: kind.into(),
            state: lifecycle::phase(&record).into(),
            previous_state: if is_change { record.changed_from } else { 0 },
            sandbox: Some(self.presenter.describe(&record, caller)),
        };
        WatchSandboxResponse { event: Some(event), revision: complete.0 }
    }

    fn now(&self) -> SystemTime {
        self.sandboxes.clock.now()
    }
}

/// What the keys of all records in a scope begin with.
fn prefix(scope: &Scope) -> String {
    match scope {
        Scope::Tenant(_) => keys::SANDBOXES.to_owned(),
        Scope::Sandbox { sandbox_id, .. } => keys::sandbox(sandbox_id),
    }
}

fn progress(position: &Position) -> WatchSandboxResponse {
    WatchSandboxResponse { event: None, revision: position.seen().0 }
}

fn refusal(error: StoreError) -> Refusal {
    match error {
        StoreError::Compacted { .. } => Refusal::WatchCompacted,
        error => error.into(),
    }
}

#[cfg(test)]
mod tests;
