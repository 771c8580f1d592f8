//! Checkpoints and forks over REST, in the words that published clients use.

use std::sync::Arc;

use http::Method;
use oc_mesh::error::{Reason, status};
use oc_proto::v1::{checkpoint_service_server::CheckpointService, *};
use parking_lot::Mutex;
use serde_json::json;
use tonic::{Request, Response, Status};

use crate::{
    mesh::{Mesh, SANDBOX},
    scheduler::{FakeScheduler, sandbox},
};

pub const CHECKPOINT: &str = "cp-00000000000000000001";

/// What the scheduler was asked for, as far as a test looks at it.
#[derive(Debug, Clone, Default)]
pub struct Asked {
    created: Arc<Mutex<Vec<CreateCheckpointRequest>>>,
    forked: Arc<Mutex<Vec<ForkCheckpointRequest>>>,
    deleted: Arc<Mutex<Vec<DeleteCheckpointRequest>>>,
}

fn checkpoint(id: &str) -> Checkpoint {
    Checkpoint {
        checkpoint_id: id.into(),
        sandbox_id: SANDBOX.into(),
        name: "first".into(),
        kind: CheckpointKind::DiskOnly.into(),
        state: CheckpointState::Ready.into(),
        size_bytes: 1 << 40,
        memory_mb: 1024,
        worker_id: "host-a".into(),
        template_id: "base".into(),
        created_at: Some(prost_types::Timestamp { seconds: 1_700_000_000, nanos: 0 }),
        ..Default::default()
    }
}

#[tonic::async_trait]
impl CheckpointService for FakeScheduler {
    async fn create_checkpoint(
        &self,
        request: Request<CreateCheckpointRequest>,
    ) -> Result<Response<CreateCheckpointResponse>, Status> {
        self.note("CreateCheckpoint", &request);
        let request = request.into_inner();
        let taken = match request.name.as_str() {
            "taken" => Err(Reason::CheckpointExists),
            "eleventh" => Err(Reason::TooManyCheckpoints),
            _ => Ok(Checkpoint { name: request.name.clone(), kind: request.kind, ..checkpoint(CHECKPOINT) }),
        };
        self.1.created.lock().push(request);
        let checkpoint = taken.map_err(|reason| status(reason, "as asked"))?;
        Ok(Response::new(CreateCheckpointResponse { checkpoint: Some(checkpoint) }))
    }

    async fn get_checkpoint(
        &self,
        request: Request<GetCheckpointRequest>,
    ) -> Result<Response<GetCheckpointResponse>, Status> {
        self.note("GetCheckpoint", &request);
        let checkpoint = Some(checkpoint(&request.get_ref().checkpoint_id));
        Ok(Response::new(GetCheckpointResponse { checkpoint }))
    }

    async fn list_checkpoints(
        &self,
        request: Request<ListCheckpointsRequest>,
    ) -> Result<Response<ListCheckpointsResponse>, Status> {
        self.note("ListCheckpoints", &request);
        let checkpoints = match request.get_ref().sandbox_id.as_str() {
            SANDBOX => vec![checkpoint(CHECKPOINT)],
            _ => vec![],
        };
        Ok(Response::new(ListCheckpointsResponse { checkpoints }))
    }

    async fn delete_checkpoint(
        &self,
        request: Request<DeleteCheckpointRequest>,
    ) -> Result<Response<DeleteCheckpointResponse>, Status> {
        self.note("DeleteCheckpoint", &request);
        self.1.deleted.lock().push(request.into_inner());
        Ok(Response::new(DeleteCheckpointResponse {}))
    }

    async fn restore_checkpoint(
        &self,
        request: Request<RestoreCheckpointRequest>,
    ) -> Result<Response<RestoreCheckpointResponse>, Status> {
        let caller = self.note("RestoreCheckpoint", &request);
        let request = request.into_inner();
        if request.checkpoint_id == "cp-none" {
            return Err(status(Reason::CheckpointNotFound, "there is no such checkpoint"));
        }
        Ok(Response::new(RestoreCheckpointResponse { sandbox: sandbox(&request.sandbox_id, &caller) }))
    }

    async fn verify_checkpoint(
        &self,
        request: Request<VerifyCheckpointRequest>,
    ) -> Result<Response<VerifyCheckpointResponse>, Status> {
        self.note("VerifyCheckpoint", &request);
        if request.get_ref().checkpoint_id == "cp-damaged" {
            return Err(status(Reason::CheckpointDamaged, "memory.img differs"));
        }
        Ok(Response::new(VerifyCheckpointResponse { verified_bytes: 7, uploaded_bytes: 5 }))
    }

    async fn fork_checkpoint(
        &self,
        request: Request<ForkCheckpointRequest>,
    ) -> Result<Response<ForkCheckpointResponse>, Status> {
        let caller = self.note("ForkCheckpoint", &request);
        let request = request.into_inner();
        let count = request.count.unwrap_or(1);
        self.1.forked.lock().push(request);
        let sandboxes: Vec<_> =
            (0..count).filter_map(|number| sandbox(&format!("sb-fork-{number}"), &caller)).collect();
        Ok(Response::new(ForkCheckpointResponse { sandbox: sandboxes.first().cloned(), sandboxes }))
    }

    async fn fork_sandbox(
        &self,
        request: Request<ForkSandboxRequest>,
    ) -> Result<Response<ForkSandboxResponse>, Status> {
        let caller = self.note("ForkSandbox", &request);
        let sandboxes = sandbox("sb-fork", &caller).into_iter().collect();
        Ok(Response::new(ForkSandboxResponse { sandboxes, pause_us: 1500, freeze_us: 20 }))
    }
}

#[tokio::test]
async fn checkpoints_are_asked_for_and_shown_in_the_words_of_published_clients() {
    let mesh = Mesh::start().await;
    let path = format!("/api/sandboxes/{SANDBOX}/checkpoints");
    for (kind, mode) in [("disk_only", "delete_oldest"), ("DISK_ONLY", "DELETE_OLDEST")] {
        let body = json!({
            "name": "before", "kind": kind, "retentionPolicy": {"mode": mode, "maxCount": 3}, "unknown": [1],
        });
        let taken = mesh.call(Method::POST, &path, body.to_string()).await;
        assert_eq!(taken.status, 201);
        let taken = taken.json();
        assert_eq!((&taken["id"], &taken["name"]), (&json!(CHECKPOINT), &json!("before")));
        assert_eq!((&taken["kind"], &taken["status"]), (&json!("disk_only"), &json!("ready")));
        assert_eq!(taken["sandboxId"], SANDBOX);
        assert_eq!(taken["sizeBytes"], 1_u64 << 40);
        assert_eq!((&taken["templateID"], &taken["memoryMB"]), (&json!("base"), &json!(1024)));
        assert_eq!((&taken["parentId"], &taken["createdAt"]), (&json!(""), &json!("2023-11-14T22:13:20Z")));
        let asked = mesh.scheduler.1.created.lock().pop().unwrap();
        assert_eq!((asked.sandbox_id.as_str(), asked.kind()), (SANDBOX, CheckpointKind::DiskOnly));
        let policy = asked.retention_policy.unwrap();
        assert_eq!((policy.mode(), policy.max_count), (RetentionMode::DeleteOldest, 3));
    }
    let full = mesh.call(Method::POST, &path, r#"{"name": "x", "kind": "full"}"#).await.json();
    assert_eq!(full["kind"], "full");
    for (name, error) in [("taken", (409, "CHECKPOINT_EXISTS")), ("eleventh", (400, "TOO_MANY_CHECKPOINTS"))]
    {
        let refused = mesh.call(Method::POST, &path, json!({"name": name}).to_string()).await;
        assert_eq!(refused.error(), (error.0, error.1.to_owned()));
    }
    let wrong = mesh.call(Method::POST, &path, r#"{"name": "x", "kind": "half"}"#).await;
    assert_eq!(wrong.error(), (400, "INVALID_ARGUMENT".to_owned()));
}

#[tokio::test]
async fn lists_of_checkpoints_are_bare_and_one_is_found_by_either_path() {
    let mesh = Mesh::start().await;
    let of_sandbox = format!("/api/sandboxes/{SANDBOX}/checkpoints");
    let listed = mesh.call(Method::GET, &of_sandbox, "").await.json();
    assert_eq!(listed.as_array().map(Vec::len), Some(1));
    assert_eq!(listed[0]["id"], CHECKPOINT);
    assert_eq!(mesh.call(Method::GET, "/api/checkpoints", "").await.body, "[]");
    for (path, sandbox) in [(of_sandbox.as_str(), SANDBOX), ("/api/checkpoints", "")] {
        let path = format!("{path}/{CHECKPOINT}");
        assert_eq!(mesh.call(Method::GET, &path, "").await.json()["id"], CHECKPOINT);
        let deleted = mesh.call(Method::DELETE, &path, "").await;
        assert_eq!((deleted.status.as_u16(), deleted.body.len()), (204, 0));
        let asked = mesh.scheduler.1.deleted.lock().pop().unwrap();
        assert_eq!((asked.checkpoint_id.as_str(), asked.sandbox_id.as_str()), (CHECKPOINT, sandbox));
    }
}

#[tokio::test]
async fn a_restore_has_a_json_content_type_and_nothing_behind_it() {
    let mesh = Mesh::start().await;
    let restored = mesh
        .call(Method::POST, &format!("/api/sandboxes/{SANDBOX}/checkpoints/{CHECKPOINT}/restore"), "")
        .await;
    assert_eq!((restored.status.as_u16(), &restored.json()["sandboxID"]), (200, &json!(SANDBOX)));
    let missing =
        mesh.call(Method::POST, &format!("/api/sandboxes/{SANDBOX}/checkpoints/cp-none/restore"), "").await;
    assert_eq!(missing.error(), (404, "CHECKPOINT_NOT_FOUND".to_owned()));
    let verified = mesh.call(Method::POST, &format!("/api/checkpoints/{CHECKPOINT}/verify"), "").await;
    assert_eq!(verified.json(), json!({"verifiedBytes": 7, "uploadedBytes": 5}));
    let damaged = mesh.call(Method::POST, "/api/checkpoints/cp-damaged/verify", "").await;
    assert_eq!(damaged.error(), (500, "CHECKPOINT_DAMAGED".to_owned()));
    assert!(damaged.json()["error"].as_str().unwrap().contains("memory.img"), "its user may know what");
}

#[tokio::test]
async fn forks_are_one_sandbox_where_published_clients_ask_and_all_of_them_elsewhere() {
    let mesh = Mesh::start().await;
    let body = json!({"timeout": 60, "envs": {"A": "1"}, "secretStore": "vault"});
    let path = format!("/api/sandboxes/from-checkpoint/{CHECKPOINT}");
    let made = mesh.call(Method::POST, &path, body.to_string()).await;
    assert_eq!((made.status.as_u16(), &made.json()["sandboxID"]), (201, &json!("sb-fork-0")));
    let asked = mesh.scheduler.1.forked.lock().pop().unwrap();
    assert_eq!((asked.checkpoint_id.as_str(), asked.timeout, asked.count), (CHECKPOINT, Some(60), None));
    assert_eq!((asked.mode(), asked.envs["A"].as_str()), (ForkMode::Unspecified, "1"));

    for (word, mode) in [("live", ForkMode::Live), ("cold", ForkMode::Cold)] {
        let body = json!({"count": 3, "mode": word}).to_string();
        let made = mesh.call(Method::POST, &format!("/api/checkpoints/{CHECKPOINT}/fork"), body).await;
        assert_eq!(made.status, 201);
        assert_eq!(made.json()["sandboxes"].as_array().map(Vec::len), Some(3));
        assert_eq!(mesh.scheduler.1.forked.lock().pop().unwrap().mode(), mode);
    }
    let forked = mesh.call(Method::POST, &format!("/api/sandboxes/{SANDBOX}/fork"), "{}").await;
    assert_eq!((forked.status.as_u16(), &forked.json()["pauseUs"]), (201, &json!(1500)));
}

#[tokio::test]
async fn a_sandboxs_token_opens_no_checkpoint() {
    let mesh = Mesh::start().await;
    let bearer = format!("Bearer {}", mesh.token(SANDBOX));
    let headers = [("authorization", bearer.as_str())];
    for path in [format!("/api/sandboxes/{SANDBOX}/checkpoints"), format!("/api/checkpoints/{CHECKPOINT}")] {
        let refused = mesh.send(Method::GET, &path, &headers, "").await;
        assert_eq!(refused.status, 403, "{path}");
    }
    assert!(mesh.scheduler.0.lock().is_empty());
}
