//! `oc nodes`.

use std::time::Duration;

use oc_proto::v1::{ClearNodeRequest, ListNodesRequest, Node};

use crate::{
    connection::{CALL_TIMEOUT, Connection, within},
    failure::Failure,
    json,
    output::{self, Output},
};

/// `oc nodes`.
pub async fn list(connection: &Connection, output: Output) -> Result<(), Failure> {
    let nodes = all(connection).await?;
    output.show(|| json::list(&nodes), || table(&nodes))
}

/// The hosts that are members now.
pub async fn all(connection: &Connection) -> Result<Vec<Node>, Failure> {
    let request = within(CALL_TIMEOUT, ListNodesRequest {});
    Ok(connection.nodes().list_nodes(request).await?.into_inner().nodes)
}

/// Deletes every sandbox on a host, whoever's it is.
pub async fn clear(connection: &Connection, node_id: &str, patience: Duration) -> Result<(), Failure> {
    let request = within(patience, ClearNodeRequest { node_id: node_id.to_owned() });
    connection.nodes().clear_node(request).await?;
    Ok(())
}

fn table(nodes: &[Node]) -> String {
    let rows = nodes.iter().map(|node| {
        [
            node.node_id.clone(),
            node.accelerator.clone(),
            node.vmm.clone(),
            format!("{}/{}", node.sandboxes, node.max_sandboxes),
            format!("{}/{}MiB", node.memory_reserved_mb, node.memory_capacity_mb),
            node.pool_ready.to_string(),
            node.version.clone(),
        ]
    });
    output::table(["ID", "ACCELERATOR", "VMM", "SANDBOXES", "MEM", "POOL", "VERSION"], rows)
}
