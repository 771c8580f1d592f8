//! Attaching to a session on behalf of a client whose credential was verified, and attaching again when something on
//! the way died.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use http::HeaderMap;
use oc_mesh::{
    channel::ClientChannel,
    error::{Reason, reason_of, status},
};
use oc_proto::v1::{AttachExecRequest, AttachStart, ExecAttached, attach_exec_request::Input};
use tokio::time::Instant;
use tonic::Status;

use super::{host::Host, path::Named};
use crate::{app::App, auth::Identity, failure, surface::Rpc, upstream::Patience};

/// How long a host may take to say where an attachment begins.
const ATTACHES_WITHIN: Duration = Duration::from_secs(30);
/// The first pause before the host is tried again; it doubles each time.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
/// The longest pause.
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// A session, and who attaches to it.
#[derive(Debug)]
pub struct Target {
    /// The gateway.
    pub app: Arc<App>,
    /// `AttachExec`.
    pub rpc: Arc<Rpc>,
    /// Who attaches.
    pub identity: Identity,
    /// What the host is told about him.
    pub headers: HeaderMap,
    /// The session.
    pub session: Named,
}

impl Target {
    /// The first message of an attachment.
    #[must_use]
    pub fn first_message(&self, start: AttachStart) -> AttachExecRequest {
        AttachExecRequest {
            sandbox_id: self.session.sandbox_id.clone(),
            session_id: self.session.session_id.clone(),
            input: Some(Input::Start(start)),
        }
    }

    /// Whether the sandbox may be used by this caller, and at all. It is not woken yet.
    ///
    /// # Errors
    /// What [`Target::attach`] would find wrong with the sandbox.
    pub async fn check(&self) -> Result<(), Status> {
        match self.app.upstreams.awake(&self.identity, &self.session.sandbox_id).await {
            Err(error) if !is(&error, Reason::SandboxHibernated) => Err(error),
            _ => Ok(()),
        }
    }

    /// Attaches, and waits until the host says where the output begins. A hibernated sandbox is woken.
    ///
    /// # Errors
    /// The sandbox cannot be used by this caller or at all, there is no such session, or the host cannot be reached.
    pub async fn attach(&self, first: Bytes, patience: Patience) -> Result<(Host, ExecAttached), Status> {
        match self.attach_once(self.channel(patience).await?, first.clone()).await {
            // It hibernated on the way there.
            Err(error) if is(&error, Reason::SandboxHibernated) => {
                self.app.upstreams.wake(&self.session.sandbox_id, &self.headers, patience).await?;
                self.attach_once(self.channel(patience).await?, first).await
            }
            attached => attached,
        }
    }

    /// Attaches without waiting for more than the beginning of the answer. A hibernated sandbox is woken.
    ///
    /// # Errors
    /// As with [`Target::attach`], unless they come as the first of the answer.
    pub async fn call(&self, first: Bytes, patience: Patience) -> Result<Host, Status> {
        let channel = self.channel(patience).await?;
        match within(Host::call(channel, &self.rpc, self.headers.clone(), first.clone())).await {
            Err(error) if is(&error, Reason::SandboxHibernated) => {
                self.app.upstreams.wake(&self.session.sandbox_id, &self.headers, patience).await?;
                let channel = self.channel(patience).await?;
                within(Host::call(channel, &self.rpc, self.headers.clone(), first)).await
            }
            called => called,
        }
    }

    /// Attaches again, and tries for so long if the host is away. A sandbox that hibernated meanwhile stays so: whoever
    /// only looks at it does not keep it awake.
    ///
    /// # Errors
    /// As with [`Target::attach`]; `SANDBOX_HIBERNATED`.
    pub async fn reattach(&self, first: Bytes, within: Duration) -> Result<(Host, ExecAttached), Status> {
        let until = Instant::now() + within;
        let mut pause = FIRST_PAUSE;
        loop {
            tokio::time::sleep(pause).await;
            let attempt = async {
                let channel = self.app.upstreams.awake(&self.identity, &self.session.sandbox_id).await?;
                self.attach_once(channel, first.clone()).await
            };
            let outcome = tokio::time::timeout_at(until, attempt).await.unwrap_or_else(|_| {
                Err(status(Reason::HostUnavailable, "the sandbox's host does not come back"))
            });
            pause = (2 * pause).min(LONGEST_PAUSE);
            match outcome {
                Err(error) if may_pass(&error) && Instant::now() + pause < until => {}
                outcome => return outcome,
            }
        }
    }

    async fn attach_once(
        &self,
        channel: ClientChannel,
        first: Bytes,
    ) -> Result<(Host, ExecAttached), Status> {
        within(async {
            let mut host = Host::call(channel, &self.rpc, self.headers.clone(), first).await?;
            let attached = host.downlink.attached().await?;
            Ok((host, attached))
        })
        .await
    }

    async fn channel(&self, patience: Patience) -> Result<ClientChannel, Status> {
        let sandbox = Some(self.session.sandbox_id.as_str());
        self.app.upstreams.choose(&self.rpc, &self.identity, sandbox, &self.headers, patience).await
    }
}

async fn within<T>(call: impl Future<Output = Result<T, Status>>) -> Result<T, Status> {
    tokio::time::timeout(ATTACHES_WITHIN, call)
        .await
        .unwrap_or_else(|_| Err(status(Reason::DeadlineExceeded, "the session did not answer in time")))
}

fn is(error: &Status, reason: Reason) -> bool {
    reason_of(error).is_some_and(|given| given == reason.as_str())
}

/// Whether a call that ended so is worth another try: something on the way died, or is busy, and may come back.
#[must_use]
pub fn may_pass(error: &Status) -> bool {
    let passes = [Reason::HostUnavailable, Reason::SandboxNotReady, Reason::Overloaded];
    let reason = failure::reason(error);
    passes.iter().any(|passing| reason == passing.as_str())
}
