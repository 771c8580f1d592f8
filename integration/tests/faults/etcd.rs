//! A mesh whose records are in etcd.

use std::sync::Arc;

use oc_integration::{
    etcd::EtcdServer,
    mesh::{Mesh, eventually},
};
use serde_json::json;

pub async fn a_mesh_on_etcd_outlives_its_server(_: Arc<()>) -> anyhow::Result<()> {
    let mut server = EtcdServer::start().await?;
    let mesh = Mesh::start(&["--pool-size", "1", "--store", &format!("etcd://{}", server.address())])?;
    let sandbox = mesh.rest().create(json!({})).await?;
    sandbox.run("echo written > file").await?;
    server.kill();
    // Calls that need no record that is not known go on.
    assert_eq!(sandbox.run("cat file").await?, "written\n");
    let refused = mesh.rest().post("/api/sandboxes", json!({})).await?;
    assert!(refused.status == 503, "{:?}", refused.refusal());
    server.restart().await?;
    let other = eventually("a create", async || mesh.rest().create(json!({})).await).await?;
    assert_eq!(eventually("the first one", async || sandbox.run("cat file").await).await?, "written\n");
    other.delete().await?;
    sandbox.delete().await?;
    mesh.stop()
}
