//! Keys, and whose sandboxes they open.

use std::sync::Arc;

use oc_integration::mesh::{Mesh, eventually};
use serde_json::json;

pub async fn another_tenants_sandbox_is_not_there(mesh: Arc<Mesh>) -> anyhow::Result<()> {
    let (_, theirs) = mesh.rest_of_new_tenant("others").await?;
    let ours = mesh.rest().create(json!({})).await?;
    let seen = theirs.sandbox(&ours.id);
    let not_there = || (404, "SANDBOX_NOT_FOUND".to_owned());
    assert_eq!(seen.get().await?.refusal(), not_there());
    assert_eq!(seen.exec(json!({ "cmd": "true" })).await?.refusal(), not_there());
    assert_eq!(seen.read("/etc/passwd").await?.refusal(), not_there());
    assert_eq!(seen.put("/tmp/x", "x").await?.refusal(), not_there());
    assert_eq!(theirs.delete(&ours.path("")).await?.refusal(), not_there());
    assert_eq!(theirs.post(&ours.path("/timeout"), json!({ "timeout": 1 })).await?.refusal(), not_there());
    assert_eq!(theirs.post(&ours.path("/token/refresh"), json!({})).await?.refusal(), not_there());
    assert!(!theirs.list().await?.contains(&ours.id));
    assert_eq!(theirs.get("/api/nodes").await?.refusal(), (403, "NOT_ADMIN".into()));
    assert_eq!(theirs.post("/api/keys", json!({})).await?.refusal(), (403, "NOT_ADMIN".into()));
    let clear = format!("/api/nodes/{}/clear", mesh.host_id());
    assert_eq!(theirs.post(&clear, json!({})).await?.refusal(), (403, "NOT_ADMIN".into()));
    ours.run("true").await?;
    ours.delete().await
}

pub async fn a_revoked_key_opens_nothing(mesh: Arc<Mesh>) -> anyhow::Result<()> {
    let (id, rest) = mesh.rest_of_new_tenant("brief").await?;
    // A key is good from the moment it is answered.
    rest.get("/api/sandboxes").await?.expect(200)?;
    let listed = mesh.rest().get("/api/keys").await?.expect(200)?;
    assert!(!String::from_utf8_lossy(&listed.body).contains("osb_"), "a key's value comes back");
    mesh.rest().delete(&format!("/api/keys/{id}")).await?.expect(204)?;
    eventually("the key is refused", async || {
        let answer = rest.get("/api/sandboxes").await?;
        anyhow::ensure!(answer.refusal() == (403, "INVALID_CREDENTIALS".into()), "{}", answer.status);
        Ok(())
    })
    .await
}
