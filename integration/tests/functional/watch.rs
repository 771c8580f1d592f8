//! Sandboxes, followed as they change.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use anyhow::{Context as _, ensure};
use oc_integration::mesh::{Mesh, PATIENCE, succeeded};
use oc_proto::v1::{
    SandboxEvent, SandboxEventType, SandboxState, WatchSandboxRequest, WatchSandboxResponse,
    sandbox_service_client::SandboxServiceClient,
};
use serde_json::{Value, json};
use tonic::{Code, Request, Streaming, transport::Channel};

use SandboxState::{Creating, Deleted, Hibernated, Hibernating, Running, Unspecified, Waking};

/// What becomes of the sandbox of these tests.
const LIFE: [(SandboxState, SandboxState); 7] = [
    (Unspecified, Creating),
    (Creating, Running),
    (Running, Hibernating),
    (Hibernating, Hibernated),
    (Hibernated, Waking),
    (Waking, Running),
    (Running, Deleted),
];

/// Watches, through the gateway.
#[derive(Clone)]
struct Watcher {
    client: SandboxServiceClient<Channel>,
    key: String,
}

impl Watcher {
    async fn connect(mesh: &Mesh) -> anyhow::Result<Self> {
        let channel = Channel::from_shared(mesh.url.clone())?.connect().await?;
        Ok(Self { client: SandboxServiceClient::new(channel), key: mesh.key.clone() })
    }

    async fn open(&self, id: &str, after: u64) -> Result<Streaming<WatchSandboxResponse>, tonic::Status> {
        let request = WatchSandboxRequest { sandbox_id: id.into(), after_revision: after };
        let mut request = Request::new(request);
        request.metadata_mut().insert("x-api-key", self.key.parse().expect("a key is ASCII"));
        Ok(self.client.clone().watch_sandbox(request).await?.into_inner())
    }

    /// A point after all that is there now.
    async fn now(&self) -> anyhow::Result<u64> {
        let mut stream = self.open("", 0).await?;
        loop {
            let message = next(&mut stream).await?.context("it ended")?;
            if message.revision > 0 {
                return Ok(message.revision);
            }
            ensure!(message.event.is_some_and(|event| event.r#type() == SandboxEventType::Current));
        }
    }

    /// The changes of all sandboxes after a revision, until `is_last`; the stream is cut after every few messages.
    async fn cut_often(
        &self,
        mut after: u64,
        few: usize,
        is_last: impl Fn(&SandboxEvent) -> bool,
    ) -> anyhow::Result<Vec<SandboxEvent>> {
        let mut events = Vec::new();
        loop {
            let mut stream = self.open("", after).await?;
            let mut read = 0;
            // Not amid changes that were written as one: these would come again.
            let mut is_whole = true;
            while read <= few || !is_whole {
                let WatchSandboxResponse { event, revision } =
                    next(&mut stream).await?.context("it ended")?;
                ensure!(revision >= after, "{revision} after {after}");
                (after, read) = (revision, read + 1);
                let Some(event) = event else { continue };
                is_whole = event.revision <= revision;
                let is_end = is_last(&event);
                events.push(event);
                if is_end {
                    return Ok(events);
                }
            }
        }
    }
}

async fn next(stream: &mut Streaming<WatchSandboxResponse>) -> anyhow::Result<Option<WatchSandboxResponse>> {
    Ok(tokio::time::timeout(PATIENCE, stream.message()).await.context("the stream is silent")??)
}

/// The states that the events of one sandbox lead through, in order.
fn life(events: &[SandboxEvent], id: &str) -> Vec<(SandboxState, SandboxState)> {
    let own = events.iter().filter(|event| event.sandbox.as_ref().is_some_and(|one| one.sandbox_id == id));
    let changes = own.filter(|event| event.r#type() != SandboxEventType::Updated);
    changes.map(|event| (event.previous_state(), event.state())).collect()
}

fn is_end_of(event: &SandboxEvent, id: &str) -> bool {
    event.state() == Deleted && event.sandbox.as_ref().is_some_and(|one| one.sandbox_id == id)
}

pub async fn every_change_is_seen_once_however_often_the_stream_is_cut(
    mesh: Arc<Mesh>,
) -> anyhow::Result<()> {
    let (watcher, rest) = (Watcher::connect(&mesh).await?, mesh.rest());
    let start = watcher.now().await?;
    let sandbox = rest.create(json!({ "metadata": { "purpose": "watched" } })).await?;
    // As it happens.
    let live = {
        let (watcher, id) = (watcher.clone(), sandbox.id.clone());
        tokio::spawn(async move { watcher.cut_often(start, 2, |event| is_end_of(event, &id)).await })
    };
    let mut one = watcher.open(&sandbox.id, 0).await?;
    let present = next(&mut one).await?.and_then(|message| message.event).context("it is there")?;
    assert_eq!((present.r#type(), present.state()), (SandboxEventType::Current, Running));
    let shown = present.sandbox.context("an event has a sandbox")?;
    assert_eq!((shown.metadata["purpose"].as_str(), shown.token.as_str()), ("watched", ""));
    rest.post(&sandbox.path("/hibernate"), json!({})).await?.expect(200)?;
    rest.post(&sandbox.path("/wake"), json!({})).await?.expect(200)?;
    sandbox.delete().await?;

    let mut own = Vec::new();
    while let Some(message) = next(&mut one).await? {
        own.extend(message.event);
    }
    assert_eq!(life(&own, &sandbox.id), LIFE[2..], "its own stream ends with it");
    // From the past as when it happened, wherever it is cut.
    let live = live.await??;
    for few in [1, 3, 100] {
        let again = watcher.cut_often(start, few, |event| is_end_of(event, &sandbox.id)).await?;
        for events in [&live, &again] {
            assert_eq!(life(events, &sandbox.id), LIFE, "cut after every {few}");
            assert!(events.is_sorted_by_key(|event| event.revision));
        }
        let revisions = |events: &[SandboxEvent]| -> BTreeSet<u64> {
            events.iter().map(|event| event.revision).collect()
        };
        assert_eq!(revisions(&again), revisions(&live));
    }
    Ok(())
}

pub async fn a_watch_says_what_it_cannot_show(mesh: Arc<Mesh>) -> anyhow::Result<()> {
    let watcher = Watcher::connect(&mesh).await?;
    let unknown = watcher.open("sb-00000000000000000000", 0).await.map(drop).unwrap_err();
    assert_eq!(unknown.code(), Code::NotFound);
    // No store is that far.
    let future = watcher.open("", u64::MAX >> 2).await.map(drop).unwrap_err();
    assert_eq!(future.code(), Code::OutOfRange);
    // Nothing happens to it, and the stream says so.
    let sandbox = mesh.rest().create(json!({ "timeout": 0 })).await?;
    let mut quiet = watcher.open(&sandbox.id, 0).await?;
    let mut messages = Vec::new();
    let silence = tokio::time::timeout(Duration::from_secs(40), async {
        while messages.iter().filter(|message: &&WatchSandboxResponse| message.event.is_none()).count() < 2 {
            messages.push(next(&mut quiet).await?.context("it ended")?);
        }
        anyhow::Ok(())
    });
    silence.await.context("no progress is told")??;
    sandbox.delete().await?;
    let mut oc = mesh.oc();
    oc.args(["watch", "--json", &sandbox.id]);
    let line: Value = serde_json::from_str(succeeded(oc)?.trim())?;
    assert_eq!((&line["type"], &line["state"]), (&json!("current"), &json!("deleted")));
    Ok(())
}
