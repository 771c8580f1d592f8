//! Work that outlives the call that asked for it. A caller that goes away must not leave a sandbox half made, so each
//! flow runs as a task of its own, and shutdown waits for all of them.

use std::{collections::HashSet, sync::Arc, time::Duration};

use oc_mesh::layers::trace::TraceContext;
use parking_lot::Mutex;
use tokio::sync::oneshot;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::Instrument as _;

tokio::task_local! {
    /// The trace of the call that a flow works for.
    static TRACE: Option<TraceContext>;
}

/// The trace of the call that this flow works for.
pub fn trace() -> Option<TraceContext> {
    TRACE.try_with(|trace| *trace).ok().flatten()
}

/// All flows of this process.
#[derive(Clone, Debug, Default)]
pub struct Flows {
    tasks: TaskTracker,
    halt: CancellationToken,
    live: Arc<Mutex<HashSet<String>>>,
}

/// Says that a flow works on a sandbox, until it is dropped.
#[derive(Debug)]
pub struct Live {
    sandbox_id: String,
    live: Arc<Mutex<HashSet<String>>>,
}

impl Drop for Live {
    fn drop(&mut self) {
        self.live.lock().remove(&self.sandbox_id);
    }
}

impl Flows {
    /// Says that a flow works on a sandbox: reconciliation leaves it alone meanwhile. `None` if one does already.
    pub fn enter(&self, sandbox_id: &str) -> Option<Live> {
        let is_first = self.live.lock().insert(sandbox_id.into());
        is_first.then(|| Live { sandbox_id: sandbox_id.into(), live: Arc::clone(&self.live) })
    }

    /// Whether a flow of this process works on it.
    pub fn is_live(&self, sandbox_id: &str) -> bool {
        self.live.lock().contains(sandbox_id)
    }

    /// Runs a flow to its end, whether or not somebody waits. `abandoned` gets its result if nobody does.
    ///
    /// Returns `None` only if the process is being stopped.
    pub async fn run<T, F>(
        &self,
        flow: impl Future<Output = T> + Send + 'static,
        abandoned: impl FnOnce(T) -> F + Send + 'static,
    ) -> Option<T>
    where
        T: Send + 'static,
        F: Future<Output = ()> + Send,
    {
        let (done, result) = oneshot::channel();
        self.spawn(async move {
            if let Err(unwanted) = done.send(flow.await) {
                abandoned(unwanted).await;
            }
        });
        result.await.ok()
    }

    /// Runs something that nobody waits for.
    pub fn spawn(&self, work: impl Future<Output = ()> + Send + 'static) {
        let halt = self.halt.clone();
        let trace = TraceContext::current().or_else(trace);
        let work = TRACE.scope(trace, work).instrument(tracing::Span::current());
        self.tasks.spawn(async move {
            halt.run_until_cancelled(work).await;
        });
    }

    /// Waits for all flows, and gives up on those that take longer than `grace`: reconciliation finishes them.
    pub async fn finish(&self, grace: Duration) {
        self.tasks.close();
        if tokio::time::timeout(grace, self.tasks.wait()).await.is_err() {
            tracing::warn!(
                flows = self.tasks.len(),
                "flows were still running and are left to reconciliation"
            );
        }
        self.halt.cancel();
        self.tasks.wait().await;
    }
}
