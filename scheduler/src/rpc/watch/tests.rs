//! Streams over a store.

use oc_mesh::{
    clock::SystemClock,
    error::reason_of,
    record,
    store::{self, Txn},
    token::TokenSigner,
    view::View,
};
use oc_proto::{
    mesh::{SandboxRecord, SandboxTransition},
    v1::SandboxState,
};

use super::*;
use crate::quota::Quota;

const A: &str = "sb-0000000000000000000a";
const B: &str = "sb-0000000000000000000b";

struct Mesh {
    watches: Watches,
    _views: tokio_util::sync::DropGuard,
    _directory: tempfile::TempDir,
}

impl Mesh {
    async fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let url = format!("file://{}", directory.path().join("store.db").display());
        let store = store::open(&url).await.unwrap();
        let views = CancellationToken::new();
        let hosts = View::start(store.clone(), keys::HOSTS, views.clone()).await.unwrap();
        let quota = Quota { max_sandboxes: 10, max_memory_mb: 10_240 };
        let opened =
            Sandboxes::open(store.clone(), hosts.clone(), quota, Arc::new(SystemClock), views.clone());
        let (sandboxes, writer) = opened.await.unwrap();
        tokio::spawn(writer);
        let activity = sandboxes.activity.clone();
        let signer = TokenSigner::ensure(&store).await.unwrap();
        let presenter = Arc::new(Presenter { signer, hosts, activity });
        let watches = Watches::new(store, sandboxes, presenter, CancellationToken::new());
        Self { watches, _views: views.drop_guard(), _directory: directory }
    }

    /// Writes a record as it is, of one of two tenants.
    async fn put(&self, id: &str, from: SandboxState, to: SandboxState) {
        let record = SandboxRecord {
            sandbox_id: id.into(),
            tenant: if id == A || id == B { "acme" } else { "other" }.into(),
            state: to.into(),
            changed_from: from.into(),
            ..Default::default()
        };
        self.write(record).await;
    }

    async fn write(&self, record: SandboxRecord) {
        let then = vec![record::put(keys::sandbox(&record.sandbox_id), &record)];
        self.watches.store.txn(Txn { compare: Vec::new(), then }).await.unwrap();
    }

    async fn try_open(&self, sandbox_id: &str, after: u64, token: Option<&str>) -> Result<Events, Refusal> {
        let request = WatchSandboxRequest { sandbox_id: sandbox_id.into(), after_revision: after };
        let mut request = Request::new(request);
        let caller = Caller {
            tenant: "acme".into(),
            admin: false,
            sandbox: token.map(String::from),
            public_url: "http://here".into(),
            preview_domain: "preview.localhost".into(),
            request_id: "r".into(),
        };
        let mut headers = http::HeaderMap::new();
        caller.apply(&mut headers);
        *request.metadata_mut() = tonic::metadata::MetadataMap::from_headers(headers);
        self.watches.open(request).await
    }

    async fn open(&self, sandbox_id: &str, after: u64) -> Events {
        self.try_open(sandbox_id, after, None).await.unwrap()
    }
}

async fn next(events: &mut Events) -> Option<Result<WatchSandboxResponse, Status>> {
    tokio::time::timeout(Duration::from_secs(10), events.next()).await.unwrap()
}

/// The next event, as text, and where to resume after it.
async fn event(events: &mut Events) -> (String, u64) {
    loop {
        let message = next(events).await.unwrap().unwrap();
        let Some(event) = message.event else { continue };
        let sandbox = event.sandbox.clone().unwrap();
        assert!(sandbox.token.is_empty() && sandbox.connect_url == "http://here");
        let word = |name: &str| name.rsplit_once("STATE_").unwrap().1.to_lowercase();
        let (before, now) = (event.previous_state().as_str_name(), event.state().as_str_name());
        let text =
            format!("{} {} {}", &sandbox.sandbox_id[sandbox.sandbox_id.len() - 1..], word(before), word(now));
        return (text, message.revision);
    }
}

#[tokio::test]
async fn a_tenant_sees_its_own_from_now_on_and_from_any_point() {
    use SandboxState::{Creating, Deleted, Hibernated, Running, Unspecified, Waking};
    let mesh = Mesh::start().await;
    mesh.put(A, Unspecified, Creating).await;
    mesh.put("sb-0000000000000000000c", Unspecified, Creating).await;
    let mut live = mesh.open("", 0).await;
    assert_eq!(event(&mut live).await, ("a unspecified creating".into(), 0));
    let present = next(&mut live).await.unwrap().unwrap();
    assert!(present.event.is_none() && present.revision > 0);
    mesh.put(A, Creating, Running).await;
    mesh.put("sb-0000000000000000000c", Creating, Running).await;
    mesh.put(B, Unspecified, Creating).await;
    mesh.write(SandboxRecord {
        sandbox_id: A.into(),
        tenant: "acme".into(),
        state: Hibernated.into(),
        transition: SandboxTransition::Waking.into(),
        changed_from: Hibernated.into(),
        ..Default::default()
    })
    .await;
    mesh.put(A, Waking, Running).await;
    mesh.put(B, Creating, Deleted).await;
    let expected = [
        "a creating running",
        "b unspecified creating",
        "a hibernated waking",
        "a waking running",
        "b creating deleted",
    ];
    let mut cuts = vec![present.revision];
    for expected in expected {
        let (text, revision) = event(&mut live).await;
        assert_eq!(text, expected);
        assert!(revision > *cuts.last().unwrap());
        cuts.push(revision);
    }
    for (told, cut) in cuts.into_iter().enumerate() {
        let mut resumed = mesh.open("", cut).await;
        for expected in &expected[told..] {
            assert_eq!(event(&mut resumed).await.0, *expected);
        }
    }
}

#[tokio::test]
async fn a_stream_of_one_sandbox_ends_with_it() {
    use SandboxState::{Deleted, Running};
    let mesh = Mesh::start().await;
    mesh.put(A, Running, Running).await;
    let mut live = mesh.open(A, 0).await;
    assert_eq!(event(&mut live).await.0, "a unspecified running");
    mesh.put(A, Running, Deleted).await;
    let (text, last) = event(&mut live).await;
    assert_eq!(text, "a running deleted");
    assert!(next(&mut live).await.is_none());
    // Resumed at its end there is nothing more; looked at anew, it is there, and deleted.
    let mut resumed = mesh.open(A, last).await;
    assert_eq!(next(&mut resumed).await.unwrap().unwrap().revision, last);
    assert!(next(&mut resumed).await.is_none());
    let mut anew = mesh.open(A, 0).await;
    assert_eq!(event(&mut anew).await.0, "a unspecified deleted");
    assert!(next(&mut anew).await.unwrap().unwrap().event.is_none());
    assert!(next(&mut anew).await.is_none());
}

#[tokio::test]
async fn nobody_watches_what_is_not_theirs() {
    let mesh = Mesh::start().await;
    let theirs = "sb-0000000000000000000c";
    mesh.put(theirs, SandboxState::Unspecified, SandboxState::Running).await;
    mesh.put(A, SandboxState::Unspecified, SandboxState::Running).await;
    let refused =
        async |id: &str, after, token| mesh.try_open(id, after, token).await.map(|_| ()).unwrap_err();
    assert!(matches!(refused(theirs, 0, None).await, Refusal::SandboxNotFound));
    assert!(matches!(refused("no ID", 0, None).await, Refusal::SandboxNotFound));
    assert!(matches!(refused("", 0, Some(A)).await, Refusal::WrongSandbox));
    assert!(matches!(refused(B, 0, Some(A)).await, Refusal::WrongSandbox));
    assert!(mesh.try_open(A, 0, Some(A)).await.is_ok());
    assert!(matches!(refused("", 1 << 40, None).await, Refusal::WatchCompacted), "of another store");
    let mut held = Vec::new();
    while let Ok(stream) = mesh.try_open(A, 0, None).await {
        held.push(stream);
        assert!(held.len() < 1000);
    }
    assert!(matches!(refused("", 0, None).await, Refusal::TooManyWatches));
    held.pop();
    assert!(mesh.try_open("", 0, None).await.is_ok());
}

#[tokio::test]
async fn a_stream_says_that_it_has_to_be_resumed_or_begun_anew() {
    let mesh = Mesh::start().await;
    let mut live = mesh.open("", 0).await;
    assert!(next(&mut live).await.unwrap().is_ok());
    mesh.watches.stop.cancel();
    let stopped = next(&mut live).await.unwrap().unwrap_err();
    assert_eq!(reason_of(&stopped).as_deref(), Some("HOST_UNAVAILABLE"));
    assert!(next(&mut live).await.is_none());
    let compacted = Status::from(refusal(StoreError::Compacted { oldest: Revision(7) }));
    assert_eq!(compacted.code(), tonic::Code::OutOfRange);
    assert_eq!(reason_of(&compacted).as_deref(), Some("WATCH_COMPACTED"));
}

#[tokio::test]
async fn a_quiet_stream_keeps_up_with_the_store() {
    let mesh = Mesh::start().await;
    mesh.put(A, SandboxState::Unspecified, SandboxState::Running).await;
    let seen = mesh.watches.store.range(keys::SANDBOXES, None, 1).await.unwrap().revision;
    for _ in 0..3 {
        let then = vec![record::put("elsewhere", &SandboxRecord::default())];
        mesh.watches.store.txn(Txn { compare: Vec::new(), then }).await.unwrap();
    }
    assert_eq!(mesh.watches.horizon.beyond(seen).await, Revision(seen.0 + 3));
    assert_eq!(
        mesh.watches.horizon.beyond(Revision(0)).await,
        Revision(0),
        "it has not seen the last change"
    );
}
