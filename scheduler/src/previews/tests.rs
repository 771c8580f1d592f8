use std::sync::Arc;

use oc_mesh::{
    caller::Caller,
    clock::ManualClock,
    error::{Reason, reason_of},
    store::{self, Txn},
};
use oc_proto::v1::{CreatePreviewRequest, SandboxState, preview_service_server::PreviewService as _};
use tempfile::TempDir;
use tokio_util::sync::DropGuard;
use tonic::Request;

use super::*;
use crate::{quota::Quota, rpc::previews::PreviewRpc, sandbox_id::SandboxId};

struct Bed {
    previews: Previews,
    clock: ManualClock,
    store: SharedStore,
    _end: DropGuard,
    _directory: TempDir,
}

impl Bed {
    async fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let url = format!("file://{}", directory.path().join("store.db").display());
        let store = store::open(&url).await.unwrap();
        let views = CancellationToken::new();
        let hosts = View::start(store.clone(), keys::HOSTS, views.clone()).await.unwrap();
        let quota = Quota { max_sandboxes: 10, max_memory_mb: 10_240 };
        let clock = ManualClock::new(SystemTime::UNIX_EPOCH + Duration::from_secs(1 << 30));
        let opened = Sandboxes::open(store.clone(), hosts, quota, Arc::new(clock.clone()), views.clone());
        let (sandboxes, writer) = opened.await.unwrap();
        tokio::spawn(writer);
        let previews = Previews::new(sandboxes, store.clone(), views.clone()).await.unwrap();
        Self { previews, clock, store, _end: views.drop_guard(), _directory: directory }
    }

    async fn sandbox(&self, tenant: &str) -> String {
        let id = SandboxId::generate().unwrap();
        let record = SandboxRecord {
            sandbox_id: id.as_str().into(),
            tenant: tenant.into(),
            state: SandboxState::Running.into(),
            host_id: "gone".into(),
            epoch: 1,
            ..Default::default()
        };
        let then = vec![record::put(keys::sandbox(id.as_str()), &record)];
        self.store.txn(Txn { compare: Vec::new(), then }).await.unwrap();
        id.as_str().to_owned()
    }

    async fn create(
        &self,
        tenant: &str,
        id: &str,
        port: u16,
        domain: &str,
    ) -> Result<(SandboxRecord, bool), Reason> {
        let domain = Some(domain).filter(|domain| !domain.is_empty()).map(str::to_owned);
        let wanted = Wanted { port, domain, token_hash: None };
        self.previews.create(tenant, id, &wanted).await.map_err(|refusal| refusal.reason())
    }

    async fn holder(&self, domain: &str) -> Option<String> {
        self.previews.claimed(domain).await.unwrap().map(|(claim, _)| claim.sandbox_id)
    }

    fn pass(&self, time: Duration) {
        self.clock.advance(time);
    }
}

#[tokio::test]
async fn a_preview_is_its_tenants_is_made_once_and_ends_with_its_sandbox() {
    let bed = Bed::new().await;
    let id = bed.sandbox("acme").await;
    assert_eq!(bed.create("other", &id, 80, "").await.unwrap_err(), Reason::SandboxNotFound);
    let (made, existed) = bed.create("acme", &id, 80, "").await.unwrap();
    let (again, existed_again) = bed.create("acme", &id, 80, "").await.unwrap();
    assert!(!existed && existed_again && made.previews == again.previews);
    for refused in [
        bed.previews.of("other", &id).await.map(drop),
        bed.previews.delete("other", &id, 80).await,
        bed.previews.set_token("other", &id, "x").await,
    ] {
        assert_eq!(refused.unwrap_err().reason(), Reason::SandboxNotFound);
    }
    bed.previews.set_token("acme", &id, "hash").await.unwrap();
    let seen = bed.previews.of("acme", &id).await.unwrap();
    assert_eq!((seen.previews.len(), seen.preview_token_hash.as_str()), (1, "hash"));
    bed.previews.delete("acme", &id, 80).await.unwrap();
    let gone = bed.previews.delete("acme", &id, 80).await.unwrap_err();
    assert_eq!(gone.reason(), Reason::PreviewNotFound);

    bed.previews.sandboxes.delete("acme", &id).await.unwrap();
    assert_eq!(bed.create("acme", &id, 80, "").await.unwrap_err(), Reason::SandboxDeleted);
    assert_eq!(bed.previews.of("acme", &id).await.unwrap_err().reason(), Reason::SandboxDeleted);
}

#[tokio::test]
async fn a_sandbox_has_so_many_previews_and_no_more() {
    let bed = Bed::new().await;
    let id = bed.sandbox("acme").await;
    for port in 1..=MAX_PREVIEWS as u16 {
        bed.create("acme", &id, port, "").await.unwrap();
    }
    assert_eq!(bed.create("acme", &id, 9999, "").await.unwrap_err(), Reason::TooManyPreviews);
    assert!(bed.create("acme", &id, 1, "").await.unwrap().1);
}

#[tokio::test]
async fn a_host_name_is_one_sandboxs_until_that_gives_it_up() {
    let bed = Bed::new().await;
    let (first, second) = (bed.sandbox("acme").await, bed.sandbox("other").await);
    bed.create("acme", &first, 80, "app.example").await.unwrap();
    bed.pass(2 * CLAIM_KEPT);
    assert_eq!(bed.create("other", &second, 80, "app.example").await.unwrap_err(), Reason::DomainTaken);
    // Another port of the same sandbox may not have it either; the same one may ask again.
    assert_eq!(bed.create("acme", &first, 81, "app.example").await.unwrap_err(), Reason::DomainTaken);
    assert!(bed.create("acme", &first, 80, "app.example").await.unwrap().1);

    // Another name in its place releases it.
    bed.create("acme", &first, 80, "new.example").await.unwrap();
    assert_eq!(bed.holder("app.example").await, None);
    bed.create("other", &second, 80, "app.example").await.unwrap();
    bed.previews.delete("other", &second, 80).await.unwrap();
    assert_eq!(bed.holder("app.example").await, None);
}

#[tokio::test]
async fn what_a_dead_scheduler_or_a_deleted_sandbox_left_claimed_is_swept() {
    let bed = Bed::new().await;
    let (first, second) = (bed.sandbox("acme").await, bed.sandbox("other").await);
    // As if it had died before it wrote the record.
    bed.previews.claim("half.example", &first).await.unwrap();
    bed.create("acme", &first, 80, "kept.example").await.unwrap();
    bed.create("other", &second, 80, "gone.example").await.unwrap();
    assert_eq!(bed.create("other", &second, 81, "half.example").await.unwrap_err(), Reason::DomainTaken);
    bed.previews.sandboxes.delete("other", &second).await.unwrap();
    bed.pass(2 * CLAIM_KEPT);
    let swept = async {
        while bed.holder("half.example").await.is_some() || bed.holder("gone.example").await.is_some() {
            bed.previews.sweep().await;
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), swept).await.unwrap();
    assert_eq!(bed.holder("kept.example").await, Some(first));
}

#[test]
fn ports_and_host_names_are_what_they_say() {
    assert_eq!(port(65_535), Ok(65_535));
    assert!(port(0).is_err() && port(65_536).is_err());
    let check = |name: &str| domain(name, &[], "https://gate.example:8443", "preview.example");
    for name in ["app.example", "a-b.c1.example", "xn--bcher-kva.example"] {
        assert_eq!(check(name).as_deref(), Ok(name));
    }
    let long = format!("{}.example", "a".repeat(64));
    for name in [
        "localhost",
        "App.example",
        "127.0.0.1",
        "a..example",
        "-a.example",
        "a.example.",
        "a.example:80",
        "*.example",
        "a/b.example",
        "",
        long.as_str(),
    ] {
        assert_eq!(check(name), Err(Invalid::PreviewDomain), "{name}");
    }
}

#[test]
fn no_preview_has_a_name_of_the_meshs_own_or_one_below_it() {
    let own_names = ["api.example".to_owned(), "internal".to_owned()];
    for public_url in [
        "https://Gate.example:8443/x",
        "http://gate.example.",
        "https://me@gate.example?x",
        "http://[::1]:8080",
    ] {
        let check = |name: &str| domain(name, &own_names, public_url, "preview.example");
        for own in [
            "a.localhost",
            "preview.example",
            "x.preview.example",
            "api.example",
            "a.b.api.example",
            "host.internal",
        ] {
            assert_eq!(check(own), Err(Invalid::OwnName(own.into())), "{own}");
        }
        for own in ["gate.example", "a.b.gate.example"] {
            assert_eq!(check(own).is_err(), !public_url.contains('['), "{own} at {public_url}");
        }
        for other in [
            "xgate.example",
            "xapi.example",
            "api.example.org",
            "xpreview.example",
            "other.example",
            "a.xinternal",
        ] {
            assert_eq!(check(other).as_deref(), Ok(other));
        }
    }
}

#[tokio::test]
async fn who_asks_for_a_name_of_the_meshs_own_is_told_so() {
    let bed = Bed::new().await;
    let id = bed.sandbox("acme").await;
    let rpc = PreviewRpc::new(bed.previews.clone(), vec!["api.example".into()]);
    let create = async |domain: &str| {
        let wanted = CreatePreviewRequest {
            sandbox_id: id.clone(),
            port: 80,
            domain: domain.into(),
            ..Default::default()
        };
        let mut request = Request::new(wanted);
        let caller = Caller {
            tenant: "acme".into(),
            admin: false,
            sandbox: None,
            public_url: "https://gate.example".into(),
            preview_domain: "preview.example".into(),
            request_id: "r".into(),
        };
        caller.apply(request.metadata_mut().as_mut());
        rpc.create_preview(request).await
    };
    for own in ["api.example", "a.api.example", "a.gate.example", "x.preview.example"] {
        let refused = create(own).await.unwrap_err();
        assert_eq!(reason_of(&refused).as_deref(), Some("INVALID_ARGUMENT"), "{own}");
        assert!(refused.message().contains(own), "{}", refused.message());
        assert_eq!(bed.holder(own).await, None);
    }
    create("app.example").await.unwrap();
    assert_eq!(bed.holder("app.example").await, Some(id.clone()));
}
